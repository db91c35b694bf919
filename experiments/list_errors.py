"""Make every mistake that the command line tells of, and write what it says to docs/errors.md.

python experiments/list_errors.py
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from model_errors import CASES, HAS_MODELS, make
from safetensors.torch import load, save
from samples import TEACHERS, Samples

from rlkd.agents.checkpoints import read_checkpoint as read
from rlkd.agents.journal import NAME, Journal
from rlkd.agents.lock import LOCK
from rlkd.agents.verify import read_csv
from rlkd.cli.main import main, one_line
from rlkd.compression import load_student
from rlkd.errors import UserError
from rlkd.tasks import load_dataset
from rlkd.teachers import load_teachers

DOC = Path(__file__).parent.parent / "docs" / "errors.md"
Setup = Callable[[Path], object]


def nothing(folder: Path) -> None:
    """Leave the files as they are."""


def config(text: str) -> Setup:
    """Write my.yaml."""
    return lambda folder: (folder / "my.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))


def card(name: str, *keys: str, value: Any) -> Setup:
    """Give a field of a JSON file another value, and make a student's checksum right again."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        place = tree
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        if "architecture" in tree and keys[0] == "architecture":
            text = json.dumps(tree["architecture"], sort_keys=True, separators=(",", ":")).encode()
            blob = (folder / name).with_suffix(".safetensors").read_bytes()
            tree["sha256"] = hashlib.sha256(text + b"\n" + blob).hexdigest()
        (folder / name).write_text(json.dumps(tree))

    return change


def sign_policy(folder: Path) -> None:
    """Make the policy's checksum right again."""
    digest = hashlib.sha256((folder / "policy/policy.safetensors").read_bytes()).hexdigest()
    card("policy/bundle.json", "sha256", value=digest)(folder)


def tensor(name: str, change: Callable[[Any], Any]) -> Setup:
    """Change a tensor of the policy and make the checksum right again; None takes it away."""

    def alter(folder: Path) -> None:
        path = folder / "policy/policy.safetensors"
        tensors = load(path.read_bytes())
        changed = change(tensors[name]) if name in tensors else change(tensors["plan.settings"])
        tensors.pop(name, None)
        path.write_bytes(save(tensors if changed is None else {**tensors, name: changed}))
        sign_policy(folder)

    return alter


def policy_bytes(blob: bytes) -> Setup:
    """Put other bytes in the place of the policy's tensors, and make the checksum right again."""

    def write(folder: Path) -> None:
        (folder / "policy/policy.safetensors").write_bytes(blob)
        sign_policy(folder)

    return write


def headed(header: bytes) -> bytes:
    """safetensors content of a header alone."""
    return len(header).to_bytes(8, "little") + header


def link(name: str, target: str) -> Setup:
    """Put a link in the place of a file."""

    def make(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return make


def size(name: str, num_bytes: int) -> Setup:
    """Make a file longer; the rest is a hole that takes no room."""

    def grow(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(num_bytes)

    return grow


def gone(name: str) -> Setup:
    """Take a file away."""
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Setup:
    """Write a text file."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return write


def lock(host: str, pid: int, **more: Any) -> Setup:
    """Put a lock into the run folder; HOST stands for this machine."""
    owner = {"pid": pid, "host": host, "since": "2026-01-02 03:04:05 +0000", "ticks": None, **more}
    return text(f"out/{LOCK}", json.dumps(owner))


STOPPED = "seed: 0\nnum_windows: 3\n"  # config.yaml of a run


def stopped(folder: Path) -> None:
    """Make a run folder as a killed run leaves it, without its lock."""
    text("out/config.yaml", STOPPED)(folder)


def held(folder: Path) -> None:
    """The same with the lock of a run that is alive."""
    stopped(folder)
    lock("HOST", os.getpid())(folder)


def entry(**fields: Any) -> Setup:
    """Write a journal of one entry, its checksum right."""

    def write(folder: Path) -> None:
        body = json.dumps(fields) + "\n"
        text(f"checkpoints/{NAME}", f"{hashlib.sha256(body.encode()).hexdigest()} {body}")(folder)

    return write


def journal(folder: Path) -> None:
    """Ask the journal in the folder for a batch."""
    Journal(Path(), resume=True).arrays("batch", {"seed": 0}, {"score": ("float64", (2,))}, dict)


def many_events(folder: Path) -> None:
    """Add more event files than any run writes."""
    for i in range(64):
        (folder / f"run/tensorboard/events.out.tfevents.{i}").write_bytes(b"")


def student(folder: Path) -> None:
    """Load a student, which no verb does."""
    load_student(Path("mlp"))


def replayed(folder: Path) -> None:
    """Make a replay's folder whose result has no figures."""
    text("run/config.yaml", "num_windows: 3")(folder)
    text("run/result.json", '{"methods": 3}')(folder)


def verified(folder: Path) -> None:
    """Read the table of a compare run back."""
    read_csv(Path("run"))


def teachers(folder: Path) -> None:
    """Load the teachers from the cache."""
    os.environ["RLKD_CACHE"] = "cache"
    load_teachers(TEACHERS, load_dataset("digits"))


def damaged_teachers(folder: Path) -> None:
    """Put a link out of the cache in the place of the cached teachers."""
    path = next((folder / "cache").glob("teachers-*"))
    path.rename(path.with_name("teachers.safetensors"))
    path.symlink_to("/dev/null")


@dataclass(frozen=True)
class Case:
    """One mistake: what was done to the sound files, and the command or call that tells of it."""

    what: str
    call: str | Callable[[Path], None]
    setup: Setup = nothing


BATCH = hashlib.sha256(json.dumps(["batch", {"seed": 0}]).encode()).hexdigest()  # what `journal` asks for
REAL = "Real models"
REPLAY = "replay --policy policy --out out"
TRAIN = "train --config my.yaml"
SECTIONS: dict[str, list[Case]] = {
    "The command": [
        Case("a verb that does not exist", "trian"),
        Case("an option that does not exist", "train --task.label_nois.high 0.5"),
        Case("a word that is no option", "train now"),
        Case("a value of another kind", "train --ppo.num_students 1.5"),
        Case("a value that is no choice", "train --student.kind rnn"),
        Case("a value for a section", "train --task 3"),
        Case("half a section", "train --task {dataset:"),
        Case("no value where one is needed", "train --num_windows null"),
        Case("a number without end", "train --ppo.learning_rate inf"),
        Case("a seed below 0", "train --seed -1"),
        Case("a required option left out", "replay"),
        Case("a mode that does not exist", "train --mode onlin"),
        Case("a real model without data", "replay --policy policy --teacher models/bert"),
        Case("a method that does not exist", "compare --methods statc"),
        Case("a method that needs a policy", "compare --methods static,policy"),
        Case("teachers weighed where a task has one", "compare --methods static,mtkd_rl"),
        Case("no round of tasks", "compare --num_seeds 0"),
        Case("a front without a policy", "compare --front_trials 3"),
        Case("an impossible front", "compare --front_weights [2]"),
        Case("groups that do not come out even", "train --ppo.group_size 7"),
        Case("a plan that begins late", "train --planning.starts [0.1,0.5]"),
        Case("more decisions than phases", "train --planning.num_decisions 4"),
        Case("a plan without rounds", "train --planning.num_rounds 1"),
        Case("noise beyond the range", "train --planning.last_noise 2"),
        Case("a critic of one member", "train --planning.surrogate.num_members 1"),
        Case("a critic without units", "train --planning.surrogate.critic_hidden 0"),
        Case("an actor that stands still", "train --planning.surrogate.actor_learning_rate 0"),
        Case("a critic without caution or decay", "train --planning.surrogate.caution -1"),
        Case("PPO's changes judged by nobody", "train --ppo.num_gate_tasks 1"),
        Case("a benchmark of nothing", "bench --rounds 0"),
        Case("a benchmark of a GPU that none is named for", "bench --device_students [128]"),
        Case("a batch of nothing", "calibrate --batch_size 0"),
    ],
    "Values": [
        Case("no window", "train --num_windows 0"),
        Case("a data set that does not exist", "train --task.dataset digit"),
        Case("a generated data set of another form", "train --task.dataset generated:colour=3"),
        Case("a generated data set beyond its limits", "train --task.dataset generated:classes=1"),
        Case("a range beyond its ends", "train --task.label_noise.high 1.5"),
        Case("a preference that weighs nothing", "replay --policy policy --preference.accuracy 2"),
        Case("no unit", "train --student.widths [0]"),
        Case("more units than any memory holds", "train --student.widths [100000]"),
        Case("an exit behind a block that is not there", "train --student.exits [2]"),
        Case("a gate without an exit", "train --student.exits [] --student.gate.enabled true"),
        Case("a gate whose reward weighs ever less", "train --student.gate.beta_start 0.5"),
        Case("a gate whose reward never rises", "train --student.gate.steps_per_rise 0"),
        Case("more halvings than the images have", "calibrate --student.kind conv --student.widths [4,4,4,4,4]"),
        Case("a step of nothing", "train --train.batch_size 0"),
        Case("fewer rollbacks than none", "train --train.max_rollbacks -1"),
        Case("no such device for a population", "train --train.device gpu"),
        Case("no sample for a teacher", "train --teacher.num_samples []"),
        Case("more teachers of a task than there are", "train --task.num_teachers.high 9"),
        Case("a teacher of more samples than there are", "train --teacher.num_samples [9999]"),
        Case("no step for a teacher", "train --teacher.num_steps 0"),
        Case("too large a batch", "train --cost.batch_size 1000000"),
        Case("a change beyond the range", "train --controls.step 2"),
        Case("an empty range", "train --controls.temperature [3,1]"),
        Case("updates that do not come out even", "train --mode online --agent.windows_per_update 7"),
        Case("an agent of nothing", "train --mode online --agent.hidden 0"),
        Case("an agent that stands still", "train --mode online --agent.learning_rate 0"),
        Case("an agent's discount above 1", "train --mode online --agent.gamma 2"),
        Case("no window between two kept students", "train --mode online --keep_every 0"),
        Case("no candidate", "train --search.num_settings 0"),
        Case("no student", "train --ppo.num_students 0"),
        Case("a discount above 1", "train --ppo.gamma 1.5"),
        Case("no learning", "train --ppo.learning_rate 0"),
        Case("a minibatch of one", "train --ppo.batch_size 1"),
        Case("a rollout of one", "train --ppo.num_students 1 --num_windows 1"),
        Case("one task to compare on", "train --comparison.num_tasks 1"),
        Case("an impossible preference to compare", "train --comparison.accuracy_weights [1.5]"),
    ],
    "Configs": [
        Case("no such file or name", "train --config defalt"),
        Case("a folder", "train --config policy"),
        Case("nothing in it", TRAIN, config("")),
        Case("no sections", TRAIN, config("[1, 2]")),
        Case("not text", TRAIN, config("\udcff\udcfe")),
        Case("not YAML", TRAIN, config("task: [1")),
        Case("too large", TRAIN, config("#" * 100_000)),
        Case("a character that YAML forbids", TRAIN, config("a: \x07")),
        Case("nested too deeply", TRAIN, config("[" * 100)),
        Case("a tag", TRAIN, config("seed: !!python/object/apply:os.system [date]")),
        Case("an alias", TRAIN, config("a: &a 1\nb: *a")),
        Case("a section that does not exist", TRAIN, config("tsk: 3")),
        Case("a key that does not exist", TRAIN, config("ppo: {num_student: 3}")),
        Case("a value for a section", TRAIN, config("task: 3")),
        Case("worlds that do not come out even", TRAIN, config("also: [" + ", ".join(["{dataset: digits}"] * 6) + "]")),
        Case("a section without content", TRAIN, config("ppo:")),
        Case("a key without value", TRAIN, config("num_windows:")),
        Case("an integer of many digits", TRAIN, config("search: {num_settings: 1" + "0" * 30 + "}")),
    ],
    "Policy bundles": [
        Case("no such folder", "replay --policy gone"),
        Case("tensors missing", REPLAY, gone("policy/policy.safetensors")),
        Case("card too large", REPLAY, size("policy/bundle.json", 2**21)),
        Case("tensors too large", REPLAY, size("policy/policy.safetensors", 2**27)),
        Case("a link out of the folder", REPLAY, link("policy/policy.safetensors", "../profile.json")),
        Case("card not JSON", REPLAY, text("policy/bundle.json", "{")),
        Case("card not an object", REPLAY, text("policy/bundle.json", "[1]")),
        Case("card nested too deeply", REPLAY, text("policy/bundle.json", "[" * 100)),
        Case("card with NaN", REPLAY, card("policy/bundle.json", "format", value=float("nan"))),
        Case("another format", REPLAY, card("policy/bundle.json", "format", value=9)),
        Case("other observations", REPLAY, card("policy/bundle.json", "observation", "names", value=["progress"])),
        Case("other bounds of an action", REPLAY, card("policy/bundle.json", "action", "high", value=2.0)),
        Case("other controls", REPLAY, card("policy/bundle.json", "action", "controls", value={"step": 0.3})),
        Case("a range without end", REPLAY, card("policy/bundle.json", "action", "controls", "step", value=True)),
        Case("altered tensors", REPLAY, card("policy/bundle.json", "sha256", value="0")),
        Case("a pickle or zip by another name", REPLAY, policy_bytes(b"PK\x03\x04" + bytes(200))),
        Case("a header of another form", REPLAY, policy_bytes(headed(b'{"start": {"dtype": "F32", "shape": 3}}'))),
        Case("a tensor missing", REPLAY, tensor("hidden.1.bias", lambda t: None)),
        Case("a tensor of another shape", REPLAY, tensor("plan.settings", lambda t: t[:, :4].contiguous())),
        Case("a tensor too many", REPLAY, tensor("more", lambda t: t.clone())),
        Case("no static setting", REPLAY, tensor("static.terms", lambda t: t[:0])),
        Case("a value that is no number", REPLAY, tensor("plan.settings", lambda t: t * float("nan"))),
        Case("a position out of range", REPLAY, tensor("plan.settings", lambda t: t + 1)),
        Case("a deviation of 0", REPLAY, tensor("observation.deviation", lambda t: t * 0)),
        Case("a weight beyond any", REPLAY, tensor("action.weight", lambda t: t + 1e9)),
    ],
    "Cost profiles": [
        Case("no such file", "train --cost.profile gone.json"),
        Case("another format", "train --cost.profile profile.json", card("profile.json", "format", value=1)),
        Case(
            "a negative figure",
            "train --cost.profile profile.json",
            card("profile.json", "coefficients", "mac_s", value=-1.0),
        ),
        Case("not JSON", "train --cost.profile profile.json", text("profile.json", "mac_s: 1")),
        Case("no file name", TRAIN, config('cost: {profile: "a\\0b"}')),
    ],
    "Runs, for `rlkd analyze`": [
        Case("no such folder", "analyze gone"),
        Case("no event file", "analyze policy"),
        Case("too many event files", "analyze run", many_events),
        Case("a record that would take all memory", "analyze run", text("run/tensorboard/x.tfevents", "x" * 99)),
        Case("a result that is not JSON", "analyze run", text("run/result.json", "{")),
        Case("a result of another form", "analyze run", text("run/result.json", "{}")),
    ],
    "Places to write": [
        Case("a folder with content", "replay --policy policy --out run"),
        Case("a file", "replay --policy policy --out profile.json"),
        Case("below a file", "replay --policy policy --out profile.json/out"),
        Case("the report below a file", "analyze run --out profile.json/out"),
        Case("a run goes on in it", REPLAY, lock("HOST", os.getpid())),
        Case("a killed run left its lock", REPLAY, lock("HOST", 2**31 - 1)),
        Case("a lock of another machine", REPLAY, lock("elsewhere", 1)),
        Case("a lock that nobody can read", REPLAY, lock("HOST", 0)),
    ],
    "Going on with `--resume`": [
        Case("no run", "train --resume out"),
        Case("no folder", "train --resume"),
        Case("another config", "train --resume out --num_windows 4", stopped),
        Case("another folder", "train --resume out --out other", stopped),
        Case("config files", "compare my.yaml --resume out", stopped),
        Case("a run that still goes on", "train --resume out", held),
        Case("no checkpoint kept", "train --keep_checkpoints 0"),
        Case("a journal of something else", journal, entry(label="other", key="")),
        Case("a journal whose answer is another array", journal, entry(label="batch", key=BATCH, arrays={"score": 1})),
        Case("a journal of impossible logs", journal, entry(label="batch", key=BATCH, logs={"metrics.jsonl": -1})),
        Case("a journal of an impossible time", journal, entry(label="batch", key=BATCH, elapsed_s=-1.0)),
        Case("another file for a checkpoint", lambda folder: read(Path("profile.json"))),
        Case("a torn checkpoint", lambda folder: read(Path("state-000001.ckpt")), text("state-000001.ckpt", "torn")),
    ],
    "Students, for `load_student`": [
        Case("another format", student, card("mlp/student.json", "format", value=1)),
        Case("altered", student, card("mlp/student.json", "sha256", value="0")),
        Case("impossible", student, card("mlp/student.json", "architecture", "threshold", value=2)),
        Case("not what the tensors are", student, card("mlp/student.json", "architecture", "num_classes", value=3)),
    ],
    "Verifying a run": [
        Case("no such run folder", "verify gone"),
        Case("a run without an end", "verify policy"),
        Case("not a config", "verify run", text("run/config.yaml", "[1]")),
        Case("not a replay's result", "verify run", replayed),
        Case("no table", verified, text("run/result.csv", "a,b\n1\n")),
    ],
    **({REAL: [Case(*case) for case in CASES]} if HAS_MODELS else {}),
    "Teachers, kept in `~/.cache/rlkd` or `$RLKD_CACHE`": [
        Case("a link out of the cache", teachers, damaged_teachers),
    ],
}


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before, cache = Path.cwd(), os.environ.get("RLKD_CACHE")
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.pop("RLKD_CACHE", None)
        if cache is not None:
            os.environ["RLKD_CACHE"] = cache


def said(case: Case, sound: Path, folder: Path) -> str:
    """The line that the case ends in."""
    shutil.copytree(sound, folder, symlinks=True)
    host = platform.node()
    case.setup(folder)
    for path in folder.glob("out/*"):
        path.write_text(path.read_text().replace('"HOST"', json.dumps(host)))
    error = io.StringIO()
    with _inside(folder), contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        if isinstance(case.call, str):
            assert main(case.call.split(" ")) == 2, f"{case.what}: {error.getvalue()}"
        else:
            try:
                case.call(folder)
            except UserError as refusal:
                error.write(f"rlkd: {one_line(str(refusal))}\n")
    *before, line = error.getvalue().splitlines(keepends=True) or [""]  # a pass of a teacher is told before it
    assert line.startswith("rlkd: "), f"{case.what}: {error.getvalue()}"
    assert line.endswith("\n"), f"{case.what}: {line}"
    assert all(told.startswith("one pass of the teacher") for told in before), f"{case.what}: {error.getvalue()}"
    line = line.replace(f"process {os.getpid()} on", "process 4711 on").replace(f"on {host},", "on HOST,")
    line = re.sub(r"teachers-digits-[0-9a-f]{16}", "teachers-digits-KEY", line)
    return line.removeprefix("rlkd: ").rstrip("\n")


def page(sites: set[tuple[str, int]] | None = None) -> str:
    """docs/errors.md; puts where each error was made into `sites`."""
    lines = [
        "# What the command line says",
        "",
        "A mistake in a command or a file is one line on standard error, after `rlkd: `, with exit code 2.",
        "`experiments/list_errors.py` wrote this from what is really said; a test fails when a word differs or when the code has",
        "an error that is not here.",
    ]
    before = UserError.__init__

    def record(self: UserError, *args: object) -> None:
        frame: FrameType | None = sys._getframe(1)
        assert frame is not None
        if sites is not None:
            sites.add((Path(frame.f_code.co_filename).name, frame.f_lineno))
        before(self, *args)

    UserError.__init__ = record  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as place:
            with _inside(Path(place)):
                samples = Samples(Path(place) / "sound", (make,) if HAS_MODELS else ())
            for title, cases in SECTIONS.items():
                lines += ["", f"## {title}", "", "| what | message |", "|---|---|"]
                for i, case in enumerate(cases):
                    line = said(case, samples.folder, Path(place) / f"{title[:3]}{i}").replace("|", "\\|")
                    command = f" (`rlkd {case.call}`)" if title in ("The command", "Values") else ""
                    lines.append(f"| {case.what}{command} | `` {line} `` |")
    finally:
        UserError.__init__ = before  # type: ignore[method-assign]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOC.write_text(page())
