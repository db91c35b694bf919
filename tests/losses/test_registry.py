"""Every term of the registry, by one set of checks: a new term is tested as soon as it is registered."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from rlkd.errors import UserError
from rlkd.losses import DEFAULT_TERMS, FAMILIES, SIGNALS, TERMS, LossConfig, Objective, Term, term
from rlkd.losses.registry import RIDES, SIZES

B, C, U, F = 4, 3, 5, 6
SHAPES = {
    **dict.fromkeys(("student_logits", "teacher_logits", "peer_logits"), (B, C)),
    "student_features": (B, U),
    **dict.fromkeys(("adapted_features", "teacher_features"), (B, F)),
    **dict.fromkeys(("student_map", "teacher_map"), (B, 7)),
    "student_first": (B, U),
    "teacher_first": (B, F),
    "student_attention": (B, 2, 4, 4),
    "teacher_attention": (B, 3, 6, 6),
    "student_values": (B, 2, 4, 3),
    "teacher_values": (B, 4, 4, 5),
    **dict.fromkeys(("student_input_gradient", "teacher_input_gradient", "student_loss_gradient"), (B, 8)),
}
SIZE = {"num_classes": C, "student_width": U, "teacher_width": F, "first_width": U, "teacher_first_width": F}
every_term = pytest.mark.parametrize("entry", TERMS.values(), ids=list(TERMS))


def example(seed: int = 0) -> dict[str, object]:
    """A value of every signal, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    given: dict[str, object] = {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        given[name] = value.softmax(-1) if name.endswith("attention") else value
    given["exit_logits"] = tuple(torch.randn(2, B, C, generator=generator, dtype=torch.float64))
    given["labels"] = torch.randint(C, (B,), generator=generator)
    given["temperature"] = torch.tensor(2.0, dtype=torch.float64)
    return given


def function_of(entry: Term) -> nn.Module | object:
    if not entry.is_module:
        return entry.function
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return entry.function(**{size: SIZE[size] for size in entry.sizes}).double()


def call(entry: Term, given: dict[str, object]) -> Tensor:
    return function_of(entry)(**{name: given[name] for name in entry.needs})  # type: ignore[operator]


def is_students(name: str) -> bool:
    return name.startswith(("student_", "adapted_", "exit_"))


def test_the_examples_cover_all_signals() -> None:
    assert set(example()) == set(SIGNALS)
    assert set(SIZE) == set(SIZES)


@every_term
def test_entry_is_documented(entry: Term) -> None:
    text = entry.function.__doc__ or ""
    assert "Formula:" in text, "the docstring gives the formula"
    assert re.match(r"https://(arxiv\.org/abs|doi\.org|openaccess\.thecvf\.com)/", entry.paper)
    assert re.search(r"\d{4}", text), "the docstring gives the paper's year"
    assert entry.summary.endswith((".", ")"))
    assert entry.scale > 0


@every_term
def test_gradients_agree_with_finite_differences_and_stop_at_the_teacher(entry: Term) -> None:
    given = example()
    names = [name for name in entry.needs if is_students(name)]
    leaves: list[Tensor] = []
    for name in names:
        value = given[name]
        leaves += list(value) if isinstance(value, tuple) else [value]  # type: ignore[list-item]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    others = {n: given[n].clone().requires_grad_() for n in entry.needs if n.startswith(("teacher_", "peer_"))}  # type: ignore[attr-defined]

    def loss(*values: Tensor) -> Tensor:
        queue = list(values)
        mine = {n: tuple(queue.pop(0) for _ in given[n]) if n == "exit_logits" else queue.pop(0) for n in names}  # type: ignore[attr-defined]
        return call(entry, {**given, **others, **mine})

    value = loss(*leaves)
    assert value.shape == ()
    assert torch.isfinite(value)
    if entry.name not in ("adversarial", "self_distillation", "per_sample_kl"):  # these stop some gradients on purpose
        assert torch.autograd.gradcheck(loss, leaves)
    value.backward()
    assert any(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)
    assert all(other.grad is None for other in others.values())


@every_term
def test_works_under_vmap(entry: Term) -> None:
    """A lock-step population computes the term of every student by one call."""
    rows = [example(seed) for seed in range(3)]
    function = function_of(entry)
    stacked = {
        name: torch.stack([torch.stack(row[name]) if name == "exit_logits" else row[name] for row in rows])  # type: ignore[arg-type, misc]
        for name in entry.needs
    }

    def one(given: dict[str, Tensor]) -> Tensor:
        values = {n: tuple(v.unbind()) if n == "exit_logits" else v for n, v in given.items()}
        if isinstance(function, nn.Module):
            return functional_call(function, dict(function.named_parameters()), (), values)
        return function(**values)  # type: ignore[operator]

    alone = torch.stack([call(entry, row) for row in rows])
    chosen = next(name for name in entry.needs if is_students(name))

    def of_chosen(value: Tensor, given: dict[str, Tensor]) -> Tensor:
        return one({**given, chosen: value})

    gradients, together = vmap(grad_and_value(of_chosen))(stacked[chosen], stacked)
    torch.testing.assert_close(together, alone)
    assert gradients.shape == stacked[chosen].shape


@every_term
def test_five_line_loop_lowers_the_loss(entry: Term) -> None:
    given, function = example(), function_of(entry)
    weights = {n: nn.Parameter(torch.zeros_like(given[n])) for n in entry.needs if n in SHAPES and is_students(n)}  # type: ignore[call-overload]
    exits = nn.Parameter(torch.zeros(2, B, C, dtype=torch.float64))
    optimizer = torch.optim.Adam([*weights.values(), exits], lr=0.02)
    losses = []
    for _ in range(30):
        now = {**given, **{n: given[n] + w for n, w in weights.items()}}  # type: ignore[operator]
        now["exit_logits"] = tuple(z + w for z, w in zip(given["exit_logits"], exits, strict=True))  # type: ignore[call-overload]
        # the five lines: a term is a function of signals
        loss = function(**{name: now[name] for name in entry.needs})  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if entry.kind == "adversarial":  # the discriminator stands still here, and the student climbs
        assert losses[-1] > losses[0]
    else:
        assert losses[-1] < losses[0]


@every_term
def test_shapes_that_differ_are_refused_by_name(entry: Term) -> None:
    given = example()
    pairs = [(n, f"teacher_{n.partition('_')[2]}") for n in entry.needs if n.startswith(("student_", "adapted_"))]
    pairs = [(ours, theirs) for ours, theirs in pairs if theirs in entry.needs and theirs != "teacher_first"]
    for ours, theirs in pairs:
        with pytest.raises(ValueError, match=rf"{ours}.*{theirs}"):
            call(entry, {**given, theirs: given[theirs][:2]})  # type: ignore[index]


def test_default_terms_are_the_four_families_at_a_scale_of_one() -> None:
    assert tuple(TERMS[name].family for name in DEFAULT_TERMS) == FAMILIES
    assert all(TERMS[name].scale == 1.0 for name in DEFAULT_TERMS)
    assert set(RIDES.values()) == set(FAMILIES)


def test_members_share_the_weight_of_their_family_at_their_published_scales() -> None:
    given = example()
    both = Objective(LossConfig(("cross_entropy", "kl", "dkd", "rkd_distance")), frozenset(SIGNALS))
    losses = both(given)

    def mean(name: str) -> Tensor:
        rest = {n: given[n] for n in TERMS[name].needs if n != "student_logits"}
        return torch.stack([TERMS[name].function(student_logits=z, **rest) for z in given["exit_logits"]]).mean()  # type: ignore[attr-defined]

    # dkd's published weight is 1 beside a cross entropy of 1, the family's 0.3 beside 0.5: its scale is 5 / 3
    torch.testing.assert_close(losses[1], (mean("kl") + mean("dkd") / 0.6) / 2)
    distance = call(TERMS["rkd_distance"], given)
    torch.testing.assert_close(losses[2], distance * 25.0 * 0.5 / 0.15)
    assert both.available.tolist() == [True, True, True, False]
    assert losses[3] == 0


def test_a_term_without_its_signals_is_refused_but_a_default_one_is_left_out() -> None:
    offered = frozenset({"student_logits", "exit_logits", "labels", "temperature", "teacher_logits"})
    assert Objective(LossConfig(), offered).available.tolist() == [True, True, False, False]
    with pytest.raises(UserError, match=r"pkt needs student_features, teacher_features.*allowed here: .*dkd"):
        Objective(LossConfig(("cross_entropy", "pkt")), offered)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (("kll",), "did you mean kl"),
        (("kl", "kl"), "each once"),
        ((), "one or more"),
        (("kl", "dkd"), "with cross_entropy or label_smoothing"),
    ],
)
def test_impossible_choices_are_refused(terms: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LossConfig(terms).check()


def test_a_term_names_signals_that_exist_and_a_name_that_is_free() -> None:
    with pytest.raises(UserError, match="got parameters x"):

        @term("new", "feature", "https://arxiv.org/abs/1")
        def wrong(x: Tensor) -> Tensor:
            return x

    with pytest.raises(UserError, match="taken"):

        @term("kl", "response", "https://arxiv.org/abs/1")
        def other(student_logits: Tensor) -> Tensor:
            return student_logits

    for (name, kind), weight, message in (
        (("new", "smell"), None, "got kind 'smell'; allowed: hard_label"),
        ((3, "feature"), None, "got the name 3; allowed: letters, digits"),
        (("my term", "feature"), None, "got the name 'my term'"),
        (("new", "feature"), -1.0, "got weight -1.0; allowed: a number above 0"),
        (("new", "feature"), float("nan"), "got weight nan"),
    ):
        with pytest.raises(UserError, match=message):
            term(name, kind, "https://arxiv.org/abs/1", weight=weight)  # type: ignore[arg-type]
    assert "new" not in TERMS
