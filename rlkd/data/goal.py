"""The goal that a user states: an accuracy floor, cost limits, or both, beside the weights of what is left open."""

import math
import re
from dataclasses import dataclass

from rlkd.data.distribution import COSTS, Preference, TaskGoal, reference_accuracy
from rlkd.errors import UserError

UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_TIMES = re.compile(rf"{_NUMBER}x")
_DURATION = re.compile(rf"{_NUMBER}\s?(s|ms|us)")
_FLOOR_WEIGHTS, _LIMIT_WEIGHTS = (0.0, 0.75, 0.25), (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Goal:
    """What the student must reach: an accuracy floor, cost limits, or both. Nothing given: weights alone.

    With a floor, what is left open is weighed 0.75 latency and 0.25 energy, with limits alone 1.0 accuracy, unless a
    preference is given.

    Example:
        >>> Goal(keep=0.98, latency="2x").floor
        ('teacher', 0.98)
    """

    keep: float | None = None
    """Accuracy floor as a share of the reference accuracy: 0.98 keeps 98 % of it."""
    reference: float | str = "teacher"
    """What keep is a share of: teacher, dense (the same student, trained dense first: one more training), or an
    accuracy such as 0.91."""
    accuracy: float | None = None
    """Accuracy floor as it is, in place of keep: 0.9."""
    latency: float | str | None = None
    """Limit on the latency of one batch of cost.batch_size: a ratio to the dense student (0.5), times faster (2x), or
    a time (3ms, 800us)."""
    macs: float | str | None = None
    """Limit on multiply-accumulates: a ratio to the dense student (0.5) or times fewer (2x)."""
    energy: float | str | None = None
    """Limit on the estimated energy: a ratio to the dense student (0.5) or times less (2x)."""
    size: float | str | None = None
    """Limit on the number of parameters: a ratio to the dense student (0.5) or times smaller (2x)."""

    @property
    def has_floor(self) -> bool:
        """Whether there is an accuracy floor."""
        return self.keep is not None or self.accuracy is not None

    @property
    def has_limit(self) -> bool:
        """Whether a cost is limited."""
        return any(getattr(self, name) is not None for name in COSTS)

    @property
    def is_given(self) -> bool:
        """Whether there is a floor or a limit."""
        return self.has_floor or self.has_limit

    @property
    def floor(self) -> tuple[str, float]:
        """Reference and share of it that make up the floor; the share is 0 for no floor."""
        if self.accuracy is not None:
            return str(self.accuracy), 1.0
        return str(self.reference), self.keep or 0.0

    def check(self) -> None:
        """Raise UserError for a floor or limit that cannot be read, or two floors."""
        if self.keep is not None and self.accuracy is not None:
            raise UserError(
                f"goal: got keep {self.keep:g} and accuracy {self.accuracy:g}; allowed: one floor; leave one out"
            )
        if self.keep is not None and not 0.0 < self.keep <= 2.0:
            raise UserError(f"goal.keep: got {self.keep:g}; allowed: a share in (0, 2], such as 0.98 for 98 %")
        if self.accuracy is not None and not 0.0 < self.accuracy <= 1.0:
            raise UserError(f"goal.accuracy: got {self.accuracy:g}; allowed: an accuracy in (0, 1], such as 0.95")
        reference_accuracy(str(self.reference))
        if self.reference != "teacher" and self.keep is None:
            raise UserError(f"goal.reference: got {self.reference} without a share of it; give goal.keep, too")
        for name in COSTS:
            given = getattr(self, name)
            if given is not None:
                limit_ratio(name, given, dense_latency_s=1.0)

    def weights(self, preference: Preference) -> tuple[float, float, float]:
        """(accuracy, latency, energy), summing to one: the preference, or what the goal leaves open."""
        if preference.is_given:
            return preference.weights(0.0 if self.has_floor else 0.6)
        return _FLOOR_WEIGHTS if self.has_floor else _LIMIT_WEIGHTS if self.has_limit else preference.weights()

    def of_task(self, preference: Preference, dense_latency_s: float) -> TaskGoal:
        """Return the goal as an episode reads it.

        Args:
            preference: weights of what the goal leaves open.
            dense_latency_s: seconds that the dense student takes, which a limit in seconds is divided by.

        Raises:
            UserError: as of `check`.
        """
        self.check()
        limits = {
            f"{name}_limit": limit_ratio(name, given, dense_latency_s)
            for name in COSTS
            if (given := getattr(self, name)) is not None
        }
        return TaskGoal(self.weights(preference), keep=self.floor[1], **limits)


def limit_ratio(name: str, given: float | str, dense_latency_s: float, *, option: str | None = None) -> float:
    """Return the greatest ratio to the dense student's cost that `given` allows.

    Args:
        name: of the cost, one of COSTS.
        given: 0.5, "0.5", "2x", or for the latency "3ms".
        dense_latency_s: seconds that the dense student takes.
        option: that messages name; by default goal.NAME.

    Raises:
        UserError: anything else, with what is allowed.
    """
    text = str(given).strip()
    ratio = math.nan
    if re.fullmatch(_NUMBER, text):
        ratio = float(text)
    elif times := _TIMES.fullmatch(text):
        ratio = 1.0 / float(times.group(1)) if float(times.group(1)) >= 1.0 else math.nan
    elif name == "latency" and (duration := _DURATION.fullmatch(text)):
        seconds = float(duration.group(1)) * UNITS_S[duration.group(2)]
        if seconds > 0.0:
            return seconds / dense_latency_s
    if not 0.0 < ratio <= 1.0:
        allowed = "a ratio to the dense student in (0, 1] such as 0.5, or 2x for half of it"
        more = ", or a time such as 3ms or 800us" if name == "latency" else ""
        raise UserError(f"{option or f'goal.{name}'}: got {given!r:.40}; allowed: {allowed}{more}")
    return ratio
