"""What loading a student needs, and needs not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shipped_students import quarter, trained

from rlkd.compression.real.cut import ship
from rlkd.compression.real.student_folder import save_module_student
from rlkd.models.real.attachment import AttachConfig

CODE = """
import sys
for name in ("sklearn", "scipy", "matplotlib", "tensorboard", "stable_baselines3", "gymnasium", "optuna"):
    sys.modules[name] = None  # an import of it raises ImportError
from rlkd.compression.{module} import {function}
"""


@pytest.mark.parametrize(
    ("module", "function"), [("compact", "load_student"), ("real.student_folder", "load_module_student")]
)
def test_a_student_is_loaded_without_the_libraries_that_trained_it(module: str, function: str) -> None:
    if module == "real.student_folder":
        pytest.importorskip("transformers")
    code = CODE.format(module=module, function=function)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_student_of_transformers_answers_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    student = trained("bert", AttachConfig())
    shipped = ship(student, "sequence_classification", quarter(student.plan, ("units", "heads")), 1.0, 0.6)
    save_module_student(shipped, tmp_path, None, {})
    code = CODE.format(module="loading", function="load_student") + (
        "import json, torch\n"
        f"student = load_student({str(tmp_path)!r})\n"
        "ids = torch.arange(5, 12)[None]\n"
        "print(json.dumps(student(input_ids=ids, attention_mask=torch.ones_like(ids)).tolist()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        wanted = shipped(input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), wanted)
