"""The exit threshold of an exported student, where the user asks for an accuracy or a latency."""

from rlkd.data.goal import limit_ratio
from rlkd.errors import UserError
from rlkd.export.exits import CalibratedExit, calibrate, calibrate_latency, check_decides, time_exits
from rlkd.runs.shipped import ShippedData

NUM_TRACED = 3  # samples that a graph is traced with; one alone would be taken for a constant


def calibrated_exit(
    opened: ShippedData, accuracy: float | None, latency: str | None, threads: int
) -> CalibratedExit | None:
    """Choose the exit threshold on validation data; None where nothing is asked for.

    Args:
        opened: the student with its data.
        accuracy: that the student must have at least.
        latency: of a sample at batch 1, as `limit_ratio` reads it: a ratio to the time without early exits, or a time.
        threads: of a call.

    Raises:
        UserError: the student has no threshold, or no threshold reaches what is asked for.
    """
    given = "--exit_accuracy" if accuracy is not None else "--exit_latency"
    if accuracy is None and latency is None:
        return None
    if opened.is_causal:
        raise UserError(f"{given}: got a language model, whose tokens leave one by one; allowed: with classifiers")
    student, batch, index = opened.student, opened.batch, opened.few("validation")
    if accuracy is not None:
        return calibrate(student, batch, index, opened.labels, accuracy)
    assert latency is not None
    check_decides(student, f"{given}: got {latency}")
    traced = batch(index[:NUM_TRACED])
    exits_s = time_exits(student, batch, index, traced=traced, has_length=opened.has_length, threads=threads)
    most_s = limit_ratio("latency", latency, exits_s[-1], option=given) * exits_s[-1]
    return calibrate_latency(student, batch, index, opened.labels, exits_s=exits_s, most_s=most_s)
