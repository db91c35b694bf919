"""A teacher behind an OpenAI-compatible completion server that returns log-probabilities of prompts.

Prompts are sent as token ids, and answers must name tokens by ids: vLLM's `prompt_logprobs`, or `logprobs` with `echo`
and `return_tokens_as_token_ids`. One token is generated, for vLLM takes no `max_tokens` of 0; it is not used. Servers
that answer for generated tokens alone (llama.cpp, OpenAI) are refused.
"""

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkd.data.examples import PADDING_MASK, TokenExamples
from rlkd.errors import UserError
from rlkd.io.files import parse_json
from rlkd.teachers.real.shards import Answers, uniform

logger = logging.getLogger(__name__)

MAX_BYTES = 2**30  # of one response
KEY = "RLKD_TEACHER_KEY"  # environment variable with the server's key
PREFIX = "token_id:"  # what vLLM writes before an id
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # states that may pass
FIRST_WAIT_S = 1.0
Position = dict[int, float]  # log-probabilities of one position by token


class Server(NamedTuple):
    """Where a teacher answers."""

    url: str  # such as http://localhost:8000/v1
    model: str = ""  # by default the only one that it serves
    timeout_s: float = 120.0  # of one request
    num_retries: int = 3
    batch_size: int = 8  # texts of one request
    first_wait_s: float = FIRST_WAIT_S  # before the first retry; each further one waits twice as long

    def check(self) -> None:
        """Raise UserError for no web address."""
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"teacher_url: got {self.url!r:.80}; allowed: http:// or https://, such as http://localhost:8000/v1"
            )


def server_answers(server: Server, data: TokenExamples, rows: Tensor, k: int) -> Answers:
    """Ask for the answers to the texts at `rows` [n].

    Raises:
        UserError: a server that cannot be reached, or answers otherwise than it should; one line.
    """
    server.check()
    if server.model == "":
        server = server._replace(model=_only_model(server))
    length = data.inputs["input_ids"].shape[1]
    answers = uniform(len(rows), length, k, data.num_classes)
    lengths = data.inputs[PADDING_MASK][rows].sum(1).tolist()
    prompts = [data.inputs["input_ids"][row, :n].tolist() for row, n in zip(rows.tolist(), lengths, strict=True)]
    for begin in range(0, len(prompts), server.batch_size):
        part = prompts[begin : begin + server.batch_size]
        for place, positions in enumerate(_ask(server, part, k), start=begin):
            _write(answers, place, prompts[place], positions, k=k)
    return answers


def _ask(server: Server, prompts: Sequence[Sequence[int]], k: int) -> list[list[Position]]:
    """Return log-probabilities of the second and later tokens of every prompt."""
    body = {
        "model": server.model,
        "prompt": list(prompts),
        "max_tokens": 1,
        "temperature": 0.0,
        "echo": True,
        "logprobs": k,
        "prompt_logprobs": k,
        "return_tokens_as_token_ids": True,
    }
    answer = _request(server, "completions", body)
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != len(prompts):
        count = len(choices) if isinstance(choices, list) else "no"
        raise UserError(f"{server.url}: gave {count} choices to {len(prompts)} prompts; allowed: one each")
    try:
        ordered = sorted(choices, key=lambda choice: int(choice["index"]))
        return [_positions(choice, prompt, server.url) for choice, prompt in zip(ordered, prompts, strict=True)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{server.url}: its answer has another form than vLLM's completions ({error!r:.100})"
        ) from error


def _positions(choice: dict[str, Any], prompt: Sequence[int], url: str) -> list[Position]:
    entries, prefix = choice.get("prompt_logprobs"), ""
    if entries is None:
        prefix = PREFIX
        entries = (choice.get("logprobs") or {}).get("top_logprobs") or []
    if len(entries) < len(prompt):
        raise UserError(
            f"{url}: gave log-probabilities of {len(entries)} tokens for a prompt of {len(prompt)}: it answers for "
            "generated tokens alone (llama.cpp and OpenAI do); allowed: a server that echoes prompts, such as vLLM, or "
            "stored answers (rlkd signals --import_file)"
        )
    positions = []
    for i, entry in enumerate(entries[1 : len(prompt)], start=1):
        if not entry:
            raise UserError(f"{url}: gave nothing for token {i} of a prompt; switch its prefix cache off")
        position = {_id_of(key, prefix, url): _value_of(value) for key, value in entry.items()}
        if prompt[i] not in position:
            raise UserError(
                f"{url}: token {i} of a prompt is {prompt[i]}, which its answer lacks; is it the same tokenizer?"
            )
        positions.append(position)
    return positions


def _id_of(key: str, prefix: str, url: str) -> int:
    text = key.removeprefix(prefix)
    if not (key.startswith(prefix) and text.isdecimal()):
        raise UserError(
            f"{url}: names tokens by text ({key!r:.30}), which several can share; allowed: ids, as of vLLM's "
            "prompt_logprobs"
        )
    return int(text)


def _value_of(value: Any) -> float:
    return float(value["logprob"] if isinstance(value, dict) else value)


def _write(answers: Answers, place: int, prompt: Sequence[int], positions: Sequence[Position], *, k: int) -> None:
    """Put the k likeliest tokens of each position, and the next token's log-probability, in their place."""
    for t, position in enumerate(positions):
        best = sorted(position.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
        if len(best) < k:
            raise UserError(f"the server gave {len(best)} tokens for a position; asked for {k}: lower --tokens.top_k")
        answers.ids[place, t] = torch.tensor([token for token, _ in best])
        answers.log_probs[place, t] = torch.tensor([value for _, value in best])
        answers.targets[place, t] = position[prompt[t + 1]]


def _only_model(server: Server) -> str:
    found = _request(server, "models", None).get("data")
    names = [str(row.get("id")) for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    if len(names) != 1:
        raise UserError(f"{server.url}: serves {', '.join(names)[:120] or 'no model'}; name one with --teacher_served")
    return names[0]


def _request(server: Server, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """Return the JSON object that the server answers, after retries where its state may pass."""
    url = f"{server.url.rstrip('/')}/{path}"
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    blob = None if body is None else json.dumps(body).encode()
    reason, wait_s = "", server.first_wait_s
    for attempt in range(server.num_retries + 1):
        if attempt:
            logger.warning(f"{url}: {reason}; asking again in {wait_s:g} s")
            time.sleep(wait_s)
            wait_s *= 2
        try:
            request = urllib.request.Request(url, blob, headers)
            with urllib.request.urlopen(request, timeout=server.timeout_s) as response:
                text = response.read(MAX_BYTES + 1)
            if len(text) > MAX_BYTES:
                raise UserError(
                    f"{url}: answered with more than {MAX_BYTES} bytes; lower --train.evaluation_batch_size"
                )
            return parse_json(text, f"{url}: its answer is no JSON object")
        except urllib.error.HTTPError as error:
            reason = f"answered {error.code} ({' '.join(error.read(2000).decode(errors='replace').split())[:160]})"
            if error.code not in AGAIN:
                raise UserError(f"{url}: {reason}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError, OSError) as error:
            reason = f"cannot be reached ({getattr(error, 'reason', error)!s:.80})"
    raise UserError(f"{url}: {reason}, {server.num_retries + 1} times; is the server running?")
