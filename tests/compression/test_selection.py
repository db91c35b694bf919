import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.compression import exits_at, importance, keep_top, spread
from rlkd.compression.selection import num_kept, select
from rlkd.models import StudentConfig, build_student


def test_keep_top_keeps_the_highest_and_at_least_one() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0]] * 3)
    masks = keep_top(scores, torch.tensor([0.5, 0.01, 1.0]))
    assert masks.tolist() == [[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]]


def test_ties_go_to_the_lower_index() -> None:
    assert keep_top(torch.ones(1, 4), torch.tensor([0.5])).tolist() == [[1, 1, 0, 0]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.floats(0, 1))
def test_what_is_kept_scores_no_less_than_what_is_dropped(values: list[float], keep: float) -> None:
    scores = torch.tensor([values])
    mask = keep_top(scores, torch.tensor([keep]))[0].bool()
    assert int(mask.sum()) == max(1, round(float(torch.tensor(keep) * len(values))))
    if not mask.all():
        assert scores[0][mask].min() >= scores[0][~mask].max()


def test_kept_units_are_rounded_up_to_multiples_and_inputs_are_not() -> None:
    keep = torch.tensor([0.01, 0.4, 0.41, 0.9])
    assert num_kept(keep, 20, 8).tolist() == [8, 8, 8, 20]
    assert num_kept(keep[:, None], torch.tensor([20.0, 40.0]), 8).tolist() == [[8, 8], [8, 16], [8, 16], [20, 40]]
    student = build_student(StudentConfig(widths=(20, 12), exits=(), unit_multiple=8), (5,), 2)
    scores = tuple(torch.arange(float(size)) for size in student.group_sizes)
    masks = select(student, scores, torch.tensor(0.5), torch.tensor(0.5))
    assert [int(mask.sum()) for mask in masks] == [2, 16, 8]
    assert masks[1].tolist() == [0.0] * 4 + [1.0] * 16  # the highest


def test_importance_by_hand() -> None:
    student = build_student(StudentConfig(widths=(2,), exits=()), (3,), 2)
    weights = torch.tensor([[1.0, -2.0, 3.0], [0.0, 1.0, -1.0]])
    parameters = {"layers.0.weight": weights}
    inputs, units = importance(student, parameters, torch.tensor([1.0, 0.5, 0.0]))
    assert inputs.tolist() == [1.0, 1.5, 0.0]  # column sums 1, 3, 4 times the inputs' scale
    assert units.tolist() == [6.0, 2.0]
    stacked = importance(student, {"layers.0.weight": torch.stack([weights, 2 * weights])}, torch.ones(3))
    assert stacked[0].tolist() == [[1.0, 3.0, 4.0], [2.0, 6.0, 8.0]]
    assert stacked[1].tolist() == [[6.0, 2.0], [12.0, 4.0]]


def test_importance_of_a_convolution_by_hand() -> None:
    student = build_student(StudentConfig("conv", (2,), ()), (4, 4), 2)
    filters = torch.stack([torch.full((1, 3, 3), -1.0), torch.eye(3)[None]])  # [2, 1, 3, 3]
    inputs, units = importance(student, {"layers.0.weight": filters}, torch.full((16,), 0.5))
    assert inputs.tolist() == [1.0]  # pixels are no group of a convolution
    assert units.tolist() == [9.0, 3.0]


def test_exits_at_has_exact_ends() -> None:
    confidence = torch.tensor([[0.05, 0.5, 1.0]] * 4)
    leaves = exits_at(confidence, torch.tensor([0.1, 0.5, 0.999, 1.0]), num_classes=10)
    assert leaves.tolist() == [[True] * 3, [False, True, True], [False, False, True], [False] * 3]


def test_spread_runs_from_one_unit_to_all_equal() -> None:
    torch.testing.assert_close(spread(torch.tensor([[1.0, 0, 0, 0], [2.0, 2, 2, 2]])), torch.tensor([0.25, 1.0]))
