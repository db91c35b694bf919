import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from rlkd.agents.evaluation import tensorboard as tb
from rlkd.agents.evaluation.trackers import TRACKERS, parse_names, tracking
from rlkd.agents.ppo.evaluation import Evaluation
from rlkd.configs import DistilConfig
from rlkd.errors import UserError

EVALUATION = Evaluation(3, 0.5, 1.0, 0.0, 0.4, 0.3)


class Client:
    """A stand-in of the clients of wandb, mlflow and trackio: it records what they are told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> "Client":
            self.calls.append((name, (arguments, named)))
            return self

        return call


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    made = Client()
    for name in TRACKERS:
        module = types.ModuleType(name)
        module.__getattr__ = made.__getattr__  # type: ignore[method-assign]
        monkeypatch.setitem(sys.modules, name, module)
    return made


def write_run(name: str, folder: Path) -> None:
    with tracking((name,), folder, DistilConfig()):
        logger = tb.new_logger(folder / "tensorboard")
        logger.record("rollout/ep_rew_mean", 0.25)
        logger.dump(7)
        tb.record_evaluation(logger, EVALUATION, 21)
        logger.close()


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_tracker_gets_config_scalars_and_evaluations(name: str, client: Client, tmp_path: Path) -> None:
    write_run(name, tmp_path)
    said = repr(client.calls)
    assert "steps_per_window" in said
    assert "'rollout/ep_rew_mean': 0.25" in said
    assert "'eval/mean_reward': 0.3" in said
    assert "7" in said
    assert "21" in said
    assert client.calls[-1][0] in ("finish", "end_run")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", list(TRACKERS))
def test_the_real_package_keeps_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip(name, reason=f"the extra {name} is not installed")
    write_run(name, tmp_path)
    tags = (b"rollout/ep_rew_mean", b"eval/mean_reward", b"steps_per_window")
    for _ in range(100):  # the process of wandb writes its file a moment after the run has ended
        stores = [path for path in tmp_path.rglob("*") if ".db" in path.name or path.suffix == ".wandb"]
        kept = b"".join(path.read_bytes() for path in stores)
        if all(tag in kept for tag in tags):
            break
        time.sleep(0.1)
    assert [tag for tag in tags if tag not in kept] == []


def test_the_reason_of_a_tracker_stays_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: Any) -> Any:
        raise RuntimeError("the store is closed.\n" + "Why. " * 40 + "Set MLFLOW_TRACKING_URI.")

    monkeypatch.setitem(TRACKERS, "mlflow", refuse)
    with pytest.raises(UserError, match=r"^--track mlflow: .*Set MLFLOW_TRACKING_URI\.\)$"):
        write_run("mlflow", tmp_path)


def test_none_is_open_unless_it_is_asked_for(client: Client, tmp_path: Path) -> None:
    logger = tb.new_logger(tmp_path / "tensorboard")
    tb.record_evaluation(logger, EVALUATION, 21)
    logger.close()
    assert client.calls == []
    assert len(logger.output_formats) == 1


def test_unknown_and_missing_trackers_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert parse_names("wandb, mlflow") == ("wandb", "mlflow")
    assert parse_names(None) == ()
    with pytest.raises(UserError, match="got 'tensorboard'; allowed: wandb, mlflow, trackio"):
        parse_names("tensorboard")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'rlkd\[wandb\]'"), tracking(("wandb",), tmp_path, DistilConfig()):
        pass
