"""Sharded weights in two real processes on the CPU: the steps, figures and states of whole ones, in half the memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import module_students
import pytest
import sharded_students
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlkd.errors import UserError
from rlkd.models.real import sharding
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.instrumented import Instrumented
from rlkd.students.real import sharded

SCRIPT = Path(sharded_students.__file__)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny_models.need_transformers()
    pytest.importorskip("accelerate", reason="the extra hf is not installed: pip install 'rlkd[hf]'")
    folder = tmp_path_factory.mktemp("sharded")
    paths = os.pathsep.join(path for path in (str(SCRIPT.parent), os.environ.get("PYTHONPATH")) if path)
    done = subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"), SCRIPT, folder],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def tensors(folder: Path, begin: str, process: int = 0) -> dict[str, Tensor]:
    found = load_file(folder / f"{process}.safetensors")
    return {name.removeprefix(begin): tensor for name, tensor in found.items() if name.startswith(begin)}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_sharded_steps_are_those_of_whole_weights(ran: Path, family: str) -> None:
    whole, cut = tensors(ran, f"{family}.False."), tensors(ran, f"{family}.True.")
    assert whole.keys() == cut.keys()
    held = [int(found.pop("held_bytes")) for found in (whole, cut)]
    assert held[1] <= 0.51 * held[0]  # parameters, gradients and moments
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-5, atol=1e-6, msg=name)
    assert (cut["norms1"][0, :2] > 0).all()
    moved = [name for name in cut if name.startswith("state2.module.model.")]
    assert max(float((cut[n] - cut[n.replace("state2", "state1")]).abs().max()) for n in moved) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_sharded_student_goes_on_exactly_and_becomes_whole(ran: Path, family: str) -> None:
    found, undisturbed = tensors(ran, f"{family}."), tensors(ran, f"{family}.True.state2.")
    assert found["loaded"]
    assert found["put back"]
    assert found["gathered"]
    assert float(found["gathered gap"]) <= 1e-6
    again = tensors(ran, f"{family}.again.")
    assert again.keys() == undisturbed.keys()
    assert all(torch.equal(again[name], undisturbed[name]) for name in again)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_one_process_goes_on_from_the_state_of_two(
    ran: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path))
    alone = sharded_students.bert(True) if family == "bert" else sharded_students.llama(False)
    alone.load_training_state(tensors(ran, f"{family}.True.state1."))
    alone.train_window(module_students.controls(**sharded_students.CONTROLS))
    alone.set_controls(module_students.controls(**sharded_students.CONTROLS))
    alone.evaluate("validation")
    state, two = alone.training_state(), tensors(ran, f"{family}.True.state2.")
    for name in two:
        torch.testing.assert_close(state[name], two[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.slow
def test_a_sharded_teacher_gives_the_bytes_of_a_whole_one_and_holds_less(ran: Path) -> None:
    whole, cut = tensors(ran, "signals.False."), tensors(ran, "signals.True.")
    assert int(cut.pop("held_bytes")) < 0.6 * int(whole.pop("held_bytes"))  # embeddings and head stay gathered
    keys = [{path.name for path in (ran / f"cache-{name}").iterdir()} for name in ("whole-0", "shared")]
    assert keys[0] == keys[1]  # one key in the cache, so that each run finds what the other computed
    for process in (0, 1):
        cut = tensors(ran, "signals.True.", process)
        assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
def test_what_cannot_be_sharded_is_one_line(ran: Path) -> None:
    first, second = (json.loads((ran / f"{i}.json").read_text()) for i in (0, 1))
    assert first["batch norm"].startswith("train.shard: got a model with batch norms")
    assert "\n" not in first["batch norm"]
    assert "cache" not in first
    assert "lacks what the first process wrote; give RLKD_CACHE a folder that every process can read" in second["cache"]


def test_one_process_shards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path))
    student = module_students.student_of(config=replace(module_students.TRAIN, shard=True))
    inner = student.student
    assert not sharding.is_sharded(inner)
    student.gather()
    assert student.student is inner
    with pytest.raises(ValueError, match=r"weight: got shape \[1, 2\]; allowed: \[3, 2\]"):
        sharding.load_whole(torch.nn.Linear(2, 3), {"weight": torch.ones(1, 2), "bias": torch.ones(3)})
    weight = torch.randn(3, 2)
    assert sharding.whole(weight) is sharding.part(weight) is sharding.sharded_like(weight, weight) is weight


@pytest.mark.parametrize("broken", ["answers", "gradients"])
def test_a_student_that_differs_once_it_is_sharded_is_refused(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_models.tiny("bert"), module_students.texts()
    inputs = data.batch(data.splits["train"][:2])
    student = Instrumented(model, make_plan(model, inputs, AttachConfig(), data.num_positions), [])

    def wrong(given: Instrumented, _: torch.device) -> Instrumented:
        copied = Instrumented(given.clean_copy(), given.plan, given.links)
        copied.heads = given.heads
        weight: Tensor = copied.model.get_submodule(given.plan.blocks[0]).get_parameter("output.dense.weight")
        if broken == "answers":
            weight.data.mul_(1.5)
        else:
            weight.register_hook(lambda gradient: gradient * 2)
        return copied

    monkeypatch.setattr(sharded, "sharded_copy", wrong)
    monkeypatch.setattr(sharded, "release", lambda _: None)
    with pytest.raises(UserError, match=rf"train\.shard: the sharded student's {broken} differ from the whole one's"):
        sharded.check_sharding(student, inputs, torch.device("cpu"))
