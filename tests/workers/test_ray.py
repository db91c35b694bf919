"""Workers on a Ray cluster that the test starts on this machine."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlkd.errors import UserError
from rlkd.workers import Work, WorkerError, WorkersConfig, open_workers
from rlkd.workers.interface import MAX_RETRIES

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'rlkd[ray]'")

from rlkd.workers.ray import RayWorkers  # noqa: E402

# Ray leaves sockets and files to its own shutdown
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def workers() -> Iterator[RayWorkers]:
    with RayWorkers(2) as two:
        yield two
    assert not ray.is_initialized()


def works(function: Callable[..., Any], *calls: tuple[Any, ...], num_students: int = 1) -> list[Work[Any]]:
    return [Work(("piece", i), function, call, num_students, 2) for i, call in enumerate(calls)]


def test_values_come_in_order_and_what_is_shared_is_fetched_once(workers: RayWorkers) -> None:
    class Counted:
        uses = 0

    def use(counted: Any, value: int, on_window: Callable[[int], object]) -> tuple[int, int, int, int]:
        import os

        import torch

        counted.uses += 1
        return value, os.getpid(), counted.uses, torch.get_num_threads()

    handle, counted = workers.share(value := Counted()), list[int]()
    assert workers.share(value) == handle
    done = list(workers.run(works(use, *((handle, i) for i in range(6)), num_students=3), counted.append))
    assert [value for value, *_ in done] == list(range(6))
    assert {threads for *_, threads in done} == {1}
    assert counted == [3] * 12
    for pid in {pid for _, pid, *_ in done}:
        mine = [uses for _, p, uses, _ in done if p == pid]
        assert sorted(mine) == list(range(1, len(mine) + 1))


def test_an_error_is_one_line_and_a_killed_worker_is_replaced(workers: RayWorkers, tmp_path: Path) -> None:
    def fault(on_window: Callable[[int], object]) -> float:
        return 1 / 0

    def mistake(on_window: Callable[[int], object]) -> None:
        from rlkd.errors import UserError

        raise UserError("scenario: got nothing")

    def once(mark: Path, on_window: Callable[[int], object]) -> str:
        import os
        import signal

        if not mark.exists():
            mark.write_text("seen")
            os.kill(os.getpid(), signal.SIGKILL)
        return mark.name

    with pytest.raises(
        WorkerError, match=r"^a worker failed in work piece 0: ZeroDivisionError: division by zero \(.*py"
    ):
        list(workers.run(works(fault, ())))
    with pytest.raises(UserError, match=r"^scenario: got nothing$"):
        list(workers.run(works(mistake, ())))
    assert list(workers.run(works(once, (tmp_path / "a",), (tmp_path / "b",)))) == ["a", "b"]


def test_a_piece_that_kills_every_worker_ends_the_run(workers: RayWorkers) -> None:
    def deadly(on_window: Callable[[int], object]) -> None:
        import os

        os._exit(1)

    with pytest.raises(WorkerError, match=rf"^work piece 0: its worker was lost {MAX_RETRIES + 1} times"):
        list(workers.run(works(deadly, ())))
    assert list(workers.run(works(lambda on_window: 7, ()))) == [7]  # they go on


def test_sigterm_stays_with_the_main_process(workers: RayWorkers) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_cluster_that_is_not_there_and_a_gpu_that_it_lacks_are_refused(workers: RayWorkers) -> None:
    with pytest.raises(UserError, match=r"--gpu_share: got 0\.5, but the cluster has no GPU"):
        RayWorkers(2, gpu_share=0.5)
    assert ray.is_initialized()  # it belongs to the other workers


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs the package ray; run `pip install 'rlkd\[ray\]'`"):  # noqa: SIM117
        with open_workers(WorkersConfig("ray", 1)):
            os.abort()
