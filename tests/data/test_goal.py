"""Goals: what a user may write, what it means, and what is refused in one line."""

import pytest

from rlkd.data import Goal, Preference
from rlkd.data.distribution import COSTS, TaskDistribution
from rlkd.data.goal import limit_ratio
from rlkd.errors import UserError


@pytest.mark.parametrize(
    ("given", "ratio"),
    [(0.5, 0.5), ("0.5", 0.5), (".25", 0.25), ("2x", 0.5), ("2.5x", 0.4), ("1x", 1.0), (1, 1.0), ("1.", 1.0)],
)
def test_ratios_and_times_less_mean_the_same_for_every_cost(given: float | str, ratio: float) -> None:
    for name in COSTS:
        assert limit_ratio(name, given, dense_latency_s=7.0) == pytest.approx(ratio)


@pytest.mark.parametrize(("given", "ratio"), [("3ms", 0.75), ("3 ms", 0.75), ("800us", 0.2), ("0.002s", 0.5)])
def test_a_time_is_divided_by_the_dense_latency(given: str, ratio: float) -> None:
    assert limit_ratio("latency", given, dense_latency_s=4e-3) == pytest.approx(ratio)


@pytest.mark.parametrize(
    "given", ["0", "0x", "-1", "2", "0.5x", "x", "", "nan", "inf", "3 m", "1e-1", "50%", "3ms or so", "0ms", 0.0, 1.5]
)
def test_other_limits_are_refused(given: float | str) -> None:
    with pytest.raises(UserError, match=r"goal\.latency: got .*; allowed: a ratio .*2x.*3ms") as refused:
        limit_ratio("latency", given, dense_latency_s=1e-3)
    assert "\n" not in str(refused.value)


def test_only_latency_is_a_time() -> None:
    for name in ("macs", "energy", "size"):
        with pytest.raises(UserError, match=rf"goal\.{name}: got '3ms'; allowed: .* 2x for half of it$"):
            Goal(**{name: "3ms"}).check()


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        (Goal(keep=0.98, accuracy=0.9), "got keep 0.98 and accuracy 0.9; allowed: one floor"),
        (Goal(keep=0.0), "goal.keep: got 0"),
        (Goal(keep=-1.0), "goal.keep: got -1"),
        (Goal(keep=98.0), "goal.keep: got 98"),
        (Goal(accuracy=1.5), "goal.accuracy: got 1.5"),
        (Goal(accuracy=0.0), "goal.accuracy: got 0"),
        (Goal(keep=0.9, reference="techer"), "goal.reference: got 'techer'; allowed: teacher, dense, or an accuracy"),
        (Goal(keep=0.9, reference=1.2), "goal.reference: got '1.2'"),
        (Goal(reference="dense"), "goal.reference: got dense without a share of it; give goal.keep"),
    ],
)
def test_other_floors_are_refused(goal: Goal, words: str) -> None:
    with pytest.raises(UserError) as refused:
        goal.check()
    assert words in str(refused.value)


def test_what_is_left_open_is_weighed_by_the_kind_of_goal() -> None:
    nothing, own = Preference(), Preference(accuracy=0.2)
    assert Goal().weights(nothing) == pytest.approx((0.6, 0.3, 0.1))
    assert Goal(keep=0.98).weights(nothing) == (0.0, 0.75, 0.25)
    assert Goal(accuracy=0.9, latency="2x").weights(nothing) == (0.0, 0.75, 0.25)
    assert Goal(latency="2x").weights(nothing) == (1.0, 0.0, 0.0)
    for goal in (Goal(), Goal(keep=0.98), Goal(macs=0.5)):
        assert goal.weights(own) == pytest.approx((0.2, 0.6, 0.2))
    assert Goal(keep=0.98).weights(Preference(energy=1.0, latency=0.0)) == (0.0, 0.0, 1.0)  # accuracy has its floor


def test_a_goal_becomes_the_goal_of_every_task() -> None:
    goal = Goal(keep=0.98, reference="dense", latency="2ms", macs="4x", size=0.25)
    asked = goal.of_task(Preference(), dense_latency_s=5e-3)
    assert asked.limits == pytest.approx((0.4, float("inf"), 0.25, 0.25))
    tasks = TaskDistribution().with_goal(asked, goal.floor[0])
    assert tasks.reference == "dense"
    for seed in range(5):
        drawn = tasks.draw_goal(seed, accuracy=0.5, latency=0.3)
        assert drawn == asked
    assert drawn.keep == 0.98
    absolute = Goal(accuracy=0.9)
    assert absolute.floor == ("0.9", 1.0)
    assert absolute.of_task(Preference(), 1.0).keep == 1.0
    assert Goal().floor == ("teacher", 0.0)
