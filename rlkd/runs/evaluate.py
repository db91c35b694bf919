"""Metrics of a student beside its teacher, on test data (`rlkd evaluate`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.compression import CompactStudent
from rlkd.configs.knowledge import EvaluateConfig
from rlkd.data import DataSet, load_dataset
from rlkd.errors import UserError
from rlkd.losses import gradient_cosine
from rlkd.metrics import (
    CORRUPTIONS,
    accuracy_by_class,
    agreement,
    calibration_error,
    corrupted,
    divergence,
    fgsm,
    knowledge_coverage,
    pgd,
    tail_accuracy,
)
from rlkd.metrics.transfer import flops_per_sample, probe_accuracy
from rlkd.models import ChainStudent
from rlkd.teachers import load_teachers

SEED = 20_260_103  # of corruptions, so that every evaluation sees the same ones
MAX_ATTACKED = 1000  # test samples that attacks and gradients are computed on

Model = Callable[[Tensor], Tensor]


def evaluate_student(student: CompactStudent, config: EvaluateConfig) -> dict[str, Any]:
    """Compute all metrics on the test split.

    Returns:
        Numbers by name; `corruptions` has the accuracies under each strength by name, `accuracy_by_class` a list.

    Raises:
        UserError: the student answers other inputs or classes than the data set has.
    """
    config.check()
    data = load_dataset(config.data)
    _check_fits(student, data)
    (teacher,) = load_teachers(config.teacher, data)
    masks = teacher.full_masks()
    models: tuple[Model, Model] = (student, lambda x: teacher(x, masks).logits[-1])
    index = data.splits["test"]
    inputs, labels = data.inputs[index], data.labels[index]
    with torch.no_grad():
        logits, taught = (model(inputs) for model in models)  # each [B, C]
    metrics: dict[str, Any] = {
        "data": data.name,
        "num_samples": len(index),
        **answer_metrics(logits, taught, labels, data.labels[data.splits["train"]]),
        "flops_per_sample": flops_per_sample(student, inputs),
    }
    metrics["flops_per_accuracy"] = metrics["flops_per_sample"] / max(metrics["accuracy"], 1e-9)
    metrics |= _under_attack(models, data, inputs[:MAX_ATTACKED], labels[:MAX_ATTACKED], config.epsilon)
    metrics["corruptions"] = _under_corruption(student, data, inputs, labels)
    metrics["corruption_shift"] = metrics["accuracy"] - _mean(
        [a for accuracies in metrics["corruptions"].values() for a in accuracies]
    )
    if config.transfer is not None:
        metrics["transfer"] = _transfer(student, teacher, data, load_dataset(config.transfer))
    return metrics


def answer_metrics(logits: Tensor, taught: Tensor, labels: Tensor, train_labels: Tensor) -> dict[str, Any]:
    """Return the metrics of answers alone.

    Args:
        logits: [B, C], the student's.
        taught: [B, C], the teacher's.
        labels: [B] int64.
        train_labels: [L] int64.
    """
    return {
        "accuracy": accuracy(logits, labels),
        "teacher_accuracy": accuracy(taught, labels),
        "agreement_top1": agreement(logits, taught),
        "agreement_top5": agreement(logits, taught, 5),
        "js_divergence_nats": divergence(logits, taught),
        "knowledge_coverage": knowledge_coverage(logits, taught, labels),
        "ece": calibration_error(logits, labels),
        "teacher_ece": calibration_error(taught, labels),
        "accuracy_by_class": accuracy_by_class(logits, labels),
        "tail_accuracy": tail_accuracy(logits, labels, train_labels),
    }


def _check_fits(student: CompactStudent, data: DataSet) -> None:
    architecture = student.architecture()
    given, wanted = torch.Size(architecture["input_shape"]).numel(), torch.Size(data.input_shape).numel()
    if given != wanted or architecture["num_classes"] != data.num_classes:
        raise UserError(
            f"data: got {data.name}, {data.num_classes} classes for inputs of {wanted} values; the student answers "
            f"{architecture['num_classes']} classes for {given}; give the data set that it was distilled on"
        )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of right answers, for logits [B, C] and labels [B]."""
    return float((logits.argmax(-1) == labels).double().mean())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _range(data: DataSet) -> tuple[float, tuple[float, float] | None]:
    """Return the scale of an input, and its bounds: of images, of their values; a table's inputs have none."""
    if len(data.input_shape) == 1:
        return float(data.inputs[data.splits["train"]].std()), None
    low, high = float(data.inputs.min()), float(data.inputs.max())
    return high - low, (low, high)


def _under_attack(
    models: tuple[Model, Model], data: DataSet, inputs: Tensor, labels: Tensor, epsilon: float
) -> dict[str, float]:
    """Return accuracies under FGSM and PGD-10, and the cosine of the input gradients."""
    scale, bounds = _range(data)
    student, _ = models
    attacks = {
        "fgsm_accuracy": fgsm(student, inputs, labels, epsilon=epsilon * scale, bounds=bounds),
        "pgd10_accuracy": pgd(student, inputs, labels, epsilon * scale, bounds=bounds),
    }
    gradients = [loss_gradient(model, inputs, labels) for model in models]
    with torch.no_grad():
        reached = {name: accuracy(student(moved), labels) for name, moved in attacks.items()}
    return {**reached, "gradient_cosine": float(gradient_cosine(*gradients))}


def loss_gradient(model: Model, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of each sample's cross entropy by its inputs, for models with data-dependent exits, too."""
    leaf = inputs.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    return gradient


def _under_corruption(student: Model, data: DataSet, inputs: Tensor, labels: Tensor) -> dict[str, list[float]]:
    scale, _ = _range(data)
    generator = torch.Generator().manual_seed(SEED)
    is_image = len(data.input_shape) > 1
    with torch.no_grad():
        return {
            name: [accuracy(student(x), labels) for x in corrupted(name, inputs, scale, generator)]
            for name, (_, _, needs_image) in CORRUPTIONS.items()
            if is_image or not needs_image
        }


@torch.no_grad()
def _transfer(student: CompactStudent, teacher: ChainStudent, data: DataSet, other: DataSet) -> dict[str, Any]:
    """Return test accuracies of linear classifiers on another data set: of the student's features and others'."""
    if other.inputs[0].numel() != data.inputs[0].numel():
        raise UserError(
            f"transfer: got {other.name}, inputs of {other.inputs[0].numel()} values; the student takes "
            f"{data.inputs[0].numel()}; give a data set of the same input shape"
        )
    features: dict[str, Callable[[Tensor], Tensor]] = {
        "student": lambda x: student_features(student, x),
        "teacher": lambda x: teacher(x, teacher.full_masks()).features[-1].flatten(1),
        "inputs": lambda x: x.flatten(1),
    }
    reached: dict[str, Any] = {"data": other.name}
    for name, of in features.items():
        parts = [(of(other.inputs[rows]), other.labels[rows]) for rows in (other.splits["train"], other.splits["test"])]
        reached[name] = probe_accuracy(*parts)
    return reached


def student_features(student: CompactStudent, inputs: Tensor) -> Tensor:
    """Return [B, U], what the last block gives, for inputs [B, *any]; no sample leaves early."""
    x = inputs.reshape(len(inputs), *student.input_shape)
    if student.kept_inputs is not None:
        x = x.index_select(1, student.kept_inputs)
    for layer in student.layers:
        x = F.relu(layer(x))
    return x.flatten(1)


def draw(metrics: dict[str, Any], path: Path) -> None:
    """Draw accuracy by class and under corruptions into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_class, under = figure.subplots(1, 2)
    values = [a if a is not None else 0.0 for a in metrics["accuracy_by_class"]]
    by_class.bar(range(len(values)), values)
    by_class.axhline(metrics["accuracy"], linestyle="--", linewidth=1, label="student")
    by_class.axhline(metrics["teacher_accuracy"], linestyle=":", linewidth=1, label="teacher")
    by_class.set(xlabel="class", ylabel="test accuracy", ylim=(0, 1.02))
    by_class.legend()
    for name, accuracies in metrics.get("corruptions", {}).items():
        under.plot(range(len(accuracies) + 1), [metrics["accuracy"], *accuracies], marker="o", label=name)
    for name in {"fgsm_accuracy", "pgd10_accuracy"} & set(metrics):
        under.axhline(metrics[name], linestyle=":", linewidth=1)
        under.annotate(name.partition("_")[0], (0, metrics[name]))
    under.set(xlabel="strength of the corruption", ylabel="test accuracy", ylim=(0, 1.02))
    if metrics.get("corruptions"):
        under.legend()
    figure.savefig(path, dpi=120)
