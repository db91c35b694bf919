"""Knowledge in the teacher's hidden layers: hints, flow between layers, similarities, boundaries.

Published weights are those of the benchmark of Tian, Krishnan & Isola (RepDistiller, https://arxiv.org/abs/1910.10699)
where it has the term.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.losses.registry import same_batch, same_shape, term

ADAPTER = "bring the student's through an adapter (`rlkd.models.adapters`: linear, bottleneck, or 1x1 convolution)"


@term("fitnets", "feature", "https://arxiv.org/abs/1412.6550")
def hint(adapted_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared error between the student's features, through its adapter, and the teacher's.

    Formula: (1/(B F)) sum_bf (r(h_b)_f - t_bf)^2, r the adapter. The paper (Romero et al. 2015) trains the hint in a
    stage of its own with half the squared norm; here it is one term among others, and the mean over features keeps its
    size independent of the teacher's width. Teacher features come standardised to unit mean square (`Signals`).

    Args:
        adapted_features: [B, F] or [B, F, H, W], the student's after the adapter has brought them to the teacher's
            width.
        teacher_features: of the same shape, without gradient.

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: the shapes differ (an adapter is missing).
    """
    same_shape("fitnets", ADAPTER, adapted_features=adapted_features, teacher_features=teacher_features)
    return F.mse_loss(adapted_features, teacher_features.detach())


@term("normalised_feature", "feature", "https://arxiv.org/abs/2207.05256")
def normalised_hint(adapted_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared error of features that were standardised channel by channel over the batch.

    Formula: (1/(B F)) sum_bf (N(r(h))_bf - N(t)_bf)^2, N(x)_bf = (x_bf - mean_b x_bf) / std_b x_bf (Normalized Feature
    Distillation, Liu et al. 2022). Size and offset of a channel are not learned.

    Args:
        adapted_features: [B, F] or [B, F, H, W]; statistics run over all but the channels.
        teacher_features: of the same shape, without gradient.

    Returns:
        A scalar in [0, 4].
    """
    same_shape("normalised_feature", ADAPTER, adapted_features=adapted_features, teacher_features=teacher_features)
    return F.mse_loss(_standard(adapted_features), _standard(teacher_features.detach()))


def _standard(features: Tensor) -> Tensor:
    """Return features [B, F, *any] with mean 0 and variance 1 of every channel."""
    dims = [0, *range(2, features.ndim)]
    centred = features - features.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + 1e-6).sqrt()


@term("activation_boundary", "feature", "https://arxiv.org/abs/1811.03233")
def activation_boundary(adapted_features: Tensor, teacher_features: Tensor, margin: float = 1.0) -> Tensor:
    """Squared hinge that puts the student on the side of zero where the teacher's neuron is.

    Formula: (1/(B F)) sum_bf [t > 0] max(0, m - r(h))^2 + [t <= 0] max(0, m + r(h))^2 (Heo et al. 2019). The teacher's
    features may be taken before or after its ReLU: only whether they are above 0 is read.

    Args:
        adapted_features: [B, F] or [B, F, H, W], of an adapter that ends without an activation.
        teacher_features: of the same shape.
        margin: m.

    Returns:
        A scalar >= 0.
    """
    same_shape("activation_boundary", ADAPTER, adapted_features=adapted_features, teacher_features=teacher_features)
    side = torch.where(teacher_features.detach() > 0, 1.0, -1.0).to(adapted_features)
    return (margin - side * adapted_features).clamp_min(0.0).square().mean()


@term("similarity", "feature", "https://arxiv.org/abs/1907.09682", weight=3000.0)
def similarity_preserving(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Squared difference of the samples' similarities in student and teacher (similarity-preserving).

    Formula: (1/B^2) || G_S - G_T ||_F^2, G the rows of F F^T scaled to unit norm (Tung & Mori 2019). Widths may differ.

    Args:
        student_features: [B, U].
        teacher_features: [B, F].

    Returns:
        A scalar >= 0.
    """
    same_batch("similarity", student_features=student_features, teacher_features=teacher_features)
    return F.mse_loss(_similarity(student_features), _similarity(teacher_features.detach()))


def _similarity(features: Tensor) -> Tensor:
    """Return [B, B], inner products with rows of unit norm."""
    return F.normalize(features @ features.T, dim=-1, eps=1e-8)


def fsp_matrix(first: Tensor, last: Tensor) -> Tensor:
    """Return the flow of solution procedure [B, U1, U2] between two layers.

    Formula: G = (1/P) sum_p first_p last_p^T over positions (Yim et al. 2017, equation 1); P = 1 for vectors.

    Args:
        first: [B, U1] or [B, U1, H, W].
        last: [B, U2] or [B, U2, H', W']; of other size, both are pooled to the smaller one.
    """
    if first.ndim == 2:
        return first[:, :, None] * last[:, None, :]
    size = (min(first.shape[2], last.shape[2]), min(first.shape[3], last.shape[3]))
    a, b = (F.adaptive_avg_pool2d(x, size).flatten(2) for x in (first, last))  # [B, U, P]
    return a @ b.transpose(1, 2) / a.shape[-1]


def fsp(student_matrix: Tensor, teacher_matrix: Tensor) -> Tensor:
    """Mean squared error of two FSP matrices (Yim et al. 2017).

    Formula: (1/B) sum_b mean((G_S - G_T)^2). The term `fsp` computes the matrices and has the adapters.
    Paper: https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html

    Args:
        student_matrix: [B, F1, F], of `fsp_matrix`.
        teacher_matrix: [B, F1, F].

    Returns:
        A scalar >= 0.
    """
    advice = "bring the student's layers through adapters to the teacher's widths (`rlkd.losses.feature.FSP`)"
    same_shape("fsp", advice, student_matrix=student_matrix, teacher_matrix=teacher_matrix)
    return F.mse_loss(student_matrix, teacher_matrix.detach())


@term("fsp", "feature", "https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html")
class FSP(torch.nn.Module):
    """Squared difference of the flow between first and last layer (FSP), through an adapter for the first layer.

    Formula: mean((a(h1) r(h2)^T - t1 t2^T)^2), with linear adapters a and r to the teacher's widths (Yim et al. 2017;
    their student has the teacher's widths, so it needs none, and they train it in a stage of its own).
    """

    def __init__(self, first_width: int, teacher_first_width: int) -> None:
        super().__init__()
        self.adapter = torch.nn.Linear(first_width, teacher_first_width)

    def forward(
        self, student_first: Tensor, adapted_features: Tensor, teacher_first: Tensor, teacher_features: Tensor
    ) -> Tensor:
        """Return the loss, a scalar, for features [B, U1], [B, F], [B, F1], [B, F]."""
        same_shape("fsp", ADAPTER, adapted_features=adapted_features, teacher_features=teacher_features)
        mine = self.adapter(student_first), adapted_features  # [B, F1], [B, F]
        theirs = teacher_first.detach(), teacher_features.detach()
        # the squared norm of a difference of outer products, without the products: F1 + F numbers instead of F1 F
        squares = (a.square().sum(-1) * b.square().sum(-1) for a, b in (mine, theirs))
        product = (mine[0] * theirs[0]).sum(-1) * (mine[1] * theirs[1]).sum(-1)
        each = sum(squares, start=-2 * product) / (theirs[0].shape[-1] * theirs[1].shape[-1])  # [B]
        return each.mean()
