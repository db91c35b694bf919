"""What both kinds of student share: controls in, telemetry and metrics out. One student is N = 1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from rlkd.data import Split, Task
from rlkd.errors import UserError
from rlkd.models import Masks

PROBE_SIZE = 16  # samples for gradient norms and cosines; a whole batch makes a window 6 % slower
PROBED_SAMPLES = 128  # validation samples of a what-if probe: noise of a difference is about 2 points


def probed_samples(validation: Tensor) -> Tensor:
    """At most PROBED_SAMPLES of the validation samples [V], spread evenly."""
    count = min(PROBED_SAMPLES, len(validation))
    return validation[torch.arange(count) * len(validation) // count]


@dataclass(frozen=True)
class TrainConfig:
    """How a student is trained between two decisions."""

    steps_per_window: int = 15
    """Optimizer steps of one window, which is one environment step."""
    batch_size: int = 48
    """Samples of one optimizer step, drawn with replacement from the student's training samples."""
    max_rollbacks: int = 2
    """Windows that are undone, with a tenth of the step size from then on, before a student counts as diverged."""
    device: str = "cpu"
    """Where a lock-step population trains: cpu, cuda, cuda:1, ...; a student alone trains on the CPU. Random draws are
    the CPU's, so the same seed means the same tasks, first weights and batches everywhere."""

    def check(self) -> None:
        """Raise UserError for a window without a step, a batch without a sample, or a negative number of rollbacks."""
        if self.steps_per_window < 1 or self.batch_size < 1:
            raise UserError(
                f"train: got steps_per_window {self.steps_per_window}, batch_size {self.batch_size}; "
                "allowed: at least 1"
            )
        if self.max_rollbacks < 0:
            raise UserError(f"train.max_rollbacks: got {self.max_rollbacks}; allowed: at least 0")

    def torch_device(self) -> torch.device:
        """Return the device, with its number.

        Raises:
            UserError: torch has no such device here.
        """
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if self.device == "cpu" or self.device in gpus:
            return torch.device(self.device)
        if self.device == "cuda" and gpus:
            return torch.device("cuda", torch.cuda.current_device())
        raise UserError(
            f"train.device: got {self.device!r}, which torch does not find here; allowed: cpu, or cuda or cuda:N for a "
            "GPU that torch.cuda.device_count() counts"
        )


@dataclass(frozen=True)
class Controls:
    """Controls of one window, for N students."""

    weights: Tensor  # [N, 4] >= 0, one a family in the order of FAMILIES, summing to one
    temperature: Tensor  # [N] > 0
    feature_keep: Tensor  # [N] in (0, 1], share of the inputs kept
    unit_keep: Tensor  # [N] in (0, 1], share of each block's units kept
    exit_threshold: Tensor  # [N], 1/C or less: all leave at the first exit; 1 or more: none leaves early
    learning_rate: Tensor  # [N] > 0

    def rows(self, index: Tensor | slice) -> "Controls":
        """Return the controls of some of the students."""
        return Controls(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device) -> "Controls":
        """Return the controls on `device`."""
        return Controls(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class Telemetry:
    """Report of a window of training."""

    losses: Tensor  # [N, 4], mean over the window, unweighted, in the order of FAMILIES
    gradient_norms: Tensor  # [N, 4], of each family's unweighted loss on PROBE_SIZE samples of the last batch
    gradient_cosine: Tensor  # [N], between the gradients of hard label and response
    diverged: Tensor  # [N] bool, a loss, a gradient or a parameter was not finite once more than may be undone
    num_rollbacks: Tensor  # [N] int64, windows that were undone since the student began


@dataclass(frozen=True)
class Metrics:
    """Results of evaluation on one split, under the controls of the last window."""

    accuracy: Tensor  # [N], each sample answered by the exit it left at
    exit_accuracy: Tensor  # [N, E], of every exit if all samples left there
    exit_loss: Tensor  # [N, E], mean cross entropy in nats
    exit_rates: Tensor  # [N, E], share of samples that left at each exit; sums to one
    agreement: Tensor  # [N], share of samples on which the answer equals the teacher's
    divergence: Tensor  # [N], KL from teacher to the final exit at T = 1, in nats
    kept: Tensor  # [N, G] number of inputs and of units of every block that are kept
    spread: Tensor  # [N, 2], evenness of importance: inputs, first block's units


class Students(Protocol):
    """N students in training."""

    num_students: int
    confirms: bool
    """Whether `confirm` looks once more at a window that could ship; tiny students ship as `evaluate` saw them."""

    def reset(self, tasks: Sequence[Task], rows: Tensor | None = None) -> None:
        """Start anew on `tasks`: all N students, or only those at `rows` ([len(tasks)] int64)."""

    def train_window(self, controls: Controls) -> Telemetry:
        """Select inputs and units, then take `steps_per_window` optimizer steps under `controls`."""

    def evaluate(self, split: Split) -> Metrics:
        """Metrics on one split under the current masks and exit thresholds."""

    def num_evaluated(self, split: Split) -> int:
        """Count the samples of a split that `evaluate` answers."""

    def confirm(self) -> tuple[Metrics, int] | None:
        """Return metrics on the validation samples that confirm a window, and their number.

        They are those of `evaluate` and mostly more; None where `confirms` is false.
        """

    def set_controls(self, controls: Controls) -> None:
        """Select inputs and units and set the exit threshold without training."""

    def probe(self, feature_keep: Tensor, unit_keep: Tensor) -> Tensor:
        """[N, E], accuracy of every exit on PROBED_SAMPLES validation samples if these shares [N] were kept now.

        Inputs and units are chosen by importance as it is now; nothing of the students changes.
        """

    def set_exit(self, threshold: Tensor) -> None:
        """Set the exit threshold [N] alone; inputs and units stay as they were selected."""

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters by name, each [N, ...]."""

    def masks(self) -> Masks:
        """Return the current masks, each [N, G]."""

    def training_state(self) -> dict[str, Tensor]:
        """Copy everything that training has changed since `reset`, optimizer and random sources included."""

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `training_state` of the same tasks, which `reset` was just given.

        Raises:
            RuntimeError: a random source that is none.
        """


def divergence_free(*tensors: Tensor) -> Tensor:
    """[N] bool: all values of every [N, ...] tensor are finite."""
    ok = [torch.isfinite(t).flatten(1).all(1) if t.ndim > 1 else torch.isfinite(t) for t in tensors]
    return torch.stack(ok).all(0)


def family_weights(weights: Tensor, available: Tensor) -> Tensor:
    """Weights [N, 4] with unavailable families ([4] bool) at zero, the others scaled to sum to one."""
    kept = weights * available
    return kept / kept.sum(-1, keepdim=True).clamp_min(1e-12)
