"""N students of one architecture trained in lock-step: one `vmap(grad(...))` call is a step for all of them.

Their parameters are stacked along a leading dimension and updated in place by a hand-written Adam (Kingma &
Ba 2015; `torch.optim` has no learning rate a row). Nothing mixes rows, so a student learns the same whoever
stands beside it. `SoloStudent` is the plain counterpart, and a test holds the two together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vjp, vmap

from rlkd.compression.selection import importance, select
from rlkd.models import ChainStudent, Masks, Outputs, initialise
from rlkd.objectives import FAMILIES, family_losses
from rlkd.objectives.hard_label import log_probabilities
from rlkd.students.evaluation import summarise
from rlkd.students.gating import ExitCost, Stakes, gate_training
from rlkd.students.interface import (
    PROBE_SIZE,
    Controls,
    Metrics,
    Telemetry,
    TrainConfig,
    available_families,
    divergence_free,
    family_weights,
)
from rlkd.students.rollback import Rollbacks
from rlkd.tasks import DataSet, Split, Task, task_generator
from rlkd.teachers import Signals

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
Parameters = dict[str, Tensor]


class WithAdapter(nn.Module):
    """A student and the linear adapter that brings its last features to the teacher's width for the hint."""

    def __init__(self, student: ChainStudent, teacher_width: int) -> None:
        super().__init__()
        self.student = student
        self.adapter = nn.Linear(student.group_sizes[-1], teacher_width)

    def forward(self, inputs: Tensor, masks: Masks) -> tuple[Outputs, Tensor]:
        """The student's outputs, and its last features at the teacher's width, [B, F]."""
        outputs = self.student(inputs, masks)
        last = outputs.features[-1]
        return outputs, self.adapter(last.mean((-2, -1)) if last.ndim == 4 else last)


class Population:
    """Implements `Students` for N copies of one `ChainStudent`; `exit_cost` is needed where it has exit gates."""

    def __init__(
        self,
        student: ChainStudent,
        data: DataSet,
        signals: Signals,
        num_students: int,
        config: TrainConfig,
        exit_cost: ExitCost | None = None,
    ) -> None:
        config.check()
        self._gate = gate_training(student, exit_cost, num_students)
        self.num_students = num_students
        self._student, self._data, self._signals, self._config = student, data, signals, config
        self._module = WithAdapter(student, signals.features.shape[-1])
        self._available = available_families(student.is_conv, signals.are_conv)
        train = data.splits["train"]
        self._input_scale = data.inputs[train].flatten(1).abs().mean(0)  # [D]
        n = num_students
        self._parameters: Parameters = {k: torch.zeros(n, *p.shape) for k, p in self._module.named_parameters()}
        self._first = {k: torch.zeros_like(p) for k, p in self._parameters.items()}
        self._second = {k: torch.zeros_like(p) for k, p in self._parameters.items()}
        self._num_updates = torch.zeros(n)
        self._rollbacks = Rollbacks(n, config.max_rollbacks)
        self._masks: Masks = tuple(torch.ones(n, size) for size in student.group_sizes)
        self._threshold = torch.ones(n)
        self._samples = torch.zeros(n, len(train), dtype=torch.int64)  # [N, L], padded
        self._labels = torch.zeros(n, len(train), dtype=torch.int64)  # [N, L], padded
        self._num_samples = [1] * n
        self._teacher = torch.zeros(n, dtype=torch.int64)
        self._batches = [torch.Generator() for _ in range(n)]
        self._step = vmap(grad_and_value(self._loss, has_aux=True))
        self._family_gradients = vmap(self._gradients_of_one)
        self._forward = vmap(self._outputs, in_dims=(0, 0, None))

    def reset(self, tasks: Sequence[Task], rows: Tensor | None = None) -> None:
        """Fresh parameters, optimizer state and batches for the students at `rows`; the others go on untouched."""
        where = torch.arange(self.num_students) if rows is None else rows
        if len(tasks) != len(where):
            raise ValueError(f"reset: got {len(tasks)} tasks for {len(where)} students; give one each")
        if self._gate:
            self._gate.reset(where, [task.preference for task in tasks])
        for row, task in zip(where.tolist(), tasks, strict=True):
            initialise(self._module, task_generator(task.seed, "parameters"))
            for name, parameter in self._module.named_parameters():
                self._parameters[name][row] = parameter.detach()
                self._first[name][row] = 0.0
                self._second[name][row] = 0.0
            self._num_updates[row] = 0.0
            self._samples[row, : len(task.samples)] = task.samples
            self._labels[row, : len(task.labels)] = task.labels
            self._num_samples[row] = len(task.samples)
            self._teacher[row] = task.teacher
            self._batches[row] = task_generator(task.seed, "batches")
        self._rollbacks.reset(where)

    def copy_rows(self, sources: Tensor) -> None:
        """Student i goes on as a copy of student `sources[i]` ([N] int64): parameters, optimizer state, selection.

        Its task and its batches stay its own.
        """
        for store in (self._parameters, self._first, self._second):
            for name, tensor in store.items():
                store[name] = tensor[sources]
        self._num_updates = self._num_updates[sources]
        self._rollbacks.copy_rows(sources)
        self._masks = tuple(mask[sources] for mask in self._masks)
        self._threshold = self._threshold[sources]

    def set_controls(self, controls: Controls) -> None:
        """Select inputs and units by importance as it is now, and set the exit threshold."""
        self._masks = select(self._student, self._scores(), controls.feature_keep, controls.unit_keep)
        self._threshold = controls.exit_threshold

    def set_exit(self, threshold: Tensor) -> None:
        """Set the exit threshold [N] alone; inputs and units stay as they were selected."""
        self._threshold = threshold

    def train_window(self, controls: Controls) -> Telemetry:
        """`steps_per_window` Adam steps for all students, each under its own controls.

        A student whose numbers are not finite goes back to where the window began (`rlkd.students.rollback`).
        """
        self.set_controls(controls)
        stores = (self._parameters, self._first, self._second)
        before = [{k: tensor.clone() for k, tensor in store.items()} for store in stores]
        num_updates, learning_rate = self._num_updates.clone(), controls.learning_rate * self._rollbacks.step_scale
        weights = family_weights(controls.weights, self._available)  # [N, 4]
        num_steps, size = self._config.steps_per_window, self._config.batch_size
        drawn = [
            torch.randint(count, (num_steps, size), generator=g)
            for count, g in zip(self._num_samples, self._batches, strict=True)
        ]
        positions = torch.stack(drawn, dim=1)  # [K, N, B]
        total = torch.zeros(self.num_students, len(FAMILIES))
        stakes = self._gate.stakes(self._masks, self._num_updates) if self._gate else ()
        for step in range(num_steps):
            batch = self._batch(positions[step])
            gradients, (_, losses) = self._step(
                self._parameters, *batch, self._masks, weights, controls.temperature, stakes
            )
            self._update(gradients, learning_rate)
            total += losses
        probe = [part[:, :PROBE_SIZE] for part in batch]
        norms, cosine = self._family_gradients(self._parameters, *probe, self._masks, controls.temperature)
        # moments keep every gradient that was not finite, so one look at the end of the window sees all of its steps
        broken = self._rollbacks.judge(divergence_free(total, norms, *(t for s in stores for t in s.values())))
        if broken.any():
            for store, kept in zip(stores, before, strict=True):
                for name, tensor in store.items():
                    tensor[broken] = kept[name][broken]
            self._num_updates[broken] = num_updates[broken]
        return Telemetry(total / num_steps, norms, cosine, self._rollbacks.diverged, self._rollbacks.count)

    def evaluate(self, split: Split) -> Metrics:
        """Metrics on one split under the current masks and exit thresholds."""
        index = self._data.splits[split]  # [B]
        with torch.no_grad():
            outputs = self._forward(self._parameters, self._masks, self._data.inputs[index])
        log_p = log_probabilities(self._signals.logits[:, index])[self._teacher]  # [N, C, B]
        labels, scores = self._data.labels[index], self._scores()
        return summarise(outputs.logits, labels, log_p, self._threshold, self._masks, scores, gates=outputs.gates)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the parameters, adapter included, each [N, ...]."""
        return {name.removeprefix("student."): p.clone() for name, p in self._parameters.items()}

    def masks(self) -> Masks:
        """Current masks, one [N, G] a group."""
        return self._masks

    def training_state(self) -> dict[str, Tensor]:
        """As `Students.training_state`; every tensor [N, ...]."""
        stores = {"parameters": self._parameters, "first": self._first, "second": self._second}
        state = {f"{store}.{name}": t for store, tensors in stores.items() for name, t in tensors.items()}
        state |= {f"mask.{i}": mask for i, mask in enumerate(self._masks)}
        state |= {"num_updates": self._num_updates, "threshold": self._threshold}
        batches = torch.stack([g.get_state() for g in self._batches])  # [N, R] uint8
        copies = {name: tensor.clone() for name, tensor in state.items()}
        return {**copies, "batches": batches, **self._rollbacks.training_state()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """As `Students.load_training_state`."""
        for store, tensors in {"parameters": self._parameters, "first": self._first, "second": self._second}.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{store}.{name}"])
        self._masks = tuple(state[f"mask.{i}"].clone() for i in range(len(self._masks)))
        self._num_updates, self._threshold = state["num_updates"].clone(), state["threshold"].clone()
        self._rollbacks.load_training_state(state)
        for generator, source in zip(self._batches, state["batches"], strict=True):
            generator.set_state(source.clone())

    def _scores(self) -> Masks:
        named = {k.removeprefix("student."): p for k, p in self._parameters.items()}
        return importance(self._student, named, self._input_scale)

    def _batch(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Inputs, labels and teacher signals of each student's samples at `positions` [N, B]."""
        samples = self._samples.gather(1, positions)  # [N, B]
        teacher = self._teacher[:, None]  # [N, 1]
        return (
            self._data.inputs[samples],  # [N, B, *shape]
            self._labels.gather(1, positions),  # [N, B]
            self._signals.logits[teacher, samples],  # [N, B, C]
            self._signals.features[teacher, samples],  # [N, B, F]
            self._signals.maps[teacher, samples],  # [N, B, P]
        )

    # The functions below see one student: vmap adds the leading dimension.

    def _outputs(self, parameters: Parameters, masks: Masks, inputs: Tensor) -> Outputs:
        outputs: Outputs = functional_call(self._module, parameters, (inputs, masks))[0]
        return outputs

    def _losses(
        self,
        parameters: Parameters,
        inputs: Tensor,
        labels: Tensor,
        teacher_logits: Tensor,
        teacher_features: Tensor,
        teacher_map: Tensor,
        masks: Masks,
        temperature: Tensor,
    ) -> tuple[Tensor, Outputs]:
        outputs, adapted = functional_call(self._module, parameters, (inputs, masks))
        losses = family_losses(outputs, adapted, labels, teacher_logits, teacher_features, teacher_map, temperature)
        return losses, outputs  # [4]

    def _loss(self, parameters: Parameters, *rest: Any) -> tuple[Tensor, Tensor]:
        """What is differentiated, and the losses; `rest` as of `_losses`, with weights before its last, then stakes."""
        weights, temperature, stakes = rest[-3:]
        arguments = (*rest[:-3], temperature)
        losses, outputs = self._losses(parameters, *arguments)
        loss = (losses * weights).sum()
        return (self._gate.loss(loss, outputs, rest[1], Stakes(*stakes)) if self._gate else loss), losses

    def _gradients_of_one(self, parameters: Parameters, *rest: Any) -> tuple[Tensor, Tensor]:
        """Norm of each family's gradient on the student's parameters, and the cosine of the first two."""
        _, pullback = vjp(lambda p: self._losses(p, *rest)[0], parameters)  # type: ignore[misc]
        (gradients,) = vmap(pullback)(torch.eye(len(FAMILIES)))
        parts = [g.flatten(1) for name, g in gradients.items() if name.startswith("student.")]  # each [4, P_k]
        norms = torch.stack([g.square().sum(1) for g in parts]).sum(0).sqrt()  # [4]
        product = torch.stack([(g[0] * g[1]).sum() for g in parts]).sum()
        return norms, product / (norms[0] * norms[1]).clamp_min(1e-12)

    def _update(self, gradients: Parameters, learning_rate: Tensor) -> None:
        """One Adam step in place, bias-corrected by each student's own count of updates."""
        names = list(self._parameters)
        g = [gradients[k] for k in names]
        m, v, p = ([store[k] for k in names] for store in (self._first, self._second, self._parameters))
        self._num_updates += 1
        correction1, correction2 = 1 - BETA1**self._num_updates, 1 - BETA2**self._num_updates  # each [N]
        step_size = -learning_rate * correction2.sqrt() / correction1  # [N]
        epsilon = EPSILON * correction2.sqrt()  # [N]
        torch._foreach_lerp_(m, g, 1 - BETA1)
        torch._foreach_mul_(v, BETA2)
        torch._foreach_addcmul_(v, g, g, 1 - BETA2)
        for k, parameter in enumerate(p):
            shape = (-1, *(1,) * (parameter.ndim - 1))
            parameter.addcdiv_(m[k] * step_size.view(shape), v[k].sqrt().add_(epsilon.view(shape)))
