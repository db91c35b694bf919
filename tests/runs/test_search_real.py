"""`rlkd search --data`: cuts of tiny transformers within limits, their costs, and the command of the winner."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_sides
import tiny_models
import torch

from rlkd.cli import distil_models, search_models
from rlkd.cli.arguments import parse
from rlkd.cli.main import main
from rlkd.cost.real import profile_through
from rlkd.cost.real_work import count_work
from rlkd.data import Goal
from rlkd.data.rows import ColumnConfig
from rlkd.envs.build_real import typical_sample
from rlkd.envs.rate import RATES
from rlkd.envs.real_config import RealConfig, RealCostConfig
from rlkd.models.real.cutting import StudentCut, student_from_teacher
from rlkd.runs import search_real
from rlkd.runs.search_real import CutCandidate, CutSpace, RealSearchConfig, RealSpace, build_space
from rlkd.students.real.train_config import ModuleTrainConfig

Capture = pytest.CaptureFixture[str]
SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
QUICK = [
    *("--train.steps_per_window", "2", "--train.batch_size", "8", "--train.learning_rate", "5e-5"),
    *("--num_windows", "1", "--cost.batch_size", "2"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text teacher of three blocks, an image teacher of two, and data."""
    t = tiny_models.need_transformers()
    folder = tmp_path_factory.mktemp("place")
    real_sides.saved(tiny_models.tiny("bert", layers=3, **SMALL), folder / "bert")
    real_sides.write_texts(folder)
    tiny_models.tiny("vit", num_classes=3).save_pretrained(folder / "vit")
    t.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    pixels = np.random.default_rng(0).random((60, 3, 16, 16), dtype=np.float32)
    np.savez(folder / "images.npz", inputs=pixels, labels=np.arange(60) % 3)
    return folder


def config(place: Path, **changes: Any) -> RealSearchConfig:
    return RealSearchConfig(
        teacher=str(place / "bert"),
        data=str(place / "texts.csv"),
        num_windows=1,
        train=ModuleTrainConfig(steps_per_window=2, batch_size=8, learning_rate=5e-5),
        cost=RealCostConfig(batch_size=2),
        **{"goal": Goal(size=0.999), **changes},
    )


@pytest.fixture(scope="module")
def space(place: Path) -> RealSpace:
    return build_space(config(place))


def test_every_cut_is_there_once_and_the_whole_teacher_is_not(space: RealSpace) -> None:
    structures = [cut.structure for cut in space.cuts]
    assert len(structures) == len(set(structures))
    ways = [(2, keep, exits) for keep in ("influence", "spread") for exits in ((), (1,))]
    whole = {(1, "influence", 1.0, ())} | {(layers, keep, 1.0, exits) for layers, keep, exits in ways}
    half = {(layers, keep, 0.5, exits) for layers, keep, _, exits in whole} | {
        (3, "influence", 0.5, ()),
        (3, "influence", 0.5, (2,)),
    }
    assert set(structures) == whole | half
    assert [cut.latency_s for cut in space.cuts] == sorted(cut.latency_s for cut in space.cuts)


def test_costs_are_ratios_to_the_teacher(space: RealSpace) -> None:
    teacher = space.teacher.model
    for cut in space.cuts:
        student, _ = student_from_teacher(teacher, space.kind, cut.cut)
        parameters = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
        latency, energy, macs, size = cut.ratios
        assert size == pytest.approx(parameters[0] / parameters[1])
        assert 0 < energy < 1
        assert 0 < macs < 1
        assert latency > 0
    one, two = (next(c for c in space.cuts if c.structure == (n, "influence", 1.0, ())) for n in (1, 2))
    teacher_macs = space.teacher_work.dense_macs
    block_macs = (two.ratios[2] - one.ratios[2]) * teacher_macs
    length, width, hidden = typical_sample(space.teacher.data)["input_ids"].shape[1], 16, 32
    by_hand = length * (4 * width * width + 2 * width * hidden) + 2 * length * length * width
    assert block_macs == pytest.approx(by_hand)


def test_an_exit_saves_time_in_proportion_to_macs(space: RealSpace) -> None:
    side = search_real._cut_side(space.config, space.kind, space.teacher, StudentCut(layers=2), None)
    assert side.plan.exits == (1,)
    work = count_work(side.model, typical_sample(side.data), side.plan)
    profile = profile_through(side.plan, work, 2, 0.004)
    kept = torch.tensor([side.plan.group_sizes]).float()
    dense = profile.cost(kept, torch.tensor([[0.0, 1.0]]), torch.ones(1))
    early = profile.cost(kept, torch.tensor([[1.0, 0.0]]), torch.tensor([0.9]))
    assert float(dense.latency_s) == pytest.approx(0.004)
    assert float(early.latency_s) == pytest.approx(0.004 * float(early.macs / dense.macs))
    assert float(early.latency_s) < 0.004


def test_an_impossible_limit_ends_before_any_training(place: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ["--teacher", str(place / "bert"), "--data", str(place / "texts.csv"), *QUICK]
    alone = ["--space.layers", "[1]", "--space.widths", "[0.5]"]  # several are told apart by the clock
    assert main(["search", *options, *alone, "--goal.size", "0.01", "--out", str(tmp_path / "a")]) == 2
    printed = capsys.readouterr()
    assert "no structure is within the limits; the fastest one, 1 layers (influence), width 0.5, has" in printed.err
    assert printed.err.count("Traceback") == 0
    assert "what is possible" not in printed.out
    assert not (tmp_path / "a").exists()


def test_narrow_searches_train_what_is_proposed_within_the_limits(
    space: RealSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[CutCandidate] = []

    def train(space: RealSpace, signals: object, candidate: CutCandidate, seed: int, rates: object) -> CutCandidate:
        trained.append(candidate)
        return dataclasses.replace(candidate, accuracy=0.5, expected_latency_s=candidate.latency_s)

    monkeypatch.setattr(search_real, "train_shortly", train)
    most = sorted(cut.ratios[3] for cut in space.cuts)[5]
    narrow = dataclasses.replace(space, limits=(np.inf, np.inf, np.inf, most))
    assert 3 < len(narrow.fitting()) < len(space.cuts)
    few = dataclasses.replace(narrow, config=dataclasses.replace(space.config, num_candidates=3))
    found = search_real.search(few, 0, lambda candidate: None)
    assert len(found) == 3
    assert all(cut.ratios[3] <= most for cut in found)
    trained.clear()
    search_real.search(narrow, 0, lambda candidate: None)
    assert [cut.structure for cut in trained] == [cut.structure for cut in narrow.fitting()]  # so few: each of them


def test_from_limits_to_a_command_that_distil_parses(place: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ["--teacher", str(place / "bert"), "--data", str(place / "texts.csv"), *QUICK]
    options += [
        "--space.layers",
        "[1,2]",
        "--space.widths",
        "[1.0]",
        "--space.keeps",
        "[first]",
        "--goal.size",
        "0.999",
    ]
    assert main(["search", *options, "--seed", "3", "--out", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert out.index("what is possible within size <= 0.999") < out.index("layers (first): accuracy")
    assert out.index("layers (first): accuracy") < out.index("the front") < out.index("winner: ")
    record = json.loads((tmp_path / "a" / "search.json").read_text())
    assert [(c["layers"], c["exits"]) for c in record["tried"]] == [(1, []), (2, []), (2, [1])]
    assert all(0 < c["accuracy"] <= 1 and c["expected_latency_s"] > 0 for c in record["tried"])
    without = record["tried"][1]
    assert without["expected_latency_s"] == pytest.approx(without["latency_s"])  # no sample leaves
    winner = record["front"][-1]
    assert winner["accuracy"] == max(c["accuracy"] for c in record["tried"])
    words = shlex.split(out.split("next: ")[1])
    assert words[:2] == ["rlkd", "distil"]
    parsed, others = parse(distil_models._parser(), words[2:], RealConfig)
    assert parsed is not None
    parsed.check()
    assert (parsed.teacher, parsed.data, others.seed) == (str(place / "bert"), str(place / "texts.csv"), 3)
    assert parsed.cut == StudentCut(layers=winner["layers"], keep="first")
    assert parsed.attach.exits == tuple(winner["exits"])
    assert parsed.goal == Goal(keep=0.98, reference="dense")
    assert parsed.num_windows == 12
    assert parsed.train.steps_per_window == 2


def test_options_make_the_configuration_again(space: RealSpace) -> None:
    asked = dataclasses.replace(
        space.config, columns=ColumnConfig(text="a b"), goal=Goal(accuracy=0.9, macs="2x"), allow_pickle=True
    )
    cut = next(c for c in space.cuts if c.exits and c.width < 1)
    wanted = search_real.distil_config(dataclasses.replace(space, config=asked), cut)
    assert wanted.goal == Goal(accuracy=0.9)
    parsed, _ = parse(distil_models._parser(), search_models.options_of(wanted), RealConfig)
    assert parsed == wanted


def test_a_training_that_diverges_counts_as_nothing(space: RealSpace, caplog: pytest.LogCaptureFixture) -> None:
    signals, cut = search_real._signals(space), space.cuts[0]
    assert search_real.train_shortly(space, signals, cut, 0, {}).accuracy > 0
    assert not [line for line in caplog.messages if "diverged" in line]
    broken = dataclasses.replace(signals, logits=torch.full_like(signals.logits, torch.nan))
    assert search_real.train_shortly(space, broken, cut, 0, {}).accuracy == 0
    assert [line for line in caplog.messages if "its training diverged; its accuracy counts as 0" in line]


@pytest.mark.slow
def test_a_range_test_finds_the_step_size_once_a_width(space: RealSpace, caplog: pytest.LogCaptureFixture) -> None:
    train = dataclasses.replace(space.config.train, learning_rate=0.0)
    asked = dataclasses.replace(space, config=dataclasses.replace(space.config, train=train))
    signals, rates = search_real._signals(asked), dict[float, float]()
    for cut in [cut for cut in space.cuts if cut.width == 0.5 and not cut.exits][:2]:
        assert 0 <= search_real.train_shortly(asked, signals, cut, 0, rates).accuracy <= 1
    assert list(rates) == [0.5]
    assert rates[0.5] in RATES
    assert len([line for line in caplog.messages if line.startswith("learning rate:")]) == 1


@pytest.mark.slow
def test_a_language_model_is_cut_too(tmp_path: Path, capsys: Capture) -> None:
    tiny_models.tiny("llama", vocab_size=len(tiny_models.WORDS) + 3, **SMALL).save_pretrained(tmp_path / "llama")
    tiny_models.save_causal_tokenizer(tmp_path / "llama")
    words = tiny_models.WORDS
    (tmp_path / "novel.txt").write_text("\n".join(" ".join(words[i % 9 : i % 9 + 5]) for i in range(60)))
    options = ["--teacher", str(tmp_path / "llama"), "--data", str(tmp_path / "novel.txt"), *QUICK]
    options += ["--tokens.top_k", "5", "--goal.size", "0.999", "--space.keeps", "[first]"]
    assert main(["search", *options, "--out", str(tmp_path / "a")]) == 0
    tried = json.loads((tmp_path / "a" / "search.json").read_text())["tried"]
    assert {(cut["layers"], cut["width"], len(cut["exits"])) for cut in tried} == {
        (1, 1.0, 0), (1, 0.5, 0), (2, 0.5, 0), (2, 0.5, 1),
    }  # fmt: skip
    assert "--tokens.top_k 5" in capsys.readouterr().out.split("next: ")[1]


@pytest.mark.slow
def test_the_winner_of_an_image_teacher_is_distilled(place: Path, tmp_path: Path) -> None:
    options = ["--teacher", str(place / "vit"), "--data", str(place / "images.npz"), *QUICK, "--cost.batches", "[]"]
    options += ["--space.layers", "[1]", "--space.widths", "[1.0,0.5]", "--goal.macs", "0.9", "--distil"]
    assert main(["search", *options, "--out", str(tmp_path / "a")]) in (0, 1)  # 1: the goal is missed
    result = json.loads((tmp_path / "a" / "distil" / "result.json").read_text())
    assert result["task"]["teacher"] == str(place / "vit")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--goal.macs", "null"], "goal: got no limit"),
        (["--cut.layers", "1"], "cut: got a value; allowed: none, rlkd search chooses it"),
        (["--student", "small.json"], "student: got a value; allowed: none"),
        (["--attach.exits", "[1]"], "attach.exits: got a value"),
        (["--space.widths", "[]"], "space: got an empty list"),
        (["--space.widths", "[1.5]"], "cut.width: got 1.5"),
        (["--space.layers", "[4]"], "space.layers: got [4]; allowed: 1 to 3, the teacher's"),
        (["--space.layers", "[3]", "--space.widths", "[1.0]"], "space: got the whole teacher alone"),
        (["--num_candidates", "0"], "num_candidates 0"),
        (["--teacher_device_map", "auto"], "teacher_device_map, teacher_shard: got one of them"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], words: str, place: Path, capsys: Capture, tmp_path: Path) -> None:
    models = ["--teacher", str(place / "bert"), "--data", str(place / "texts.csv"), "--goal.macs", "2x"]
    assert main(["search", *models, *options, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_a_deep_teacher_is_tried_at_a_few_depths() -> None:
    shapes = search_real._shapes(CutSpace(), 24)
    layers = sorted({layers for layers, _ in shapes})
    assert len(layers) == search_real.NUM_DEPTHS
    assert (layers[0], layers[-1]) == (1, 24)
    assert (24, 1.0) not in shapes
