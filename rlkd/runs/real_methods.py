"""The ways of setting a real student's controls that `rlkd compare --data ...` compares, and their configuration.

Every method but the learned ones weighs labels and softened answers half and half at T = 4 (Hinton et al. 2015), so
that they differ in what they leave out and when.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rlkd.agents.baselines.recipes import INPUTS, RECIPES, UNITS, for_all
from rlkd.agents.baselines.search import axes, first_settings, named, new_study
from rlkd.agents.policy.bundle import Bundle
from rlkd.agents.policy.controllers import Controller, hold_start
from rlkd.envs.action import CONTROLS, NUM_CONTROLS, ControlConfig, published_setting, with_exit_kind, with_values
from rlkd.envs.real_config import RealConfig
from rlkd.errors import UserError
from rlkd.losses import FAMILIES

NNCF_STEP, NNCF_INPUTS = 0.5, 0.5  # a first step of 0.1; inputs are pruned half as far as units
CUBIC_END, ONE_SHOT_AT = 0.6, 0.4  # last axes of the recipes: pruned at 70 % and at 42 % of the training
PATIENCE = 2  # exits in a row that agree
TPE_TRIALS = (10, 25)

Trainings = Generator[Controller, float, None]
"""Controllers, one a training; each `send` gives the validation score of the training before."""


@dataclass(frozen=True)
class RealCompareConfig(RealConfig):
    """`rlkd compare --data ...`: the same real student under several controllers."""

    methods: str = "policy,plain,cubic,one_shot,nncf,smaller"
    """Comma-separated: REAL_METHODS. `plain` always joins: its student is the dense one that ratios refer to."""
    num_seeds: int = 3
    """Trainings of every method."""
    shares: tuple[float, ...] = (0.7, 0.4)
    """Final shares of kept units and inputs that `cubic` and `one_shot` try, one training each; the best on validation
    counts."""

    def method_names(self) -> list[str]:
        """`methods` as a list, each once, `plain` first."""
        return list(dict.fromkeys(["plain", *(name.strip() for name in self.methods.split(","))]))

    def check(self) -> None:
        """Raise UserError for the first impossible value."""
        super().check()
        for name in self.method_names():
            if name not in REAL_METHODS:
                raise UserError(f"methods: got {name!r}; allowed: {', '.join(REAL_METHODS)}")
        if "smaller" in self.method_names() and self.student:
            raise UserError("methods: got 'smaller' and --student; allowed with a student that is cut from the teacher")
        if self.num_seeds < 1:
            raise UserError(f"num_seeds: got {self.num_seeds}; allowed: at least 1")
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise UserError(f"shares: got {list(self.shares)}; allowed: one or more, each above 0 and at most 1")


@dataclass(frozen=True)
class RealMethod:
    """One way of setting the controls of a real student."""

    meaning: str
    trainings: Callable[[RealCompareConfig, Bundle, int], Trainings]
    """Of the configuration, the policy and a seed; the student that scores best on validation ships."""
    exits: Literal["none", "given", "every block"] = "none"
    """Early exits that are attached."""
    starts_as_policy: bool = False
    """Whether the setting that training begins with is the policy's."""
    may_hold: bool = False
    """Whether the guard may hold its units (`guard.hold`): fixed schedules stay as their papers have them."""
    num_blocks_less: int = 0
    """How many blocks fewer than the others its student has."""
    count: Callable[[RealCompareConfig], int] = lambda config: 1
    """Number of trainings."""


def plain_setting(controls: ControlConfig) -> Tensor:
    """[12], labels and softened answers half and half at T = 4 (Hinton et al. 2015); nothing is left out."""
    values: dict[str, float | Tensor] = {f"weight_{name}": 0.0 for name in FAMILIES}
    values |= {"weight_hard_label": 0.5, "weight_response": 0.5, "temperature": 4.0}
    return with_exit_kind(with_values(published_setting(controls)[None], values, controls), "never")[0]


def _plain(config: RealCompareConfig, bundle: Bundle, seed: int) -> Trainings:
    yield RECIPES["constant"].controller(for_all(plain_setting(bundle.policy.controls)))


def _pruned(recipe: str, last: float, config: RealCompareConfig, bundle: Bundle, seed: int) -> Trainings:
    """`recipe` at every share."""
    controls = bundle.policy.controls
    for share in config.shares:
        values: dict[str, float | Tensor] = {"unit_keep": share, "feature_keep": share}
        setting = with_values(plain_setting(controls)[None], values, controls)[0]
        yield RECIPES[recipe].controller(for_all(torch.cat([setting, torch.tensor([last])])))


def _nncf(config: RealCompareConfig, bundle: Bundle, seed: int) -> Trainings:
    point = plain_setting(bundle.policy.controls)
    point[UNITS], point[INPUTS] = NNCF_STEP, NNCF_INPUTS
    yield RECIPES["nncf"].controller(for_all(point))


def _patience(config: RealCompareConfig, bundle: Bundle, seed: int) -> Trainings:
    setting = with_exit_kind(plain_setting(bundle.policy.controls)[None], "threshold")[0]
    setting[CONTROLS.index("exit_threshold")] = 1.0  # the surest alone leave by their confidence
    yield RECIPES["constant"].controller(for_all(setting))


def _tpe(num_trials: int, config: RealCompareConfig, bundle: Bundle, seed: int) -> Trainings:
    """Constant settings that TPE proposes (Bergstra et al. 2011), after the published one and some that keep less."""
    study = new_study(seed)
    for point in first_settings(bundle.policy.controls)[:num_trials]:
        study.enqueue_trial(named(point))
    for _ in range(num_trials):
        trial = study.ask(axes(NUM_CONTROLS))
        score = yield RECIPES["constant"].controller(for_all(torch.tensor(list(trial.params.values()))))
        study.tell(trial, score)


def _policy(config: RealCompareConfig, bundle: Bundle, seed: int) -> Trainings:
    yield bundle.policy.controller()


def _start(config: RealCompareConfig, bundle: Bundle, seed: int) -> Trainings:
    yield hold_start


def _num_shares(config: RealCompareConfig) -> int:
    return len(config.shares)


def _tpe_method(num_trials: int) -> RealMethod:
    return RealMethod(
        f"the best of {num_trials} TPE trials over constant settings on validation",
        partial(_tpe, num_trials),
        exits="given",
        count=lambda config: num_trials,
    )


REAL_METHODS: dict[str, RealMethod] = {
    "policy": RealMethod(
        "closed loop: the learned policy", _policy, exits="given", starts_as_policy=True, may_hold=True
    ),
    "start": RealMethod(
        "the setting that the policy begins with, unchanged", _start, exits="given", starts_as_policy=True
    ),
    "plain": RealMethod("plain distillation: labels and softened answers at T = 4, the whole student", _plain),
    "cubic": RealMethod(
        "plain distillation, units and inputs pruned along the cubic schedule (Zhu & Gupta 2017)",
        partial(_pruned, "cubic", CUBIC_END),
        count=_num_shares,
    ),
    "one_shot": RealMethod(
        "plain distillation, pruned once at two fifths, then fine-tuned",
        partial(_pruned, "one_shot", ONE_SHOT_AT),
        count=_num_shares,
    ),
    "nncf": RealMethod("plain distillation, pruned while above the floor (NNCF's rule)", _nncf),
    "smaller": RealMethod("plain distillation of a student with one block less", _plain, num_blocks_less=1),
    "pabee": RealMethod(
        f"plain distillation with an exit after every block; a sample leaves once {PATIENCE} in a row agree (PABEE, "
        "Zhou et al. 2020)",
        _patience,
        exits="every block",
    ),
    **{f"tpe_{count}": _tpe_method(count) for count in TPE_TRIALS},
}
