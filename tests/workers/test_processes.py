"""Workers that are processes: order, what they keep, what happens when one dies, and that all are gone at the end."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlkd.errors import UserError
from rlkd.workers import IN_PROCESS, Work, WorkerError, WorkersConfig, open_workers
from rlkd.workers.interface import MAX_RETRIES, check_versions, versions
from rlkd.workers.processes import ProcessWorkers


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessWorkers]:
    with ProcessWorkers(2) as two:
        yield two


def works(function: Callable[..., Any], *calls: tuple[Any, ...], num_students: int = 1) -> list[Work[Any]]:
    return [Work(("piece", i), function, call, num_students, 2) for i, call in enumerate(calls)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_values_come_in_the_order_of_the_pieces_and_windows_are_counted(workers: ProcessWorkers) -> None:
    def wait(seconds: float, value: int, on_window: Callable[[int], object]) -> tuple[int, int]:
        import time

        time.sleep(seconds)
        on_window(1)  # counted by the main process
        return value, torch.get_num_threads()

    counted: list[int] = []
    done = list(workers.run(works(wait, (0.2, 0), (0.0, 1), (0.0, 2), num_students=3), counted.append))
    assert done == [(0, 1), (1, 1), (2, 1)]
    assert counted == [3] * 6
    here = list(IN_PROCESS.run(works(wait, (0.0, 5)), counted.append))
    assert here[0][0] == 5
    assert counted == [3] * 6 + [1]


def test_the_largest_piece_begins_first() -> None:
    def when(on_window: Callable[[int], object]) -> float:
        import time

        return time.monotonic()

    pieces = [Work((i,), when, (), num_students, 1) for i, num_students in enumerate((1, 1, 9, 1))]
    with ProcessWorkers(1) as alone:
        moments = list(alone.run(pieces))
    assert sorted(range(4), key=lambda i: moments[i]) == [2, 0, 1, 3]


def test_what_is_shared_is_sent_once_to_each_worker(workers: ProcessWorkers) -> None:
    class Counted:
        def __init__(self) -> None:
            self.uses = 0

        def use(self) -> int:
            self.uses += 1
            return self.uses

    def use(counted: Any, on_window: Callable[[int], object]) -> tuple[int, int]:
        import os

        return os.getpid(), counted.use()

    value = Counted()
    handle = workers.share(value)
    assert workers.share(value) == handle
    assert workers.share(Counted()) != handle
    done = list(workers.run(works(use, *[(handle,)] * 6)))
    for pid in {pid for pid, _ in done}:  # the same object every time
        mine = [uses for p, uses in done if p == pid]
        assert sorted(mine) == list(range(1, len(mine) + 1))
    assert value.uses == 0


def test_an_error_in_a_worker_is_one_line(workers: ProcessWorkers) -> None:
    def mistake(on_window: Callable[[int], object]) -> None:
        raise UserError("scenario: got nothing")

    def fault(on_window: Callable[[int], object]) -> float:
        return 1 / 0

    with pytest.raises(UserError, match=r"^scenario: got nothing$") as raised:
        list(workers.run(works(mistake, ())))
    assert not isinstance(raised.value, WorkerError)
    with pytest.raises(
        WorkerError, match=r"^a worker failed in work piece 0: ZeroDivisionError: division by zero \(.*py"
    ):
        list(workers.run(works(fault, ())))
    assert list(workers.run(works(lambda on_window: 7, ()))) == [7]  # they go on


def test_a_piece_whose_worker_is_killed_is_done_again(
    workers: ProcessWorkers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def once(mark: Path, on_window: Callable[[int], object]) -> str:
        import os
        import signal

        if not mark.exists():
            mark.write_text("seen")
            os.kill(os.getpid(), signal.SIGKILL)
        return mark.name

    with caplog.at_level(logging.WARNING):
        assert list(workers.run(works(once, (tmp_path / "a",), (tmp_path / "b",), (tmp_path / "a",)))) == [
            "a",
            "b",
            "a",
        ]
    assert "a worker is lost; work piece" in caplog.text
    for pid in workers.pids:  # even if it has nothing to do
        os.kill(pid, signal.SIGKILL)
    assert list(workers.run(works(lambda on_window: 7, (), ()))) == [7, 7]


def test_a_piece_that_kills_every_worker_ends_the_run(workers: ProcessWorkers) -> None:
    def deadly(on_window: Callable[[int], object]) -> None:
        import os

        os._exit(1)

    with pytest.raises(WorkerError, match=f"^work piece 0: its worker ended {MAX_RETRIES + 1} times without an answer"):
        list(workers.run(works(deadly, ())))


def test_ctrl_c_ends_the_work_and_the_workers(tmp_path: Path) -> None:
    def slow(mark: Path, on_window: Callable[[int], object]) -> None:
        import time

        mark.write_text("begun")
        time.sleep(60)

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    began_s = time.monotonic()
    pids: list[int] = []

    def work() -> None:
        with ProcessWorkers(2) as two:
            pids.extend(two.pids)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            list(two.run(works(slow, (tmp_path / "begun",))))

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began_s < 30
    assert len(pids) == 2
    assert not any(map(is_alive, pids))


def test_workers_end_with_a_main_process_that_is_killed() -> None:
    code = (
        "import time; from rlkd.workers import Work; from rlkd.workers.processes import ProcessWorkers\n"
        "if __name__ == '__main__':\n"
        "    two = ProcessWorkers(2); print(*two.pids, flush=True)\n"
        "    sleep = lambda seconds, on_window: time.sleep(seconds)\n"
        "    list(two.run([Work((i,), sleep, (60,), 1, 1) for i in range(2)]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        pids = [int(word) for word in main.stdout.readline().split()]
        assert len(pids) == 2
        main.kill()
    for _ in range(600):
        if not any(map(is_alive, pids)):
            return
        time.sleep(0.05)
    raise AssertionError(f"{pids} go on")


def test_other_versions_are_refused_and_another_processor_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    *packages, processor = versions()
    check_versions((*packages, processor))
    assert not caplog.text
    check_versions((*packages, "processor Z80"))
    assert f"a worker has processor Z80, here {processor}" in caplog.text
    with pytest.raises(WorkerError, match=r"a worker has torch 1\.0, here torch"):
        check_versions((packages[0], "torch 1.0", *packages[2:], processor))


@pytest.mark.parametrize(
    ("config", "device", "said"),
    [
        (WorkersConfig("threads"), "cpu", "--workers: got 'threads'; allowed: none, processes, ray"),
        (WorkersConfig("processes", 0), "cpu", "--num_workers: got 0; allowed: at least 1"),
        (WorkersConfig("none", 2), "cpu", "--num_workers, --gpu_share: got without --workers"),
        (WorkersConfig("processes", 2, "auto"), "cpu", "--ray_address: got with --workers processes"),
        (WorkersConfig("processes", 2, None, 1.5), "cpu", "--gpu_share: got 1.5; allowed: 0 to 1"),
        (WorkersConfig("processes", 2), "cuda", "--gpu_share: got none, but students train on cuda"),
    ],
)
def test_workers_that_contradict_themselves_are_refused(config: WorkersConfig, device: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        config.check(device)
    assert str(raised.value).startswith(said)


def test_more_workers_than_the_gpus_have_shares_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = WorkersConfig("processes", 3, gpu_share=0.5)
    with pytest.raises(UserError, match=r"--num_workers: got 3 with --gpu_share 0\.5 on 1 GPUs"), open_workers(config):
        pass
