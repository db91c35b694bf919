"""Metrics of a real student beside its teacher, on test data (`rlkd evaluate --teacher`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkd.compression.real.student_folder import load_module_student
from rlkd.configs.knowledge import RealEvaluateConfig
from rlkd.data.examples import Examples
from rlkd.errors import UserError
from rlkd.io.files import read_json
from rlkd.losses import gradient_cosine
from rlkd.metrics import fgsm, pgd
from rlkd.metrics.transfer import flops_per_sample
from rlkd.models.real.attachment import AttachConfig
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.sides import Sources, load_teacher
from rlkd.runs.evaluate import MAX_ATTACKED, accuracy, answer_metrics, loss_gradient
from rlkd.runs.shipped import examples_of

PIXELS = "pixel_values"
Answer = Callable[[dict[str, Tensor]], Tensor]  # inputs by name to logits [B, C]


def evaluate_real(folder: Path, config: RealEvaluateConfig) -> dict[str, Any]:
    """Compute the metrics of a real student on the test split; texts have none of attacks and input gradients.

    Args:
        folder: of `rlkd distil`, with student.json.
        config: checked here.

    Raises:
        UserError: a language model, or a student whose classes are not the teacher's.
    """
    config.check()
    student = load_module_student(folder).eval()
    kind = student.shipment.kind
    if kind == "causal_lm":
        raise UserError(f"{folder}: a language model; allowed: classifiers (rlkd distil reports its perplexity)")
    card = read_json(folder / "student.json", "a real student's card")
    data = examples_of(student, folder / "model", config.columns, Path(config.data), card)
    sources = Sources(config.teacher, "", config.data, config.columns, StudentCut(), AttachConfig(), None, False)
    other = load_teacher(sources, kind)
    if data.num_classes != other.data.num_classes or not torch.equal(data.labels, other.data.labels):
        raise UserError(
            f"teacher: {config.teacher} has {other.data.num_classes} classes, in its order; the student has "
            f"{data.num_classes} of its own; give the teacher that it was distilled from"
        )
    index = data.splits["test"]
    labels = data.labels[index]

    def student_answers(inputs: dict[str, Tensor]) -> Tensor:
        answers: Tensor = student(**inputs)
        return answers

    def teacher_answers(inputs: dict[str, Tensor]) -> Tensor:
        return logits_of(forward(other.model, inputs)).float()

    other.model.eval()
    logits = _answers(student_answers, data, index, config.batch_size)
    taught = _answers(teacher_answers, other.data, index, config.batch_size)
    metrics: dict[str, Any] = {
        "data": data.name,
        "num_samples": len(index),
        **answer_metrics(logits, taught, labels, data.labels[data.splits["train"]]),
    }
    few = data.batch(index[: config.batch_size])
    metrics["flops_per_sample"] = flops_per_sample(lambda _: student_answers(few), labels[: config.batch_size])
    metrics["flops_per_accuracy"] = metrics["flops_per_sample"] / max(metrics["accuracy"], 1e-9)
    if PIXELS in data.inputs:
        metrics |= _under_attack(student_answers, teacher_answers, data, index[:MAX_ATTACKED], config.epsilon)
    return metrics


@torch.no_grad()
def _answers(model: Answer, data: Examples, index: Tensor, batch_size: int) -> Tensor:
    """Return logits [B, C] for the samples at `index` [B]."""
    return torch.cat([model(data.batch(rows)) for rows in torch.split(index, batch_size)])


def _under_attack(student: Answer, teacher: Answer, data: Examples, index: Tensor, epsilon: float) -> dict[str, float]:
    """Return accuracies under FGSM and PGD-10, and the cosine of the input gradients, for images of one size."""
    pixels, labels = data.inputs[PIXELS][index], data.labels[index]
    size = epsilon * float(data.inputs[PIXELS][data.splits["train"]].std())

    def answers(x: Tensor) -> Tensor:
        return student({PIXELS: x})

    moved = {
        "fgsm_accuracy": fgsm(answers, pixels, labels, epsilon=size),
        "pgd10_accuracy": pgd(answers, pixels, labels, size),
    }
    with torch.no_grad():
        reached = {name: accuracy(answers(x), labels) for name, x in moved.items()}
    gradients = [loss_gradient(model, pixels, labels) for model in (answers, lambda x: teacher({PIXELS: x}))]
    return {**reached, "gradient_cosine": float(gradient_cosine(*gradients))}
