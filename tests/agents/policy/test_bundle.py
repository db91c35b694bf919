import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from samples import some_policy

from rlkd.agents.policy.bundle import load_bundle, save_bundle
from rlkd.agents.policy.policy import HIDDEN
from rlkd.data import Range
from rlkd.envs import OBSERVATIONS, ControlConfig, Scenario
from rlkd.envs.episodes import Episodes
from rlkd.errors import UserError
from rlkd.io.files import MAX_JSON_BYTES, MAX_TENSOR_BYTES
from rlkd.students import Population


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_bundle(some_policy(), tmp_path / "policy", {"seed": 3})
    return tmp_path / "policy"


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the tensors and make the checksum match."""
    blob = save(tensors)
    (folder / "policy.safetensors").write_bytes(blob)
    sign(folder)


def sign(folder: Path) -> None:
    card = json.loads((folder / "bundle.json").read_text())
    card["sha256"] = hashlib.sha256((folder / "policy.safetensors").read_bytes()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(card))


def test_a_policy_survives_the_disk(folder: Path) -> None:
    policy, bundle = some_policy(), load_bundle(folder)
    seen = torch.rand(7, len(OBSERVATIONS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(bundle.policy.act(seen), policy.act(seen))
    assert torch.equal(bundle.policy.start, policy.start)
    assert bundle.policy.controls == ControlConfig(step=0.2)
    assert bundle.provenance == {"seed": 3}
    assert bundle.digest == save_bundle(policy, folder, {"seed": 4})
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "bundle.json", "policy.safetensors"]


def test_weights_of_several_teachers_travel_with_the_policy(folder: Path, scenario: Scenario) -> None:
    theta = torch.tensor([0.5, -1.0, 2.0])
    save_bundle(dataclasses.replace(some_policy(), teacher_weights=theta), folder, {})
    policy = load_bundle(folder).policy
    assert policy.teacher_weights is not None
    assert torch.equal(policy.teacher_weights, theta)
    task = dataclasses.replace(scenario.config.task, num_teachers=Range(3, 3))
    config = dataclasses.replace(scenario.config, task=task)
    episodes = Episodes(dataclasses.replace(scenario, config=config), 2, task)
    policy.controller()(episodes.reset([0, 1]), episodes, 0)
    assert isinstance(episodes.students, Population)
    assert torch.equal(episodes.students._teachers._theta, theta.expand(2, 3))
    card = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**card, "weighs_teachers": 1}))
    with pytest.raises(UserError, match="weighs_teachers is 1"):
        load_bundle(folder)
    (folder / "bundle.json").write_text(json.dumps({**card, "weighs_teachers": False}))
    with pytest.raises(UserError, match="teacher_weights"):
        load_bundle(folder)


@pytest.mark.parametrize(("name", "limit"), [("bundle.json", MAX_JSON_BYTES), ("policy.safetensors", MAX_TENSOR_BYTES)])
def test_a_missing_or_oversized_file_is_named(folder: Path, name: str, limit: int) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(limit + 1)  # sparse: takes no room
    with pytest.raises(UserError, match=f"{name}.*allowed: at most"):
        load_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load_bundle(folder)


def test_truncated_or_altered_tensors_fail_the_checksum(folder: Path) -> None:
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="checksum"):
        load_bundle(folder)
    sign(folder)
    with pytest.raises(UserError, match="damaged"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("format",), 3, "format is 3, this version of rlkd reads 4; train the policy anew with rlkd train, or use"),
        (("format",), None, "format is None"),
        (("observation", "names", 0), "progres", "observation.names is 'progres' at 0"),
        (("observation", "high", 1), 7.0, "observation.high is 7.0 at 1"),
        (("action", "names", 8), "lr", "action.names is 'lr' at 8"),
        (("network", "hidden"), 6, "hidden.0.weight is torch.float32"),
        (("network", "hidden"), None, "damaged"),
        (("network", "hidden"), "5", "network.hidden is '5'"),
        (("network", "hidden"), 10**9, "network.hidden is 1000000000"),
        (("action", "low"), -2.0, "action.low is -2.0, this version of rlkd has -1.0"),
        (("action", "high"), None, "action.high is None, this version of rlkd has 1.0"),
        (("action", "controls", "step"), True, "damaged"),
        (("action", "controls", "temperature"), [1.0, 2.0, 3.0], "damaged"),
        (("action", "controls", "learning_rate"), [1e-3], "damaged"),
        (("action", "controls", "step"), -1.0, "controls.step"),
        (("action", "controls", "step"), "x", "damaged"),
        (("action", "controls", "stride"), 1.0, "damaged"),
    ],
)
def test_a_differing_field_is_named(folder: Path, keys: tuple[str | int, ...], value: object, words: str) -> None:
    card = json.loads((folder / "bundle.json").read_text())
    place = card
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "bundle.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=words):
        load_bundle(folder)


def test_wrong_tensors_are_named(folder: Path) -> None:
    tensors = load((folder / "policy.safetensors").read_bytes())

    def refused(words: str, **changed: torch.Tensor) -> None:
        rewrite(folder, {**tensors, **changed})
        with pytest.raises(UserError, match=words):
            load_bundle(folder)

    refused(r"action\.bias holds a non-finite value", **{"action.bias": tensors["action.bias"] * float("nan")})
    refused(r"action\.weight is torch\.float64", **{"action.weight": tensors["action.weight"].double()})
    refused("action.weight holds a value beyond", **{"action.weight": tensors["action.weight"] * 1e9})
    refused("deviation must be finite and above 0", **{"observation.deviation": -tensors["observation.deviation"]})
    refused("start holds a value outside of 0 to 1", start=tensors["start"] + 1)
    refused("start is torch.float32", start=tensors["start"][:9])
    refused("'more' does not belong in it", more=torch.zeros(1))
    rewrite(folder, {k: v for k, v in tensors.items() if k != "hidden.1.bias"})
    with pytest.raises(UserError, match=r"hidden\.1\.bias is nothing"):
        load_bundle(folder)


def test_a_hidden_observation_survives_and_reads_zero(folder: Path) -> None:
    policy = some_policy()
    policy.deviation[3] = HIDDEN
    save_bundle(policy, folder, {})
    loaded = load_bundle(folder).policy
    seen = torch.rand(2, len(OBSERVATIONS), generator=torch.Generator().manual_seed(1))
    other = seen.clone()
    other[:, 3] = 1 - other[:, 3]
    assert torch.equal(loaded.act(seen), loaded.act(other))
    other[:, 2] = 1 - other[:, 2]
    assert not torch.equal(loaded.act(seen), loaded.act(other))


@pytest.mark.parametrize("text", ["no json", "[1]", "{}", "null", "[" * 100_000, '{"format": 1}'])
def test_anything_but_a_card_is_refused(folder: Path, text: str) -> None:
    (folder / "bundle.json").write_text(text)
    with pytest.raises(UserError):
        load_bundle(folder)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["bundle.json", "policy.safetensors"]), st.data())
def test_damage_is_a_user_error_or_harmless(tmp_path: Path, name: str, data: st.DataObject) -> None:
    folder = tmp_path / "policy"
    save_bundle(some_policy(), folder, {})
    blob = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(blob)
    if name == "policy.safetensors":
        sign(folder)
    try:
        policy = load_bundle(folder).policy
    except UserError:
        return  # any other exception fails the test
    assert torch.isfinite(policy.act(torch.rand(1, len(OBSERVATIONS)))).all()
