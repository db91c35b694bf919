"""Two real processes on the CPU, started by torchrun, take the steps that one process takes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import module_students
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from rlkd.io import processes
from rlkd.students.real.module import ModuleStudent

SCRIPT = """
import os, sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
import module_students
from safetensors.torch import save_file
from rlkd.io import processes
processes.join("cpu")
os.environ["RLKD_CACHE"] += f"-{processes.index()}"
student = module_students.student_of(config=replace(module_students.TRAIN, micro_batches=2))
changes = {"unit_keep": 0.5} if processes.index() == 0 else {"weights": [0.0, 0.0, 1.0, 0.0]}
told = module_students.controls(**changes)
losses = [student.train_window(told).losses for _ in range(2)]
state = {name: value.contiguous() for name, value in student.state_dict().items()}
state["told losses"] = torch.stack(losses)
state["told count"] = torch.tensor([processes.num_processes(), len(processes.share(torch.arange(12)))])
save_file(state, f"{sys.argv[1]}/{processes.index()}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_models.need_transformers()
    pytest.importorskip("accelerate", reason="the extra hf is not installed: pip install 'rlkd[hf]'")
    (tmp_path / "script.py").write_text(SCRIPT)
    folders = [Path(tiny_models.__file__).parent]
    settings = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*call, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, **settings, "RLKD_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (load_file(tmp_path / f"{i}.safetensors") for i in (0, 1))
    assert first["told count"].tolist() == [2, 6]
    assert all(torch.equal(first[name], second[name]) for name in first)  # the controls were the first one's

    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    alone = module_students.student_of(config=replace(module_students.TRAIN, micro_batches=2))
    losses = [alone.train_window(module_students.controls(unit_keep=0.5)).losses for _ in range(2)]
    torch.testing.assert_close(first["told losses"], torch.stack(losses), rtol=1e-4, atol=1e-5)
    before, after = fresh_state(), alone.state_dict()
    assert max(float((after[name] - first[name]).abs().max()) for name in after) < 2e-4
    assert max(float((after[name] - before[name]).abs().max()) for name in after) > 1e-3


def fresh_state() -> dict[str, torch.Tensor]:
    student: ModuleStudent = module_students.student_of()
    return student.state_dict()


def test_one_process_changes_nothing() -> None:
    assert (processes.num_processes(), processes.index()) == (1, 0)
    positions = torch.arange(5)
    assert torch.equal(processes.share(positions), positions)
    gradient = torch.tensor([1.0, 2.0])
    processes.add_up([gradient, None])
    assert gradient.tolist() == [1.0, 2.0]
    told, cpu = module_students.controls(), torch.device("cpu")
    assert processes.agree(told, cpu) is told
    assert processes.everywhere(torch.tensor([True, False]), cpu).tolist() == [True, False]
    assert list(processes.in_turns([1, 2, 3], lambda task: task * 10)) == [(1, 10), (2, 20), (3, 30)]
