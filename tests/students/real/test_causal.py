"""A tiny language model as a student: token losses by hand, masks, accumulation, exits a token, and what ships."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from module_students import controls, distance, task
from torch import Tensor

from rlkd.compression.real.cut import ship
from rlkd.compression.real.student_folder import load_module_student, save_module_student
from rlkd.cost.profile import ENERGY_MODEL
from rlkd.cost.real import ModuleProfile
from rlkd.cost.real_work import count_work
from rlkd.data.anchors import Anchors
from rlkd.data.examples import TokenExamples, next_token_mask
from rlkd.errors import UserError
from rlkd.losses.chunked import Divergence
from rlkd.models.real.attachment import AttachConfig, control_table, make_plan
from rlkd.models.real.hooks import link_places
from rlkd.models.real.instrumented import Instrumented
from rlkd.students.real.causal import CausalStudent, TokenConfig
from rlkd.students.real.headless import check_head
from rlkd.students.real.train_config import ModuleTrainConfig
from rlkd.teachers.real.token_signals import token_signals

TRAIN = ModuleTrainConfig(steps_per_window=3, batch_size=8, learning_rate=1e-3, warmup=0.0)
V = 40


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))


def texts(size: int = 48, length: int = 8, pad: int = 0) -> TokenExamples:
    """Each token is mostly the one before it plus one; ragged; every third text begins with a prompt of two."""
    g = torch.Generator().manual_seed(4)
    steps = torch.randint(1, 3, (size, length), generator=g) // 2 + 1
    ids = 3 + (torch.randint(37, (size, 1), generator=g) + steps.cumsum(1)) % 37
    mask = (torch.arange(length) < torch.randint(4, length + 1, (size, 1), generator=g)).long()
    prompts = torch.zeros_like(ids)
    prompts[::3, :2] = 1
    order = torch.arange(size)
    splits = {"train": order[:32], "validation": order[32:40], "test": order[40:]}
    inputs = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    return TokenExamples("toy", inputs, order * 0, V, splits, next_token_mask(mask, prompts))  # type: ignore[arg-type]


def student_of(
    data: TokenExamples | None = None,
    family: str = "llama",
    config: ModuleTrainConfig = TRAIN,
    attach: AttachConfig | None = None,
    k: int = 5,
    divergence: Divergence = "forward",
    layers: int = 2,
    beside: bool = False,
) -> CausalStudent:
    data = data or texts()
    student, teacher = tiny_models.tiny(family, layers=layers), tiny_models.tiny(family, seed=1, layers=3)
    inputs = data.batch(data.splits["train"][:2])
    plan, theirs = (make_plan(m, inputs, attach or AttachConfig(), data.num_positions) for m in (student, teacher))
    links = link_places(student, teacher, plan.blocks[-1:], theirs.blocks, inputs, inputs)
    places = [link.teacher for link in links]
    signals = token_signals(teacher, theirs, places, data, k, Anchors(V, 1.0))
    made = CausalStudent(
        Instrumented(student, plan, links), data, signals, config, 4, divergence, teacher=teacher if beside else None
    )
    made.reset([task(data)])
    return made


def losses_of(student: CausalStudent, temperature: float = 2.0) -> Tensor:
    """On the first eight training texts, of which three have prompts, and most have padding."""
    student.student.eval()
    with torch.no_grad():
        return student._losses(torch.arange(8), torch.tensor(temperature))


def test_a_probe_gives_the_quality_of_every_exit_under_other_masks() -> None:
    student = student_of()
    student.train_window(controls(unit_keep=0.9))
    student.set_controls(controls(unit_keep=0.9))
    now = student.evaluate("validation")
    less = student.probe(torch.tensor([1.0]), torch.tensor([0.3]))
    assert less.shape == (1, 2)
    assert torch.equal(student.probe(torch.tensor([1.0]), torch.tensor([0.9])), now.exit_accuracy)
    assert not torch.equal(less, now.exit_accuracy)
    student.set_controls(controls(unit_keep=0.3))
    again = student.evaluate("validation")
    assert torch.equal(again.exit_accuracy, less)
    torch.testing.assert_close(less, 1 - again.exit_loss / math.log(V))
    assert student.num_evaluated("validation") == int(texts().counted[32:40].sum())


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("beside", [False, True])
def test_token_losses_by_hand(divergence: Divergence, beside: bool) -> None:
    """At k = V the cached teacher is the full one; means are over counted tokens of both exits."""
    data = texts()
    student = student_of(data, k=5 if beside else V, divergence=divergence, beside=beside)
    rows = torch.arange(8)
    inputs, counted = data.batch(rows), data.counted[rows]
    target = inputs["input_ids"][:, 1:][counted]
    model = student.student.model
    with torch.no_grad():
        theirs = tiny_models.tiny("llama", seed=1, layers=3)(**inputs).logits[:, :-1][counted]
        own = model(**inputs, output_hidden_states=True)
        middle = F.rms_norm(own.hidden_states[1], (32,))  # after the first of two blocks; the exit's norm begins at one
        exits = [(middle @ model.lm_head.weight.T)[:, :-1][counted], own.logits[:, :-1][counted]]  # type: ignore[operator, union-attr]
    hard = sum(F.cross_entropy(z, target) for z in exits) / 2
    soft = torch.zeros(())
    for z in exits:
        p, q = (theirs / 2).softmax(-1), (z / 2).softmax(-1)
        gap = q * (q.log() - p.log()) if divergence == "reverse" else p * (p.log() - q.log())
        soft += 4 * gap.sum(-1).mean() / 2
    losses = losses_of(student)
    torch.testing.assert_close(losses[0], torch.as_tensor(hard), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses[1], soft, atol=1e-5, rtol=1e-4)
    assert (losses[2:] > 0).all()


def test_a_step_with_the_teacher_in_memory_is_that_of_the_whole_cache() -> None:
    """Logits of student and teacher never stand whole; losses, gradients and steps are the same."""
    cached, beside = student_of(k=V), student_of(k=3, beside=True)
    for _ in range(2):
        a, b = (s.train_window(controls(unit_keep=0.5)) for s in (cached, beside))
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.gradient_norms, b.gradient_norms, rtol=1e-3, atol=1e-5)
    assert distance(cached.state_dict(), beside.state_dict()) < 2e-4
    assert not any("teacher" in name for name in beside.training_state())
    assert "forward" not in vars(beside.student.model.get_output_embeddings())  # type: ignore[operator]


def test_a_model_that_scales_its_logits_is_refused_beside_the_student() -> None:
    teacher = tiny_models.tiny("llama")
    check_head(teacher, texts().batch(torch.arange(2)), "it")
    calls = teacher.forward
    teacher.forward = lambda **given: {"logits": 30 * torch.tanh(calls(**given).logits / 30)}  # type: ignore[method-assign]
    with pytest.raises(UserError, match="it scales or caps them"):
        check_head(teacher, texts().batch(torch.arange(2)), "it")
    with pytest.raises(UserError, match=r"the output layer of it is NoneType; allowed: nn\.Linear"):
        check_head(tiny_models.tiny("bert"), texts().batch(torch.arange(2)), "it")


def test_fewer_tokens_kept_can_only_lower_the_divergence() -> None:
    whole, some = losses_of(student_of(k=V), 1.0), losses_of(student_of(k=5), 1.0)
    assert 0 < float(some[1]) < float(whole[1])
    assert float(some[0]) == pytest.approx(float(whole[0]))


def test_padding_and_prompts_change_nothing() -> None:
    first, other = losses_of(student_of(texts(pad=0))), losses_of(student_of(texts(pad=17)))
    torch.testing.assert_close(first, other)
    data = texts()
    unmasked = replace(data, counted=next_token_mask(data.inputs["attention_mask"]))
    assert abs(float(losses_of(student_of(unmasked))[0] - first[0])) > 1e-4  # prompts do count where they are learned
    metrics = [student_of(texts(pad=pad)).evaluate("validation") for pad in (0, 17)]
    assert float(metrics[0].exit_loss[0, -1]) == pytest.approx(float(metrics[1].exit_loss[0, -1]), rel=1e-5)


@pytest.mark.parametrize("micro_batches", [2, 5])
def test_accumulation_changes_neither_loss_nor_step(micro_batches: int) -> None:
    """Parts of a batch have unequally many tokens."""
    whole, parts = student_of(), student_of(config=replace(TRAIN, micro_batches=micro_batches))
    for _ in range(2):
        a, b = (s.train_window(controls(unit_keep=0.5)) for s in (whole, parts))
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-4, atol=1e-5)
    assert distance(whole.state_dict(), parts.state_dict()) < 2e-4
    assert distance(whole.state_dict(), student_of().state_dict()) > 1e-3


def test_evaluation_is_a_quality_of_the_cross_entropy() -> None:
    data = texts()
    student = student_of(data, config=replace(TRAIN, evaluation_batch_size=3))
    student.set_controls(controls())
    rows = data.splits["validation"]
    counted = data.counted[rows]
    with torch.no_grad():
        logits = student.student.model(**{k: v[rows] for k, v in data.inputs.items()}).logits[:, :-1][counted]
        theirs = tiny_models.tiny("llama", seed=1, layers=3)(**{k: v[rows] for k, v in data.inputs.items()}).logits
    nats = F.cross_entropy(logits, data.inputs["input_ids"][rows][:, 1:][counted])
    metrics = student.evaluate("validation")
    assert float(metrics.exit_loss[0, -1]) == pytest.approx(float(nats), rel=1e-4)
    assert float(metrics.accuracy) == pytest.approx(max(0.0, 1 - float(nats) / math.log(V)), abs=1e-5)
    same = (logits.argmax(-1) == theirs[:, :-1][counted].argmax(-1)).float().mean()
    assert float(metrics.agreement) == pytest.approx(float(same))
    assert metrics.exit_rates.tolist() == [[0.0, 1.0]]


def test_a_window_ends_with_an_evaluation_on_a_spread_of_validation() -> None:
    data = texts()
    few, some = student_of(data, config=replace(TRAIN, validation_size=4)), data.splits["validation"][::2]
    for student in (few, chosen := student_of(replace(data, splits={**data.splits, "validation": some}))):
        student.set_controls(controls())
    assert torch.equal(few.evaluate("validation").exit_loss, chosen.evaluate("validation").exit_loss)
    assert not torch.equal(few.evaluate("validation").exit_loss, student_of(data).evaluate("validation").exit_loss)


def test_parts_of_several_processes_add_up_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process takes its part of a batch, whose texts have unequally many tokens; sums over parts are the whole."""
    whole, positions = student_of(), torch.arange(8)
    weights, temperature = torch.full((4,), 0.25), torch.tensor(2.0)
    expected, _ = whole._train_step(positions, weights, temperature, 1.0)
    sums = torch.zeros(4)
    for index in (0, 1):
        monkeypatch.setattr("rlkd.io.processes.share", lambda p, index=index: p.tensor_split(2)[index])
        part, _ = student_of()._train_step(positions, weights, temperature, 1.0)
        sums += part
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-5)


def test_a_student_learns_from_labels_and_from_its_teacher() -> None:
    config = replace(TRAIN, steps_per_window=25, batch_size=24, learning_rate=5e-3)
    student = student_of(config=config)
    before = float(student.evaluate("train").accuracy)
    student.train_window(controls(weights=[1.0, 0.0, 0.0, 0.0]))
    assert float(student.evaluate("train").accuracy) > before + 0.2
    kinds: tuple[tuple[Divergence, bool], ...] = (("forward", False), ("reverse", False), ("js", True))
    for kind, beside in kinds:
        follower = student_of(config=config, divergence=kind, beside=beside)
        divergence = float(follower.evaluate("train").divergence)
        follower.train_window(controls(weights=[0.0, 1.0, 0.0, 0.0], temperature=1.0))
        assert float(follower.evaluate("train").divergence) < 0.8 * divergence


def trained(patience: int) -> CausalStudent:
    attach = AttachConfig(exits=(1, 2), patience=patience)
    student = student_of(config=replace(TRAIN, steps_per_window=20, learning_rate=5e-3), attach=attach, layers=3)
    student.train_window(controls(weights=[1.0, 0.0, 0.0, 0.0], unit_keep=0.5))
    return student


@pytest.mark.parametrize(("threshold", "patience"), [(0.0, 0), (0.15, 0), (0.9, 2), (1.0, 0)])
def test_what_ships_answers_like_what_was_trained(threshold: float, patience: int, tmp_path: Path) -> None:
    """Each token at the exit where it leaves; hidden units are cut, heads zeroed."""
    student = trained(patience)
    student.set_controls(controls(unit_keep=0.5, exit_threshold=threshold))
    masks = tuple(mask[0] for mask in student.masks()[1:])
    shipped = ship(student.student, "causal_lm", masks, 1.0, threshold)
    save_module_student(shipped, tmp_path / "student", None, {})
    loaded = load_module_student(tmp_path / "student")
    data = texts()
    rows = data.splits["validation"]
    inputs, counted = (
        data.batch(rows),
        data.counted[rows][:, : int(data.inputs["attention_mask"][rows].sum(1).max()) - 1],
    )
    metrics = student.evaluate("validation")
    for model in (shipped, loaded):
        with torch.no_grad():
            logits = model(**inputs)
        nats = F.cross_entropy(logits[:, :-1][counted], inputs["input_ids"][:, 1:][counted])
        assert float(metrics.accuracy) == pytest.approx(1 - float(nats) / math.log(V), abs=1e-4)
    rates = metrics.exit_rates[0].tolist()
    if threshold in (0.0, 1.0):
        assert rates == [1.0 - threshold, 0.0, threshold]
    elif patience:
        assert rates[1] > rates[0]  # the second exit lets go where it agrees with the first
    else:
        assert 0.05 < rates[0] < 0.95
    assert loaded.model.config.intermediate_size == 32  # type: ignore[union-attr]


def test_an_exit_saves_where_every_token_has_left() -> None:
    """An exit costs its head for every token; what follows runs for the whole text unless all have left."""
    student = student_of()
    inputs = texts().batch(torch.tensor([0]))
    length = inputs["input_ids"].shape[1]
    work = count_work(student.student.model, inputs, student.plan)
    profile = ModuleProfile(student.plan, work, 4, tiny_models.even_speed(work, 1e-3, 1e-9), dict(ENERGY_MODEL), {})
    kept = torch.tensor([student.plan.group_sizes], dtype=torch.float32)
    head = float(length * 32 * V)

    def macs(rate: float, threshold: float) -> float:
        return float(profile.cost(kept, torch.tensor([[rate, 1 - rate]]), torch.tensor([threshold])).macs)

    dense = macs(0.0, 1.0)
    assert macs(0.4, 0.5) == pytest.approx(dense + head)
    assert macs(1.0, 0.0) == pytest.approx((dense - head) / 2 + head)  # one of two equal blocks, then a head
    assert macs(1.0, 0.5) == pytest.approx(macs(1.0, 0.0))


def test_what_a_model_lacks_is_listed() -> None:
    inputs = texts().batch(torch.arange(2))
    plan = make_plan(tiny_models.tiny("gpt2"), inputs, AttachConfig(), 8)
    table = control_table(plan)
    assert "unit_keep         not available" in table
    assert "exits after blocks [1] (a token each" in table
    assert "feature_keep      not available: every token has an answer of its own" in table
    llama = control_table(make_plan(tiny_models.tiny("llama"), inputs, AttachConfig(), 8))
    assert "hidden units and heads in 4 groups" in llama


def test_a_head_that_does_not_read_the_blocks_has_no_exits() -> None:
    model: Any = tiny_models.tiny("llama")
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, V))
    inputs = texts().batch(torch.arange(2))
    assert make_plan(model, inputs, AttachConfig(), 8).exits == ()
    with pytest.raises(UserError, match=r"attach.exits: got \[1\]; allowed: \[\]"):
        make_plan(model, inputs, AttachConfig(exits=(1,)), 8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TokenConfig(top_k=0), "tokens.top_k"),
        (TokenConfig(best_perplexity=0.5), "tokens.best_perplexity"),
        (TokenConfig(worst_perplexity=5.0, best_perplexity=5.0), "tokens.worst_perplexity"),
    ],
)
def test_impossible_options(config: TokenConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config.check()
    with pytest.raises(UserError, match="allowed: below 40"):
        TokenConfig(best_perplexity=50.0).anchors(40)
