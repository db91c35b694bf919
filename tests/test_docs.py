import ast
import doctest
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import yaml
from stable_baselines3 import PPO

import rlkd
from rlkd.cli.main import VERBS, main

ROOT = Path(__file__).parent.parent
OTHER_PROGRAMS = {
    *("--logdir", "--algo", "--env", "--gym-packages", "--nproc_per_node", "--max-logprobs", "--head", "--address"),
    *("--port", "--docs", "--section.key"),
}
WITH_PYTHON = ("README.md", "docs/index.md", "docs/python.md", "docs/environment.md", "docs/train.md")
TUTORIALS = ("text_classifier", "ppo_experiment", "own_parts")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _python(page: Path) -> list[str]:
    """Return the blocks that run as they stand; a block of ```py names models that a test has not."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120
    assert max(line.count("|") - 1 for line in lines if line.startswith("|")) <= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_on_pages_imports_names_that_exist(page: Path) -> None:
    for block in _python(page):
        tree = ast.parse(block)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(page), "exec"), {})


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = _python(ROOT / page)
    assert blocks
    for block in blocks:
        exec(block, {})
        shutil.rmtree(tmp_path / "my-student", ignore_errors=True)


def test_the_settings_for_rl_zoo3_are_those_of_ppo_and_the_environment() -> None:
    (block,) = re.findall(r"```yaml\n(rlkd/.*?)```", (ROOT / "docs" / "train.md").read_text(), re.DOTALL)
    ((env_id, settings),) = yaml.safe_load(block).items()
    assert settings["n_steps"] == rlkd.EnvConfig().num_windows  # a rollout has whole episodes
    assert gymnasium.spec(env_id).id == env_id
    own = {"n_envs", "n_timesteps"}  # of rl-zoo3 itself
    assert own < set(settings) <= own | set(inspect.signature(PPO).parameters)
    assert settings["n_envs"] * settings["n_steps"] % settings["batch_size"] == 0
    assert set(eval(settings["policy_kwargs"])) == {"net_arch"}


def test_every_verb_has_a_row_that_leads_to_a_page_about_it() -> None:
    page = (ROOT / "docs" / "verbs.md").read_text()
    rows = dict(re.findall(r"^\| (`.+?`) \| (.+) \|$", page, re.MULTILINE))
    verbs = {verb: text for names, text in rows.items() for verb in re.findall(r"`([\w-]+)`", names)}
    assert set(verbs) == set(VERBS)
    for verb, text in verbs.items():
        links = re.findall(r"\]\(([\w-]+\.md)", text)
        assert any(f"rlkd {verb}" in (ROOT / "docs" / link).read_text() for link in links), verb


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("distil_digits", ["2"]),
        ("own_module", ["1", "60"]),
        ("own_agent", ["2", "1"]),
        ("environment", ["2"]),
    ],
)
def test_examples_run(name: str, sizes: list[str], tmp_path: Path) -> None:
    call = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *sizes]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TUTORIALS)
def test_notebooks_hold_the_cells_of_the_tutorials_with_their_output(name: str) -> None:
    folder = ROOT / "docs" / "tutorials"
    names: dict[str, Any] = {"__name__": "build", "__file__": str(folder / "build.py")}
    exec((folder / "build.py").read_text(), names)
    notebook = json.loads((folder / f"{name}.ipynb").read_text())
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert cells == names["cells_of"]((folder / f"{name}.py").read_text()), "make them anew: make notebooks"
    printing = [cell for cell in notebook["cells"] if re.search(r"^\s*print\(", "".join(cell["source"]), re.MULTILINE)]
    assert len(printing) >= 3
    assert all(cell["outputs"] for cell in printing)


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorials_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "text_classifier":
        pytest.importorskip("transformers", reason="the extra hf is not installed")
    monkeypatch.chdir(tmp_path)
    folder = ROOT / "docs" / "tutorials"
    source = (folder / f"{name}.py").read_text()
    exec(compile(source, name, "exec"), {"__name__": "tutorial"})


def test_python_of_an_own_student_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (own,) = [block for block in _python(ROOT / "docs" / "distil.md") if "ChainStudent(" in block]
    names: dict[str, object] = {}
    exec(own, names)
    assert len(capsys.readouterr().out.splitlines()) >= 12  # an accuracy for each window
    assert (tmp_path / "runs" / "mine" / "student.json").is_file()


@pytest.mark.parametrize("name", ["Goal", "Preference", "distil", "make_sb3_env", "register_dataset"])
def test_examples_of_public_docstrings_run(name: str) -> None:
    thing = getattr(rlkd, name)
    names = dict(vars(sys.modules[thing.__module__]))
    runner = doctest.DocTestRunner()
    (example,) = doctest.DocTestFinder(recurse=False).find(thing, name, globs=names)
    assert example.examples
    assert runner.run(example).failed == 0


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    for name in rlkd.__all__:
        text = getattr(rlkd, name).__doc__ or ""
        assert len(text) > 20, name
        assert not text.startswith(f"{name}("), name  # what dataclass writes where there is none


@pytest.mark.slow
def test_every_option_on_the_pages_is_one_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    real = [[verb, "--data", "x"] for verb in ("distil", "compare", "search")] + [["train", "--mode", "online"]]
    for argv in [*([verb] for verb in VERBS), *real]:
        with pytest.raises(SystemExit):
            main([*argv, "--help"])
    own = set(re.findall(r"--[a-zA-Z_][\w.+-]*", capsys.readouterr().out))
    pages = [page for page in PAGES if page.parent.name not in ("results", "decisions", "real", "compare", "goals")]
    for page in [*pages, *(ROOT / "docs" / "tutorials").glob("*.py")]:
        for option in re.findall(r"(?<![\w-])--[a-zA-Z_][\w.-]*", page.read_text()):
            is_section = option.endswith(".") and any(name.startswith(option) for name in own)
            assert is_section or option.rstrip(".") in own | OTHER_PROGRAMS, (page.name, option)


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    objects = {path.rpartition(".")[2]: path for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    renamed = {"loss_term": "term"}
    for name in rlkd.__all__:
        path = objects[renamed.get(name, name)]
        module, _, own = path.rpartition(".")
        assert getattr(importlib.import_module(module), own) is getattr(rlkd, name), name
        assert name not in renamed or f"`rlkd.{name}` is this" in text
    assert len(objects) == len(rlkd.__all__)


def test_every_decision_has_its_page_with_date_and_status() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "index.md").read_text()
    rows = re.findall(r"^\| (\d{4}) \| ([\d-]{10}) \| (\w+) \| \[(.+)\]\((.+)\) \|$", index, re.MULTILINE)
    pages = sorted(page.name for page in folder.glob("0*.md"))
    assert sorted(row[4] for row in rows) == pages
    assert [page[:4] for page in pages] == [f"{number:04d}" for number in range(1, len(pages) + 1)]
    for number, date, status, title, name in rows:
        text = (folder / name).read_text()
        assert name.startswith(number)
        assert text.startswith(f"# {title}\n\nDate: {date}. Status: {status}. Subject: ")
        assert status in ("accepted", "superseded")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Measured"]
        assert (status == "superseded") == bool(re.search(r"Superseded\s+by\s+\[\d{4}\]", text)), name
