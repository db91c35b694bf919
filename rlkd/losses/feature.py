"""Knowledge in the teacher's hidden layers: hints (FitNets, Romero et al. 2015)."""

import torch.nn.functional as F
from torch import Tensor


def hint(adapted_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Mean squared error between the student's features, through its adapter, and the teacher's.

    Formula: (1/(B F)) sum_bf (r(h_b)_f - t_bf)^2, r the adapter. The paper trains the hint in a stage of its
    own with half the squared norm; here it is one term among others, and the mean over features keeps its size
    independent of the teacher's width. Teacher features come standardised to unit mean square (`Signals`).

    Args:
        adapted_features: [B, F], the student's features after the adapter has brought them to the teacher's width.
        teacher_features: [B, F], without gradient.

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: the shapes differ (an adapter is missing).
    """
    if adapted_features.shape != teacher_features.shape:
        raise ValueError(
            f"hint: student features {tuple(adapted_features.shape)} and teacher features "
            f"{tuple(teacher_features.shape)} must have one shape; bring the student's through an adapter"
        )
    return F.mse_loss(adapted_features, teacher_features.detach())
