"""Properties of the controls: every position decodes into its ranges, and encoding takes it back."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.envs import CONTROLS, ControlConfig, DistillationEnv, Scenario
from rlkd.envs.action import SCALARS, change, decode, dict_action, encode, with_values
from rlkd.losses import FAMILIES

CONFIG = ControlConfig()
positions = st.lists(st.floats(0, 1, width=32), min_size=len(CONTROLS), max_size=len(CONTROLS))


@settings(max_examples=40, deadline=None)
@given(positions)
def test_every_position_decodes_within_its_ranges(values: list[float]) -> None:
    controls = decode(torch.tensor([values]), CONFIG, 10)
    for name in ("temperature", "feature_keep", "unit_keep", "learning_rate"):
        low, high = getattr(CONFIG, name)
        assert low * (1 - 1e-5) <= float(getattr(controls, name)) <= high * (1 + 1e-5), name
    assert 0.1 - 1e-6 <= float(controls.exit_threshold) <= 1.0 + 1e-6
    assert (controls.weights >= 0).all()
    assert abs(float(controls.weights.sum()) - 1) < 1e-5


@settings(max_examples=40, deadline=None)
@given(positions)
def test_encoding_what_was_decoded_gives_the_same_controls(values: list[float]) -> None:
    position = torch.tensor([values], dtype=torch.float64)
    controls = decode(position, CONFIG, 10)
    named = {f"weight_{family}": float(controls.weights[0, i]) for i, family in enumerate(FAMILIES)}
    for name in SCALARS:
        named[name] = float(getattr(controls, name))
    named["exit_threshold"] = values[CONTROLS.index("exit_threshold")]  # given as a position
    again = encode(named, CONFIG)
    scalars = len(FAMILIES)
    torch.testing.assert_close(again[scalars:].double(), position[0, scalars:], atol=1e-5, rtol=1e-5)
    # weights come back up to a common shift of the logits, which changes nothing
    torch.testing.assert_close(decode(again[None].double(), CONFIG, 10).weights, controls.weights, atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(positions, st.lists(st.floats(-3, 3, width=32), min_size=len(CONTROLS), max_size=len(CONTROLS)))
def test_a_change_is_at_most_a_step_and_stays_inside(start: list[float], action: list[float]) -> None:
    before = torch.tensor([start])
    after = change(before, torch.tensor([action]), CONFIG)
    assert (after >= 0).all()
    assert (after <= 1).all()
    assert ((after - before).abs() <= CONFIG.step + 1e-6).all()
    assert torch.equal(change(before, torch.zeros(1, len(CONTROLS)), CONFIG), before)


def test_actions_move_from_the_start_and_do_not_add_up(scenario: Scenario) -> None:
    env = DistillationEnv(scenario=scenario)
    env.reset(seed=1)
    action = dict_action(np.full(len(CONTROLS), -0.5, dtype=np.float32))
    first, second = (env.step(action)[0][-len(CONTROLS) :] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    expected = (scenario.plan.settings[0] - 0.5 * scenario.config.controls.step).clamp(0, 1)
    np.testing.assert_allclose(first, expected.numpy(), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(positions, st.floats(1, 10), st.floats(0.1, 1), st.floats(0.05, 1), st.floats(5e-4, 3e-2))
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
    controls = decode(with_values(middle, {**wanted, "exit_threshold": -1.0}, CONFIG), CONFIG, 10)
    assert controls.temperature.tolist() == pytest.approx([1.0, 2.0, 10.0], rel=1e-5)
    assert controls.feature_keep.tolist() == pytest.approx([1.0] * 3)
    assert controls.unit_keep.tolist() == pytest.approx([0.05] * 3)
    assert controls.exit_threshold.tolist() == pytest.approx([0.1] * 3)
    never = decode(with_values(middle, {"exit_threshold": 1.0}, CONFIG), CONFIG, 10)
    assert never.exit_threshold.tolist() == pytest.approx([1.0] * 3)
    fixed = ControlConfig(temperature=(3.0, 3.0))
    assert decode(with_values(middle, {"temperature": 5.0}, fixed), fixed, 10).temperature.tolist() == [3.0] * 3


def test_weights_are_set_in_proportion_and_zero_is_the_bottom_of_the_range() -> None:
    first = torch.tensor([2.0, 0.0])
    values: tuple[float | torch.Tensor, ...] = (first, 1.0, 0.5, 0.5)
    named = dict(zip((f"weight_{family}" for family in FAMILIES), values, strict=True))
    position = with_values(torch.zeros(2, len(CONTROLS)), named, CONFIG)
    weights = decode(position, CONFIG, 10).weights
    assert weights[0].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125], rel=1e-5)
    bottom = math.exp(-8)
    assert weights[1].tolist() == pytest.approx([w / (2 + bottom) for w in (bottom, 1.0, 0.5, 0.5)], rel=1e-4)
    assert position[:, : len(FAMILIES)].amax(1).tolist() == [1.0, 1.0]


def test_some_weights_without_the_others_are_refused() -> None:
    with pytest.raises(ValueError, match="got weight_hard_label, weight_feature; give the weights of all"):
        with_values(torch.zeros(1, len(CONTROLS)), {"weight_feature": 1.0, "weight_hard_label": 1.0}, CONFIG)
    with pytest.raises(ValueError, match="no value for weight_hard_label"):
        encode({"temperature": 2.0}, CONFIG)
