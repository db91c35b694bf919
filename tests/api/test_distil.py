import copy
import dataclasses
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import need_transformers, points, save_policy, save_tokenizer, tiny
from torch import nn

import rlkd
from rlkd.agents.policy.bundle import load_bundle, save_bundle
from rlkd.agents.policy.policy import unchanged
from rlkd.envs.action import CONTROLS
from rlkd.errors import UserError

SHORT = {"num_windows": 2, "train.steps_per_window": 4}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It changes nothing: half of the units stay from the first window to the last."""
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder)
    given = load_bundle(folder).policy
    start = given.start.clone()
    start[CONTROLS.index("unit_keep")] = 0.75
    save_bundle(dataclasses.replace(unchanged(given), start=start), folder, {})
    return folder


@pytest.fixture(scope="module")
def chain(profile_file: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> rlkd.Result:
    options = {**SHORT, "cost": {"profile": str(profile_file)}, "teacher.num_steps": 60, "student": {"widths": [12, 8]}}
    out = tmp_path_factory.mktemp("runs") / "digits"
    return rlkd.distil(data="digits", goal=rlkd.Goal(keep=0.5), policy=policy, out=out, options=options)


def taught(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    inputs, labels = points()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_data_set_that_rlkd_knows_gives_student_metrics_history_and_report(chain: rlkd.Result) -> None:
    assert [row["window"] for row in chain.history] == [1.0, 2.0]
    assert chain.goal_met is chain.metrics["goal_met"]
    assert chain.metrics["measured"]["batch_1"]["latency_s"] > 0
    assert chain.report().read_text().startswith("<!doctype html>")
    assert (chain.folder / "command.txt").read_text() == "rlkd.distil(...), from Python\n"


def test_the_saved_student_answers_as_the_one_in_the_hand(chain: rlkd.Result, tmp_path: Path) -> None:
    inputs = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0))
    saved = chain.save(tmp_path / "student")
    assert torch.equal(rlkd.load_student(saved)(inputs), chain.student(inputs))
    assert torch.equal(rlkd.load_student(chain.folder)(inputs), chain.student(inputs))
    with pytest.raises(UserError, match="exists; allowed: a new folder"):
        chain.save(saved)
    page = chain.report(tmp_path / "page.html")
    assert page.read_text() == chain.report().read_text()


@pytest.mark.slow
def test_a_run_without_a_folder_leaves_none_behind(profile_file: Path, policy: Path) -> None:
    options = {**SHORT, "num_windows": 1, "cost.profile": str(profile_file), "teacher.num_steps": 60}
    result = rlkd.distil(
        data="wine",
        policy=policy,
        options={**options, "teacher.num_samples": [0], "task.num_labels": {"low": 80, "high": 80}},
    )
    folder = result.folder
    assert folder.exists()
    del result
    gc.collect()
    assert not folder.exists()


@pytest.fixture(scope="module")
def own(
    policy: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, dict[str, torch.Tensor], rlkd.Result]:
    teacher = taught().train()
    before = copy.deepcopy(teacher.state_dict())
    out = tmp_path_factory.mktemp("runs") / "own"
    return teacher, before, rlkd.distil(teacher, data=points(), policy=policy, out=out, options=SHORT)


def test_a_module_of_ones_own_stays_as_it_was(own: tuple[nn.Module, dict[str, torch.Tensor], rlkd.Result]) -> None:
    teacher, before, result = own
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.training
    assert all(module.training for module in teacher.modules())
    assert num_hooks(teacher) == 0
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in teacher.parameters())
    assert result.student is not teacher


def test_units_are_cut_out_of_a_module_of_ones_own(
    own: tuple[nn.Module, dict[str, torch.Tensor], rlkd.Result],
) -> None:
    teacher, _, result = own
    sizes = [sum(p.numel() for p in m.parameters()) for m in (result.student, teacher)]
    assert result.history[-1]["unit_keep"] < 1.0
    assert sizes[0] < sizes[1]
    assert result.metrics["shipped_difference"] < 1e-4
    loaded = rlkd.load_student(result.folder, model=taught(seed=5))
    inputs = points(7)[0]
    assert torch.equal(loaded(input=inputs), result.student(input=inputs))


def test_a_folder_of_ones_own_class_asks_for_a_module(
    own: tuple[nn.Module, dict[str, torch.Tensor], rlkd.Result],
) -> None:
    with pytest.raises(UserError, match="your own class Sequential; give a module of it"):
        rlkd.load_student(own[2].folder)
    with pytest.raises(UserError, match="give a module of the class"):
        rlkd.load_student(own[2].folder, model=nn.Sequential(nn.Linear(6, 2)))


@pytest.mark.parametrize(
    ("teacher", "data", "message"),
    [
        (None, "digit", "teacher: got none with data 'digit'"),
        (None, (torch.zeros(3, 2), torch.zeros(3).long()), "teacher: got none with data of type tuple; allowed"),
        ("own", (torch.zeros(3, 6), torch.zeros(2, dtype=torch.long)), "got inputs \\[3, 6\\] and labels \\[2\\]"),
        ("own", (torch.full((3, 6), torch.nan), torch.zeros(3, dtype=torch.long)), "not finite"),
        ("own", {"trian": points()}, "got the splits \\['trian'\\]; allowed: train, validation, test"),
        ("own", (torch.zeros(90, 5), torch.zeros(90, dtype=torch.long)), "does not take inputs of shape \\[2, 5\\]"),
        ("own", (points()[0], points()[1] + 7), "got|no class|allowed"),
        (
            "own",
            (points()[0], points()[1] - 1),
            r"data: got label -1 at sample \d \(from 0\); allowed: 0 to 1, one for each",
        ),
        ("own", (points()[0].long(), points()[1]), r"does not take inputs of shape \[2, 6\] and torch.int64 .*dtype"),
        ("own", 5, "data: got int for data; allowed"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    teacher: str | None, data: object, message: str, policy: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        rlkd.distil(taught() if teacher else None, data=data, policy=policy, out=tmp_path / "run", options=SHORT)


class Pair(nn.Module):
    """It answers with two tensors."""

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs[:, :2], inputs


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (nn.Linear(6, 1), "teacher: gives one number a sample; allowed: logits of two classes or more"),
        (nn.Linear(6, 2).double(), r"teacher: got weights of torch.float64; allowed: torch.float32, teacher.float\(\)"),
        (Pair(), "model: got an output of type tuple; allowed: one tensor of logits"),
    ],
)
def test_a_teacher_that_does_not_answer_in_logits_is_refused(teacher: nn.Module, message: str, policy: Path) -> None:
    inputs, labels = points()
    with pytest.raises(UserError, match=message):
        rlkd.distil(teacher, data=(inputs, labels * 0), policy=policy, options=SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train.steps": 4}, "TrainConfig has no 'steps'; allowed: steps_per_window"),
        ({"num_window": 4}, "did you mean num_windows"),
        ({"num_windows": "4"}, "num_windows: got '4'; allowed: a whole number"),
        ({"num_windows": 0}, "num_windows: got 0; allowed: at least 1"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str, policy: Path) -> None:
    with pytest.raises(UserError, match=message):
        rlkd.distil(data="digits", policy=policy, options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"goal": 0.98}, r"goal: got 0.98; allowed: an rlkd.Goal, such as rlkd.Goal\(keep=0.98\)"),
        ({"goal": rlkd.Goal(keep=98)}, "goal.keep: got 98; allowed: a share in"),
        ({"options": ["num_windows"]}, r"options: got \['num_windows'\]; allowed: a mapping from names to values"),
        ({"seed": -1}, "seed: got -1; allowed: a whole number from 0 to 4294967295"),
        ({"seed": "7"}, "seed: got '7'; allowed"),
        (
            {"policy": 3},
            r"policy: got int; allowed: a name, a run folder, or the folder of a policy \(rlkd.save_policy",
        ),
        (
            {"teacher": nn.Linear(2, 2), "options": {"cut.layers": 2}},
            "cut.layers: got it for a module of your own; allow",
        ),
        ({"student": nn.Linear(2, 2)}, "student: got one without a teacher to learn from; give a teacher and its data"),
        ({"processor": str}, "processor: got type without a transformers model as a module; leave it out"),
        ({"teacher": "models/bert", "data": "a.csv", "processor": len}, "leave it out: a folder has its own"),
        ({"teacher": nn.Linear(2, 2), "processor": len}, "and other models take the data as they are"),
        (
            {"goal": rlkd.Goal(keep=0.9), "options": {"goal.latency": "2x"}},
            r"options: goal: got it beside the argument goal; give all of it as rlkd.Goal\(...\)",
        ),
        (
            {"data": "wine", "options": {"task.dataset": "digits"}},
            "options: task.dataset: got 'digits', while the argument is 'wine'; give it as the argument alone",
        ),
        (
            {"teacher": "models/gone", "data": "a.csv", "options": {"data": "b.csv"}},
            "options: data: got 'b.csv', while the argument is 'a.csv'",
        ),
        ({"teacher": nn.Linear}, r"teacher: got the class Linear; allowed: an instance, Linear\(...\)"),
        ({"teacher": [1]}, "teacher: got list; allowed: an nn.Module, or the folder of a transformers model"),
        (
            {"teacher": "models/gone", "student": nn.Linear(2, 2)},
            "student: got Linear, a module of your own, for a tran",
        ),
    ],
)
def test_arguments_of_other_types_are_refused_in_one_line(
    arguments: dict[str, object], message: str, policy: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        rlkd.distil(**{"policy": policy, "out": tmp_path / "run", **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_failed_start_leaves_the_folder_free(policy: Path, tmp_path: Path) -> None:
    need_transformers()
    given = {"data": [{"text": "good", "label": 3}], "policy": policy, "out": tmp_path / "run"}
    with pytest.raises(UserError, match="processor: got none for a transformers model; give its tokenizer"):
        rlkd.distil(tiny("bert"), **given)
    with pytest.raises(UserError, match="got label '3'; allowed: the model's classes"):
        rlkd.distil(tiny("bert"), processor=save_tokenizer(tmp_path / "words"), **given)
    assert not (tmp_path / "run").exists()


def test_a_student_or_report_that_cannot_be_written_is_one_line(chain: rlkd.Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (chain.save, chain.report):
        with pytest.raises(UserError, match=r"file/x: cannot write it \(Not a directory\); choose a place"):
            write(tmp_path / "file" / "x")


def test_policies_are_found_by_name_and_by_folder(policy: Path, tmp_path: Path) -> None:
    assert rlkd.load_policy().digest == rlkd.load_policy("default").digest != rlkd.load_policy(policy).digest
    with pytest.raises(UserError, match="allowed: default"):
        rlkd.load_policy(tmp_path / "none")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: rlkd.save_policy(3, out, {}), "save_policy: got int; allowed: a policy of rlkd.policy_fr"),
        (lambda out: rlkd.save_policy(rlkd.load_policy(), out, {}), "got Bundle; allowed: .* the .policy of"),
        (lambda out: rlkd.save_policy(rlkd.load_policy().policy, 3, {}), "folder: got int; allowed: a path"),
        (
            lambda out: rlkd.save_policy(rlkd.load_policy().policy, out, "my own"),
            "save_policy: provenance: got str .*; allowed: a mapping of values that JSON has",
        ),
        (
            lambda out: rlkd.save_policy(rlkd.load_policy().policy, out, {"score": torch.zeros(1)}),
            "save_policy: provenance: got dict .*Tensor is not JSON serializable",
        ),
        (
            lambda out: rlkd.make_sb3_env("digits"),
            "make_sb3_env: got 'digits'; allowed: an rlkd.EnvConfig.*task={'dataset': 'digits'}",
        ),
        (lambda out: rlkd.build_scenario("digits"), "build_scenario: got 'digits'; allowed: an rlkd.EnvConfig"),
        (
            lambda out: rlkd.make_env(rlkd.EnvConfig(num_windows="4")),
            "build_scenario: num_windows: got '4'; allowed: a whole number",
        ),
        (
            lambda out: rlkd.make_sb3_env(rlkd.EnvConfig(student=rlkd.StudentConfig(widths=48))),
            "build_scenario: student: widths: got 48; allowed: a list, each entry a whole number",
        ),
        (lambda out: rlkd.make_env("digits", num_windows=2), "make: got 'digits'; allowed: an rlkd.EnvConfig"),
        (
            lambda out: rlkd.build_scenario(rlkd.EnvConfig(), student=nn.Linear(64, 10)),
            "build_scenario: student: got Linear; allowed: an rlkd.models.ChainStudent",
        ),
        (lambda out: rlkd.make_sb3_env(num_students="4"), "num_students: got '4'; allowed: a whole number from 1"),
        (lambda out: rlkd.make_sb3_env(seed=-1), "seed: got -1; allowed: a whole number from 0"),
        (
            lambda out: rlkd.make_sb3_env(scale=(np.zeros(50), np.zeros(50))),
            "scale: got tuple of other values; allowed: mean and deviation of the 50 observations, finite",
        ),
        (
            lambda out: rlkd.make_sb3_env(
                rlkd.EnvConfig(), rlkd.EnvConfig(controls=rlkd.ControlConfig(temperature=(1, 2)))
            ),
            "make_sb3_env: got scenarios whose controls differ; allowed: one rlkd.ControlConfig for all",
        ),
    ],
)
def test_what_is_no_policy_or_environment_is_refused_in_one_line(
    call: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        call(tmp_path / "policy")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "policy").exists()


@pytest.mark.slow
def test_a_transformers_model_in_the_hand(policy: Path, tmp_path: Path) -> None:
    need_transformers()
    teacher = tiny("bert", layers=4)
    before = copy.deepcopy(teacher.state_dict())
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    words = ["good film", "bad plot", "great actor", "poor film", "fine plot", "dull actor"]
    rows = [{"text": f"the {words[i % 6]} was {words[(i // 6) % 6]}", "label": i % 2} for i in range(72)]
    result = rlkd.distil(
        teacher,
        data=rows,
        processor=tokenizer,
        policy=policy,
        out=tmp_path / "run",
        options={**SHORT, "train.batch_size": 8},
    )
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert num_hooks(teacher) == 0
    batch = tokenizer(["the good film"], return_tensors="pt")
    assert result.student(**batch).shape == (1, 2)
    assert torch.allclose(rlkd.load_student(tmp_path / "run")(**batch), result.student(**batch), atol=1e-6)


def test_a_shipped_student_loads_with_torch_and_safetensors_alone(chain: rlkd.Result) -> None:
    code = (
        "import sys\n"
        "for name in ('gymnasium', 'stable_baselines3', 'sklearn', 'transformers', 'optuna', 'matplotlib', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "import torch, rlkd\n"
        f"print(tuple(rlkd.load_student({str(chain.folder)!r})(torch.zeros(3, 8, 8)).shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "(3, 10)\n"), done.stderr


def test_what_is_no_student_or_another_one_is_refused(chain: rlkd.Result, policy: Path) -> None:
    for arguments, message in (
        ((policy,), r"holds no student \(no student.json\); give the folder of a student, or of a run of one"),
        ((None,), "load_student: got NoneType; allowed: the folder of a student or of a run"),
        ((chain.folder, taught()), "was not made of a module of your own; call load_student without a model"),
        ((chain.folder, nn.Linear), "model: got <class .*; allowed: an instance of your own class"),
    ):
        with pytest.raises(UserError, match=message):
            rlkd.load_student(*arguments)  # type: ignore[arg-type]


def test_importing_rlkd_loads_no_torch_and_every_public_name_exists() -> None:
    code = "import sys, rlkd; assert 'torch' not in sys.modules; [getattr(rlkd, name) for name in rlkd.__all__]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rlkd.__all__ == sorted(rlkd.__all__, key=lambda n: (not n[0].isupper(), n))
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        rlkd.distill  # noqa: B018


def test_a_loss_term_of_ones_own_trains_a_student(profile_file: Path, policy: Path) -> None:
    calls = []

    @rlkd.loss_term("own_cosine", "feature", "https://arxiv.org/abs/1910.01108", weight=1.0)
    def own_cosine(adapted_features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
        """One minus the cosine of the features."""
        calls.append(adapted_features.shape)
        return (1 - nn.functional.cosine_similarity(adapted_features, teacher_features, dim=-1)).mean()

    options = {**SHORT, "cost.profile": str(profile_file), "teacher.num_steps": 60}
    options |= {"loss.terms": ["cross_entropy", "kl", "own_cosine"]}
    result = rlkd.distil(data="digits", policy=policy, options=options)
    assert calls
    assert len(result.history) == 2
