import dataclasses
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from rlkd.data import Split
from rlkd.envs import ENV_ID, OBSERVATIONS, ControlConfig, EnvConfig, Episodes, FlattenAction, Scenario, build_scenario
from rlkd.envs.action import (
    CONTROLS,
    EXIT_KINDS,
    decode,
    dict_action,
    encode,
    exit_kind,
    flat_action,
    published_setting,
)
from rlkd.errors import UserError

CHANGE = OBSERVATIONS.index("score_change")


def actions(num: int, seed: int = 0) -> list[np.ndarray]:
    """[12] changes, drawn uniformly."""
    rng = np.random.default_rng(seed)
    return [rng.uniform(-1, 1, len(CONTROLS)).astype(np.float32) for _ in range(num)]


def play(
    scenario: Scenario, steps: list[np.ndarray], seed: int = 3
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Observations [1 + W, O], rewards [W] and infos of one episode."""
    env = gymnasium.make(ENV_ID, scenario=scenario)
    observation, _ = env.reset(seed=seed)
    seen, rewards, infos = [observation], [], []
    for step in steps:
        observation, reward, _, _, info = env.step(dict_action(step))
        seen.append(observation)
        rewards.append(float(reward))
        infos.append(info)
    return np.stack(seen), np.array(rewards), infos


def test_gymnasium_and_sb3_find_nothing_to_warn_of(scenario: Scenario) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ENV_ID, scenario=scenario).unwrapped)
        sb3_check_env(FlattenAction(gymnasium.make(ENV_ID, scenario=scenario)))


def test_vector_environment_agrees_with_single_ones_step_by_step(double_scenario: Scenario) -> None:
    scenario = double_scenario
    vector = gymnasium.make_vec(ENV_ID, num_envs=3, vectorization_mode="vector_entry_point", scenario=scenario)
    singles = [gymnasium.make(ENV_ID, scenario=scenario) for _ in range(3)]
    observations, _ = vector.reset(seed=20)
    for i, env in enumerate(singles):
        np.testing.assert_allclose(env.reset(seed=20 + i)[0], observations[i], atol=1e-6)
    for step in range(2 * scenario.config.num_windows):
        flat = np.stack(actions(3, seed=step))
        observations, rewards, terminated, truncated, info = vector.step(dict_action(flat))
        assert not truncated.any()
        for i, env in enumerate(singles):
            observation, reward, done, _, single_info = env.step(dict_action(flat[i]))
            assert done == terminated[i] == ((step + 1) % scenario.config.num_windows == 0)
            last = info["final_obs"][i] if done else observations[i]
            figures = info["final_info"] if done else info
            np.testing.assert_allclose(observation, last, atol=1e-6)
            assert reward == pytest.approx(rewards[i], abs=1e-6)
            assert single_info["macs_ratio"] == pytest.approx(figures["macs_ratio"][i], abs=1e-6)
            if done:
                np.testing.assert_allclose(env.reset()[0], observations[i], atol=1e-6)


def test_seeds_repeat_and_differ(scenario: Scenario) -> None:
    steps = actions(2)
    first, again, other = play(scenario, steps), play(scenario, steps), play(scenario, steps, seed=4)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    vector = gymnasium.make_vec(ENV_ID, num_envs=2, vectorization_mode="vector_entry_point", scenario=scenario)
    assert np.array_equal(vector.reset(seed=[5, 6])[0], vector.reset(seed=5)[0])
    with pytest.raises(ValueError, match="1 seeds for 2 students"):
        vector.reset(seed=[5])


@pytest.mark.parametrize("seed", [3, 4, 8])
def test_rewards_are_the_changes_of_the_score(goal_scenario: Scenario, seed: int) -> None:
    seen, rewards, infos = play(goal_scenario, actions(4), seed)
    first = gymnasium.make(ENV_ID, scenario=goal_scenario).unwrapped
    first.reset(seed=seed)
    begin = float(first._episodes.evaluate("validation")[2][0])  # type: ignore[attr-defined]
    scores = [begin, *(info["score"] for info in infos)]
    np.testing.assert_allclose(rewards, np.diff(scores), atol=1e-6)
    np.testing.assert_allclose(seen[1:, CHANGE], rewards.clip(-2, 2), atol=1e-6)
    assert rewards.sum() == pytest.approx(scores[-1] - begin, abs=1e-6)


def test_score_by_hand(goal_scenario: Scenario) -> None:
    names = ("preference_accuracy", "preference_latency", "preference_energy")
    kinds = set()
    for seed in range(3, 9):
        seen, _, infos = play(goal_scenario, actions(2), seed)
        w = [seen[0, OBSERVATIONS.index(name)] for name in names]
        i = infos[0]
        expected = w[0] * i["accuracy"] + w[1] * (1 - i["latency_ratio"]) + w[2] * (1 - i["energy_ratio"])
        if i["has_floor"]:
            assert w[0] == 0
            expected -= min(2.0, 10 * max(0.0, -i["margin"]))  # the margin is accuracy less the floor
            assert i["shortfall"] == pytest.approx(max(0.0, -i["margin"]), abs=1e-6)
            assert i["goal_met"] == (i["margin"] >= 0)
        assert i["score"] == pytest.approx(expected, abs=1e-5)
        kinds.add((bool(i["has_floor"]), bool(seen[0, OBSERVATIONS.index("has_limit")])))
    assert kinds == {(True, False), (False, True), (False, False)}


def test_a_reward_belongs_to_the_action_that_caused_it(scenario: Scenario) -> None:
    common, ending = actions(2), actions(2, seed=9)
    one = play(scenario, [*common, ending[0]])
    two = play(scenario, [*common, ending[1]])
    np.testing.assert_array_equal(one[1][:2], two[1][:2])
    assert one[1][2] != two[1][2]
    # nothing but pruning harder: the window that prunes is the one whose cost falls
    hold, prune = np.zeros(len(CONTROLS), dtype=np.float32), np.zeros(len(CONTROLS), dtype=np.float32)
    prune[CONTROLS.index("unit_keep")] = -1.0
    ratios = [info["macs_ratio"] for info in play(scenario, [hold, prune, prune])[2]]
    assert ratios[0] == pytest.approx(1.0)
    assert ratios[1] < 0.5


def with_split_changed(scenario: Scenario, split: Split, what: str) -> Scenario:
    """The same scenario with every label, or every input, of one split replaced."""
    index = scenario.data.splits[split]
    labels, inputs = scenario.data.labels.clone(), scenario.data.inputs.clone()
    if what == "labels":
        labels[index] = (labels[index] + 1) % scenario.data.num_classes
    else:
        inputs[index] = 1.0 - inputs[index]
    return dataclasses.replace(scenario, data=dataclasses.replace(scenario.data, labels=labels, inputs=inputs))


def test_test_data_changes_nothing_that_is_seen_or_rewarded(scenario: Scenario) -> None:
    steps = actions(3)
    plain = play(scenario, steps)
    for what in ("labels", "inputs"):
        other = play(with_split_changed(scenario, "test", what), steps)
        np.testing.assert_array_equal(plain[0], other[0])
        np.testing.assert_array_equal(plain[1], other[1])
    assert not np.array_equal(plain[1], play(with_split_changed(scenario, "validation", "labels"), steps)[1])


def test_students_train_on_the_train_split_alone(scenario: Scenario) -> None:
    def trained(w: Scenario) -> dict[str, torch.Tensor]:
        episodes = Episodes(w, 2)
        episodes.reset([1, 2])
        episodes.step(episodes.start)
        return episodes.students.state_dict()

    plain = trained(scenario)
    for split in ("validation", "test"):
        other = trained(with_split_changed(scenario, split, "inputs"))  # type: ignore[arg-type]
        assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert not torch.equal(
        plain["layers.0.weight"], trained(with_split_changed(scenario, "train", "inputs"))["layers.0.weight"]
    )


def test_no_action_holds_the_start(scenario: Scenario) -> None:
    seen, _, _ = play(scenario, [np.zeros(len(CONTROLS), dtype=np.float32)] * 2)
    controls = [OBSERVATIONS.index(f"control_{name}") for name in CONTROLS]
    start = published_setting(scenario.config.controls)
    np.testing.assert_allclose(seen[0, controls], start.numpy())
    np.testing.assert_allclose(seen[1:, controls[:-3]], np.stack([start[:-3].numpy()] * 2))
    assert exit_kind(torch.from_numpy(seen[:, controls])).tolist() == [0, 0, 0]


def test_observations_stay_in_bounds(scenario: Scenario) -> None:
    space = gymnasium.make(ENV_ID, scenario=scenario).observation_space
    assert space.shape == (len(OBSERVATIONS),) == (len(set(OBSERVATIONS)),)
    for observation in play(scenario, actions(4, seed=2))[0]:
        assert space.contains(observation)


def test_a_diverged_student_ends_with_the_worst_score(config: EnvConfig) -> None:
    hot = build_scenario(dataclasses.replace(config, controls=ControlConfig(learning_rate=(1e30, 1e30))))
    env = gymnasium.make(ENV_ID, scenario=hot)
    observation, _ = env.reset(seed=0)
    for num_rollbacks in (1, 2):
        observation, _, terminated, _, info = env.step(dict_action(np.zeros(len(CONTROLS), dtype=np.float32)))
        assert (terminated, info["diverged"], info["num_rollbacks"]) == (False, 0.0, num_rollbacks)
        assert np.isfinite(observation).all()
    last = info["score"]
    observation, reward, terminated, truncated, info = env.step(dict_action(np.zeros(len(CONTROLS), dtype=np.float32)))
    assert (terminated, truncated, info["diverged"], info["score"]) == (True, False, 1.0, 0.0)
    assert info["num_rollbacks"] == 2.0
    assert reward == pytest.approx(0.0 - last, abs=1e-6)
    assert np.isfinite(observation).all()


def test_controls_decode_by_hand() -> None:
    config = ControlConfig()
    low, high = decode(torch.zeros(1, 12), config, 10), decode(torch.ones(1, 12), config, 10)
    for name in ("temperature", "feature_keep", "unit_keep", "learning_rate"):
        torch.testing.assert_close(
            torch.stack([getattr(low, name)[0], getattr(high, name)[0]]), torch.tensor(getattr(config, name))
        )
    assert low.weights.tolist() == [[0.25] * 4]
    published = decode(published_setting(config)[None], config, 10)
    torch.testing.assert_close(published.weights, torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert float(published.temperature) == pytest.approx(4.0)
    assert (float(published.feature_keep), float(published.unit_keep)) == pytest.approx((1.0, 1.0))
    assert float(published.exit_threshold) == 1.0


def test_the_kind_of_exit_decides_the_threshold_and_ties_go_to_the_first() -> None:
    u = torch.full((5, 12), 0.5)
    u[:, -3:] = torch.tensor([[0.6, 0.5, 0.4], [0.1, 0.2, 0.0], [0.3, 0.3, 0.31], [0.7, 0.7, 0.7], [0.2, 0.9, 0.9]])
    assert [EXIT_KINDS[i] for i in exit_kind(u).tolist()] == ["never", "first", "threshold", "never", "first"]
    threshold = decode(u, ControlConfig(), 10).exit_threshold
    assert threshold.tolist() == pytest.approx([1.0, 0.1, 0.1 + 0.9 * 0.5, 1.0, 0.1])


def test_flat_and_dict_actions_are_one() -> None:
    flat = np.stack(actions(4))
    np.testing.assert_array_equal(flat_action(dict_action(flat)), flat)
    named = {**dict.fromkeys((f"weight_{f}" for f in ("hard_label", "response", "feature", "attention")), 1.0)}
    values = {
        **named,
        "temperature": 10.0,
        "feature_keep": 0.1,
        "unit_keep": 1.0,
        "exit_threshold": 0.5,
        "learning_rate": 5e-4,
    }
    for kind, last in (("never", [1, 0, 0]), ("first", [0, 1, 0]), ("threshold", [0, 0, 1])):
        u = encode(values, ControlConfig(), kind)
        assert u.tolist() == pytest.approx([1, 1, 1, 1, 1, 0, 1, 0.5, 0, *last])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_windows": 0}, "num_windows: got 0"),
        ({"controls": ControlConfig(step=0.0)}, r"controls\.step: got 0"),
        ({"controls": ControlConfig(unit_keep=(0.5, 1.5))}, r"controls\.unit_keep"),
        ({"controls": ControlConfig(temperature=(1.0, float("inf")))}, r"controls\.temperature: got \[1, inf\]"),
        ({"controls": ControlConfig(learning_rate=(5e-324, 1e-3))}, r"controls\.learning_rate"),
        ({"controls": ControlConfig(temperature=(1.0, 1e31))}, r"controls\.temperature: got \[1, 1e\+31\]"),
        ({"controls": ControlConfig(temperature=(float("nan"), 2.0))}, r"controls\.temperature"),
    ],
)
def test_impossible_configs_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(EnvConfig(), **change).check()
