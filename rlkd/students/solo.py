"""One student, an ordinary `nn.Module`, trained by an ordinary loop with `torch.optim.Adam`.

The plain counterpart of `Population`: same interface with N = 1, same batches from the same task, and, to
float tolerance, the same parameters.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rlkd.compression.selection import importance, select
from rlkd.data import DataSet, Split, Task, task_generator
from rlkd.losses import FAMILIES, LossConfig
from rlkd.models import ChainStudent, Masks, Outputs, initialise
from rlkd.students.adapted import WithAdapter, chain_objective
from rlkd.students.evaluation import summarise
from rlkd.students.fusion import TeacherMix
from rlkd.students.gating import ExitCost, Stakes, gate_training
from rlkd.students.interface import (
    PROBE_SIZE,
    Controls,
    Metrics,
    Telemetry,
    TrainConfig,
    divergence_free,
    family_weights,
    probed_samples,
)
from rlkd.students.optimizers import load_optimizer_state, optimizer_state
from rlkd.students.rollback import Rollbacks, Snapshot, moments
from rlkd.teachers import Signals


class SoloStudent:
    """Implements `Students` for one student; `exit_cost` is needed where it has exit gates.

    Its task may have up to `max_teachers` teachers; `loss` has the terms of the objective.
    """

    num_students = 1
    confirms = False

    def __init__(
        self,
        student: ChainStudent,
        data: DataSet,
        signals: Signals,
        *,
        config: TrainConfig,
        exit_cost: ExitCost | None = None,
        max_teachers: int = 1,
        loss: LossConfig | None = None,
    ) -> None:
        config.check()
        self._gate = gate_training(student, exit_cost, 1)
        self.student = student
        self._data, self._signals, self._config = data, signals, config
        objective = chain_objective(loss or LossConfig(), student, signals)
        self._module = WithAdapter(student, objective, signals)
        self._available = objective.available
        self._input_scale = data.inputs[data.splits["train"]].flatten(1).abs().mean(0)  # [D]
        self._masks = student.full_masks()
        self._threshold = torch.ones(1)
        self._teachers = TeacherMix(1, max_teachers)
        self._rollbacks = Rollbacks(1, config.max_rollbacks)

    def reset(self, tasks: Sequence[Task], rows: Tensor | None = None) -> None:
        """Fresh parameters, optimizer and batches for the one task."""
        (self._task,) = tasks
        self._teachers.reset(tasks, torch.arange(1))
        initialise(self._module, task_generator(self._task.seed, "parameters"))
        self._optimizer = torch.optim.Adam(self._parameter_groups())
        self._batches = task_generator(self._task.seed, "batches")
        self._rollbacks.reset(torch.arange(1))
        self._num_updates = torch.zeros(1)
        if self._gate:
            self._gate.reset(torch.zeros(1, dtype=torch.int64), [self._task.preference])

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters in their order, each run of neighbours with one factor on the step size as a group."""
        factors = {f"student.{name}": factor for name, factor in self.student.rate_factors().items()}
        runs = groupby(self._module.named_parameters(), lambda item: factors.get(item[0], 1.0))
        return [{"params": [p for _, p in run], "rate_factor": factor} for factor, run in runs]

    def set_controls(self, controls: Controls) -> None:
        """As `Population.set_controls`."""
        masks = select(self.student, self._scores(), controls.feature_keep[0], controls.unit_keep[0])
        self._masks, self._threshold = masks, controls.exit_threshold

    def set_exit(self, threshold: Tensor) -> None:
        """As `Population.set_exit`."""
        self._threshold = threshold

    def num_evaluated(self, split: Split) -> int:
        """As `Students.num_evaluated`."""
        return len(self._data.splits[split])

    @torch.no_grad()
    def confirm(self) -> None:
        """As `Students.confirm`: nothing."""

    def probe(self, feature_keep: Tensor, unit_keep: Tensor) -> Tensor:
        """As `Students.probe`."""
        masks = select(self.student, self._scores(), feature_keep[0], unit_keep[0])
        index = probed_samples(self._data.splits["validation"])
        outputs, _ = self._module(self._data.inputs[index], masks)
        answers = torch.stack([z.argmax(-1) for z in outputs.logits])  # [E, B]
        return (answers == self._data.labels[index]).float().mean(-1)[None]

    def load_parameters(self, parameters: Mapping[str, Tensor], rows: Tensor) -> None:
        """As `Population.load_parameters`; `rows` is [0]."""
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                parameter.copy_(parameters[name.removeprefix("student.")][0])

    def weigh_teachers(self, theta: Tensor) -> None:
        """As `Population.weigh_teachers`."""
        self._teachers.weigh(theta)

    def train_window(self, controls: Controls) -> Telemetry:
        """As `Population.train_window`, step by step."""
        self.set_controls(controls)
        before = Snapshot(self._module, self._optimizer)
        weights = family_weights(controls.weights, self._available)[0]  # [4]
        for group in self._optimizer.param_groups:
            group["lr"] = (controls.learning_rate * self._rollbacks.step_scale).item() * group["rate_factor"]
        num_steps, size = self._config.steps_per_window, self._config.batch_size
        positions = torch.randint(len(self._task.samples), (num_steps, size), generator=self._batches)  # [K, B]
        total = torch.zeros(len(FAMILIES))
        stakes = [part[0] for part in self._gate.stakes(self.masks(), self._num_updates)] if self._gate else []
        for step in range(num_steps):
            losses, outputs = self._losses(positions[step], controls.temperature[0])
            loss = (losses * weights).sum()
            if self._gate:
                loss = self._gate.loss(loss, outputs, self._task.labels[positions[step]], Stakes(*stakes))
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            total += losses.detach()
        norms, cosine = self._family_gradients(positions[-1, :PROBE_SIZE], controls.temperature[0])
        parameters = [p.detach()[None] for p in self._module.parameters()]
        finite = divergence_free(total[None], norms[None], *parameters, *moments(self._optimizer))
        if self._rollbacks.judge(finite).any():
            before.put_back(self._module, self._optimizer)
        else:
            self._num_updates += num_steps
        rollbacks = self._rollbacks
        return Telemetry((total / num_steps)[None], norms[None], cosine[None], rollbacks.diverged, rollbacks.count)

    @torch.no_grad()
    def evaluate(self, split: Split) -> Metrics:
        """As `Population.evaluate`."""
        index = self._data.splits[split]
        outputs, _ = self._module(self._data.inputs[index], self._masks)
        return summarise(
            tuple(z[None] for z in outputs.logits),
            self._data.labels[index],
            self._teachers.answers(self._signals, index),
            self._threshold,
            self.masks(),
            tuple(s[None] for s in self._scores()),
            gates=tuple(z[None] for z in outputs.gates),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Copy the parameters, adapter included, each [1, ...]."""
        return {k.removeprefix("student."): p.detach()[None].clone() for k, p in self._module.named_parameters()}

    def masks(self) -> Masks:
        """Return the current masks, one [1, G] for each group."""
        return tuple(mask[None] for mask in self._masks)

    def training_state(self) -> dict[str, Tensor]:
        """As `Students.training_state`."""
        state = {f"parameters.{name}": p.detach().clone() for name, p in self._module.named_parameters()}
        state |= {f"mask.{i}": mask.clone() for i, mask in enumerate(self._masks)}
        state |= {"threshold": self._threshold.clone(), "num_updates": self._num_updates.clone()}
        state["batches"] = self._batches.get_state()
        return {**state, **optimizer_state(self._optimizer), **self._rollbacks.training_state()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """As `Students.load_training_state`."""
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                parameter.copy_(state[f"parameters.{name}"])
        self._masks = tuple(state[f"mask.{i}"].clone() for i in range(len(self._masks)))
        self._threshold, self._num_updates = state["threshold"].clone(), state["num_updates"].clone()
        self._batches.set_state(state["batches"].clone())
        self._rollbacks.load_training_state(state)
        load_optimizer_state(self._optimizer, state)

    def _scores(self) -> Masks:
        named = {k: p.detach() for k, p in self.student.named_parameters()}
        return importance(self.student, named, self._input_scale)

    def _losses(self, positions: Tensor, temperature: Tensor) -> tuple[Tensor, Outputs]:
        samples, labels = self._task.samples[positions], self._task.labels[positions]  # each [B]
        signals = self._teachers.of(self._signals, samples[None], labels[None])  # each [1, B, *]
        targets = (labels, *(signal[0] for signal in signals), temperature)
        outputs, losses = self._module(self._data.inputs[samples], self._masks, targets)
        return losses, outputs  # [4]

    def _family_gradients(self, positions: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Population`: norms [4] of each family's gradient on the student, cosine of the first two."""
        losses, _ = self._losses(positions, temperature)
        parameters = list(self.student.parameters())
        rows = []
        for loss in losses:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in gradients]))
        flat = torch.stack(rows)  # [4, P]
        norms = flat.norm(dim=1)
        return norms, (flat[0] * flat[1]).sum() / (norms[0] * norms[1]).clamp_min(1e-12)
