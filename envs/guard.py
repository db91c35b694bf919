"""Guards: ship the best window of a training, and undo windows that break a goal which was met before.

A window meets its goal if its validation accuracy is at least the floor; a task without a floor is always met. The best
window has the highest J among those that meet the goal; if none does, the most accurate one is the best. A window of a
real student that could become the best is looked at on more of the validation split: the best of many on few samples
owes part of that to chance. Such a window meets its goal if it does so there, and those that have a standard error to
spare go before the others. The student before any window, with nothing left out, counts as one: it ships untouched if
no window does better. Where it alone met its floor, a student that is below has lost too much: part of that is put back
before each window.

A student that begins trained begins whole. It gives up units and inputs in small steps, and none while it is below its
floor: what it forgets with them, few steps do not bring back. In the second half of the training, part of them is put
back below the floor. This restricts what a learned policy may do, as a shield (Alshiekh et al. 2018,
https://arxiv.org/abs/1708.08611); other than there, the rule is written by hand and reads measured accuracy.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkd.envs.action import CONTROLS, whole
from rlkd.envs.episodes import Episodes, Outcome, merge_rows
from rlkd.errors import UserError

MISSED, MET, SURE = 0, 1, 2  # levels of a window
UNTOUCHED, NO_WINDOW = 0, -1  # what stands for a best window: the student before the first one, or none
FREE_SHARE = 1 / 3  # of the windows, in which nothing is put back where the untouched student met its floor
HELD_SHARE = 1 / 2  # the same for other students that began trained
GIVEN_UP = 0.6  # of the range of units and inputs: what students that began trained give up at most in all windows
PUT_BACK = 0.5  # share of the way to the whole student, for each window
TRAINED = 0.5  # share of the way from chance to its floor that a student that begins trained has behind it
KEPT = [CONTROLS.index("feature_keep"), CONTROLS.index("unit_keep")]


@dataclass(frozen=True)
class GuardConfig:
    """What a guard does besides shipping the best window."""

    undo: bool = False
    """Undo a window at once that falls too far below the floor after the goal had been met."""
    tolerance: float = 0.005
    """Accuracy below the floor that a window may have without being undone."""
    hold: bool = True
    """Let a student that begins trained begin whole and give up units and inputs in small steps, and none while it is
    below its floor; put part of them back in the later windows."""

    def check(self) -> None:
        """Raise UserError for a negative tolerance."""
        if not self.tolerance >= 0:
            raise UserError(f"guard.tolerance: got {self.tolerance:g}; allowed: at least 0")


class Guard:
    """Watches N episodes from their reset to their end.

    Call `before_window` before and `after_window` after every step, and `finish` once at the end.

    Args:
        episodes: just reset.
        config: what to do.
    """

    def __init__(self, episodes: Episodes, config: GuardConfig | None = None) -> None:
        self._episodes, self._config = episodes, config or GuardConfig()
        self._config.check()
        n = episodes.num_students
        self.best_window = torch.full((n,), NO_WINDOW)  # [N], counted from 1, UNTOUCHED or NO_WINDOW
        self._level = torch.zeros(n, dtype=torch.int64)  # [N], of the best window: MISSED, MET or SURE
        self.num_undone = torch.zeros(n, dtype=torch.int64)  # [N]
        self.num_held = torch.zeros(n, dtype=torch.int64)  # [N], windows whose controls `before_window` changed
        self._value = torch.full((n,), -torch.inf)  # [N], of the best window: J if it met the goal, else accuracy
        self._best: dict[str, Tensor] = {}
        self._before = episodes.training_state() if self._config.undo else {}
        self._is_current = torch.zeros(n, dtype=torch.bool)  # [N], whether the students are as in the best window
        self._is_below = torch.zeros(n, dtype=torch.bool)  # [N], whether the last window missed the goal
        self._is_held = torch.zeros(n, dtype=torch.bool)  # [N], whether the student begins trained
        self._keep_untouched()

    def before_window(self, u: Tensor) -> Tensor:
        """Return the controls [N, 12] to train with in place of `u` [N, 12].

        Students that began trained give up at most GIVEN_UP divided by the number of windows; before the first window
        they have all units and inputs. Below their floor they keep at least what they have, and from HELD_SHARE of the
        windows on half of the rest comes back. Where only the untouched student meets its floor, that begins after
        FREE_SHARE of the windows, and no sample leaves early.
        """
        if not self._config.hold:
            return u
        episodes, kept = self._episodes, u.clone()
        num_windows = episodes.scenario.config.num_windows
        done = episodes.window / num_windows  # [N]
        lost = (self.best_window == UNTOUCHED) & self.met & (done >= FREE_SHARE) & self._is_below  # [N]
        given_up = torch.where(self._is_below, 0.0, GIVEN_UP / num_windows)  # [N]
        had = torch.where(episodes.window[:, None] == 0, 1.0, episodes.u[:, KEPT])  # [N, 2]
        kept[:, KEPT] = torch.maximum(u[:, KEPT], had - given_up[:, None])
        back = torch.where((done >= HELD_SHARE) & self._is_below & ~lost, PUT_BACK, 0.0)  # [N]
        kept[:, KEPT] += back[:, None] * (1.0 - kept[:, KEPT])
        kept = torch.where(self._is_held[:, None], kept, u)
        kept = torch.where(lost[:, None], kept + PUT_BACK * (whole(kept) - kept), kept)
        self.num_held = self.num_held + (kept != u).any(-1)
        return kept

    def after_window(self, outcome: Outcome) -> Tensor:
        """Keep the best window and undo what must be undone; returns the observation [N, O] to act on next."""
        episodes, accuracy = self._episodes, outcome.metrics.accuracy
        floor = episodes.floors[:, 0]  # [N]
        level, value = self._judge(accuracy, outcome.score, outcome.diverged)
        better = torch.where(level == self._level, value >= self._value, level > self._level) & ~outcome.diverged  # [N]
        self._is_below = level == MISSED
        had_met = self.met
        # untouched weights that miss the goal are no result of a training that diverged
        lost = outcome.diverged & ~had_met & (self.best_window == UNTOUCHED)
        self.best_window = torch.where(lost, NO_WINDOW, self.best_window)
        if better.any():
            self._best = merge_rows(self._best, episodes.training_state(), better)
            self.best_window = torch.where(better, episodes.window.long(), self.best_window)
            self._level = torch.where(better, level, self._level)
            self._value = torch.where(better, value, self._value)
        self._is_current = better
        observation = outcome.observation
        if self._config.undo:
            # a diverged student has no window that could be undone: its training has ended
            undone = had_met & (accuracy < floor - self._config.tolerance) & ~outcome.diverged
            if undone.any():
                episodes.restore(self._before, undone)
                observation = torch.where(undone[:, None], episodes.observe_now(), observation)
                self.num_undone = self.num_undone + undone
            self._before = episodes.training_state()
        return observation

    def _keep_untouched(self) -> None:
        """Keep the students that have floors as they are now, with nothing left out."""
        before, has_floor = self._episodes.training_state(), self._episodes.floors[:, 0] > 0
        accuracy, score = self._episodes.leave_nothing_out()
        floor, chance = self._episodes.floors[:, 0], 1 / self._episodes.scenario.data.num_classes
        self._is_held = has_floor & (accuracy - chance > TRAINED * (floor - chance))
        level, value = self._judge(accuracy, score, ~has_floor)
        self._is_below = has_floor & (level == MISSED)
        if has_floor.any():
            self._best = self._episodes.training_state()
            # never SURE: any window that meets the goal and saves more goes before
            self._level = torch.where(has_floor, level.clamp_max(MET), self._level)
            self._value = torch.where(has_floor, value, self._value)
            self.best_window = torch.where(has_floor, UNTOUCHED, self.best_window)
        self._episodes.restore(before, torch.ones_like(has_floor))

    def _judge(self, accuracy: Tensor, score: Tensor, diverged: Tensor) -> tuple[Tensor, Tensor]:
        """Return the level and the value [N] of students as they are.

        Only what could become the best is confirmed, and not what is far above its floor: chance does not reach so far.

        Args:
            accuracy: [N], on validation.
            score: [N], J on validation.
            diverged: [N] bool, students that cannot ship.
        """
        met = meets_goal(accuracy, self._episodes.floors[:, 0])
        level, value = met.long(), torch.where(met, score, accuracy)
        hopeful = met & ((self._level < SURE) | (value.to(self._value) >= self._value)) & ~diverged
        clear = met & (accuracy >= self._episodes.clear_floors)
        level, hopeful = torch.where(clear, SURE, level), hopeful & ~clear
        confirmed = self._episodes.confirm() if hopeful.any() else None
        if confirmed is not None:
            reached = confirmed.accuracy
            met = met & meets_goal(reached, confirmed.floor)
            level = torch.where(hopeful, met.long() + (met & meets_goal(reached, confirmed.sure_floor)), level)
            value = torch.where(hopeful, torch.where(met, confirmed.score, reached), value)
        return level, value.to(self._value)

    @property
    def met(self) -> Tensor:
        """[N] bool, whether the best window met the goal on validation."""
        return self._level > MISSED

    def finish(self) -> Tensor:
        """Bring the best window back where the last one is not it; returns `best_window` [N]."""
        behind = ~self._is_current & (self.best_window > NO_WINDOW)
        if behind.any():
            self._episodes.restore(self._best, behind)
            self._is_current = self._is_current | behind
        return self.best_window

    def state(self) -> dict[str, Tensor]:
        """Return copies of all that `load_state` needs, for a training that is stopped and resumed."""
        own = {
            "best_window": self.best_window,
            "level": self._level,
            "num_undone": self.num_undone,
            "num_held": self.num_held,
            "value": self._value,
            "is_current": self._is_current,
            "is_below": self._is_below,
        }
        kept = {f"best.{k}": t for k, t in self._best.items()} | {f"before.{k}": t for k, t in self._before.items()}
        return {name: tensor.clone() for name, tensor in (own | kept).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state` of a guard over the same episodes."""
        self.best_window, self._level = state["best_window"].clone(), state["level"].clone()
        self.num_held = state["num_held"].clone()
        self.num_undone, self._value = state["num_undone"].clone(), state["value"].clone()
        self._is_current, self._is_below = state["is_current"].clone(), state["is_below"].clone()
        self._best, self._before = (
            {k.removeprefix(begin): t.clone() for k, t in state.items() if k.startswith(begin)}
            for begin in ("best.", "before.")
        )


def meets_goal(accuracy: Tensor, floor: Tensor, tolerance: float = 0.0) -> Tensor:
    """[N] bool: `accuracy` [N] is at least `floor` [N] less the tolerance, up to float rounding."""
    return accuracy >= floor - tolerance - 1e-6
