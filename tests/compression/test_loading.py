"""What loading a student needs, and needs not."""

import subprocess
import sys

import pytest

CODE = """
import sys
for name in ("sklearn", "matplotlib", "tensorboard", "stable_baselines3", "gymnasium", "optuna"):
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
