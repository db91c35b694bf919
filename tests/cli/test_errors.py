"""docs/errors.md is what the command line says, word for word, and leaves no error of the code out."""

import ast
from pathlib import Path

import pytest
from list_errors import DOC, HAS_MODELS, REAL, page

ROOT = Path(__file__).parent.parent.parent

# Said by nothing that can be set up here, each with the reason.
NOT_SHOWN = {
    "rlkd/files.py: the safetensors library refuses what the header's own check let pass": "not a safetensors file",
    "rlkd/files.py: reading fails half-way, by a defective disk": "cannot read it ({error.strerror})",
    "rlkd/files.py: a full disk, which tests/cli/test_cli.py and tests/test_files.py fake": "the disk is full",
    "rlkd/files.py: a link that cannot be followed, on some versions of Python": "cannot be followed",
    "rlkd/cli/arguments.py: jsonargparse fails in a way of its own": "options or config cannot be understood",
    "rlkd/compression/compact.py: indices in the tensors": "kept_inputs must be rising indices",
    "agents/lock.py: a folder that exists but cannot be written": "cannot write {folder}",
    "agents/lock.py: another run takes the lock between a look and a grab": "UserError(_taken(folder, resume))",
    "agents/lock.py: another run is being resumed in the same moment": "another run is just going on with it",
    "agents/lock.py: a lock that cannot be written or locked": "cannot take over its",
    "agents/ppo_state.py: a state of another training; tests/agents/test_resume.py": "not the state of this training",
    "agents/replay.py: a state of another training; tests/agents/test_resume.py": "not the state of this training",
    "envs/episodes.py: a state of another training; tests/students/test_training_state.py": "training state:",
    "agents/report.py: TensorBoard's reader fails in a way of its own": "cannot read the event file",
    "agents/methods.py: rlkd compare says it first": "needs a policy",
    "agents/online.py: only a policy whose rates no training has gets there": "diverged in its first window",
    "agents/verify.py: a student of another run; tests/agents/test_verify.py": "student: exits after blocks",
    "rlkd/teachers/cache.py: said, and computed anew; tests/teachers/test_cache.py": "",
    "rlkd/teachers/training.py: said, and trained anew; tests/teachers/test_training_cache.py": "torn or altered",
    "agents/pbt.py: set from Python alone": "pbt: got group_size",
    "agents/teacher_weights.py: set from Python alone": "teacher weights: got group_size",
    "rlkd/tasks/files.py: files of other people's packages; tests/tasks/test_files.py makes them": "",
    "envs/modules.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/compression/modules.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/cost/modules.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/models/hooks.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/models/plan.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/models/pretrained.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/students/module.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/memory.py: a machine without memory; tests/test_memory.py": "",
    "rlkd/cli/replay_models.py: several processes, which torchrun starts": "--resume: got several processes",
    "rlkd/students/processes.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/tasks/idx.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/students/causal.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/tasks/texts.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/teachers/token_signals.py: real models need the extra hf; the tests beside it make them": "",
    "rlkd/tasks/tables.py: real models need the extra hf; the tests beside it make them": "",
    "envs/world.py: a student of one's own, from Python": "classes for inputs of shape",
    "rlkd/models/chain.py: inputs of one or four dimensions, which no data set has": "got conv for inputs of shape",
}


def made(path: Path) -> list[tuple[range, str]]:
    """Lines and text of every UserError that a source file makes."""
    source = path.read_text()
    return [
        (range(node.lineno, (node.end_lineno or node.lineno) + 1), ast.get_source_segment(source, node) or "")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError"
    ]


def sources() -> list[Path]:
    tops = [ROOT / name for name in ("rlkd", "envs", "agents", "configs")]
    return sorted({path.resolve() for top in tops for path in top.rglob("*.py")})


@pytest.fixture(scope="module")
def written() -> tuple[str, set[tuple[str, int]]]:
    sites: set[tuple[str, int]] = set()
    return page(sites), sites


def test_the_table_of_errors_says_what_is_said(written: tuple[str, set[tuple[str, int]]]) -> None:
    doc = DOC.read_text()
    if not HAS_MODELS:  # without the extra hf its mistakes cannot be made
        before, _, after = doc.partition(f"\n## {REAL}\n")
        doc = before + after[after.index("\n## ") :]
    assert doc.splitlines() == written[0].splitlines(), "run python experiments/list_errors.py"


def test_every_error_of_the_code_is_in_the_table(written: tuple[str, set[tuple[str, int]]]) -> None:
    missing = []
    for path in sources():
        for lines, call in made(path):
            if not any(name == path.name and line in lines for name, line in written[1]):
                missing.append(f"{path.relative_to(ROOT)}:{lines.start} {' '.join(call.split())}")
    unexplained = [
        m
        for m in missing
        if not any(m.startswith(k.split(":")[0] + ":") and words in m for k, words in NOT_SHOWN.items())
    ]
    assert not unexplained, "\n".join(unexplained)
    stale = [
        k for k, words in NOT_SHOWN.items() if not any(m.startswith(k.split(":")[0]) and words in m for m in missing)
    ]
    assert not stale, stale
