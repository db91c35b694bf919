"""The way from the command line to a loss has few enough frames to be followed."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

import pytest
import tiny_models

import rlkd
from rlkd.cli.main import main
from rlkd.losses.response import response

ROOT = Path(rlkd.__file__).resolve().parent.parent
MOST_FRAMES = 12


class Reached(Exception):
    """Ends a run at the loss."""


def frames_up(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def way_to(code: CodeType, argv: list[str], through: str = "") -> list[str]:
    """Project frames from `main` to the first call of `code` below a function called `through`."""
    way: list[str] = []

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or frame.f_code is not code:
            return
        frames = list(frames_up(frame))
        if through and through not in (f.f_code.co_name for f in frames):
            return
        for f in frames:
            path = Path(f.f_code.co_filename).resolve()
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("rlkd", "envs", "agents", "configs"):
                way.append(f"{path.relative_to(ROOT)}: {f.f_code.co_name}")
            if f.f_code is main.__code__:
                break
        raise Reached

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        with pytest.raises(Reached):
            main(argv)
    finally:
        sys.setprofile(before)
    return way[::-1]


def test_the_way_of_ppo_from_the_command_line_to_a_loss(tiny: list[str], tmp_path: Path) -> None:
    way = way_to(response.__code__, ["train", *tiny, "--out", str(tmp_path / "run")], through="collect_rollouts")
    assert way[0] == "rlkd/cli/main.py: main"
    assert "agents/ppo/train.py: train" in way
    assert "envs/episodes.py: step" in way
    assert len(way) <= MOST_FRAMES + 1, "\n".join(way)  # rollouts are collected here, not in stable-baselines3


@pytest.mark.slow
def test_the_way_of_distil_from_the_command_line_to_a_loss_of_a_real_model(tmp_path: Path) -> None:
    tiny_models.need_transformers()
    tiny_models.tiny("bert", layers=3).save_pretrained(tmp_path / "bert")  # type: ignore[operator]
    tiny_models.save_tokenizer(tmp_path / "bert")
    tiny_models.save_policy(tmp_path / "policy")
    rows = (f"{tiny_models.WORDS[i % 5]},{i % 2},r{i}" for i in range(60))
    (tmp_path / "texts.csv").write_text("text,label,source\n" + "".join(f"{row}\n" for row in rows))
    argv = ["--teacher", str(tmp_path / "bert"), "--data", str(tmp_path / "texts.csv"), "--cut.layers", "2"]
    argv += ["--policy", str(tmp_path / "policy"), "--out", str(tmp_path / "run"), "--num_windows", "1"]
    way = way_to(response.__code__, ["distil", *argv], through="run_windows")
    assert way[0] == "rlkd/cli/main.py: main"
    assert "rlkd/students/real/module.py: train_window" in way
    assert len(way) <= MOST_FRAMES, "\n".join(way)
