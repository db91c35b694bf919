"""Properties of the controls: all unit controls decode into their ranges, and encoding takes them back."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.envs import CONTROLS, ControlConfig, DistillationEnv, Scenario
from rlkd.envs.action import (
    EXIT_KINDS,
    SCALARS,
    change,
    decode,
    dict_action,
    encode,
    exit_kind,
    with_exit_kind,
    with_values,
)
from rlkd.losses import FAMILIES

CONFIG = ControlConfig()
units = st.lists(st.floats(0, 1, width=32), min_size=len(CONTROLS), max_size=len(CONTROLS))


@settings(max_examples=40, deadline=None)
@given(units)
def test_all_unit_controls_decode_within_its_ranges(values: list[float]) -> None:
    controls = decode(torch.tensor([values]), CONFIG, 10)
    for name in ("temperature", "feature_keep", "unit_keep", "learning_rate"):
        low, high = getattr(CONFIG, name)
        assert low * (1 - 1e-5) <= float(getattr(controls, name)) <= high * (1 + 1e-5), name
    assert 0.1 - 1e-6 <= float(controls.exit_threshold) <= 1.0 + 1e-6
    assert (controls.weights >= 0).all()
    assert abs(float(controls.weights.sum()) - 1) < 1e-5


@settings(max_examples=40, deadline=None)
@given(units)
def test_encoding_what_was_decoded_gives_the_same_controls(values: list[float]) -> None:
    u = torch.tensor([values], dtype=torch.float64)
    controls = decode(u, CONFIG, 10)
    named = {f"weight_{family}": float(controls.weights[0, i]) for i, family in enumerate(FAMILIES)}
    for name in SCALARS:
        named[name] = float(getattr(controls, name))
    named["exit_threshold"] = values[CONTROLS.index("exit_threshold")]  # given as its unit control
    kind = EXIT_KINDS[int(exit_kind(u)[0])]
    again = encode(named, CONFIG, kind)
    scalars = slice(len(FAMILIES), -len(EXIT_KINDS))
    torch.testing.assert_close(again[scalars].double(), u[0, scalars], atol=1e-5, rtol=1e-5)
    assert again[-len(EXIT_KINDS) :].tolist() == [float(kind == other) for other in EXIT_KINDS]
    # weights come back up to a common shift of the logits, which changes nothing
    torch.testing.assert_close(decode(again[None].double(), CONFIG, 10).weights, controls.weights, atol=1e-5, rtol=1e-4)


actions = st.lists(st.floats(-3, 3, width=32), min_size=len(CONTROLS), max_size=len(CONTROLS))


@settings(max_examples=40, deadline=None)
@given(units, units, actions)
def test_a_change_is_at_most_a_step_and_stays_inside(
    values: list[float], begin: list[float], action: list[float]
) -> None:
    before, start = torch.tensor([values]), torch.tensor([begin])
    after = change(before, torch.tensor([action]), start, CONFIG)
    assert (after >= 0).all()
    assert (after <= 1).all()
    moved = slice(0, -len(EXIT_KINDS))
    assert ((after - before)[:, moved].abs() <= CONFIG.step + 1e-6).all()
    held = change(before, torch.zeros(1, len(CONTROLS)), start, CONFIG)
    assert torch.equal(held[:, moved], before[:, moved])


@pytest.mark.parametrize("kind", EXIT_KINDS)
def test_no_action_has_the_start_s_exit_and_a_lead_of_half_an_action_flips_it(kind: str) -> None:
    start = with_exit_kind(torch.full((1, len(CONTROLS)), 0.5), kind)
    u = with_exit_kind(start, "never" if kind == "first" else "first")  # what it is now does not count
    action = torch.zeros(1, len(CONTROLS))
    assert EXIT_KINDS[int(exit_kind(change(u, action, start, CONFIG))[0])] == kind
    other = (EXIT_KINDS.index(kind) + 1) % len(EXIT_KINDS)
    action[0, other - len(EXIT_KINDS)] = 0.45
    assert EXIT_KINDS[int(exit_kind(change(u, action, start, CONFIG))[0])] == kind
    action[0, other - len(EXIT_KINDS)] = 0.55
    assert int(exit_kind(change(u, action, start, CONFIG))[0]) == other


def test_actions_add_up_from_window_to_window(scenario: Scenario) -> None:
    env = DistillationEnv(scenario=scenario)
    env.reset(seed=1)
    action = dict_action(np.full(len(CONTROLS), -0.5, dtype=np.float32))
    seen = [env.step(action)[0][-len(CONTROLS) :] for _ in range(2)]
    step, moved = scenario.config.controls.step, slice(0, -len(EXIT_KINDS))
    for window, observed in enumerate(seen):
        expected = (scenario.start - 0.5 * step * (window + 1)).clamp(0, 1)
        np.testing.assert_allclose(observed[moved], expected[moved].numpy(), atol=1e-6)
    np.testing.assert_array_equal(seen[0][-len(EXIT_KINDS) :], seen[1][-len(EXIT_KINDS) :])


@settings(max_examples=40, deadline=None)
@given(units, st.floats(1, 10), st.floats(0.1, 1), st.floats(0.05, 1), st.floats(5e-4, 3e-2))
def test_values_that_were_set_are_decoded_and_the_others_stay(
    values: list[float], temperature: float, features: float, units: float, rate: float
) -> None:
    before = torch.tensor([values, [0.5] * len(CONTROLS)])
    named = {"temperature": temperature, "feature_keep": features, "unit_keep": units, "learning_rate": rate}
    for name, value in named.items():
        after = with_values(before, {name: torch.tensor([value, value])}, CONFIG)
        torch.testing.assert_close(getattr(decode(after, CONFIG, 10), name), torch.full((2,), value), rtol=1e-4, atol=0)
        others = [i for i, other in enumerate(CONTROLS) if other != name]
        assert torch.equal(after[:, others], before[:, others])
    assert torch.equal(before[1], torch.full((len(CONTROLS),), 0.5))  # the argument is not written to


def test_values_are_clipped_to_their_ranges() -> None:
    middle = torch.full((3, len(CONTROLS)), 0.5)
    wanted: dict[str, float | torch.Tensor] = {
        "temperature": torch.tensor([0.1, 2.0, 99.0]),
        "feature_keep": 2.0,
        "unit_keep": 0.01,
    }
    controls = decode(with_values(middle, wanted, CONFIG), CONFIG, 10)
    assert controls.temperature.tolist() == pytest.approx([1.0, 2.0, 10.0], rel=1e-5)
    assert controls.feature_keep.tolist() == pytest.approx([1.0] * 3)
    assert controls.unit_keep.tolist() == pytest.approx([0.05] * 3)
    by_threshold = with_exit_kind(with_values(middle, {"exit_threshold": -1.0}, CONFIG), "threshold")
    assert decode(by_threshold, CONFIG, 10).exit_threshold.tolist() == pytest.approx([0.1 + 0.9 * 0.01] * 3)
    highest = with_values(by_threshold, {"exit_threshold": 2.0}, CONFIG)
    assert decode(highest, CONFIG, 10).exit_threshold.tolist() == pytest.approx([0.1 + 0.9 * 0.99] * 3)
    fixed = ControlConfig(temperature=(3.0, 3.0))
    assert decode(with_values(middle, {"temperature": 5.0}, fixed), fixed, 10).temperature.tolist() == [3.0] * 3


def test_weights_are_set_in_proportion_and_zero_is_the_bottom_of_the_range() -> None:
    first = torch.tensor([2.0, 0.0])
    values: tuple[float | torch.Tensor, ...] = (first, 1.0, 0.5, 0.5)
    named = dict(zip((f"weight_{family}" for family in FAMILIES), values, strict=True))
    u = with_values(torch.zeros(2, len(CONTROLS)), named, CONFIG)
    weights = decode(u, CONFIG, 10).weights
    assert weights[0].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125], rel=1e-5)
    bottom = math.exp(-8)
    assert weights[1].tolist() == pytest.approx([w / (2 + bottom) for w in (bottom, 1.0, 0.5, 0.5)], rel=1e-4)
    assert u[:, : len(FAMILIES)].amax(1).tolist() == [1.0, 1.0]


def test_some_weights_without_the_others_are_refused() -> None:
    with pytest.raises(ValueError, match="got weight_hard_label, weight_feature; give the weights of all"):
        with_values(torch.zeros(1, len(CONTROLS)), {"weight_feature": 1.0, "weight_hard_label": 1.0}, CONFIG)
    with pytest.raises(ValueError, match="no value for weight_hard_label"):
        encode({"temperature": 2.0}, CONFIG)
