"""Distil from Python: models and data in the hand, or folders, under the policy that the command line uses.

`import rlkd` gives everything here (`rlkd.distil`, `rlkd.load_student`, ...); this module is loaded on first use.
"""

import json
import logging
import operator
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlkd.agents.policy.bundle import Bundle, save_bundle
from rlkd.agents.policy.bundled import CARD, bundled_policies, find_policy
from rlkd.agents.policy.policy import Policy
from rlkd.compression.loading import load_student
from rlkd.configs import DistilConfig
from rlkd.data import Goal
from rlkd.data.datasets import DATASETS, is_dataset
from rlkd.envs.build_real import scenario_of_sides
from rlkd.envs.real_config import RealConfig, RealCostConfig
from rlkd.errors import UserError, closest
from rlkd.io.files import write_error
from rlkd.io.journal import Journal
from rlkd.io.settings import with_settings
from rlkd.models.real.own import own_sides, unchanged
from rlkd.models.real.traced import is_own_module
from rlkd.runs.folder import describe_run, run_folder, use_one_thread
from rlkd.runs.given import write_data, write_model
from rlkd.runs.outcome import Outcome
from rlkd.runs.resume import with_own_profile
from rlkd.runs.single import distil_chain, pretrained_scenario, ship_scenario, train_scenario

logger = logging.getLogger(__name__)

COMMAND = "rlkd.distil(...), from Python"
OWN_BATCH = (
    256  # samples that the latency of a user's own module is modelled for: small calls cost the same at any size
)

OWN_OPTIONS = [
    "num_windows",
    "attach",
    "train",
    "loss",
    "cost",
    "hardware",
    "goal",
    "preference",
    "guard",
    "keep_checkpoints",
]


@dataclass(frozen=True)
class Result:
    """What `rlkd.distil` brings."""

    student: nn.Module
    """The student as it ships, on the CPU: it answers [B, C] logits, called as the model that it was made of."""
    metrics: dict[str, Any]
    """Figures on test data: `accuracy`, `floor`, `goal_met`, `macs_ratio`, `size_ratio`, ... and `measured` latency."""
    history: list[dict[str, float]]
    """One row a window: the controls and what they led to on validation data."""
    folder: Path
    """The run folder, with report, student, metrics and event files; a temporary one is removed with this result."""

    @property
    def goal_met(self) -> bool | None:
        """Whether the goal is met on test data; None without a goal."""
        met: bool | None = self.metrics["goal_met"]
        return met

    def report(self, file: Path | str | None = None) -> Path:
        """Return the path of the report, one HTML page; with `file`, copy it there first.

        Raises:
            UserError: `file` cannot be written.
        """
        page = self.folder / "report.html"
        if file is None:
            return page
        try:
            return Path(shutil.copyfile(page, file))
        except OSError as error:
            raise write_error(file, error) from error

    def save(self, folder: Path | str) -> Path:
        """Copy the student to `folder`, from where `rlkd.load_student` reads it; returns the path.

        Raises:
            UserError: the folder exists, or cannot be written.
        """
        target = Path(folder)
        if target.exists():
            raise UserError(f"save: {target} exists; allowed: a new folder")
        try:
            shutil.copytree(self.folder / "student", target)
        except OSError as error:
            raise write_error(target, error) from error
        return target


class _Quiet:
    """`rlkd.runs.folder.Progress` that logs each window."""

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        """Log the beginning of a phase."""
        logger.info("%s: %d windows", name, num_windows)

    def advance(self, num_students: int) -> None:
        """Nothing to count."""

    def figures(self, **values: float) -> None:
        """Log figures of a window."""
        logger.info(" ".join(f"{name} {value:.3f}" for name, value in values.items()))


def distil(
    teacher: nn.Module | Path | str | None = None,
    student: nn.Module | Path | str | None = None,
    data: Any = "digits",
    *,
    goal: Goal | None = None,
    policy: Path | str = "default",
    processor: Any = None,
    seed: int = 0,
    out: Path | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Result:
    """Distil a student to a goal under a learned policy, in one training run.

    The models that are given stay as they were: what is trained is a copy, and no hook stays on them.

    Args:
        teacher: an `nn.Module` of your own that gives logits [B, C]; a transformers classifier or causal language
            model, or its folder; or None for the teacher of a data set that rlkd knows.
        student: a smaller model of the same kind, or its folder; by default half of the blocks of a transformers model,
            or a copy of your own module, which the controls prune.
        data: for your own module `(inputs, labels)`, real numbers [S, ...] and whole numbers [S] from 0 to C - 1, a
            mapping from train, validation and test to such pairs, map-style datasets, or an .npz file; for a
            transformers model a file or folder (docs/data.md), a list of rows such as `{"text": ..., "label": ...}`, a
            `datasets.Dataset` or `DatasetDict`; without a teacher the name of a data set (`rlkd list`).
        goal: what the student must reach; by default nothing, so that the weights of the preference alone decide.
        policy: a name of `rlkd policies`, a run folder of `rlkd train`, or the folder of a policy.
        processor: tokenizer or image processor of a transformers model that is given as a module.
        seed: of every random choice, 0 to 2**32 - 1.
        out: run folder; by default a temporary one that is removed with the result.
        options: further settings by the names of `rlkd distil --help`, such as `{"train.steps_per_window": 50}`.

    Returns:
        The student with its metrics, history and report.

    Raises:
        UserError: one line about a model, data or goal that cannot be used.

    Example:
        >>> import rlkd
        >>> result = rlkd.distil(data="digits", goal=rlkd.Goal(keep=0.95), options={"num_windows": 2})
        >>> len(result.history)
        2
    """
    bundle = load_policy(policy)
    settings = _settings(goal, options)
    _check_kinds(teacher=teacher, student=student)
    _check_processor(processor, teacher)
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise UserError(f"seed: got {seed!r:.40}; allowed: a whole number from 0 to {2**32 - 1}")
    threads = torch.get_num_threads()
    use_one_thread()
    scratch = None
    if out is None:
        scratch = tempfile.mkdtemp(prefix="rlkd-")
        out = Path(scratch) / "run"
    try:
        with run_folder(Path(out), "distil") as folder:
            outcome = _distil(teacher, student, data, settings, bundle, processor, seed=seed, folder=folder)
    except BaseException:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    finally:
        torch.set_num_threads(threads)
    if outcome.broken:
        logger.warning(outcome.broken)
    figures = {**outcome.done.figures, "measured": outcome.done.measured}
    result = Result(outcome.done.student, figures, outcome.history, outcome.folder)
    if scratch:
        weakref.finalize(result, shutil.rmtree, scratch, ignore_errors=True)
    return result


def _settings(goal: Goal | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the goal and the options by name; other types are refused."""
    if not isinstance(options, Mapping | None):
        raise UserError(
            f"options: got {options!r:.60}; allowed: a mapping from names to values, such as {{'num_windows': 6}}"
        )
    if not isinstance(goal, Goal | None):
        raise UserError(f"goal: got {goal!r:.60}; allowed: an rlkd.Goal, such as rlkd.Goal(keep=0.98)")
    if goal is not None and any(str(name).split(".")[0] == "goal" for name in options or {}):
        raise UserError("options: goal: got it beside the argument goal; give all of it as rlkd.Goal(...)")
    return {**({} if goal is None else {"goal": goal}), **(options or {})}


def _changed(config: Any, settings: Mapping[str, Any], *arguments: str) -> Any:
    """Return the config with the settings, checked.

    Args:
        config: has what the arguments of `distil` say.
        settings: the goal and the options by name.
        arguments: dotted names of the fields that `config` has from arguments.

    Raises:
        UserError: an unknown option, an impossible value, or an option that contradicts an argument.
    """
    changed = with_settings(config, settings)
    for name in arguments:
        given, now = (operator.attrgetter(name)(c) for c in (config, changed))
        if given != now:
            raise UserError(
                f"options: {name}: got {now!r:.60}, while the argument is {given!r:.60}; give it as the argument alone"
            )
    changed.check()
    return changed


def _check_kinds(**models: Any) -> None:
    """Raise UserError for a teacher or student that is neither a module nor a path."""
    for name, model in models.items():
        if isinstance(model, type) and issubclass(model, nn.Module):
            raise UserError(f"{name}: got the class {model.__name__}; allowed: an instance, {model.__name__}(...)")
        if not isinstance(model, nn.Module | Path | str | None):
            raise UserError(
                f"{name}: got {type(model).__name__}; allowed: an nn.Module, or the folder of a transformers model"
            )


def _check_processor(processor: Any, teacher: nn.Module | Path | str | None) -> None:
    """Raise UserError for a processor that nothing would use."""
    if processor is not None and (not isinstance(teacher, nn.Module) or is_own_module(teacher)):
        raise UserError(
            f"processor: got {type(processor).__name__} without a transformers model as a module; leave it out: a "
            "folder has its own, and other models take the data as they are"
        )


def _distil(
    teacher: Any,
    student: Any,
    data: Any,
    settings: dict[str, Any],
    bundle: Bundle,
    processor: Any,
    *,
    seed: int,
    folder: Path,
) -> Outcome:
    """Choose the way by what is given."""
    progress = _Quiet()
    if teacher is None:
        if student is not None:
            raise UserError("student: got one without a teacher to learn from; give a teacher and its data, too")
        if not (isinstance(data, str) and is_dataset(data)):
            what = repr(data[:60]) if isinstance(data, str) else f"of type {type(data).__name__}"
            raise UserError(
                f"teacher: got none with data {what}; allowed: a teacher with its data, or a data set of "
                f"{', '.join(DATASETS)} (rlkd.register_dataset adds your own arrays)"
            )
        chain = _changed(with_settings(DistilConfig(), {"task.dataset": data}), settings, "task.dataset")
        return distil_chain(chain, bundle, folder, seed, progress=progress, command=COMMAND)
    if isinstance(teacher, nn.Module) and is_own_module(teacher):
        return _distil_own(teacher, student, data, settings, bundle, seed=seed, folder=folder)
    if isinstance(student, nn.Module) and is_own_module(student):
        raise UserError(
            f"student: got {type(student).__name__}, a module of your own, for a transformers teacher; allowed: a "
            "transformers model, its folder, or none"
        )
    if isinstance(teacher, nn.Module) and processor is None and not isinstance(data, str | Path):
        raise UserError("processor: got none for a transformers model; give its tokenizer or image processor")
    given = folder / "given"
    if isinstance(teacher, nn.Module):
        teacher = write_model(teacher, processor, given / "teacher", "teacher")
    if isinstance(student, nn.Module):
        student = write_model(student, None, given / "student", "student")
    if not isinstance(data, str | Path):
        data = write_data(data, given / "data")
    base = RealConfig(teacher=str(teacher), data=str(data), student="" if student is None else str(student))
    config = _changed(base, settings, "teacher", "student", "data")
    journal = Journal(folder, False, config.keep_checkpoints)
    scenario = pretrained_scenario(config, bundle, folder, seed, journal=journal, command=COMMAND)
    learned = train_scenario(scenario, config, bundle, folder, seed, progress=progress, journal=journal)
    return ship_scenario(learned, config, bundle, folder, seed)


def _distil_own(
    teacher: nn.Module,
    student: Any,
    data: Any,
    settings: dict[str, Any],
    bundle: Bundle,
    *,
    seed: int,
    folder: Path,
) -> Outcome:
    """Distil modules of the user's own classes."""
    if student is not None and not (isinstance(student, nn.Module) and is_own_module(student)):
        raise UserError(
            f"student: got {type(student).__name__} for a teacher of your own class; allowed: an nn.Module of your own"
        )
    for name in settings:
        if str(name).split(".")[0] not in OWN_OPTIONS:
            raise UserError(
                f"options: {name}: got it for a module of your own; allowed: {', '.join(OWN_OPTIONS)}"
                f"{closest(str(name), OWN_OPTIONS)}"
            )
    base = RealConfig(
        teacher=type(teacher).__name__,
        data=type(data).__name__,
        student="" if student is None else type(student).__name__,
        cost=RealCostConfig(batch_size=OWN_BATCH),
    )
    config = _changed(base, settings)
    with unchanged(teacher):
        own, other = own_sides(teacher, student, data, config.attach)
        journal = Journal(folder, False, config.keep_checkpoints)
        describe_run(folder, config, seed, command=COMMAND)
        scenario = scenario_of_sides(
            with_own_profile(config, folder),
            "module",
            own,
            other,
            controls=bundle.policy.controls,
            start=bundle.policy.start,
            seed=seed,
        )
        learned = train_scenario(scenario, config, bundle, folder, seed, progress=_Quiet(), journal=journal)
        return ship_scenario(learned, config, bundle, folder, seed)


def load_policy(policy: Path | str = "default") -> Bundle:
    """Load a policy: by a name of `rlkd policies`, or from a run folder or the folder of a policy; runs no code of it.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    if not isinstance(policy, Path | str):
        raise UserError(
            f"policy: got {type(policy).__name__}; allowed: a name, a run folder, or the folder of a policy "
            "(rlkd.save_policy writes one)"
        )
    if isinstance(policy, str) and policy in bundled_policies():
        return find_policy(bundled_policies()[policy])
    folder = Path(policy)
    allowed = ", ".join([*bundled_policies(), "a run folder of rlkd train, or the folder of a policy"])
    if not folder.is_dir():
        raise UserError(f"policy: got {str(policy)!r:.80}; allowed: {allowed}")
    if not any((place / CARD).exists() for place in (folder, folder / "policy")):
        raise UserError(f"policy: {folder} holds no policy (no {CARD}); allowed: {allowed}")
    return find_policy(folder)


def save_policy(policy: Policy, folder: Path | str, provenance: Mapping[str, Any]) -> str:
    """Write a policy to a folder, which `load_policy` and `rlkd distil --policy` take; returns its tensors' sha256.

    Args:
        policy: of `policy_from_sb3`, or the `.policy` of what `load_policy` returns.
        folder: made if missing; existing files are replaced one by one, each whole.
        provenance: says from what, when and how well the policy was learned, in values that JSON has.

    Raises:
        UserError: an argument of another type, or a folder that cannot be written.
    """
    if not isinstance(policy, Policy):
        raise UserError(
            f"save_policy: got {type(policy).__name__}; allowed: a policy of rlkd.policy_from_sb3, or the .policy of "
            "what rlkd.load_policy returns"
        )
    if not isinstance(folder, Path | str):
        raise UserError(f"save_policy: folder: got {type(folder).__name__}; allowed: a path")
    try:
        json.dumps(dict(provenance), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"save_policy: provenance: got {type(provenance).__name__} ({error!s:.80}); allowed: a mapping of values "
            "that JSON has, such as {'agent': 'my own'}"
        ) from error
    return save_bundle(policy, folder, dict(provenance))


__all__ = ["Result", "distil", "load_policy", "load_student", "save_policy"]
