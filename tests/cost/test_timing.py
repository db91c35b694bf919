"""The one timer: calls take turns, on one thread, after a warm-up; no figure of a clock is checked."""

import itertools
from collections.abc import Callable

import pytest
import torch

from rlkd.cost.timing import compare_latency, summarise, time_calls


def test_calls_take_turns_on_one_thread_without_gradients() -> None:
    order: list[str] = []
    seen: set[tuple[int, bool]] = set()

    def call(name: str) -> Callable[[], object]:
        def note() -> None:
            order.append(name)
            seen.add((torch.get_num_threads(), torch.is_inference_mode_enabled()))

        return note

    latencies = time_calls([call("a"), call("b"), call("c")], 4)
    turns = "".join(name for name, _ in itertools.groupby(order))
    assert turns == "abc" + "abc" + "cba"[1:] + "abc"[1:] + "cba"[1:]  # the warm-up, then rounds to and fro
    assert seen == {(1, True)}
    assert [latency.num_rounds for latency in latencies] == [4, 4, 4]
    seen.clear()
    time_calls([call("a")], 1, threads=2)
    assert seen == {(2, True)}


def test_the_summary_by_hand() -> None:
    latency = summarise([float(i) for i in reversed(range(21))], [1.0, 3.0, 2.0])
    assert (latency.median_s, latency.spread_s, latency.p95_s) == (10.0, 10.0, 19.0)
    assert latency.processor_s == 2.0
    assert summarise([2.0], [1.0]).p95_s == 2.0


def test_a_comparison_states_how_it_was_measured() -> None:
    row = compare_latency(lambda: None, lambda: None, 32)
    assert (row["batch_size"], row["threads"], row["num_rounds"]) == (32, 1, 21)
    assert row["speedup"] == pytest.approx(row["dense_latency_s"] / row["latency_s"])
    assert row["latency_s"] <= row["p95_s"]
