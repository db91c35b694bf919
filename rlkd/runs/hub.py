"""Share policies and students on the Hugging Face hub: push a folder with its card, pull and check one.

Only JSON, safetensors and text files travel, in either direction. What is pulled is read as any folder of a stranger:
checked before use, and no code of it runs.
"""

import importlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlkd.agents.policy.bundle import load_bundle
from rlkd.compression.loading import load_student
from rlkd.compression.real.student_folder import check_module_student
from rlkd.errors import UserError
from rlkd.io.files import MAX_JSON_BYTES, inside, read_bytes, read_json, write_whole

SUFFIXES = (".json", ".safetensors", ".md", ".txt", ".yaml", ".jinja")
PATTERNS = [f"*{suffix}" for suffix in SUFFIXES]
REPO = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a policy or a student with a model card; returns the address.

    Args:
        folder: of a policy or a student, or a run folder, whose student is taken, or else its policy.
        repo: OWNER/NAME on the hub; made where it does not exist.
        private: whether a new repository is private.

    Raises:
        UserError: no policy or student, a file of another kind in it, no account, or no network.
    """
    _check_name(repo)
    what, place = find(folder)
    for path in sorted(place.rglob("*")):
        if path.is_file() and path.suffix not in SUFFIXES:
            raise UserError(f"{path}: got a {path.suffix or 'nameless'} file; allowed: {', '.join(SUFFIXES)}")
        if path.is_symlink():
            raise UserError(f"{path}: is a link; give the file itself")
    write_whole(place / "README.md", model_card(what, place, folder, repo))
    with _one_line(repo):
        api = _client()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=str(place), allow_patterns=PATTERNS, commit_message=f"Upload a {what} of rlkd"
        )
    return f"https://huggingface.co/{repo}"


def pull(repo: str, out: Path, revision: str | None = None) -> str:
    """Download a policy or a student into a new folder, and check it; returns which of the two it is.

    Args:
        repo: OWNER/NAME on the hub.
        out: new folder.
        revision: a commit, branch or tag.

    Raises:
        UserError: the folder exists, no such repository, no network, or what it holds cannot be used and is removed.
    """
    _check_name(repo)
    if out.exists():
        raise UserError(f"--out: {out} exists; allowed: a new folder")
    try:
        with _one_line(repo):
            _client().snapshot_download(repo, local_dir=str(out), revision=revision, allow_patterns=PATTERNS)
        shutil.rmtree(out / ".cache", ignore_errors=True)  # notes of the client, which `push` would refuse
        what, place = find(out)
        if what == "student":
            _check_student(place)
    except UserError:
        shutil.rmtree(out, ignore_errors=True)  # what cannot be used is not kept
        raise
    return what


def _check_student(place: Path) -> None:
    """Raise UserError for a student that is damaged or altered; a model of transformers is not loaded for it."""
    card = read_json(inside(place, "student.json"), "a student's card")
    if isinstance(card, dict) and card.get("shipment") is not None:
        check_module_student(place)
    else:
        load_student(place)


def find(folder: Path) -> tuple[str, Path]:
    """Return whether a folder holds a student or a policy, and where.

    Raises:
        UserError: neither.
    """
    for place in (folder, folder / "student", folder / "policy"):
        if (place / "student.json").is_file():
            return "student", place
        if (place / "bundle.json").is_file():
            load_bundle(place)
            return "policy", place
    raise UserError(f"{folder}: holds no student and no policy; give a run folder, or that of a student or a policy")


def model_card(what: str, place: Path, run: Path, repo: str) -> str:
    """Return the card of a policy or student: figures with intervals, command, configuration, use."""
    tags = ["rlkd", "knowledge-distillation", *(["reinforcement-learning"] if what == "policy" else [])]
    lines = ["---", "library_name: rlkd", "tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {repo}", ""]
    lines += _about_policy(place) if what == "policy" else _about_student(place)
    for name in ("command.txt", "config.yaml"):
        if (run / name).is_file():
            text = read_bytes(inside(run, name), MAX_JSON_BYTES).decode(errors="replace").strip()
            lines += ["", f"`{name}`:", "", "```", text.replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def _about_policy(place: Path) -> list[str]:
    bundle = load_bundle(place)
    lines = ["A policy that sets the controls of a distillation. Use it with", "", "```sh"]
    lines += ["rlkd pull OWNER/NAME --out my-policy", "rlkd distil --policy my-policy --goal.keep 0.98", "```", ""]
    scores = bundle.provenance.get("scores", {})
    if scores:
        lines += [
            "Held-out tasks, test data, paired:",
            "",
            "| comparison | difference in J | 95 % interval |",
            "|---|---|---|",
        ]
        for name, row in scores.items():
            low, high = row["ci95"]
            lines.append(f"| {name} | {row['difference']:+.4f} | {low:+.4f} to {high:+.4f} |")
    return [*lines, "", f"sha256 of the tensors: `{bundle.digest}`"]


def _about_student(place: Path) -> list[str]:
    card = read_json(inside(place, "student.json"), "a student's card")
    figures = card.get("figures", {})
    lines = ["A student that rlkd has distilled. Use it with", "", "```python"]
    lines += [
        "import rlkd",
        'student = rlkd.load_student("my-student")  # after: rlkd pull OWNER/NAME --out my-student',
    ]
    lines += ["```", "", "| on test data, one training | |", "|---|---|"]
    names = ("accuracy", "teacher_accuracy", "floor", "goal_met", "macs_ratio", "latency_ratio", "size_ratio")
    shown = {name: figures[name] for name in names if figures.get(name) is not None}
    lines += [
        f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in shown.items()
    ]
    return [
        *lines,
        "",
        f"Policy: sha256 `{json.dumps(card.get('policy_sha256', ''))[1:-1]}`. Ratios are to the dense student.",
    ]


def _check_name(repo: str) -> None:
    if not REPO.fullmatch(repo):
        raise UserError(f"repository: got {repo!r:.80}; allowed: OWNER/NAME")


def _client() -> Any:
    try:
        return importlib.import_module("huggingface_hub").HfApi()
    except ImportError as error:
        raise UserError("sharing needs the package huggingface_hub; run `pip install 'rlkd[hub]'`") from error


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """Turn errors of the hub's client into one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the client's errors come from several libraries
        reason = " ".join(str(error).split())[:160]
        words = f"{type(error).__name__} {reason}".lower()
        hint = "check the name and `hf auth login`"
        if any(word in words for word in ("connect", "network", "resolve", "timeout", "offline")):
            hint = "there is no network here, or HF_HUB_OFFLINE is set; copy the folder by hand instead"
        raise UserError(f"{repo}: the hub did not answer ({type(error).__name__}: {reason}); {hint}") from error
