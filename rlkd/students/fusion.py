"""Several teachers of one student as one: their signals, weighted sample by sample.

The weights of a student's k teachers on a sample are softmax over them of theta . (how likely the teacher finds the
label, its confidence, its entropy), three figures that any set of classifiers has. Theta 0, which holds unless a
controller sets another, is the plain mean. MTKD-RL (Yang et al. 2025) weighs each teacher's loss by what an agent
sees of teacher and student; here logits are averaged before the loss (one target a sample, whatever k is), and what
the agent sees is the teachers' alone.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.data import Task
from rlkd.losses.hard_label import log_probabilities
from rlkd.teachers import Signals

NUM_CUES = 3
LEAST_LOG_P = -5.0  # least log-probability of a label; smaller values carry no more information


class TeacherMix:
    """The teachers of N students, up to `max_teachers` each.

    Tensors are changed in place alone, so that a recorded window (CUDA graph) stays valid.
    """

    def __init__(self, num_students: int, max_teachers: int = 1, device: torch.device | None = None) -> None:
        if max_teachers < 1:
            raise ValueError(f"max_teachers: got {max_teachers}; allowed: at least 1")
        n, k = num_students, max_teachers
        self._teachers = torch.zeros(n, k, dtype=torch.int64, device=device)  # [N, K], padded with the first
        self._given = torch.zeros(n, k, dtype=torch.bool, device=device)  # [N, K]
        self._theta = torch.zeros(n, NUM_CUES, device=device)  # [N, 3]

    def reset(self, tasks: Sequence[Task], rows: Tensor) -> None:
        """Set the teachers of `tasks` for the students at `rows` [len(tasks)], under the plain mean.

        Raises:
            ValueError: a task has more teachers than there is room for.
        """
        room = self._teachers.shape[1]
        most = max(len(task.teachers) for task in tasks)
        if most > room:
            raise ValueError(f"reset: got a task of {most} teachers; allowed: up to max_teachers, {room}")
        padded = [(*task.teachers, *(task.teacher,) * (room - len(task.teachers))) for task in tasks]
        given = [[place < len(task.teachers) for place in range(room)] for task in tasks]
        device = self._teachers.device
        self._teachers[rows] = torch.tensor(padded, device=device)
        self._given[rows] = torch.tensor(given, device=device)
        self._theta[rows] = 0.0

    def weigh(self, theta: Tensor) -> None:
        """Set theta [N, 3]."""
        self._theta.copy_(theta)

    def of(self, signals: Signals, samples: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the signals [N, B, *], in the order of `Signals.named`, for `samples` and `labels` [N, B].

        A mean of maps of unit norm is brought back to unit norm.
        """
        if self._teachers.shape[1] == 1:
            return tuple(signal[self._teachers, samples] for signal in signals.named().values())
        teachers = self._teachers[:, :, None]  # [N, K, 1]
        each = {name: signal[teachers, samples[:, None]] for name, signal in signals.named().items()}
        logits = each["teacher_logits"]  # [N, K, B, C]
        weights = self._weights(cues(logits, labels[:, None].expand(logits.shape[:-1])))  # [N, K, B]
        mixed = {name: _mean(signal, weights) for name, signal in each.items()}
        mixed["teacher_map"] = F.normalize(mixed["teacher_map"], dim=-1, eps=1e-8)
        return tuple(mixed.values())

    def answers(self, signals: Signals, index: Tensor) -> Tensor:
        """Log-probabilities [N, C, B] under the plain mean on samples `index` [B] whose labels are not to be used."""
        logits = signals.logits[:, index]  # [T, B, C]
        if self._teachers.shape[1] == 1:
            return log_probabilities(logits)[self._teachers[:, 0]]
        weights = self._given / self._given.sum(1, keepdim=True)  # [N, K]
        return log_probabilities(_mean(logits[self._teachers], weights[..., None].expand(-1, -1, len(index))))

    def _weights(self, seen: Tensor) -> Tensor:
        """[N, K, B] for cues [N, K, B, 3]; 0 where there is no teacher."""
        preference = (seen @ self._theta[:, None, :, None].to(seen))[..., 0]  # [N, K, B]
        return preference.masked_fill(~self._given[..., None], -math.inf).softmax(1)


def cues(logits: Tensor, labels: Tensor) -> Tensor:
    """[*N, B, 3] of teachers' logits [*N, B, C] on samples with `labels` [*N, B]: what their weights are decided by.

    Log-probability of the label (at least LEAST_LOG_P), largest probability, entropy over log C.
    """
    log_p = log_probabilities(logits)  # [*N, C, B]
    p = log_p.exp()
    label = log_p.gather(-2, labels[..., None, :])[..., 0, :].clamp_min(LEAST_LOG_P)
    entropy = -(p * log_p).sum(-2) / math.log(logits.shape[-1])
    return torch.stack([label, p.amax(-2), entropy], dim=-1)


def _mean(signal: Tensor, weights: Tensor) -> Tensor:
    """[N, B, S] of `signal` [N, K, B, S] under `weights` [N, K, B] that sum to one over K."""
    return (signal * weights[..., None]).sum(1)
