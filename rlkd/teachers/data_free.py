"""Distillation without data: a generator invents inputs, and the student learns what the teacher answers to them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkd.errors import UserError

Model = Callable[[Tensor], Tensor]  # inputs [B, N] to logits [B, C]


@dataclass(frozen=True)
class DataFreeConfig:
    """How generator and student learn from the teacher alone."""

    num_rounds: int = 400
    """Rounds of one generator step and several student steps."""
    student_steps: int = 5
    """Student steps a round."""
    batch_size: int = 128
    """Invented samples of a step; each student step also sees as many of uniform noise mixed with older ones."""
    learning_rate: float = 2e-3
    """Of the student's Adam; it falls to a tenth along half a cosine."""
    generator_rate: float = 1e-3
    """Of the generator's Adam."""
    one_hot: float = 0.5
    """Weight of certainty: the teacher should be sure of what is invented (DAFL)."""
    balance: float = 5.0
    """Weight of balance: all classes should be invented equally often (DAFL)."""
    disagreement: float = 1.0
    """Weight of what the student cannot do yet: the generator seeks inputs on which it differs from the teacher."""
    memory: int = 20
    """Batches of invented samples that are kept and learned again, against forgetting."""

    def check(self) -> None:
        """Raise UserError for an impossible value."""
        if min(self.num_rounds, self.student_steps, self.batch_size, self.memory) < 1:
            raise UserError(
                f"data_free: got num_rounds {self.num_rounds}, student_steps {self.student_steps}, batch_size "
                f"{self.batch_size}, memory {self.memory}; allowed: at least 1"
            )
        if not (self.learning_rate > 0 and self.generator_rate > 0):
            raise UserError(
                f"data_free: got learning_rate {self.learning_rate:g}, generator_rate {self.generator_rate:g}; "
                "allowed: above 0"
            )


class Generator(nn.Module):
    """Inputs from noise: two layers, batch normalisation, and values within bounds.

    Args:
        num_noise: numbers that each sample is made of.
        num_inputs: N.
        bounds: lowest and highest value of an input.
        width: units of the hidden layer.
    """

    def __init__(self, num_noise: int, num_inputs: int, bounds: tuple[float, float], width: int = 128) -> None:
        super().__init__()
        self.num_noise, self.bounds = num_noise, bounds
        self.hidden, self.norm = nn.Linear(num_noise, width), nn.BatchNorm1d(width)
        self.out, self.spread = nn.Linear(width, num_inputs), nn.BatchNorm1d(num_inputs)

    def forward(self, noise: Tensor) -> Tensor:
        """Return inputs [B, N] for noise [B, num_noise]."""
        low, high = self.bounds
        x = F.leaky_relu(self.norm(self.hidden(noise)), 0.2)
        result: Tensor = low + (high - low) * torch.sigmoid(self.spread(self.out(x)))
        return result


def generator_loss(teacher_logits: Tensor, student_logits: Tensor, config: DataFreeConfig) -> Tensor:
    """Return what the generator descends, a scalar.

    Formula: a CE(t, argmax t) - b H(mean_b softmax(t_b)) - c (1/B) sum_b |t_b - s_b|_1 / C: the one-hot and the
    information-entropy loss of DAFL (Chen et al. 2019, https://arxiv.org/abs/1904.01186) and the adversarial term of
    DFAD (Fang et al. 2019, https://arxiv.org/abs/1912.11006). DAFL's activation term and the matching of
    batch-normalisation statistics (DeepInversion, Yin et al. 2020, https://arxiv.org/abs/1912.08795) need a look inside
    the teacher and are left out.

    Args:
        teacher_logits: [B, C] of invented samples.
        student_logits: [B, C].
        config: has the weights a, b and c.
    """
    certainty = F.cross_entropy(teacher_logits, teacher_logits.argmax(-1))
    mean = teacher_logits.softmax(-1).mean(0)
    entropy = -(mean * mean.clamp_min(1e-12).log()).sum()
    # logits without their mean: an offset is no answer
    difference = _centred(teacher_logits) - _centred(student_logits)
    return config.one_hot * certainty - config.balance * entropy - config.disagreement * difference.abs().mean()


def student_loss(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return the mean absolute difference of centred logits, a scalar, which the student descends (DFAD)."""
    return (_centred(teacher_logits) - _centred(student_logits)).abs().mean()


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def distil_without_data(
    teacher: Model, student: nn.Module, generator: Generator, config: DataFreeConfig, random: torch.Generator
) -> list[float]:
    """Train generator and student in turns against a fixed teacher; no image is read.

    Args:
        teacher: gives logits [B, C] of inputs [B, N]; gradients pass through it to the generator.
        student: the same, with parameters to train.
        generator: gives inputs.
        config: checked here.
        random: draws noise and memories.

    Returns:
        The student's loss on freshly invented samples after every round.
    """
    config.check()
    inventing = torch.optim.Adam(generator.parameters(), lr=config.generator_rate)
    learning = torch.optim.Adam(student.parameters(), lr=config.learning_rate)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(learning, config.num_rounds, config.learning_rate / 10)
    memory: list[Tensor] = []
    losses = []
    for _ in range(config.num_rounds):
        invented = generator(torch.randn(config.batch_size, generator.num_noise, generator=random))
        loss = generator_loss(teacher(invented), student(invented), config)
        inventing.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        inventing.step()
        memory = [*memory, invented.detach()][-config.memory :]
        for step in range(config.student_steps):
            with torch.no_grad():
                inputs = _lesson(generator, memory, config, random)
                taught = teacher(inputs)
            lesson = student_loss(taught, student(inputs))
            learning.zero_grad()
            lesson.backward()  # type: ignore[no-untyped-call]
            learning.step()
            if step == 0:
                losses.append(float(lesson.detach()))
        course.step()
    return losses


def _lesson(generator: Generator, memory: list[Tensor], config: DataFreeConfig, random: torch.Generator) -> Tensor:
    """Return [2 B, N]: freshly invented samples, and older ones under uniform noise of random strength."""
    fresh = generator(torch.randn(config.batch_size, generator.num_noise, generator=random))
    old = memory[int(torch.randint(len(memory), (), generator=random))]
    low, high = generator.bounds
    noise = low + (high - low) * torch.rand(old.shape, generator=random)
    share = torch.rand(len(old), 1, generator=random)
    return torch.cat([fresh, (1 - share) * old + share * noise])
