"""N students of one architecture trained in lock-step: one `vmap(grad(...))` call is a step for all of them.

Their parameters are stacked along a leading dimension and updated in place by a hand-written Adam (Kingma &
Ba 2015; `torch.optim` has no learning rate a row). Nothing mixes rows, so a student learns the same in any
population. `SoloStudent` is the plain counterpart, and a test compares the two.

All of it lives on one device (`TrainConfig.device`); what comes in and goes out is on the CPU, where all random draws
are made. On a GPU a window is one recording (`rlkd.students.recorded`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vjp, vmap
from torch.nn.utils.rnn import pad_sequence

from rlkd.compression.selection import importance, select
from rlkd.data import DataSet, Split, Task, task_generator
from rlkd.losses import FAMILIES, LossConfig
from rlkd.models import ChainStudent, Masks, Outputs, initialise
from rlkd.models.chain import draw_weights, drawn_names
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
from rlkd.students.recorded import recorded
from rlkd.students.rollback import Rollbacks
from rlkd.teachers import Signals

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
Parameters = dict[str, Tensor]
Tensors = TypeVar("Tensors", DataSet, Signals)


class Population:
    """Implements `Students` for N copies of one `ChainStudent`.

    Args:
        student: gives the structure.
        data: what they learn.
        signals: of the teachers.
        num_students: N.
        config: of the training, its device included.
        exit_cost: needed where the student has exit gates.
        record: whether a GPU replays windows and evaluations (`rlkd.students.recorded`), with the same results.
            Convolutional students are never recorded: cuDNN broke the capture off (torch 2.11, H200).
        max_teachers: that a task may have.
        loss: terms of the objective.
    """

    confirms = False

    def __init__(
        self,
        student: ChainStudent,
        data: DataSet,
        signals: Signals,
        num_students: int,
        config: TrainConfig,
        exit_cost: ExitCost | None = None,
        record: bool = True,
        max_teachers: int = 1,
        loss: LossConfig | None = None,
    ) -> None:
        config.check()
        self._device = device = config.torch_device()
        self._gate = gate_training(student, exit_cost, num_students)
        self.num_students = num_students
        self._student, self._config = student, config
        self._data, self._signals = _placed(data, device), _placed(signals, device)
        objective = chain_objective(loss or LossConfig(), student, signals)
        self._module = WithAdapter(student, objective, signals)
        self._available = objective.available
        train = data.splits["train"]
        self._input_scale = data.inputs[train].flatten(1).abs().mean(0).to(device)  # [D]
        n = num_students
        shapes = {name: parameter.shape for name, parameter in self._module.named_parameters()}
        self._rate_factors = {f"student.{name}": factor for name, factor in student.rate_factors().items()}
        self._parameters: Parameters = {k: torch.zeros(n, *shape, device=device) for k, shape in shapes.items()}
        self._first = {k: torch.zeros_like(p) for k, p in self._parameters.items()}
        self._second = {k: torch.zeros_like(p) for k, p in self._parameters.items()}
        self._num_updates = torch.zeros(n, device=device)
        self._rollbacks = Rollbacks(n, config.max_rollbacks)
        self._masks: Masks = tuple(torch.ones(n, size, device=device) for size in student.group_sizes)
        self._threshold = torch.ones(n, device=device)
        self._samples = torch.zeros(n, len(train), dtype=torch.int64, device=device)  # [N, L], padded
        self._labels = torch.zeros(n, len(train), dtype=torch.int64, device=device)  # [N, L], padded
        self._num_samples = [1] * n
        self._teachers = TeacherMix(n, max_teachers, device)
        self._batches = [torch.Generator() for _ in range(n)]
        self._step = vmap(grad_and_value(self._loss, has_aux=True))
        self._family_gradients = vmap(self._gradients_of_one)
        self._forward = vmap(self._outputs, in_dims=(0, 0, None))
        record = record and not student.is_conv
        self._window = recorded(self._train, device, record)
        self._evaluations = {split: recorded(partial(self._metrics, split), device, record) for split in data.splits}

    def reset(self, tasks: Sequence[Task], rows: Tensor | None = None) -> None:
        """Fresh parameters, optimizer state and batches for the students at `rows`; the others go on untouched."""
        where = torch.arange(self.num_students) if rows is None else rows
        if len(tasks) != len(where):
            raise ValueError(f"reset: got {len(tasks)} tasks for {len(where)} students; give one each")
        if self._gate:
            self._gate.reset(where, [task.preference for task in tasks])
        initialise(self._module, torch.Generator())  # for all that is not drawn
        fresh = {
            name: parameter.detach().expand(len(tasks), *parameter.shape).clone()
            for name, parameter in self._module.named_parameters()
        }
        drawn = zip(*(fresh[name].unbind() for name in drawn_names(self._module)), strict=True)
        for row, task, weights in zip(where.tolist(), tasks, drawn, strict=True):
            draw_weights(weights, task_generator(task.seed, "parameters"))
            self._num_samples[row] = len(task.samples)
            self._batches[row] = task_generator(task.seed, "batches")
        rows = where.to(self._device)
        for name, values in fresh.items():
            self._parameters[name][rows] = values.to(self._device)
            self._first[name][rows] = 0.0
            self._second[name][rows] = 0.0
        self._num_updates[rows] = 0.0
        for store, parts in (
            (self._samples, [task.samples for task in tasks]),
            (self._labels, [task.labels for task in tasks]),
        ):
            padded = pad_sequence(parts, batch_first=True)  # [R, L]
            store[rows, : padded.shape[1]] = padded.to(self._device)
        self._teachers.reset(tasks, rows)
        self._rollbacks.reset(where)

    def copy_rows(self, sources: Tensor) -> None:
        """Student i goes on as a copy of student `sources[i]` ([N] int64): parameters, optimizer state, selection.

        Its task and its batches stay its own.
        """
        rows = sources.to(self._device)
        for store in (self._parameters, self._first, self._second):
            for tensor in store.values():
                tensor.copy_(tensor[rows])
        self._num_updates.copy_(self._num_updates[rows])
        self._rollbacks.copy_rows(sources)
        self._masks = tuple(mask[rows] for mask in self._masks)
        self._threshold = self._threshold[rows]

    def set_controls(self, controls: Controls) -> None:
        """Select inputs and units by importance as it is now, and set the exit threshold."""
        here = controls.to(self._device)
        self._masks = select(self._student, self._scores(), here.feature_keep, here.unit_keep)
        self._threshold = here.exit_threshold

    def set_exit(self, threshold: Tensor) -> None:
        """Set the exit threshold [N] alone; inputs and units stay as they were selected."""
        self._threshold = threshold.to(self._device)

    def num_evaluated(self, split: Split) -> int:
        """As `Students.num_evaluated`."""
        return len(self._data.splits[split])

    @torch.no_grad()
    def confirm(self) -> None:
        """As `Students.confirm`: nothing."""

    def probe(self, feature_keep: Tensor, unit_keep: Tensor) -> Tensor:
        """As `Students.probe`."""
        shares = (keep.to(self._device) for keep in (feature_keep, unit_keep))
        masks = select(self._student, self._scores(), *shares)
        index = probed_samples(self._data.splits["validation"])
        outputs = self._forward(self._parameters, masks, self._data.inputs[index])
        answers = torch.stack([z.argmax(-1) for z in outputs.logits], dim=1)  # [N, E, B]
        return (answers == self._data.labels[index]).float().mean(-1).cpu()

    def load_parameters(self, parameters: Mapping[str, Tensor], rows: Tensor) -> None:
        """Give the students at `rows` parameters as `state_dict` has them, each [len(rows), ...]."""
        where = rows.to(self._device)
        for name, store in self._parameters.items():
            store[where] = parameters[name.removeprefix("student.")].to(self._device)

    def weigh_teachers(self, theta: Tensor) -> None:
        """How each student's teachers are weighed from now on ([N, 3], `rlkd.students.fusion`); a reset forgets it."""
        self._teachers.weigh(theta)

    def train_window(self, controls: Controls) -> Telemetry:
        """`steps_per_window` Adam steps for all students, each under its own controls.

        A student whose numbers are not finite goes back to where the window began (`rlkd.students.rollback`).
        """
        self.set_controls(controls)
        learning_rate = controls.learning_rate * self._rollbacks.step_scale
        weights = family_weights(controls.weights, self._available)  # [N, 4]
        stakes = self._gate.stakes(self.masks(), self._num_updates.cpu()) if self._gate else ()
        given = (self._draw(), weights, controls.temperature, learning_rate, *stakes)
        with _exact_convolutions():
            results = self._window(*self._masks, *(tensor.to(self._device) for tensor in given))
        before = results[4:]
        losses, norms, cosine, finite = (tensor.cpu() for tensor in results[:4])
        broken = self._rollbacks.judge(finite)
        if broken.any():
            rows = broken.nonzero()[:, 0].to(self._device)
            for tensor, kept in zip(self._trained(), before, strict=True):
                tensor[rows] = kept[rows]
        return Telemetry(losses, norms, cosine, self._rollbacks.diverged, self._rollbacks.count)

    def _draw(self) -> Tensor:
        """Positions [K, N, B] of a window's samples among each student's own, on the CPU."""
        num_steps, size = self._config.steps_per_window, self._config.batch_size
        drawn = torch.empty(self.num_students, num_steps, size, dtype=torch.int64)
        for count, generator, out in zip(self._num_samples, self._batches, drawn.unbind(), strict=True):
            torch.randint(count, (num_steps, size), generator=generator, out=out)
        return drawn.transpose(0, 1)

    def _trained(self) -> list[Tensor]:
        """All that training changes, [N, ...] each."""
        stores = (self._parameters, self._first, self._second)
        return [*(tensor for store in stores for tensor in store.values()), self._num_updates]

    def _train(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Train a window on the device, without any transfer to the CPU.

        Args:
            given: a mask a group, positions [K, N, B], weights [N, 4], temperature [N], learning rate [N], stakes.

        Returns:
            Mean losses [N, 4], gradient norms [N, 4], their cosine [N], whether all was finite [N], and copies of
            `_trained()` as it was before.
        """
        before = tuple(tensor.clone() for tensor in self._trained())
        num_groups = len(self._masks)
        masks, (positions, weights, temperature, learning_rate, *stakes) = given[:num_groups], given[num_groups:]
        total = torch.zeros(self.num_students, len(FAMILIES), device=self._device)
        for at in positions:
            batch = self._batch(at)
            gradients, (_, losses) = self._step(self._parameters, *batch, masks, weights, temperature, tuple(stakes))
            self._update(gradients, learning_rate)
            total += losses
        probe = [part[:, :PROBE_SIZE] for part in batch]
        norms, cosine = self._family_gradients(self._parameters, *probe, masks, temperature)
        # moments keep every gradient that was not finite, so one look at the end of the window sees all of its steps
        finite = divergence_free(total, norms, *self._trained())
        return total / len(positions), norms, cosine, finite, *before

    def evaluate(self, split: Split) -> Metrics:
        """Metrics on one split under the current masks and exit thresholds."""
        with torch.no_grad(), _exact_convolutions():
            results = self._evaluations[split](self._threshold, *self._masks)
        return Metrics(*(tensor.to("cpu", copy=True) for tensor in results))

    def _metrics(self, split: Split, threshold: Tensor, *masks: Tensor) -> tuple[Tensor, ...]:
        """Return the fields of `Metrics`, on the device."""
        index = self._data.splits[split]  # [B]
        outputs = self._forward(self._parameters, masks, self._data.inputs[index])
        log_p = self._teachers.answers(self._signals, index)  # [N, C, B]
        labels, scores = self._data.labels[index], self._scores()
        metrics = summarise(outputs.logits, labels, log_p, threshold, masks, scores, gates=outputs.gates)
        return tuple(getattr(metrics, field.name) for field in dataclasses.fields(metrics))

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the parameters, adapter included, each [N, ...]."""
        return {name.removeprefix("student."): p.to("cpu", copy=True) for name, p in self._parameters.items()}

    def masks(self) -> Masks:
        """Return the present masks, [N, G] for each group."""
        return tuple(mask.cpu() for mask in self._masks)

    def training_state(self) -> dict[str, Tensor]:
        """As `Students.training_state`; every tensor [N, ...]."""
        stores = {"parameters": self._parameters, "first": self._first, "second": self._second}
        state = {f"{store}.{name}": t for store, tensors in stores.items() for name, t in tensors.items()}
        state |= {f"mask.{i}": mask for i, mask in enumerate(self._masks)}
        state |= {"num_updates": self._num_updates, "threshold": self._threshold}
        batches = torch.stack([g.get_state() for g in self._batches])  # [N, R] uint8
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        return {**copies, "batches": batches, **self._rollbacks.training_state()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """As `Students.load_training_state`."""
        for store, tensors in {"parameters": self._parameters, "first": self._first, "second": self._second}.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{store}.{name}"])
        self._num_updates.copy_(state["num_updates"])
        self._masks = tuple(state[f"mask.{i}"].to(self._device, copy=True) for i in range(len(self._masks)))
        self._threshold = state["threshold"].to(self._device, copy=True)
        self._rollbacks.load_training_state(state)
        for generator, source in zip(self._batches, state["batches"], strict=True):
            generator.set_state(source.clone())

    def _scores(self) -> Masks:
        named = {k.removeprefix("student."): p for k, p in self._parameters.items()}
        return importance(self._student, named, self._input_scale)

    def _batch(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Return inputs, labels and teacher signals of each student's samples at `positions` [N, B]."""
        samples, labels = self._samples.gather(1, positions), self._labels.gather(1, positions)  # each [N, B]
        return self._data.inputs[samples], labels, *self._teachers.of(self._signals, samples, labels)

    # The functions below see one student: vmap adds the leading dimension.

    def _outputs(self, parameters: Parameters, masks: Masks, inputs: Tensor) -> Outputs:
        outputs: Outputs = functional_call(self._module, parameters, (inputs, masks))[0]
        return outputs

    def _losses(self, parameters: Parameters, inputs: Tensor, *rest: Any) -> Tensor:
        """Return the losses [4]; `rest` is labels, the teachers' signals, masks and temperature."""
        *targets, masks, temperature = rest
        losses: Tensor = functional_call(self._module, parameters, (inputs, masks, (*targets, temperature)))[1]
        return losses

    def _loss(self, parameters: Parameters, *rest: Any) -> tuple[Tensor, Tensor]:
        """Return total and losses; `rest` is that of `_losses`, with the weights before its last, then the stakes."""
        inputs, *targets, masks, weights, temperature, stakes = rest
        outputs, losses = functional_call(self._module, parameters, (inputs, masks, (*targets, temperature)))
        loss = (losses * weights).sum()
        return (self._gate.loss(loss, outputs, rest[1], Stakes(*stakes)) if self._gate else loss), losses

    def _gradients_of_one(self, parameters: Parameters, *rest: Any) -> tuple[Tensor, Tensor]:
        """Norm of each family's gradient on the student's parameters, and the cosine of the first two."""
        _, pullback = vjp(lambda p: self._losses(p, *rest), parameters)  # type: ignore[misc]
        (gradients,) = vmap(pullback)(torch.eye(len(FAMILIES), device=self._device))
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
            step = step_size * self._rate_factors.get(names[k], 1.0)
            parameter.addcdiv_(m[k] * step.view(shape), v[k].sqrt().add_(epsilon.view(shape)))


def _placed(tensors: Tensors, device: torch.device) -> Tensors:
    """Move data or signals to `device`; tensors that are there already are not copied."""
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(tensors):
        value = getattr(tensors, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device)
        elif isinstance(value, Mapping):  # splits
            moved[field.name] = {name: index.to(device) for name, index in value.items()}
    return dataclasses.replace(tensors, **moved)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """On a GPU in float32, as matrix products are by default, not in TF32; by algorithms that repeat their bits."""
    settings = torch.backends.cudnn
    before = settings.allow_tf32, settings.deterministic
    settings.allow_tf32, settings.deterministic = False, True
    try:
        yield
    finally:
        settings.allow_tf32, settings.deterministic = before
