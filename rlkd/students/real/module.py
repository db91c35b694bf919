"""One real student, any `nn.Module` with `Instrumented`'s attachments, trained under the same controls.

Implements `Students` for N = 1 beside `SoloStudent`: what differs is what real models need, AdamW or Lion with warm-up
and decay inside the policy's learning rate, accumulation, clipping, bfloat16, a device, and inputs by name.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlkd.compression.real.choice import unit_masks
from rlkd.data import Split, Task, task_generator
from rlkd.data.examples import Examples, to_device
from rlkd.errors import UserError
from rlkd.io import processes
from rlkd.io.memory import enough_memory
from rlkd.losses import FAMILIES, LossConfig, Objective
from rlkd.losses.hard_label import log_probabilities
from rlkd.models.chain import Masks, initialise
from rlkd.models.real.blocks import checkpoint_blocks, group_importance
from rlkd.models.real.hooks import find_scales, forget_scales
from rlkd.models.real.instrumented import Instrumented, ModuleOutputs
from rlkd.models.real.sharding import load_whole, part, release, whole, whole_state
from rlkd.students.evaluation import ExitsByClass, exits_by_class, summarise
from rlkd.students.interface import (
    PROBE_SIZE,
    Controls,
    Metrics,
    Telemetry,
    divergence_free,
    family_weights,
    probed_samples,
)
from rlkd.students.optimizers import load_optimizer_state, new_optimizer, optimizer_state, schedule
from rlkd.students.real.gradients import gradient_norms, sharded_gradient_norms
from rlkd.students.real.hidden import check_stages, hidden_signals, num_active_columns, offered_signals
from rlkd.students.real.sharded import sharded_copy
from rlkd.students.real.train_config import ModuleTrainConfig, confirming_samples, evaluated_samples
from rlkd.students.rollback import Rollbacks, Snapshot, moments
from rlkd.teachers import Signals

TRAIN_LESS = "raise --train.micro_batches, or lower --train.batch_size or --columns.max_length"
EVALUATE_LESS = "lower --train.evaluation_batch_size"
PUBLISHED_RATE = 3e-3  # the learning rate's control in the published setting


class ModuleStudent:
    """Implements `Students` for one real student.

    Args:
        student: the model with its attachments, holding the weights that every training starts from; with
            `config.shard` and several processes a sharded copy of it trains, until `gather`.
        data: what it learns.
        signals: of one teacher, for all samples; maps with P = 0 switch the attention family off.
        config: checked here.
        num_windows: of a whole training, for the course of the learning rate.
        loss: terms of the objective; relations between samples are those within a micro-batch.
        channel_multiple: as of `keep_top_units`.
        start_rate: the learning rate's control at which `config.learning_rate` is the step size.
    """

    num_students = 1
    confirms = True

    def __init__(
        self,
        student: Instrumented,
        data: Examples,
        signals: Signals,
        config: ModuleTrainConfig,
        num_windows: int,
        loss: LossConfig | None = None,
        *,
        channel_multiple: int = 1,
        start_rate: float = PUBLISHED_RATE,
    ) -> None:
        config.check()
        if config.learning_rate == 0:
            raise ValueError("learning_rate: got 0; allowed here: above 0 (rlkd.envs.rate finds one)")
        if config.batch_size < config.micro_batches * processes.num_processes():
            raise UserError(
                f"train.batch_size: got {config.batch_size}; allowed: at least {config.micro_batches} micro-batches a "
                f"process for {processes.num_processes()} processes"
            )
        self._device = config.torch_device()
        self._is_sharded = config.shard and processes.num_processes() > 1
        if self._is_sharded and student.plan.order:
            raise UserError("attach.units: got depth with train.shard in several processes; allowed: width")
        self._whole, self.plan = student, student.plan
        self._data, self._signals, self._config = data, signals, config
        self._channel_multiple = channel_multiple
        self._num_steps = num_windows * config.steps_per_window
        self._start_rate = start_rate
        self._loss = loss or LossConfig()
        self._objective = Objective(self._loss, offered_signals(student, signals, data))
        check_stages(self._loss, len(student.links))
        self._available = self._objective.available
        width, num_classes = signals.features.shape[-1], signals.logits.shape[-1]
        student.terms = self._objective.modules(
            {"student_width": width, "teacher_width": width, "num_classes": num_classes}
        )
        # a sharded copy trains while the whole student waits, with the weights that it starts from, on the CPU
        start = {} if self._is_sharded else student.model.state_dict()
        self._initial = {name: value.detach().clone() for name, value in start.items()}
        self.student = sharded_copy(student, self._device) if self._is_sharded else student.to(self._device)
        if config.gradient_checkpointing:
            checkpoint_blocks(self.student.model)
        self._unit_masks: Masks = tuple(torch.ones(group.size) for group in self.plan.groups)
        self._keep, self._threshold = 1.0, torch.ones(1)
        self._token_scores = torch.ones(self.plan.num_positions)
        self._rollbacks = Rollbacks(1, config.max_rollbacks)
        self._seen: Tensor | None = None  # [1, E], exit accuracies on the probed samples, if they are known

    @property
    def available(self) -> dict[str, bool]:
        """Which families of terms this student and its teacher have in common."""
        return dict(zip(FAMILIES, self._available.tolist(), strict=True))

    def reset(self, tasks: Sequence[Task], rows: Tensor | None = None) -> None:
        """Restore the starting weights, with fresh exits, adapters, optimizer and batches."""
        (self._task,) = tasks
        if not self._is_sharded:
            self.student.model.load_state_dict(self._initial)
        self._draw(task_generator(self._task.seed, "parameters"))
        if self._is_sharded:
            load_whole(self.student, self._whole.state_dict())
        else:
            self.student.to(self._device)
        config = self._config
        self._optimizer = new_optimizer(self.student, config.optimizer, config.learning_rate, config.weight_decay)
        self._batches = task_generator(self._task.seed, "batches")
        self._step = 0
        self._rollbacks.reset(torch.arange(1))
        self._token_scores = torch.ones(self.plan.num_positions)
        self._seen = None
        self._find_scales()

    @torch.no_grad()
    def _find_scales(self) -> None:
        """Bring features as wide as the teacher's to a mean square of one, as read on samples of the train split."""
        if not forget_scales(self.student.adapters):
            return
        self._unit_masks, self._keep = tuple(torch.ones(group.size) for group in self.plan.groups), 1.0
        self.student.eval()
        samples = probed_samples(self._data.splits["train"])
        parts = torch.split(samples, self._config.evaluation_batch_size)
        features = torch.cat([self._forward(some).features.float().cpu() for some in parts])  # [B, F]
        find_scales(self.student.adapters, self.student.links, features)

    def _draw(self, generator: torch.Generator) -> None:
        """Draw exits, adapters and modules of loss terms on the CPU."""
        for fresh in (self._whole.heads, self._whole.adapters, self._whole.terms):
            initialise(fresh.cpu(), generator)

    def set_controls(self, controls: Controls) -> None:
        """Choose units and heads by importance as it is now, the share of tokens, and the exit threshold."""
        self._unit_masks = self._top_units(controls.unit_keep)
        self._keep = float(controls.feature_keep[0]) if self.plan.select_after is not None else 1.0
        self._threshold = controls.exit_threshold
        self._seen = None

    def _top_units(self, keep: Tensor) -> Masks:
        """Return masks of the units that are most important now, for a share [1]."""
        scores = group_importance(self.student.model, self.plan.groups)
        return unit_masks(self.plan, scores, keep[0], self._channel_multiple)

    def set_exit(self, threshold: Tensor) -> None:
        """As `Population.set_exit`."""
        self._threshold = threshold

    def num_evaluated(self, split: Split) -> int:
        """As `Students.num_evaluated`."""
        return len(self._evaluated(split))

    @torch.no_grad()
    def probe(self, feature_keep: Tensor, unit_keep: Tensor) -> Tensor:
        """As `Students.probe`; what the last evaluation answered under the same masks is not computed again."""
        before = self._unit_masks, self._keep
        masks = self._top_units(unit_keep)
        keep = float(feature_keep[0]) if self.plan.select_after is not None else 1.0
        is_same = keep == self._keep and all(torch.equal(a, b) for a, b in zip(masks, self._unit_masks, strict=True))
        if is_same and self._seen is not None:
            return self._seen
        self._unit_masks, self._keep = masks, keep
        try:
            return processes.agree(self._exit_accuracy(probed_samples(self._data.splits["validation"])), self._device)
        finally:
            self._unit_masks, self._keep = before

    def _exit_accuracy(self, index: Tensor) -> Tensor:
        """[1, E], on the samples at `index` [B]."""
        logits, _ = self._answers(index)
        answers = torch.stack([z.argmax(-1) for z in logits])  # [E, B]
        return (answers == self._data.labels[index]).float().mean(-1)[None]

    def _remember(self, split: Split, index: Tensor, metrics: Metrics) -> Metrics:
        """Keep what an evaluation on the probed samples found, for probes under the same masks."""
        if split == "validation" and torch.equal(index, probed_samples(self._data.splits[split])):
            self._seen = metrics.exit_accuracy
        return metrics

    def train_window(self, controls: Controls) -> Telemetry:
        """`steps_per_window` optimizer steps under `controls`.

        If they are undone, the course of the learning rate goes on all the same: it counts steps taken.
        """
        controls = processes.agree(controls, self._device)
        self.set_controls(controls)
        before = Snapshot(self.student, self._optimizer)
        weights = family_weights(controls.weights, self._available)[0].to(self._device)  # [4]
        temperature = controls.temperature[0].to(self._device)
        factor = (float(controls.learning_rate[0]) / self._start_rate) ** self._config.rate_exponent
        scale = factor * float(self._rollbacks.step_scale[0])
        num_steps, size = self._config.steps_per_window, self._config.batch_size
        positions = torch.randint(len(self._task.samples), (num_steps, size), generator=self._batches)  # [K, B]
        total, worst_norm = torch.zeros(len(FAMILIES)), torch.zeros((), device=self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._task.seed % 2**48 + self._step + (processes.index() << 50))  # of dropout
            self.student.train()
            with enough_memory(f"batches of {size} in {self._config.micro_batches} parts", TRAIN_LESS):
                for step in range(num_steps):
                    losses, norm = self._train_step(positions[step], weights, temperature, scale)
                    total += losses
                    worst_norm = torch.maximum(worst_norm, norm)  # keeps one that is no number
            self.student.train(self._config.gradient_checkpointing)  # blocks are computed again in training alone
            norms, cosine = self._family_gradients(positions[-1, :PROBE_SIZE], temperature)
        self.student.eval()
        parameters = (part(p.detach())[None] for p in self.student.parameters())
        on_device = divergence_free(worst_norm[None], *parameters, *moments(self._optimizer))
        finite = processes.everywhere(on_device.cpu() & divergence_free(total[None], norms[None]), self._device)
        if self._rollbacks.judge(finite).any():
            before.put_back(self.student, self._optimizer)
        rollbacks = self._rollbacks
        return Telemetry((total / num_steps)[None], norms[None], cosine[None], rollbacks.diverged, rollbacks.count)

    def _train_step(
        self, positions: Tensor, weights: Tensor, temperature: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step on the samples at `positions` [B].

        Returns:
            The families' losses [4] on the CPU, and the norm [] of the whole gradient before it is clipped.
        """
        config = self._config
        factor = scale * schedule(self._step, self._num_steps, config.warmup, config.floor)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        self._optimizer.zero_grad()
        total = torch.zeros(len(FAMILIES), device=self._device)
        for few in processes.share(positions).tensor_split(config.micro_batches):
            shares = self._shares(few, positions)  # [4]
            with self.student.replayed():
                losses = self._losses(few, temperature)
                (shares * losses * weights).sum().backward()  # type: ignore[no-untyped-call]
            total += shares * losses.detach()
        parameters = list(self.student.parameters())
        processes.add_up([total, *(() if self._is_sharded else (p.grad for p in parameters))])  # shards are added up
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm))
        self._optimizer.step()
        self._step += 1
        return total.cpu(), norm

    def evaluate(self, split: Split) -> Metrics:
        """Metrics under the current masks, tokens and exit threshold; on validation, of `validation_size` samples."""
        index = self._evaluated(split)
        return self._remember(split, index, processes.agree(self._metrics(index), self._device))

    def confirm(self) -> tuple[Metrics, int]:
        """As `Students.confirm`, on `confirm_size` samples."""
        index = confirming_samples(self._data.splits["validation"], self._config)
        scores = self._token_scores  # what is confirmed must not steer what is learned
        metrics = processes.agree(self._metrics(index), self._device)
        self._token_scores = scores
        return metrics, len(index)

    @torch.no_grad()
    def _metrics(self, index: Tensor) -> Metrics:
        """Metrics on the samples at `index` [B]."""
        logits, token_scores = self._answers(index)
        if self.plan.select_after is not None:
            self._token_scores = token_scores
        return summarise(
            tuple(z[None] for z in logits),
            self._data.labels[index],
            log_probabilities(self._signals.logits[self._task.teacher, index])[None],
            self._threshold,
            self.masks(),
            tuple(score[None] for score in self._scores()),
            self.plan.patience,
        )

    def _evaluated(self, split: Split) -> Tensor:
        """Return the samples of a split that `evaluate` answers, [B]."""
        return evaluated_samples(self._data.splits[split], split, self._config)

    @torch.no_grad()
    def exits_by_class(self, split: Split) -> ExitsByClass:
        """Where the samples of each class leave on one split, and how many are right, under the current controls."""
        index = self._data.splits[split]
        logits, _ = self._answers(index)
        return exits_by_class(logits, self._data.labels[index], self._threshold, self.plan.patience)

    def _answers(self, index: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Logits [B, C] of every exit for the samples at `index` [B], and their mean sorted token scores [P]."""
        self.student.eval()
        order = self._data.by_length(index)
        parts, token_scores = [], torch.zeros(self.plan.num_positions)
        with enough_memory(f"evaluating {self._config.evaluation_batch_size} samples at once", EVALUATE_LESS):
            for rows in torch.split(order, self._config.evaluation_batch_size):
                outputs = self._forward(index[rows])
                parts.append([z.float().cpu() for z in outputs.logits])
                if outputs.token_scores is not None:
                    token_scores += outputs.token_scores.cpu() * len(rows) / len(index)
        release(self.student)
        back = order.argsort()
        return tuple(torch.cat(columns)[back] for columns in zip(*parts, strict=True)), token_scores

    def state_dict(self) -> dict[str, Tensor]:
        """Copy the parameters, exits and adapters included, each [1, ...]."""
        named = self.student.named_parameters()
        return {k.removeprefix("model."): whole(p.detach())[None].clone() for k, p in named}

    def gather(self) -> None:
        """End the training of a sharded student: the whole one takes its weights and its place, in every process."""
        if not self._is_sharded:
            return
        self._whole.load_state_dict(whole_state(self.student))
        self.student, self._is_sharded = self._whole.to(self._device).eval(), False
        del self._optimizer

    def masks(self) -> Masks:
        """One [1, G] a group: tokens by rank of received attention, then hidden units and heads of every block."""
        count = max(1, round(self._keep * self.plan.num_positions))
        tokens = (torch.arange(self.plan.num_positions) < count).float()
        return tuple(mask[None] for mask in (tokens, *(self._unit_masks or (torch.ones(1),))))

    def training_state(self) -> dict[str, Tensor]:
        """As `Students.training_state`, on the CPU."""
        state = {f"module.{name}": value for name, value in whole_state(self.student).items()}
        state |= {f"mask.{i}": mask.cpu().clone() for i, mask in enumerate(self._unit_masks)}
        state |= {"threshold": self._threshold.clone(), "token_scores": self._token_scores.clone()}
        state |= {"keep": torch.tensor(self._keep, dtype=torch.float64), "step": torch.tensor(self._step)}
        if self.plan.order:
            state["order"] = torch.tensor(self.plan.order)  # [blocks] int64
        state["batches"] = self._batches.get_state()
        return {**state, **optimizer_state(self._optimizer), **self._rollbacks.training_state()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """As `Students.load_training_state`.

        Raises:
            UserError: blocks were skipped in another order.
        """
        given, own = (list(order)[::-1] for order in (map(int, state.get("order", ())), self.plan.order))
        if given != own:
            raise UserError(
                f"attach.units: the state skips blocks in the order {given}, this student in {own}; begin anew"
            )
        self._seen = None
        load_whole(self.student, {name: state[f"module.{name}"] for name in self.student.state_dict()})
        self._unit_masks = tuple(state[f"mask.{i}"].clone().to(mask) for i, mask in enumerate(self._unit_masks))
        self._threshold, self._token_scores = state["threshold"].clone(), state["token_scores"].clone()
        self._keep, self._step = float(state["keep"]), int(state["step"])
        self._batches.set_state(state["batches"].clone())
        self._rollbacks.load_training_state(state)
        load_optimizer_state(self._optimizer, state)

    def _scores(self) -> Masks:
        groups = group_importance(self.student.model, self.plan.groups)
        return (self._token_scores, *(groups or (torch.ones(1),)))

    def _active_columns(self) -> int:
        """Count the columns of the features that are learned now."""
        stages = self._loss.stages
        if stages == 1:
            return self._signals.features.shape[-1]
        return num_active_columns(self.student.links, stages, self._step / self._num_steps)

    def _forward(self, samples: Tensor) -> ModuleOutputs:
        inputs = to_device(self._data.batch(samples), self._device)
        masks = tuple(mask.to(self._device) for mask in self._unit_masks)
        is_half, keeps = self._config.precision == "bfloat16", not self._is_sharded  # whole weights in half precision
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_half, cache_enabled=keeps):
            outputs: ModuleOutputs = self.student(inputs, masks, self._keep)
        return outputs

    def _shares(self, part: Tensor, positions: Tensor) -> Tensor:
        """[4]: how much of each term's mean over the batch at `positions` [B] comes from those at `part`."""
        return torch.full((len(FAMILIES),), len(part) / len(positions), device=self._device)

    def _losses(self, positions: Tensor, temperature: Tensor) -> Tensor:
        """[4], of the samples at `positions` [B] of the task."""
        samples = self._task.samples[positions]  # [B]
        teacher, device = self._task.teacher, self._device
        outputs = self._forward(samples)
        given = {
            "exit_logits": tuple(z.float() for z in outputs.logits),
            "labels": self._task.labels[positions].to(device),
            "teacher_logits": self._signals.logits[teacher, samples].to(device),
            "temperature": temperature,
            **self._hidden(samples, outputs),
        }
        return self._objective(given, self.student.terms)

    def _hidden(self, samples: Tensor, outputs: ModuleOutputs) -> dict[str, Tensor]:
        """Return signals of hidden layers for the samples [B]."""
        teacher, signals = self._task.teacher, self._signals
        return hidden_signals(
            outputs,
            signals.features[teacher, samples, : self._active_columns()].to(self._device),
            signals.maps[teacher, samples].to(self._device),
            has_features=bool(self._available[2]),
            has_maps=bool(self._available[3]),
        )

    def _family_gradients(self, positions: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Norms [4] of each family's gradient on model and exits, and the cosine of the first two, on the CPU."""
        self._optimizer.zero_grad()  # of the last step
        with self.student.replayed():
            losses = self._losses(positions, temperature)  # [4]
            if self._is_sharded:
                return sharded_gradient_norms(losses, self._available, self.student)
            parameters = [*self.student.model.parameters(), *self.student.heads.parameters()]
            return gradient_norms(losses, self._available, [p for p in parameters if p.requires_grad])
