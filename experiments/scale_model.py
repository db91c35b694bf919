"""A model of policy training with many workers: seconds of a round, computed event by event from measured costs.

The main process sends pieces of work one after the other, workers train them, the main process receives them and
updates the policy. Times of pieces scatter as measured.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOWS = 4  # of a measured episode
WORKERS = (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024)
STUDENTS = (48, 480, 4_800, 48_000)  # of each scenario


@dataclass(frozen=True)
class Costs:
    """What the model is made of, in seconds."""

    piece_fixed_s: float  # of a piece of work, whatever its size
    piece_student_s: float  # for every student of it
    piece_scatter: float  # standard deviation of the log of a piece's time, between repetitions
    send_s: float  # of the main process for each piece
    receive_fixed_s: float  # of the main process for each piece
    receive_student_s: float  # for every student
    worker_s: float  # from sending to beginning and from end to arrival, not of the main process
    update_fixed_s: float
    update_window_s: float  # of an update, for every window of the rollout


def round_s(
    costs: Costs,
    num_workers: int,
    num_students: int,
    chunk: int,
    *,
    num_scenarios: int,
    num_windows: int,
    seed: int = 0,
) -> float:
    """Seconds of one round by the model: send, train, receive as they end, update.

    Args:
        costs: measured for pieces of WINDOWS windows; longer episodes take in proportion.
        num_workers: that take the next piece when they are free.
        num_students: of every scenario.
        chunk: most students of a piece.
        num_scenarios: of the round.
        num_windows: of an episode.
        seed: of the scatter.
    """
    r = np.random.default_rng(seed)
    num_chunks = -(-num_students // chunk)
    students = num_students / num_chunks
    count = num_chunks * num_scenarios
    piece = (costs.piece_fixed_s + costs.piece_student_s * students) * num_windows / WINDOWS
    receive = costs.receive_fixed_s + costs.receive_student_s * students * num_windows / WINDOWS
    times = piece * np.exp(costs.piece_scatter * r.standard_normal(count))
    main_free, begun = 0.0, 0
    ends: list[float] = []  # when pieces at work will have arrived
    while begun < min(count, num_workers):
        main_free += costs.send_s
        heapq.heappush(ends, main_free + costs.worker_s + times[begun])
        begun += 1
    while ends:
        main_free = max(main_free, heapq.heappop(ends)) + receive
        if begun < count:
            main_free += costs.send_s
            heapq.heappush(ends, main_free + costs.worker_s + times[begun])
            begun += 1
    return main_free + costs.update_fixed_s + costs.update_window_s * num_students * num_scenarios * num_windows


def table_of(costs: Costs, num_scenarios: int, num_windows: int) -> list[dict[str, Any]]:
    """Return a row for each number of workers and students, with the chunk that is best for it."""
    rows = []
    for students in STUDENTS:
        chunks = sorted({max(1, math.ceil(students / k)) for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)})
        chunks = [chunk for chunk in chunks if chunk <= 128]

        def best(num_workers: int, students: int = students, chunks: Sequence[int] = chunks) -> tuple[float, int]:
            return min(
                (round_s(costs, num_workers, students, c, num_scenarios=num_scenarios, num_windows=num_windows), c)
                for c in chunks
            )

        one, _ = best(1)
        update = costs.update_fixed_s + costs.update_window_s * students * num_scenarios * num_windows
        for num_workers in WORKERS:
            seconds, chunk = best(num_workers)
            rows.append(
                {
                    "num_workers": num_workers,
                    "num_students": students,
                    "chunk_students": chunk,
                    "round_s": seconds,
                    "trainings_per_s": students * num_scenarios / seconds,
                    "speedup": one / seconds,
                    "efficiency": one / seconds / num_workers,
                    "update_share": update / seconds,
                }
            )
    return rows


def reading_of(rows: Sequence[dict[str, Any]]) -> str:
    """Say from which number of workers on a batch keeps them less than half busy, and what ends the speed-up."""
    found = []
    for students in STUDENTS:
        mine = [r for r in rows if r["num_students"] == students]
        good = [r for r in mine if r["efficiency"] >= 0.5]
        most = max(mine, key=lambda r: r["speedup"])
        found.append(
            f"- {students:,} students a scenario keep up to {max(r['num_workers'] for r in good):,} workers at least half busy; "
            f"the greatest speed-up is {most['speedup']:.0f}, with {most['num_workers']:,} workers, where the update takes "
            f"{100 * most['update_share']:.0f} % of a round."
        )
    return "Where the barrier at the end of each round hurts:\n\n" + "\n".join(found)
