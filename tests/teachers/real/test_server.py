"""A teacher behind a completion server: a small local one that answers as vLLM does, and ones that answer otherwise."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import tiny_models
import torch

from rlkd.data.examples import TokenExamples, next_token_mask
from rlkd.errors import UserError
from rlkd.teachers.real.server import Server, server_answers

V, K = 40, 4


def texts() -> TokenExamples:
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, V, (5, 6), generator=g)
    mask = (torch.arange(6) < torch.tensor([6, 4, 5, 3, 6])[:, None]).long()
    order = torch.arange(5)
    splits: Any = {"train": order[:3], "validation": order[3:4], "test": order[4:]}
    return TokenExamples(
        "toy", {"input_ids": ids * mask, "attention_mask": mask}, order * 0, V, splits, next_token_mask(mask)
    )


class Teacher(ThreadingHTTPServer):
    """Answers as vLLM's /v1/completions; `mode` makes it answer otherwise."""

    def __init__(self, mode: str = "ids") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode, self.model, self.requests = mode, tiny_models.tiny("llama"), list[dict[str, Any]]()
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def choice(self, index: int, prompt: list[int], k: int) -> dict[str, Any]:
        with torch.no_grad():
            log_p = self.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)  # [L, V]
        entries: list[dict[str, float] | None] = [None]
        for position, token in enumerate(prompt[1:]):
            best = log_p[position].topk(k)
            found = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            found[token] = float(log_p[position, token])  # vLLM adds the prompt's own token
            entries.append({str(t): v for t, v in found.items()})
        if self.mode == "echo":
            named = [None if e is None else {f"token_id:{t}": v for t, v in e.items()} for e in entries]
            return {"index": index, "logprobs": {"top_logprobs": [*named, {"token_id:3": -0.1}]}}
        if self.mode == "text":
            return {"index": index, "logprobs": {"top_logprobs": [None, *({"7": -0.1} for _ in prompt)]}}
        if self.mode == "generated":  # llama.cpp
            return {"index": index, "logprobs": {"top_logprobs": [{"a": -0.1}]}}
        if self.mode == "cached":
            entries[1] = None
        if self.mode == "tokenizer":
            entries = [None, *({str(t): -9.0 for t in range(k)} for _ in prompt[1:])]
        rows = [None if e is None else {t: {"logprob": v, "rank": 1} for t, v in e.items()} for e in entries]
        return {"index": index, "prompt_logprobs": rows}


class Handler(BaseHTTPRequestHandler):
    server: Teacher

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, state: int, body: bytes) -> None:
        self.send_response(state)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        names = ["one", "two"] if self.server.mode == "two" else ["tiny"]
        self.answer(200, json.dumps({"data": [{"id": name} for name in names]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        mode = self.server.mode
        if mode == "busy" and len(self.server.requests) < 3:
            return self.answer(503, b"loading")
        if mode == "refusing":
            return self.answer(400, b'{"error": "logprobs: at most 2"}')
        if mode == "garbage":
            return self.answer(200, b"<html>")
        if mode == "slow":
            time.sleep(0.4)
            return None  # the client has gone
        choices = [self.server.choice(i, prompt, body["logprobs"]) for i, prompt in enumerate(body["prompt"])]
        if mode == "few":
            choices = choices[1:]
        return self.answer(200, json.dumps({"choices": choices[::-1]}).encode())


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    tiny_models.need_transformers()
    server = Teacher()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def quick(teacher: Teacher, **changes: Any) -> Server:
    return Server(teacher.url, batch_size=2, first_wait_s=0.01)._replace(**changes)


@pytest.mark.parametrize("mode", ["ids", "echo", "busy"])
def test_answers_are_the_teacher_s(teacher: Teacher, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher.mode = mode
    monkeypatch.setenv("RLKD_TEACHER_KEY", "secret")
    data, rows = texts(), torch.tensor([0, 2, 3])
    answers = server_answers(quick(teacher), data, rows, K)
    with torch.no_grad():
        log_p = teacher.model(**data.batch(rows)).logits.log_softmax(-1)
    counted, best = data.counted[rows], log_p.topk(K)
    assert torch.equal(answers.ids[:, :-1][counted], best.indices[:, :-1][counted])
    torch.testing.assert_close(answers.log_probs[:, :-1][counted], best.values[:, :-1][counted], atol=1e-5, rtol=1e-4)
    target = log_p[:, :-1].gather(-1, data.inputs["input_ids"][rows, 1:, None])[..., 0]
    torch.testing.assert_close(answers.targets[counted], target[counted], atol=1e-5, rtol=1e-4)
    assert bool(answers.targets[~counted].isnan().all())
    body = teacher.requests[-1]
    assert (body["model"], body["max_tokens"], body["echo"], body["prompt_logprobs"]) == ("tiny", 1, True, K)
    assert set(teacher.keys) == {"Bearer secret"}
    assert len(teacher.requests) == (4 if mode == "busy" else 2)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("generated", "log-probabilities of 1 tokens for a prompt of 6: it answers for generated tokens alone"),
        ("text", "names tokens by text .'7'., which several can share"),
        ("cached", "gave nothing for token 1 of a prompt; switch its prefix cache off"),
        ("tokenizer", "which its answer lacks; is it the same tokenizer"),
        ("few", "gave 1 choices to 2 prompts"),
        ("refusing", r"answered 400 .*logprobs: at most 2"),
        ("garbage", "its answer is no JSON object"),
        ("two", "serves one, two; name one with --teacher_served"),
    ],
)
def test_wrong_answers_are_one_line(teacher: Teacher, mode: str, words: str) -> None:
    teacher.mode = mode
    with pytest.raises(UserError, match=words) as caught:
        server_answers(quick(teacher), texts(), torch.arange(5), K)
    assert "\n" not in str(caught.value)
    assert len(teacher.requests) <= 1  # what will not pass is not asked again


def test_a_server_that_does_not_answer_is_asked_again_and_then_given_up(teacher: Teacher) -> None:
    teacher.mode = "slow"
    with pytest.raises(UserError, match=r"cannot be reached \(timed out\), 2 times; is the server running"):
        server_answers(quick(teacher, model="tiny", timeout_s=0.1, num_retries=1), texts(), torch.arange(2), K)
    assert len(teacher.requests) == 2
    gone = Server("http://127.0.0.1:9/v1", "tiny", num_retries=0)
    with pytest.raises(UserError, match="cannot be reached"):
        server_answers(gone, texts(), torch.arange(2), K)
    with pytest.raises(UserError, match="teacher_url: got 'localhost:8000'; allowed: http"):
        server_answers(Server("localhost:8000"), texts(), torch.arange(2), K)
