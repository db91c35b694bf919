"""Knowledge in the relations between samples: distances, angles, correlations, probabilities, graphs, contrast.

All compare matrices over the batch, so student and teacher may have different widths. They ride on the feature
family's weight. Published weights are those of RepDistiller (https://arxiv.org/abs/1910.10699) where it has the term.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.losses.registry import same_batch, term

EPSILON = 1e-8


def squared_distances(features: Tensor) -> Tensor:
    """Return [B, B], squared Euclidean distances between the rows of [B, U], never below 0."""
    square = features.square().sum(-1)
    return (square[:, None] + square[None] - 2 * features @ features.T).clamp_min(0.0)


@term("rkd_distance", "relation", "https://arxiv.org/abs/1904.05068", weight=25.0)
def rkd_distance(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Huber loss of the distances between samples, each side divided by its mean distance.

    Formula: (1/B^2) sum_ij huber(d_S,ij / mean d_S - d_T,ij / mean d_T), means over pairs i != j (Park et al. 2019).

    Args:
        student_features: [B, U].
        teacher_features: [B, F].

    Returns:
        A scalar >= 0.
    """
    same_batch("rkd_distance", student_features=student_features, teacher_features=teacher_features)
    return F.smooth_l1_loss(_distances(student_features), _distances(teacher_features.detach()))


def _distances(features: Tensor) -> Tensor:
    """Return [B, B], distances divided by their mean over different samples."""
    b = len(features)
    others = 1 - torch.eye(b, dtype=features.dtype, device=features.device)
    distances = (squared_distances(features) + 1e-12).sqrt() * others
    return distances / (distances.sum() / max(1, b * (b - 1))).clamp_min(EPSILON)


@term("rkd_angle", "relation", "https://arxiv.org/abs/1904.05068", weight=50.0)
def rkd_angle(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles that triples of samples form.

    Formula: (1/B^3) sum_ijk huber(cos_S(i, j, k) - cos_T(i, j, k)), the angle at sample i (Park et al. 2019). It takes
    memory of B^3 numbers and, for the differences, B^2 U.

    Args:
        student_features: [B, U].
        teacher_features: [B, F].

    Returns:
        A scalar >= 0.
    """
    same_batch("rkd_angle", student_features=student_features, teacher_features=teacher_features)
    return F.smooth_l1_loss(_angles(student_features), _angles(teacher_features.detach()))


def _angles(features: Tensor) -> Tensor:
    """Return [B, B, B], cosines of the angles at the first sample between the two others."""
    difference = features[None] - features[:, None]  # [B, B, U]
    # a sample that was drawn twice has distance 0 from itself: a tiny constant would blow rounding up
    unit = difference / (difference.square().sum(-1, keepdim=True) + 1e-8).sqrt()
    return unit @ unit.transpose(1, 2)


@term("correlation_congruence", "relation", "https://arxiv.org/abs/1904.01802")
def correlation_congruence(student_features: Tensor, teacher_features: Tensor, gamma: float = 0.4) -> Tensor:
    """Squared difference of the samples' Gaussian kernels in student and teacher.

    Formula: (1/B^2) || K_S - K_T ||_F^2, K_ij = exp(-gamma || f_i - f_j ||^2) on features of unit norm (Peng et al.
    2019, who expand the kernel to second order; here it is exact).

    Args:
        student_features: [B, U].
        teacher_features: [B, F].
        gamma: of the kernel.

    Returns:
        A scalar in [0, 1].
    """
    same_batch("correlation_congruence", student_features=student_features, teacher_features=teacher_features)
    ours, theirs = (_kernel(f, gamma) for f in (student_features, teacher_features.detach()))
    return F.mse_loss(ours, theirs)


def _kernel(features: Tensor, gamma: float) -> Tensor:
    """Return [B, B], the Gaussian kernel of features of unit norm."""
    return torch.exp(-gamma * squared_distances(F.normalize(features, dim=-1, eps=EPSILON)))


@term("pkt", "relation", "https://arxiv.org/abs/1803.10837", weight=30000.0)
def probabilistic_transfer(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Divergence of the probabilities with which samples are neighbours (probabilistic knowledge transfer).

    Formula: (1/B^2) sum_ij p_ij log(p_ij / q_ij), rows p_i and q_i proportional to (cosine + 1) / 2 (Passalis & Tefas
    2018).

    Args:
        student_features: [B, U].
        teacher_features: [B, F].

    Returns:
        A scalar >= 0.
    """
    same_batch("pkt", student_features=student_features, teacher_features=teacher_features)
    q, p = _neighbours(student_features), _neighbours(teacher_features.detach())
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


def _neighbours(features: Tensor) -> Tensor:
    """Return [B, B], rows of probabilities."""
    unit = F.normalize(features, dim=-1, eps=EPSILON)
    cosine = (unit @ unit.T + 1) / 2
    return cosine / cosine.sum(-1, keepdim=True)


@term("sample_graph", "relation", "https://doi.org/10.1109/CVPR.2019.00726")
def sample_graph(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Squared difference of the graph of samples: its edges are squared distances (instance relationship graph).

    Formula: (1/B^2) || A_S - A_T ||_F^2, A_ij = || f_i - f_j ||^2 divided by the largest of the batch (the edge term of
    Liu et al. 2019; their vertex term is a hint or the logits, which are terms of their own).

    Args:
        student_features: [B, U].
        teacher_features: [B, F].

    Returns:
        A scalar in [0, 1].
    """
    same_batch("sample_graph", student_features=student_features, teacher_features=teacher_features)
    return F.mse_loss(_edges(student_features), _edges(teacher_features.detach()))


def _edges(features: Tensor) -> Tensor:
    """Return [B, B], squared distances divided by the largest."""
    distances = squared_distances(features)
    return distances / distances.amax().clamp_min(EPSILON)


@term("crd", "relation", "https://arxiv.org/abs/1910.10699", weight=0.8)
class CRD(torch.nn.Module):
    """Contrast of student and teacher: two views of one sample are close, views of different samples are not.

    Formula: mean of cross entropies -log softmax(s_i . t_j / tau)[i] over j and over i, s and t linear embeddings of
    unit norm (the InfoNCE form of CRD, Tian et al. 2020), with the other samples of the batch as negatives.
    `MemoryCRD` has the memory bank of the paper. Two samples of one class are negatives of each other here.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        size = min(128, teacher_width)
        self.student = torch.nn.Linear(student_width, size)
        self.teacher = torch.nn.Linear(teacher_width, size)
        self.temperature = 0.1

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """Return the loss, a scalar >= 0, for [B, U] and [B, F]."""
        same_batch("crd", student_features=student_features, teacher_features=teacher_features)
        s = F.normalize(self.student(student_features), dim=-1, eps=EPSILON)  # [B, E]
        t = F.normalize(self.teacher(teacher_features.detach()), dim=-1, eps=EPSILON)  # [B, E]
        scores = s @ t.T / self.temperature  # [B, B]
        by_student, by_teacher = F.log_softmax(scores, -1).diagonal(), F.log_softmax(scores, 0).diagonal()
        return -(by_student.mean() + by_teacher.mean()) / 2


class MemoryCRD(torch.nn.Module):
    """Contrastive representation distillation with a memory bank of both sides' embeddings.

    Formula: -E[log h(s_i, t_i)] - K E[log(1 - h(s_i, t_j))] and the same with sides swapped, h(a, b) = e / (e + K/S),
    e = exp(a . b / tau) / Z, K negatives drawn from the bank of S samples (Tian et al. 2020, equations 17 and 19). Z is
    the mean of exp(a . b / tau) of the first batch times S. Paper: https://arxiv.org/abs/1910.10699

    It changes buffers in `forward`, so it does not work under `vmap`: use the term `crd` for a lock-step population.

    Args:
        student_width: U.
        teacher_width: F.
        num_samples: S, of the data set.
        num_negatives: K.
        generator: draws first embeddings and negatives.
        size: of an embedding.
        momentum: share of an old embedding that stays when its sample comes again.
        temperature: tau.
    """

    bank: Tensor
    normaliser: Tensor

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        num_samples: int,
        *,
        num_negatives: int,
        generator: torch.Generator,
        size: int = 128,
        momentum: float = 0.5,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.embed = torch.nn.ModuleList([torch.nn.Linear(student_width, size), torch.nn.Linear(teacher_width, size)])
        self.num_negatives, self.momentum, self.temperature = num_negatives, momentum, temperature
        self._generator = generator
        first = torch.randn(2, num_samples, size, generator=generator)
        self.register_buffer("bank", F.normalize(first, dim=-1))  # [2, S, E]: student, teacher
        self.register_buffer("normaliser", torch.zeros(2))

    def forward(self, student_features: Tensor, teacher_features: Tensor, samples: Tensor) -> Tensor:
        """Return the loss, a scalar, and store the new embeddings.

        Args:
            student_features: [B, U].
            teacher_features: [B, F].
            samples: [B] int64, each sample's place in the data set.
        """
        same_batch("crd", student_features=student_features, teacher_features=teacher_features)
        features = student_features, teacher_features.detach()
        ours, theirs = (F.normalize(e(f), dim=-1, eps=EPSILON) for e, f in zip(self.embed, features, strict=True))
        shape = (len(samples), self.num_negatives)
        drawn = torch.randint(self.bank.shape[1], shape, generator=self._generator).to(samples.device)
        places = torch.cat([samples[:, None], drawn], dim=1)  # [B, 1 + K], the positive first
        loss = self._contrast(0, ours, self.bank[1, places]) + self._contrast(1, theirs, self.bank[0, places])
        with torch.no_grad():
            for side, new in enumerate((ours, theirs)):
                mixed = self.momentum * self.bank[side, samples] + (1 - self.momentum) * new
                self.bank[side, samples] = F.normalize(mixed, dim=-1, eps=EPSILON)
        return loss

    def _contrast(self, side: int, anchors: Tensor, others: Tensor) -> Tensor:
        """Return the loss of anchors [B, E] against the bank's embeddings [B, 1 + K, E], the positive first."""
        scores = ((others @ anchors[..., None])[..., 0] / self.temperature).exp()  # [B, 1 + K]
        if self.normaliser[side] == 0:
            self.normaliser[side] = scores.detach().mean() * self.bank.shape[1]
        scores = scores / self.normaliser[side]
        noise = self.num_negatives / self.bank.shape[1]
        right, wrong = scores[:, 0] / (scores[:, 0] + noise), noise / (scores[:, 1:] + noise)
        return -(right.clamp_min(EPSILON).log() + wrong.clamp_min(EPSILON).log().sum(-1)).mean()
