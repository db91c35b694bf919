"""Knowledge in derivatives by the inputs. They ride on the response family's weight: derivatives of the same logits."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from rlkd.losses.registry import same_shape, term

Model = Callable[[Tensor], Tensor]  # inputs [B, *any] to logits [B, C], each sample's from its own inputs alone


def logit_gradient(model: Model, inputs: Tensor, classes: Tensor) -> Tensor:
    """Return [B, *any], the gradient of each sample's logit of its class in `classes` [B] by its inputs.

    It can be differentiated again, and works under `vmap`.
    """
    gradients: Tensor = grad(lambda x: model(x).gather(1, classes[:, None]).sum())(inputs)
    return gradients


def loss_gradient(model: Model, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return [B, *any], the gradient of each sample's cross entropy by its inputs; otherwise as `logit_gradient`."""
    gradients: Tensor = grad(lambda x: F.cross_entropy(model(x), labels, reduction="sum"))(inputs)
    return gradients


@term("jacobian", "gradient", "https://arxiv.org/abs/1803.00443", weight=1.0)
def jacobian_matching(student_input_gradient: Tensor, teacher_input_gradient: Tensor) -> Tensor:
    """Squared distance of the normalised input gradients of the class that the teacher finds likeliest.

    Formula: (1/B) sum_b || g_S,b / ||g_S,b|| - g_T,b / ||g_T,b|| ||^2, g the gradient of that class's logit by the
    inputs (Srinivas & Fleuret 2018, section 4.1, who match this one row of the Jacobian).

    Args:
        student_input_gradient: [B, N], of `logit_gradient`.
        teacher_input_gradient: [B, N].

    Returns:
        A scalar in [0, 4].
    """
    advice = "flatten both, and give both models the same inputs"
    same_shape(
        "jacobian",
        advice,
        student_input_gradient=student_input_gradient,
        teacher_input_gradient=teacher_input_gradient,
    )
    ours, theirs = (_unit(g) for g in (student_input_gradient, teacher_input_gradient.detach()))
    return (ours - theirs).square().sum(-1).mean()


def _unit(gradient: Tensor) -> Tensor:
    """Return rows of unit norm; where all is 0 the derivative is 0, too."""
    return gradient / (gradient.square().sum(-1, keepdim=True) + 1e-12).sqrt()


@term("gradient_penalty", "gradient", "https://arxiv.org/abs/1711.09404", weight=0.01)
def gradient_penalty(student_loss_gradient: Tensor) -> Tensor:
    """Mean squared norm of the input gradient of the cross entropy, at a weight of 0.01.

    Formula: (1/B) sum_b || d CE_b / d x_b ||^2 (double backpropagation of Drucker & LeCun 1992; Ross & Doshi-Velez
    2018). It needs no teacher.

    Args:
        student_loss_gradient: [B, N], of `loss_gradient`.

    Returns:
        A scalar >= 0.
    """
    return student_loss_gradient.square().sum(-1).mean()


def gradient_cosine(student_gradient: Tensor, teacher_gradient: Tensor) -> Tensor:
    """Return the mean cosine of the input gradients of student and teacher: a metric, without gradient of its own.

    Args:
        student_gradient: [B, *any].
        teacher_gradient: [B, *any].
    """
    same_shape(
        "gradient_cosine",
        "give both models the same inputs",
        student_gradient=student_gradient,
        teacher_gradient=teacher_gradient,
    )
    ours, theirs = (g.detach().flatten(1) for g in (student_gradient, teacher_gradient))
    return torch.as_tensor(F.cosine_similarity(ours, theirs, dim=-1, eps=1e-12).mean())
