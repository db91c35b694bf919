"""Quantisation-aware distillation: a student learns from its teacher on the grid that it ships on.

`train_on_grid` is the training of every student; the rest is for chains (`rlkd.export.dynamic_grid` has real students).
Weights are rounded in every step, activations to ranges that follow the batches and then stand still, as in Jacob et
al. 2018 (arXiv:1712.05877). Layers that move the answers least may take four-bit weights.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkd.compression import CompactStudent
from rlkd.data import DataSet
from rlkd.errors import UserError
from rlkd.export.fake_quant import Grid, fake_bias, fake_quantise, grid_between, grid_of
from rlkd.losses.hard_label import cross_entropy
from rlkd.losses.response import response
from rlkd.models import layers_of

FULL, FEW = 8, 4  # bits
CALIBRATED = 256  # training samples of the first ranges
MOMENTUM = 0.99
STILL = 2 / 3  # of the steps, after which ranges stand still


@dataclass(frozen=True)
class AwareConfig:
    """How a student is trained on the grid."""

    num_steps: int = 400
    batch_size: int = 64
    learning_rate: float = 1e-3
    temperature: float = 4.0
    teacher_weight: float = 0.7  # of the teacher's answers; the labels have the rest
    evaluations: int = 8  # on validation; the best state ships

    def check(self) -> None:
        """Raise UserError for a training that cannot be done."""
        if self.num_steps < self.evaluations:
            raise UserError(f"--qat: got {self.num_steps} steps; allowed: at least {self.evaluations}")


class FakeChain(nn.Module):
    """A chain student that computes on integer grids, in floats.

    Args:
        student: copied.
        bits: of each layer's weight by its name, such as `layers.0` or `heads.1`; 8 where it is not named.
    """

    low: Tensor
    high: Tensor

    def __init__(self, student: CompactStudent, bits: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.student = copy.deepcopy(student).requires_grad_(True)
        self.bits = dict(bits or {})
        num_ranges = len(student.layers) + 1  # the inputs, then what every block gives
        self.register_buffer("low", torch.zeros(num_ranges))
        self.register_buffer("high", torch.zeros(num_ranges))
        self.follows = True  # ranges follow the batches

    def activation_grid(self, block: int) -> Grid:
        """Return the grid of what block `block` gives; 0 stands for the inputs."""
        return grid_between(self.low[block], self.high[block], FULL)

    def weight_grid(self, name: str) -> Grid:
        """Return the grid of a layer's weight."""
        return grid_of(self.student.get_submodule(name).weight, self.bits.get(name, FULL))  # type: ignore[arg-type]

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Return the logits [B, C] of every exit for inputs [B, *input_shape]."""
        s = self.student
        x = inputs.reshape(len(inputs), *s.input_shape)
        x = x if s.kept_inputs is None else x.index_select(1, s.kept_inputs)
        x = self._rounded(x, 0)
        logits = []
        for block, layer in enumerate(layers_of(s.layers), start=1):
            weight, bias = self._layer(f"layers.{block - 1}", block - 1)
            y = F.conv2d(x, weight, bias, 2, 1) if isinstance(layer, nn.Conv2d) else F.linear(x, weight, bias)
            x = self._rounded(F.relu(y), block)
            if block in s.exits:
                index = s.exits.index(block)
                weight, bias = self._layer(f"heads.{index}", block)
                logits.append(F.linear(x.flatten(1), weight, bias))
        return logits

    def _layer(self, name: str, block: int) -> tuple[Tensor, Tensor]:
        """Return weight and bias of a layer as the runtime has them, for inputs on the grid of `block`."""
        layer, grid = self.student.get_submodule(name), self.weight_grid(name)
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        return fake_quantise(weight, grid), fake_bias(bias, self.activation_grid(block), grid)

    def _rounded(self, x: Tensor, block: int) -> Tensor:
        if self.training and self.follows:
            with torch.no_grad():
                low, high = x.min().clamp_max(0.0), x.max()
                is_new = self.high[block] == self.low[block]
                share = torch.where(is_new, 0.0, MOMENTUM)
                self.low[block] = share * self.low[block] + (1 - share) * low
                self.high[block] = share * self.high[block] + (1 - share) * high
        return fake_quantise(x, self.activation_grid(block))


@dataclass(frozen=True)
class TrainedChain:
    """A trained student on its grid."""

    chain: FakeChain
    accuracy: float  # on validation, each sample answered at the exit where it leaves
    bits: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def accuracy_of(chain: FakeChain, data: DataSet, index: Tensor) -> float:
    """Return the share of the samples at `index` [B] that are answered rightly, each where it leaves."""
    chain.eval()
    logits = chain(data.inputs[index])
    answer, waiting = logits[0].argmax(-1), torch.ones(len(index), dtype=torch.bool)
    for number, later in enumerate(logits[1:]):
        waiting = waiting & chain.student.stays(logits[number], number)
        answer = torch.where(waiting, later.argmax(-1), answer)
    return float((answer == data.labels[index]).float().mean())


def calibrated(student: CompactStudent, data: DataSet, bits: Mapping[str, int] | None = None) -> FakeChain:
    """Return the student on its grid with ranges from training samples, before any further training."""
    chain = FakeChain(student, bits).train()
    with torch.no_grad():
        chain(data.inputs[data.splits["train"][:CALIBRATED]])
    return chain.eval()


def layer_names(student: CompactStudent) -> list[str]:
    """Return the names of all layers and heads."""
    return [f"{part}.{i}" for part in ("layers", "heads") for i in range(len(getattr(student, part)))]


@torch.no_grad()
def four_bit_layers(student: CompactStudent, data: DataSet, share: float = 0.5) -> dict[str, int]:
    """Return four bits for the layers that move the answers least when they alone have them: `share` of the layers.

    What moves is the root mean square difference of the logits of all exits, on training samples.
    """
    inputs = data.inputs[data.splits["train"][:CALIBRATED]]
    reference = torch.stack(calibrated(student, data)(inputs))
    moved = {}
    for name in layer_names(student):
        logits = torch.stack(calibrated(student, data, {name: FEW})(inputs))
        moved[name] = float((logits - reference).square().mean().sqrt())
    order = sorted(moved, key=lambda name: moved[name])
    return dict.fromkeys(order[: max(1, int(share * len(order)))], FEW)


def train_aware(
    student: CompactStudent,
    data: DataSet,
    teacher_logits: Tensor,
    config: AwareConfig,
    seed: int,
    bits: Mapping[str, int] | None = None,
) -> TrainedChain:
    """Train the student on its grid under the teacher; the state that is best on validation ships.

    Args:
        student: not changed.
        data: it is scaled as the student takes it.
        teacher_logits: [S, C].
        config: of the training.
        seed: of the batches.
        bits: of the weights, as in `FakeChain`.
    """
    chain = calibrated(student, data, bits)

    def exit_logits(rows: Tensor, progress: float) -> Sequence[Tensor]:
        chain.train()
        chain.follows = progress < STILL
        logits: list[Tensor] = chain(data.inputs[rows])
        return logits

    task = GridTask(
        exit_logits=exit_logits,
        teacher_logits=lambda rows: teacher_logits[rows],
        accuracy=lambda: accuracy_of(chain, data, data.splits["validation"]),
        labels=data.labels,
        train=data.splits["train"],
    )
    parameters = [p for layer in layer_names(student) for p in chain.student.get_submodule(layer).parameters()]
    best = train_on_grid(chain, parameters, task, config, seed)
    return TrainedChain(chain.eval().requires_grad_(False), best, dict(bits or {}))


@dataclass(frozen=True)
class GridTask:
    """Tells what a student on its grid learns, and how it is judged."""

    exit_logits: Callable[[Tensor, float], Sequence[Tensor]]  # [B, C] of each exit for samples [B], with the progress
    teacher_logits: Callable[[Tensor], Tensor]  # [B, C] for samples [B]
    accuracy: Callable[[], float]  # on validation
    labels: Tensor  # [S] int64
    train: Tensor  # [T] int64, the samples that are learned from


def train_on_grid(
    module: nn.Module, parameters: Sequence[nn.Parameter], task: GridTask, config: AwareConfig, seed: int
) -> float:
    """Train parameters under teacher and labels; the module keeps the state that is best on validation.

    Args:
        module: the student on its grid, changed.
        parameters: of it, those that learn.
        task: what is learned.
        config: of the training.
        seed: of the batches.

    Returns:
        The accuracy of that state on validation; the state before the training counts, too.

    Raises:
        UserError: too few steps.
    """
    config.check()
    best, best_state = task.accuracy(), copy.deepcopy(module.state_dict())
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_steps)
    generator = torch.Generator().manual_seed(seed)
    every = config.num_steps // config.evaluations
    for step in range(config.num_steps):
        rows = task.train[torch.randint(len(task.train), (config.batch_size,), generator=generator)]
        logits = task.exit_logits(rows, step / config.num_steps)
        loss = _loss(logits, task.labels[rows], task.teacher_logits(rows), config)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0:
            now = task.accuracy()
            if now > best:
                best, best_state = now, copy.deepcopy(module.state_dict())
    module.load_state_dict(best_state)
    return best


def _loss(logits: Sequence[Tensor], labels: Tensor, teacher: Tensor, config: AwareConfig) -> Tensor:
    """Return the mean over exits of the distillation loss, a scalar."""
    w = config.teacher_weight
    terms = [w * response(z, teacher, config.temperature) + (1 - w) * cross_entropy(z, labels) for z in logits]
    return torch.stack(terms).mean()
