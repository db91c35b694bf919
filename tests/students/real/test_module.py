"""A tiny transformer as a student: gradients, accumulation, determinism, and that it learns."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import tiny_models
import torch
from module_students import TRAIN, controls, distance, student_of, task, texts
from torch import Tensor

from rlkd.errors import UserError
from rlkd.io import processes
from rlkd.losses import LossConfig
from rlkd.models.real.attachment import AttachConfig


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "resnet", "convnext", "mobilenet"])
def test_a_window_reports_every_family_and_evaluation_every_exit(family: str) -> None:
    student = student_of(family, attach=AttachConfig(hints="all"))
    telemetry = student.train_window(controls(feature_keep=0.5, unit_keep=0.5, exit_threshold=0.7))
    assert not bool(telemetry.diverged)
    assert student.available == {"hard_label": True, "response": True, "feature": True, "attention": True}
    assert (telemetry.gradient_norms > 0).all()
    assert telemetry.losses.shape == (1, 4)
    assert -1.0 <= float(telemetry.gradient_cosine) <= 1.0
    metrics = student.evaluate("validation")
    assert metrics.exit_accuracy.shape == (1, 2)
    assert float(metrics.exit_rates.sum()) == pytest.approx(1.0)
    assert metrics.kept.shape == (1, len(student.plan.group_sizes))
    assert metrics.spread.shape == (1, 2)
    if family not in tiny_models.CONV_FAMILIES:
        assert metrics.kept[0, 1:3].tolist() == [32.0, 2.0]
        assert metrics.kept[0, 0] == round(0.5 * student.plan.num_positions)
        assert 0 < float(metrics.spread[0, 0]) < 1


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_a_probe_is_an_evaluation_under_other_masks_and_changes_nothing(family: str) -> None:
    student = student_of(family)
    student.train_window(controls(unit_keep=0.9))
    student.set_controls(controls(unit_keep=0.9))  # by importance as it is now, as every window ends
    metrics = student.evaluate("validation")
    before, state = student.masks(), student.training_state()
    less = student.probe(torch.tensor([0.5]), torch.tensor([0.3]))
    assert student.probe(torch.tensor([1.0]), torch.tensor([0.9])) is metrics.exit_accuracy  # nothing is run twice
    for a, b in zip(before, student.masks(), strict=True):
        assert torch.equal(a, b)
    after = student.training_state()
    assert all(torch.equal(state[name], after[name]) for name in state if name != "token_scores")
    student.set_controls(controls(feature_keep=0.5, unit_keep=0.3))
    assert torch.equal(student.evaluate("validation").exit_accuracy, less)
    student.train_window(controls(unit_keep=0.9))
    student.set_controls(controls(unit_keep=0.9))
    fresh = student.probe(torch.tensor([1.0]), torch.tensor([0.9]))  # the weights are others now
    assert torch.equal(fresh, student.evaluate("validation").exit_accuracy)


@pytest.mark.parametrize("micro_batches", [2, 5])
def test_accumulation_changes_neither_loss_nor_gradient_step(micro_batches: int) -> None:
    whole, parts = student_of(), student_of(config=replace(TRAIN, micro_batches=micro_batches))
    assert distance(whole.state_dict(), parts.state_dict()) == 0.0
    for _ in range(2):
        a, b = (s.train_window(controls(feature_keep=0.6, unit_keep=0.5)) for s in (whole, parts))
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-4, atol=1e-6)
    assert distance(whole.state_dict(), parts.state_dict()) < 2e-4
    assert distance(whole.state_dict(), student_of().state_dict()) > 1e-3


def test_the_gradient_that_is_reported_is_the_gradient() -> None:
    student = student_of()
    telemetry = student.train_window(controls())
    positions = torch.arange(16)
    student.student.eval()
    norms, cosine = student._family_gradients(positions, torch.tensor(2.0))
    losses = student._losses(positions, torch.tensor(2.0))
    own = [*student.student.model.parameters(), *student.student.heads.parameters()]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(x, own, retain_graph=True, materialize_grads=True)])
        for x in losses
    ]
    torch.testing.assert_close(norms, torch.stack([r.norm() for r in rows]), rtol=1e-4, atol=1e-6)
    expected = torch.dot(rows[0], rows[1]) / (rows[0].norm() * rows[1].norm())
    torch.testing.assert_close(cosine, expected, rtol=1e-3, atol=1e-5)
    assert telemetry.gradient_norms.shape == (1, 4)


def test_the_same_seed_gives_the_same_student_and_another_does_not() -> None:
    dropout = {"hidden_dropout_prob": 0.1}
    a, b = student_of(**dropout), student_of(**dropout)
    torch.manual_seed(99)  # the global stream plays no part
    first, second = a.train_window(controls()), b.train_window(controls())
    assert torch.equal(first.losses, second.losses)
    assert distance(a.state_dict(), b.state_dict()) == 0.0
    before = a.state_dict()
    a.reset([task(texts())])
    a.train_window(controls())
    assert distance(a.state_dict(), before) == 0.0
    b.reset([task(texts(), seed=1)])
    b.train_window(controls())
    assert distance(a.state_dict(), b.state_dict()) > 1e-4


def test_a_student_learns_from_labels_and_from_its_teacher() -> None:
    config = replace(TRAIN, steps_per_window=25, batch_size=32, learning_rate=3e-3)
    student = student_of(config=config)
    before = student.evaluate("train")
    for _ in range(2):
        student.train_window(controls(weights=[1.0, 0.0, 0.0, 0.0]))
    after = student.evaluate("train")
    assert float(after.exit_loss[0, -1]) < 0.5 * float(before.exit_loss[0, -1])
    follower = student_of(config=config)
    divergence = float(follower.evaluate("train").divergence)
    for _ in range(2):
        follower.train_window(controls(weights=[0.0, 1.0, 0.0, 0.0]))
    assert float(follower.evaluate("train").divergence) < 0.5 * divergence


def test_unavailable_families_get_no_weight() -> None:
    student = student_of("vit", teacher_family="resnet")
    assert student.available["attention"] is False
    other = student_of("vit", teacher_family="resnet")
    a = student.train_window(controls(weights=[0.5, 0.5, 0.0, 0.0]))
    other.train_window(controls(weights=[0.25, 0.25, 0.0, 0.5]))
    assert distance(student.state_dict(), other.state_dict()) < 1e-6
    assert float(a.gradient_norms[0, 3]) == 0.0


def test_exits_follow_the_threshold_and_the_ends_are_exact() -> None:
    student = student_of()
    student.set_controls(controls(exit_threshold=0.5))
    assert student.evaluate("validation").exit_rates.tolist() == [[1.0, 0.0]]
    student.set_controls(controls(exit_threshold=1.0))
    assert student.evaluate("validation").exit_rates.tolist() == [[0.0, 1.0]]


def test_patience_is_heard() -> None:
    attach = AttachConfig(exits=(1, 2), patience=2)
    student = student_of(attach=attach)
    student.set_controls(controls(exit_threshold=0.999))
    rates = student.evaluate("validation").exit_rates[0]
    assert float(rates[1]) > 0
    student_without = student_of(attach=AttachConfig(exits=(1, 2)))
    student_without.set_controls(controls(exit_threshold=0.999))
    assert float(student_without.evaluate("validation").exit_rates[0, 1]) == 0.0


def test_bfloat16_stays_close_and_parameters_stay_float32() -> None:
    half, full = student_of(config=replace(TRAIN, precision="bfloat16")), student_of()
    a, b = (s.train_window(controls()) for s in (half, full))
    torch.testing.assert_close(a.losses, b.losses, rtol=0.05, atol=0.02)
    assert not torch.equal(a.losses, b.losses)
    assert all(p.dtype == torch.float32 for p in half.student.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_student_that_diverges_goes_back_and_goes_on_with_smaller_steps(optimizer: Literal["adamw", "lion"]) -> None:
    config = replace(TRAIN, optimizer=optimizer, learning_rate=1e-4)
    student, reference = student_of("resnet", config), student_of("resnet", config)  # has buffers, too
    for s in (student, reference):
        s.train_window(controls())
    before = {name: value.clone() for name, value in student.student.state_dict().items()}
    moments = copy.deepcopy(student._optimizer.state_dict()["state"])
    told = student.train_window(controls(learning_rate=1e38))
    assert (told.num_rollbacks.tolist(), told.diverged.tolist()) == ([1], [False])
    for name, value in student.student.state_dict().items():
        assert torch.equal(value, before[name]), name
    for key, row in student._optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[key][name]) for name, value in row.items())
    # by hand: the reference spends the batches and the steps of the schedule, then takes a tenth
    torch.randint(len(reference._task.samples), (3, 12), generator=reference._batches)
    reference._step += 3
    student.train_window(controls())
    reference.train_window(controls(learning_rate=float(torch.tensor(3e-3) * torch.tensor(0.1))))
    for name, value in student.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name


def test_a_student_that_diverges_too_often_is_told() -> None:
    student = student_of()
    told = [student.train_window(controls(learning_rate=1e38)) for _ in range(3)]
    assert [t.num_rollbacks.item() for t in told] == [1, 2, 2]
    assert [t.diverged.item() for t in told] == [False, False, True]
    student.reset([task(texts())])
    assert not bool(student.train_window(controls()).diverged)


def test_a_gradient_whose_norm_overflows_counts() -> None:
    """Clipping would make zeros of it: the student would stand still and say nothing."""
    student = student_of()
    parameter = next(iter(student.student.model.parameters()))
    spoils = iter([1e30])  # in the first of the window's steps alone
    parameter.register_hook(lambda gradient: gradient + next(spoils, 0.0))
    told = student.train_window(controls())
    assert torch.isfinite(told.gradient_norms).all()
    assert torch.isfinite(told.losses).all()
    assert told.num_rollbacks.tolist() == [1]


def test_evaluation_gives_every_sample_its_own_label() -> None:
    """Batches are made by length; the answers come back in order."""
    student = student_of(config=replace(TRAIN, evaluation_batch_size=5))
    data = texts()
    with torch.no_grad():
        student.student.model.classifier.weight.mul_(200.0)  # answers that differ from sample to sample
    for split in ("train", "validation"):
        index = data.splits[split]  # type: ignore[index]
        lengths = data.inputs["attention_mask"][index].sum(1)
        assert lengths[data.by_length(index)].tolist() == sorted(lengths.tolist())
        with torch.no_grad():
            logits = student.student.model(**data.batch(index)).logits
        expected = torch.nn.functional.cross_entropy(logits, data.labels[index])
        student.set_controls(controls())
        metrics = student.evaluate(split)  # type: ignore[arg-type]
        assert float(metrics.exit_loss[0, -1]) == pytest.approx(float(expected), rel=1e-4)
        theirs = student._signals.logits[0, index].argmax(-1)
        assert float(metrics.agreement) == pytest.approx(float((logits.argmax(-1) == theirs).float().mean()))


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_real_student_goes_on_as_if_it_had_not_stopped(optimizer: Literal["adamw", "lion"]) -> None:
    config = replace(TRAIN, optimizer=optimizer, warmup=0.3)
    old, new = (student_of(config=config, hidden_dropout_prob=0.1) for _ in range(2))
    old.train_window(controls(unit_keep=0.5))
    old.train_window(controls(learning_rate=1e30))  # is rolled back
    old.evaluate("validation")
    new.reset([task(texts())])
    new.load_training_state(old.training_state())
    for _ in range(2):
        for students in (old, new):
            students.train_window(controls(unit_keep=0.7))
            students.evaluate("validation")
        ours, theirs = old.training_state(), new.training_state()
        assert set(ours) == set(theirs)
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert int(ours["rollbacks.count"]) == 1


def test_the_teacher_is_no_part_of_what_is_saved() -> None:
    student = student_of("vit", teacher_family="resnet")
    own = {name for name, _ in student.student.model.named_parameters()}
    attached = {f"heads.0.{part}" for part in ("weight", "bias")} | {
        f"adapters.0.{part}" for part in ("weight", "bias")
    }
    assert set(student.state_dict()) == own | attached
    assert not any("resnet" in name for name, _ in student.student.named_modules())


def test_a_window_ends_with_an_evaluation_on_a_spread_of_validation() -> None:
    few, whole = student_of(config=replace(TRAIN, validation_size=4)), student_of()
    seen: list[Tensor] = []
    answers = few._answers
    few._answers = lambda index: (seen.append(index), answers(index))[1]  # type: ignore[method-assign, func-returns-value]
    for student in (few, whole):
        student.set_controls(controls())
    accuracy = float(few.evaluate("validation").accuracy)
    assert seen[0].tolist() == [64, 68, 72, 76]  # of 64 to 79
    right = torch.stack([z.argmax(-1) for z in answers(seen[0])[0]])[-1] == texts().labels[seen[0]]
    assert accuracy == pytest.approx(float(right.float().mean()))
    few.evaluate("test")
    assert len(seen[1]) == 16  # results come from all test samples
    assert torch.equal(whole.evaluate("validation").exit_loss, student_of().evaluate("validation").exit_loss)
    with pytest.raises(UserError, match=r"train\.validation_size: got -1"):
        replace(TRAIN, validation_size=-1).check()


def test_exits_of_each_class_sum_to_those_of_all() -> None:
    student = student_of()
    student.set_controls(controls(exit_threshold=0.52))
    metrics, by_class = student.evaluate("test"), student.exits_by_class("test")
    shares = by_class.num_samples / by_class.num_samples.sum()
    torch.testing.assert_close((shares[:, None] * by_class.exit_rates).sum(0).float(), metrics.exit_rates[0])
    assert float((shares * by_class.accuracy).sum()) == pytest.approx(float(metrics.accuracy))


def test_a_batch_smaller_than_its_parts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkd.io.processes.num_processes", lambda: 5)
    with pytest.raises(UserError, match=r"train\.batch_size: got 12; allowed: at least 3 micro-batches .* 5 processes"):
        student_of(config=replace(TRAIN, micro_batches=3))


NINE = LossConfig(
    ("cross_entropy", "kl", "dkd", "dist", "fitnets", "similarity", "rkd_distance", "attention_transfer", "crd")
)


def test_a_real_student_trains_with_nine_terms_and_their_modules() -> None:
    student, default = student_of(loss=NINE), student_of()
    before = student.state_dict()
    telemetry, plain = student.train_window(controls()), default.train_window(controls())
    assert torch.isfinite(telemetry.losses).all()
    assert (telemetry.losses[0, 1:3] != plain.losses[0, 1:3]).all()
    after = student.state_dict()
    own = [name for name in after if name.startswith("terms.crd.")]
    assert own
    assert all(not torch.equal(before[name], after[name]) for name in own)
    assert not [name for name in default.state_dict() if name.startswith("terms.")]
    student.reset([task(texts())])
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in own)


def test_hints_of_deeper_blocks_join_in_stages() -> None:
    attach = AttachConfig(hints="all")
    staged = student_of(attach=attach, loss=LossConfig(stages=3))
    width = staged.student.links[0].teacher_width
    assert staged._active_columns() == width
    staged.train_window(controls())  # 3 of 12 steps
    staged.train_window(controls())
    assert staged._active_columns() == 2 * width
    staged.train_window(controls())
    assert staged._active_columns() == 3 * width
    with pytest.raises(UserError, match="stages: got 2; allowed: 1 to 1"):
        student_of(loss=LossConfig(stages=2))
    with pytest.raises(UserError, match="crd, which has a fixed width"):
        student_of(attach=attach, loss=LossConfig(("cross_entropy", "crd"), stages=2))


def test_a_term_that_a_real_pair_cannot_have_is_refused() -> None:
    with pytest.raises(UserError, match="jacobian needs student_input_gradient, teacher_input_gradient"):
        student_of(loss=LossConfig(("cross_entropy", "jacobian")))


@pytest.mark.parametrize("family", ["bert", "vit", "llama_classifier"])
def test_gradient_checkpointing_changes_no_step(family: str) -> None:
    """Blocks that are computed again have the masks and the tokens of the pass before."""
    told = controls(unit_keep=0.5, feature_keep=0.6)
    states, losses = [], []
    for is_on in (False, True):
        student = student_of(family, replace(TRAIN, micro_batches=2, gradient_checkpointing=is_on))
        telemetry = [student.train_window(told) for _ in range(2)]
        losses.append(torch.cat([t.losses for t in telemetry] + [t.gradient_norms for t in telemetry]))
        states.append(student.state_dict())
        blocks = [m for m in student.student.model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(blocks) == is_on
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert distance(*states) < 1e-5


def test_gradient_checkpointing_of_a_model_without_it_is_refused() -> None:
    with pytest.raises(UserError, match="MobileNetV2ForImageClassification has none; allowed: models of transformers"):
        student_of("mobilenet", replace(TRAIN, gradient_checkpointing=True))


def test_features_as_wide_as_the_teachers_begin_at_a_mean_square_of_one() -> None:
    student = student_of()  # a copy of the teacher's architecture
    assert [link.adapter for link in student.student.links] == ["scale"] * len(student.student.links)
    with torch.no_grad():
        features = student._forward(student._data.splits["train"]).features
    widths = [link.teacher_width for link in student.student.links]
    for columns in torch.split(features, widths, dim=-1):
        assert float(columns.square().mean()) == pytest.approx(1.0, rel=0.05)
    first = [adapter.factor for adapter in student.student.adapters]
    student.train_window(controls(weights=[1.0, 0.0, 0.0, 0.0]))
    student.reset([task(student._data)])
    assert [adapter.factor for adapter in student.student.adapters] == first  # found anew on the untouched student


DEPTH = AttachConfig(units="depth")


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_share_of_the_units_skips_blocks(family: str) -> None:
    student = student_of(family, attach=DEPTH)
    order = student.plan.order
    before = student.state_dict()
    telemetry = student.train_window(controls(unit_keep=0.5))  # 1.5 of 3 blocks
    assert torch.isfinite(telemetry.losses).all()
    kept = student.evaluate("validation").kept[0, 1:]
    whole, half, none = (kept[2 * (number - 1) : 2 * number].tolist() for number in order)
    assert [whole, half, none] == [[64, 4], [32, 2], [0, 0]]
    after, skipped = student.state_dict(), f"{student.plan.blocks[order[2] - 1]}."
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(skipped) for name in moved)  # no gradient and no decay
    assert any(name.startswith(student.plan.blocks[order[0] - 1]) for name in moved)
    less = student.probe(torch.ones(1), torch.tensor([0.2]))
    student.set_controls(controls(unit_keep=0.2))
    assert student.masks()[1 + 2 * (order[1] - 1)].sum() == 0
    assert torch.equal(student.evaluate("validation").exit_accuracy, less)
    student.train_window(controls(unit_keep=1.0))  # all blocks are back
    back = student.state_dict()
    assert any(name.startswith(skipped) and not torch.equal(back[name], after[name]) for name in back)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_student_that_skips_blocks_goes_on_as_if_it_had_not_stopped(optimizer: Literal["adamw", "lion"]) -> None:
    config = replace(TRAIN, optimizer=optimizer, warmup=0.3)
    old, new = (student_of(config=config, attach=DEPTH, hidden_dropout_prob=0.1) for _ in range(2))
    old.train_window(controls(unit_keep=0.5))
    old.train_window(controls(learning_rate=1e30))  # is rolled back
    new.reset([task(texts())])
    new.load_training_state(old.training_state())
    for keep in (0.3, 1.0):
        for students in (old, new):
            students.train_window(controls(unit_keep=keep))
            students.evaluate("validation")
    ours, theirs = old.training_state(), new.training_state()
    assert ours["order"].tolist() == list(new.plan.order)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_state_of_another_order_is_refused() -> None:
    deep, wide = student_of(attach=DEPTH), student_of()
    state = deep.training_state()
    assert "order" not in wide.training_state()
    with pytest.raises(
        UserError, match=r"attach\.units: the state skips blocks in the order \[\d, \d, \d\], this .* \[\]"
    ):
        wide.load_training_state(state)
    with pytest.raises(
        UserError, match=r"attach\.units: the state skips blocks in the order \[\], this student in \[\d"
    ):
        deep.load_training_state(wide.training_state())
    with pytest.raises(UserError, match=r"attach\.units: the state skips"):
        deep.load_training_state({**state, "order": state["order"].flip(0)})
    deep.load_training_state(state)


def test_gradient_checkpointing_skips_the_blocks_of_the_pass_before() -> None:
    states = []
    for is_on in (False, True):
        student = student_of("bert", replace(TRAIN, micro_batches=2, gradient_checkpointing=is_on), attach=DEPTH)
        student.train_window(controls(unit_keep=0.5, feature_keep=0.6))
        states.append(student.state_dict())
    assert distance(*states) < 1e-5


def test_depth_with_sharded_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    with pytest.raises(UserError, match=r"attach\.units: got depth with train\.shard in several processes"):
        student_of(config=replace(TRAIN, shard=True), attach=DEPTH)
