import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from rlkd.agents.bundle import MAX_BYTES, load_bundle, save_bundle
from rlkd.agents.policy import TENSORS, Policy
from rlkd.agents.search import Shortlist
from rlkd.envs import CONTROLS, OBSERVATIONS, ControlConfig
from rlkd.errors import UserError


def some_policy(hidden: int = 5) -> Policy:
    g = torch.Generator().manual_seed(0)
    num_seen, num_set = len(OBSERVATIONS), len(CONTROLS)
    shapes = [(hidden, num_seen), (hidden,), (hidden, hidden), (hidden,), (num_set, hidden), (num_set,)]
    weights = {name: torch.randn(*shape, generator=g) for name, shape in zip(TENSORS, shapes, strict=True)}
    static = Shortlist(torch.rand(2, num_set, generator=g), torch.rand(2, 3, generator=g))
    mean, deviation = torch.rand(num_seen, generator=g), 0.1 + torch.rand(num_seen, generator=g)
    return Policy(weights, mean, deviation, torch.rand(3, num_set, generator=g), static, ControlConfig(step=0.2))


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
    assert bundle.policy.controls == ControlConfig(step=0.2)
    assert bundle.provenance == {"seed": 3}
    assert bundle.digest == save_bundle(policy, folder, {"seed": 4})
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "bundle.json", "policy.safetensors"]


@pytest.mark.parametrize("name", ["bundle.json", "policy.safetensors"])
def test_a_missing_or_oversized_file_is_named(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no room
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
        (("format",), 1, "format is 1"),
        (("observation", "names", 0), "progres", "observation.names is 'progres' at 0"),
        (("observation", "high", 1), 7.0, "observation.high is 7.0 at 1"),
        (("action", "names", 8), "lr", "action.names is 'lr' at 8"),
        (("network", "hidden"), 6, "hidden.0.weight is torch.float32"),
        (("network", "hidden"), None, "damaged"),
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


def test_non_finite_and_missing_tensors_are_named(folder: Path) -> None:
    tensors = load((folder / "policy.safetensors").read_bytes())
    broken = {**tensors, "action.bias": tensors["action.bias"] * float("nan")}
    rewrite(folder, broken)
    with pytest.raises(UserError, match=r"action\.bias holds a non-finite value"):
        load_bundle(folder)
    rewrite(folder, {k: v for k, v in tensors.items() if k != "hidden.1.bias"})
    with pytest.raises(UserError, match=r"hidden\.1\.bias is nothing"):
        load_bundle(folder)


@pytest.mark.parametrize("text", ["no json", "[1]", "{}", "null", "[" * 100_000, '{"format": 1}'])
def test_anything_but_a_card_is_refused(folder: Path, text: str) -> None:
    (folder / "bundle.json").write_text(text)
    with pytest.raises(UserError):
        load_bundle(folder)


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


def test_a_pickle_in_disguise_runs_no_code(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    blob = pickle.dumps(_Bomb(marker))
    (folder / "policy.safetensors").write_bytes(blob)
    sign(folder)
    with pytest.raises(UserError):
        load_bundle(folder)
    assert not marker.exists()
    pickle.loads(blob)
    assert marker.exists()  # the bomb was live


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
