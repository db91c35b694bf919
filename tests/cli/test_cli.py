import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from sklearn.datasets import load_digits

from rlkd.agents.evaluation.report import read_run
from rlkd.cli.configfile import plain_yaml
from rlkd.cli.main import VERBS, main
from rlkd.cli.resume import parse_run
from rlkd.cli.train import _parser
from rlkd.compression import load_student
from rlkd.configs import ExperimentConfig
from rlkd.cost import CostProfile
from rlkd.cost.profile import ENERGY_MODEL
from rlkd.data import load_dataset
from rlkd.data.samples import InputScale

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


MISTAKES = {
    "unknown verb": (["trian"], ["'trian'", "did you mean train?"]),
    "unknown option": (
        ["train", "--task.label_nois.high", "0.5"],
        ["--task.label_nois.high", "did you mean --task.label_noise"],
    ),
    "no abbreviations": (["train", "--ppo.num_student", "5"], ["did you mean --ppo.num_students?"]),
    "wrong type": (["train", "--ppo.num_students", "1.5"], ["ppo.num_students", "'1.5'", "allowed: int"]),
    "wrong choice": (["distil", "--student.kind", "rnn"], ["student.kind", "'rnn'", "'mlp', 'conv'"]),
    "impossible value": (["train", "--task.label_noise.high", "1.5"], ["task.label_noise", "1.5", "<= 1"]),
    "unknown data set": (["distil", "--task.dataset", "digit"], ["task.dataset", "did you mean digits?"]),
    "impossible exit": (["distil", "--student.exits", "[2]"], ["student.exits: got [2]", "from 1 to 1"]),
    "exit of one block": (
        ["distil", "--student.widths", "[8]"],
        ["student.exits: got [1]; allowed: [] (the last block"],
    ),
    "impossible search": (["train", "--search.num_settings", "0"], ["search"]),
    "unknown loss term": (["distil", "--loss.terms", "[cross_entropy,kll]"], ["loss.terms: got 'kll'", "mean kl?"]),
    "term without a signal": (
        ["distil", "--loss.terms", "[cross_entropy,mutual]"],
        ["mutual needs peer_logits", "allowed here: activation_boundary"],
    ),
    "no student to evaluate": (["evaluate", "gone"], ["gone: holds no student.json and no student/student.json"]),
    "no name of a student": (["evaluate"], ["STUDENT: got nothing; allowed: a value (--help has examples)"]),
    "no folder and no repository": (["push"], ["--folder and --repo: got nothing"]),
    "no data set to evaluate on": (
        ["evaluate", "gone", "--data", "iris"],
        ["data: got 'iris'; allowed: breast_cancer"],
    ),
    "unknown data set of a scenario": (
        ["train", "--scenarios", "[{dataset: digit}]"],
        ["scenarios: dataset: got 'digit'", "did you mean digits?"],
    ),
    "unknown algorithm": (["train", "--agent.algorithm", "dqn"], ["got 'dqn'; allowed: 'ppo', 'a2c', 'recurrent_ppo'"]),
    "two numbers": (["search", "--depths", "[]"], ["depths: got '[]'; allowed: a list of 2 elements"]),
    "no trial": (["tune", "--config", "smoke", "--num_trials", "0"], ["--num_trials: got 0; allowed: at least 1"]),
    "step size": (
        ["train", "--ppo.learning_rate", "-1"],
        ["ppo: got learning_rate -1 and clip_range 0.2; allowed: abov"],
    ),
    "impossible attack": (["evaluate", "gone", "--epsilon", "0"], ["epsilon: got 0", "at most 1"]),
    "two teachers to inspect": (["inspect-teacher", "--teacher.num_samples", "[10,20]"], ["one number"]),
    "no such config": (["train", "--config", "defalt"], ["'defalt'", "did you mean default?"]),
    "stray word": (["train", "now"], ["'now'", "--section.key value"]),
    "value for a section": (["train", "--task", "3"], ["task: got '3'", "section with keys dataset"]),
    "file for a section": (["train", "--task.label_noise=x.yaml"], ["task.label_noise: got 'x.yaml'", "low, high"]),
    "seed": (["train", "--seed", "-1"], ["--seed: got -1"]),
    "profile": (["compare", "--cost.profile", "gone.json"], ["gone.json", "rlkd calibrate"]),
    "a word far from every verb": (["fly"], ["no verb 'fly'; allowed: "]),
    "no value": (["distil", "--goal.keep"], ["--goal.keep: got no value; give one"]),
    "a value that looks like an option": (["distil", "--goal.latency", "-2x"], ["given as --goal.latency=-VALUE"]),
    "an option without its section": (
        ["distil", "--keep", "1"],
        ["no option --keep; did you mean --goal.keep or --task."],
    ),
    "one number for a list": (
        ["distil", "--student.widths", "48"],
        ["student.widths: got '48'; allowed: a list, such as"],
    ),
    "an option of tiny students": (
        ["distil", "--teacher", "x", "--data", "y", "--student.widths", "[4]"],
        ["no option --student.widths; --student takes one value here"],
    ),
    "percent": (
        ["distil", "--goal.keep", "98"],
        ["goal.keep: got 98; allowed: a share in (0, 2], such as 0.98 for 98 %"],
    ),
    "octal": (["distil", "--student.widths", "[010, 8]"], ["--student.widths: has '010' (line 1)", "leading zeros"]),
    "sexagesimal": (["distil", "--num_windows", "1:30"], ["--num_windows: has '1:30'"]),
    "underscore": (["distil", "--num_windows=1_0"], ["--num_windows: has '1_0'"]),
    "octal of a verb's own option": (["bench", "--rounds", "010"], ["--rounds: has '010'"]),
    "yes for true": (["compare", "--tune_exit", "yes"], ["--tune_exit: has 'yes'", "true, false"]),
    "key twice": (["train", "--validation", "[{dataset: wine, dataset: digits}]"], ["--validation", "'dataset' twice"]),
    "nan": (["train", "--ppo.learning_rate", "nan"], ["ppo.learning_rate"]),
    "infinity in a list": (["train", "--comparison.accuracy_weights", "[0.5, .inf]"], ["accuracy_weights: got"]),
    "policy missing": (["distil", "--policy", "gone"], ["policy: got 'gone'; allowed: default, a run folder of"]),
    "folder without a policy": (
        ["compare", "--policy", "."],
        ["policy: . holds no policy (no bundle.json); allowed: def"],
    ),
    "data without a name": (["distil", "--teacher", "", "--data", ""], ["model: got no name; allowed: a folder with"]),
    "preference": (["distil", "--policy", "gone", "--preference.accuracy", "2"], ["preference: got accuracy 2"]),
    "unknown method": (["compare", "--methods", "constat"], ["'constat'", "did you mean constant?"]),
    "method without policy": (["compare", "--methods", "constant,policy"], ["--policy"]),
    "no such run": (["analyze", "gone"], ["gone"]),
    "calibrate": (["calibrate", "--batch_size", "0"], ["batch_size: got 0"]),
    "too many halvings": (
        ["calibrate", "--student.kind", "conv", "--student.widths", "[4, 4, 4, 4, 4]"],
        ["student.widths", "at most 4"],
    ),
    "bench": (["bench", "--rounds", "0"], ["--rounds"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_two(name: str, capsys: Capture, tmp_path: Path) -> None:
    argv, words = MISTAKES[name]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rlkd: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ppo: {num_student: 3}", "did you mean ppo.num_students?"),
        ("tsk: 3", "did you mean task?"),
        ("ppo: {num_students: many}", "'many'"),
        ("task: [1", "not YAML"),
        ("!!python/object/apply:os.system ['touch ran']", "has a tag"),
        ("ppo: {num_students: !!int 3}", "has a tag tag:yaml.org,2002:int (line 1)"),
        ("task: 3", "task: got '3'; allowed: a section with keys dataset,"),
        ("task: {label_noise: 0.5}", "task.label_noise: got '0.5'; allowed: a section with keys low, high"),
        ("task: other.yaml", "task: got 'other.yaml'; allowed: a section"),
        ("ppo:", "ppo: got nothing; allowed: a section"),
        ("train: {batch_size: 8}\nnum_windows: 3\ntrain: {batch_size: 9}", "has the key 'train' twice (lines 1 and 3)"),
        ("task: {label_noise: {low: 0.1, high: 0.2, low: 0.0}}", "has the key 'low' twice (lines 1 and 1)"),
        ("also:\n- dataset: wine\n  dataset: digits", "has the key 'dataset' twice (lines 2 and 3)"),
        ("num_windows: 010", "has '010' (line 1), which versions of YAML read differently"),
        ("student: {widths: [8, 010]}", "has '010' (line 1)"),
        ("num_windows: 1:30", "has '1:30' (line 1)"),
        ("num_windows: 0o17", "has '0o17' (line 1)"),
        ("num_windows: 1_0", "has '1_0' (line 1)"),
        ("task: {dataset: no}", "has 'no' (line 1)"),
        ("task:\n  dataset: 2024-01-01", "has '2024-01-01' (line 2)"),
        ("student: {<<: {widths: [8]}}", "has '<<' (line 1)"),
        ("also: [{dataset: wine, student: {widths: [1e99]}}]", "also"),
        ("", "holds nothing"),
        ("# only a remark", "holds nothing"),
        ("[1, 2]", "holds ['1', '2']; allowed: sections and keys"),
        ("[" * 10_000, "nested deeper than 32"),
        ("a: &a [1]\nppo: *a", "has an alias or anchor (line 1)"),
        ("#" * 2**17, "131072 bytes; allowed: at most 16384; give a YAML file"),
        ("\udcff\udcfe", "not UTF-8 text (byte 0); give a YAML file"),
        ("controls: {temperature: [1, .inf]}", "controls.temperature: got inf; allowed: numbers from"),
        ("ppo: {num_epochs: null}", "ppo.num_epochs: got nothing; allowed: int"),
        ("search: {num_settings: null}", "search.num_settings: got nothing; allowed: int"),
        ("task: {num_labels: {low: 60, high: .inf}}", "task.num_labels.high: got inf; allowed: numbers from"),
        ("ppo: {initial_log_std: .nan}", "ppo.initial_log_std: got nan"),
        ("search: {num_settings: 1" + "0" * 30 + "}", "search.num_settings: got an integer of 31 digits"),
        (
            "scenarios: [{student: {widths: [100000]}}]",
            "student.widths: got 1 blocks of up to 100000 units; allowed: up to",
        ),
        ('{scenarios: [{cost: {profile: "a\\0b"}}]}', "no file name"),
        ('{scenarios: [{cost: {profile: "a\\nb\\e[2J"}}]}', "a b [2J: cannot read it"),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, words: str, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text, errors="surrogateescape")
    assert main(["train", "--config", "bad.yaml"]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_a_text_in_quotes_and_plain_decimals_are_taken_as_they_are() -> None:
    tree = plain_yaml("a: '010'\nb: 1e-4\nc: -0.5\nd: [true, 10, 0, null, 3.]\ne: no-one", "x")
    assert tree == {"a": "010", "b": "1e-4", "c": "-0.5", "d": ["true", "10", "0", "null", "3."], "e": "no-one"}


@pytest.mark.parametrize("verb", ["train", "distil", "compare"])
def test_a_failed_start_leaves_nothing_and_gives_no_advice_to_resume(
    verb: str, trained: Path, capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "ours").mkdir()
    argv = [verb, "--cost.profile", "gone.json", "--policy", str(trained / "policy")]
    if verb == "train":
        argv = [verb, "--config", "smoke", "--scenarios", "[{cost: {profile: gone.json}}]"]
    for out in ("new", "ours"):
        assert main([*argv, "--out", out]) == 2
        err = capsys.readouterr().err
        assert "gone.json: cannot read it (No such file or directory)" in err
        assert "--resume" not in err
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "ours").iterdir()) == []


def test_a_config_that_is_no_file_is_named(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        assert main(["train", "--config", name]) == 2
        assert capsys.readouterr().err == f"rlkd: --config: {name}: not a file; give a YAML file\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"rlkd {verb}" in out.split("Examples:")[1]
    assert "Path to a configuration file" not in out  # a section takes no file


def test_usage_and_version(capsys: Capture) -> None:
    assert main([]) == 2
    assert main(["--help"]) == main(["--version"]) == main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    for word in ("digits", "mlp", "hard_label", "open_loop", "default", "temperature", "teacher_margin"):
        assert word in out


def test_train_writes_a_whole_run_and_refuses_to_overwrite_it(trained: Path, capsys: Capture) -> None:
    names = "result.json config.yaml command.txt versions.json tensorboard policy student metrics.jsonl timing.jsonl"
    for name in [*names.split(), "report.html", "cost_profile.json"]:
        assert (trained / name).exists(), name
    result = read_run(trained).result
    assert result is not None
    assert "policy-constant" in result["paired"]
    before = (trained / "result.json").read_bytes()
    assert main(["train", "--config", "smoke", "--out", str(trained)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (trained / "result.json").read_bytes() == before


@pytest.mark.parametrize("student", ["default", "wide", "conv"])
def test_distil_writes_a_working_student(
    trained: Path, tmp_path: Path, profile_file: Path, student: str, capsys: Capture
) -> None:
    argv = ["distil", "--policy", str(trained / "policy"), "--out", "out", "--cost.profile", str(profile_file)]
    argv += ["--num_windows", "2", "--teacher.num_steps", "60", "--preference.accuracy", "0.9"]
    assert main(argv + (["--config", student] if student != "default" else [])) == 0
    result = read_run(tmp_path / "out").result
    assert result is not None
    assert result["preference"]["accuracy"] == pytest.approx(0.9)
    data = load_dataset("digits")
    test = data.splits["test"]
    answers = load_student(tmp_path / "out" / "student")(data.inputs[test]).argmax(-1)
    accuracy = (answers == data.labels[test]).float().mean()
    card = json.loads((tmp_path / "out" / "student" / "student.json").read_text())
    scale = InputScale(**{name: tuple(v) if isinstance(v, list) else v for name, v in card["input_scale"].items()})
    assert torch.equal(scale.apply(torch.from_numpy(load_digits().images)), data.inputs)  # raw: 0 to 16
    same = load_student(str(tmp_path / "out" / "student"))  # a text is taken as well as a path
    assert torch.equal(same(data.inputs[test]).argmax(-1), answers)
    assert float(accuracy) == pytest.approx(result["methods"]["policy"]["accuracy"])
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count("\n") == 2
    figures = result["methods"]["policy"]
    validation = data.splits["validation"]
    answers = load_student(tmp_path / "out" / "student")(data.inputs[validation]).argmax(-1)
    accuracy = float((answers == data.labels[validation]).float().mean())
    assert accuracy == pytest.approx(figures["validation_accuracy"])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("what is possible")
    assert any(line.startswith("validation, by which to choose among runs: J ") for line in lines)
    assert any(line.startswith("test, to report once and not to choose by: J ") for line in lines)
    for window in (1, 2):
        assert f"distilling: window {window} of 2, score " in err
    scalars = read_run(tmp_path / "out").scalars
    for name in ("validation_score", "validation_accuracy"):
        assert scalars[f"hparam/{name}"][1] == pytest.approx([figures[name]])
    assert scalars["hparam/test_accuracy"][1] == pytest.approx([figures["accuracy"]])


@pytest.mark.slow
def test_the_smallest_bundled_data_set_trains_to_its_last_phase(tmp_path: Path, tiny: list[str]) -> None:
    main_one = "{dataset: wine, num_windows"
    wine = [o.replace("{num_windows", main_one, 1).replace("[40, 897]", "[20, 40, 80]") for o in tiny]
    assert main(["train", *wine, "--task.dataset", "wine", "--out", "wine"]) == 0
    result = yaml.safe_load((tmp_path / "wine" / "result.json").read_text())
    assert result["student"]["teacher_accuracy"] > 0.8  # of all 89 samples


@pytest.mark.slow
def test_analyze_leaves_the_reports_of_several_runs_alone(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(trained, tmp_path / "other")
    own = (trained / "report.html").read_bytes()
    assert main(["analyze", "other"]) == 0
    assert (tmp_path / "other" / "report.html").read_bytes() != own  # a run alone is drawn anew, under its own name
    capsys.readouterr()
    assert main(["analyze", str(trained), "other"]) == 0
    assert (trained / "report.html").read_bytes() == own
    (page,) = tmp_path.glob("runs/analyze-*/report.html")
    assert str(page.relative_to(tmp_path)) in capsys.readouterr().out
    assert main(["analyze", str(trained), "other", "--out", str(trained)]) == 2
    assert "is one of the runs, whose own report would be lost" in capsys.readouterr().err
    events = next((tmp_path / "other" / "tensorboard").iterdir())
    blob = bytearray(events.read_bytes())
    blob[len(blob) // 3] ^= 4
    events.write_bytes(blob)
    assert main(["analyze", "other", "--out", "both"]) == 0
    assert "damaged from byte" in capsys.readouterr().err


def test_a_damaged_policy_is_one_line(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    for name in ("bundle.json", "policy.safetensors"):
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / name).write_bytes((trained / "policy" / name).read_bytes()[:-50])
    assert main(["distil", "--policy", "p"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_and_options_mean_the_same(tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "c.yaml").write_text("task: {label_noise: {high: 0.3}}\nppo: {hidden: 7}\n")
    options = ["--task.label_noise.high", "0.3", "--ppo.hidden", "7"]
    given = [[*tiny, "--config", "c.yaml"], [*tiny, *options]]
    (one, _), (other, _) = (parse_run(_parser, argv, ExperimentConfig) for argv in given)
    assert one == other
    assert (one.ppo.hidden, one.task.label_noise.high) == (7, 0.3)


def test_the_installed_script_answers() -> None:
    script = Path(sys.executable).with_name("rlkd")
    done = subprocess.run([script, "tran"], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_calibrate_writes_a_profile_that_train_takes(tmp_path: Path) -> None:
    assert main(["calibrate", "--student.widths", "[8, 8]", "--batch_size", "4", "--out", "p.json"]) == 0
    assert (tmp_path / "p.json").exists()
    assert torch.get_num_threads() == 1


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [4, 16, 32])
def test_a_disk_that_fills_up_ends_in_one_line(tmp_path: Path, tiny: list[str], blocks: int) -> None:
    """No file may grow beyond `blocks` KiB: a limit that needs no privileges and fails writes wherever they happen."""
    code = f"""
import resource, sys
from rlkd.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({blocks} * 1024, {blocks} * 1024))
sys.exit(main(sys.argv[1:]))
"""
    call = [sys.executable, "-c", code, "train", *tiny, "--out", "full"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("rlkd: ") or "Error" in line]
    assert done.returncode == 2, done.stderr
    assert len(said) == 1, done.stderr
    assert said[0].startswith("rlkd: ")
    what = "cannot write it (File too large); choose a place that can be written"
    assert said[0].endswith(f"{what}; go on with: rlkd train --resume full")
    assert not list((tmp_path / "full").glob("**/*.partial"))
    assert not (tmp_path / "full" / "run.lock").exists()


@pytest.mark.parametrize("argv", [["calibrate", "--student.widths", "[8]", "--student.exits", "[]"], ["bench"]])
def test_an_output_that_cannot_be_written_is_one_line(
    argv: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlkd.cli.calibrate.calibrate", lambda *_: CostProfile(4, (1e-6,) * 8, dict(ENERGY_MODEL), {}))
    figures = {"updates_per_s": {}, "ratio": {}, "step_share": {}}
    monkeypatch.setattr("rlkd.cli.bench.bench", lambda *_: figures)
    (tmp_path / "file").write_text("")
    assert main([*argv, "--out", "file/out.json"]) == 2
    err = capsys.readouterr().err
    assert err == "rlkd: file/out.json: cannot write it (Not a directory); choose a place that can be written\n"


def test_too_little_memory_is_one_line_and_other_failures_stay_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("rlkd.cli.listing.run", lambda _: torch.empty(2**55).numel())
    assert main(["list"]) == 2
    assert capsys.readouterr().err.startswith("rlkd: not enough memory (")

    def broken(argv: list[str]) -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr("rlkd.cli.listing.run", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["list"])


def test_a_failing_thread_is_not_lost(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def run(argv: list[str]) -> int:
        def work() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return 0

    monkeypatch.setattr("rlkd.cli.listing.run", run)
    assert main(["list"]) == 2
    assert capsys.readouterr().err == (
        "rlkd: output: cannot write it, the disk is full (No space left on device); free some room, then run it again\n"
    )
