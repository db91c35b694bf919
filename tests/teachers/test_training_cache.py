import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from rlkd.data import load_dataset
from rlkd.errors import UserError
from rlkd.teachers import TeacherConfig, load_teachers

CONFIG = TeacherConfig(widths=(6,), num_samples=(24, 40), num_steps=1)
BOTH = """
from rlkd.data import load_dataset
from rlkd.teachers import TeacherConfig, load_teachers
data = load_dataset("digits")
print("ready", flush=True)
input()
teachers = load_teachers(TeacherConfig(widths=(6,), num_samples=(24, 40), num_steps=1), data)
print(float(sum(p.sum() for t in teachers for p in t.parameters())))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_two_processes_that_train_the_same_teachers_leave_one_sound_cache(cache: Path) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-c", BOTH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("\n")
        run.stdin.flush()
    sums = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sums[0] == sums[1] != ""
    assert len(list(cache.iterdir())) == 1  # no litter


@pytest.mark.parametrize("damage", ["cut", "nan", "shape", "missing", "more", "link", "altered", "unsigned"])
def test_a_damaged_cache_says_what_to_do(cache: Path, damage: str) -> None:
    data = load_dataset("digits")
    load_teachers(CONFIG, data)
    path = next(cache.iterdir())
    tensors = load(path.read_bytes())
    name = "0.layers.0.weight"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "link":
        path.rename(cache.parent / "outside")
        path.symlink_to(cache.parent / "outside")
    else:
        changed = {
            "nan": {**tensors, name: tensors[name] * float("nan")},
            "shape": {**tensors, name: tensors[name][:3]},
            "missing": {k: v for k, v in tensors.items() if k != name},
            "altered": {**tensors, name: tensors[name] + 1e-3},
            "unsigned": tensors,
            "more": {**tensors, "2.layers.0.weight": torch.zeros(2)},
        }[damage]
        old = {"sha256": hashlib.sha256(save(tensors)).hexdigest()}
        path.write_bytes(save(changed) if damage == "unsigned" else save(changed, old))
    with pytest.raises(UserError, match=r"^cached teachers: .*; delete the file to train them anew$"):
        load_teachers(CONFIG, data)


def test_a_cache_that_cannot_be_written_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("RLKD_CACHE", str(cache / "file"))
    with pytest.raises(UserError, match=r"cannot write it \(Not a directory\)"):
        load_teachers(CONFIG, load_dataset("digits"))
