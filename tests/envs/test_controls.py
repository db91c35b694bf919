"""Properties of the controls: every position decodes into its ranges, and encoding takes it back."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.envs import CONTROLS, ControlConfig, DistillationEnv, World
from rlkd.envs.action import SCALARS, change, decode, dict_action, encode
from rlkd.objectives import FAMILIES

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


def test_actions_move_from_the_start_and_do_not_add_up(world: World) -> None:
    env = DistillationEnv(world=world)
    env.reset(seed=1)
    action = dict_action(np.full(len(CONTROLS), -0.5, dtype=np.float32))
    first, second = (env.step(action)[0][-len(CONTROLS) :] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    expected = (world.plan[0] - 0.5 * world.config.controls.step).clamp(0, 1)
    np.testing.assert_allclose(first, expected.numpy(), atol=1e-6)
