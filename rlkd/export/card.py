"""The model card that stands beside an exported student."""

from collections.abc import Mapping, Sequence
from typing import Any

FIGURES = {
    "accuracy": "accuracy on test data",
    "validation_accuracy": "accuracy on validation data",
    "teacher_accuracy": "the teacher's accuracy on test data",
    "perplexity": "perplexity on test data",
    "parameters": "parameters",
    "macs": "multiply-accumulates of a sample",
    "macs_ratio": "MACs, of the dense student's",
    "latency_ratio": "predicted latency, of the dense student's",
    "size_ratio": "parameters, of the dense student's",
    "exit_rates": "share of samples that leave at each exit",
    "goal_met": "goal met",
}


def model_card(
    *,
    title: str,
    data_name: str,
    card: Mapping[str, Any],
    files: Mapping[str, str],
    inputs: Sequence[str],
    notes: Sequence[str],
    usage: str,
) -> str:
    """Return README.md of an exported student.

    Args:
        title: what the student is.
        data_name: data that the figures belong to.
        card: the student's; its `figures` are of the run that made it.
        files: what each exported file is, by name.
        inputs: a line for each input and output.
        notes: what was found at the export, a line each.
        usage: Python that answers a sample.
    """
    given = card.get("figures")
    figures: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    rows = [f"| {what} | {_shown(figures[name])} |" for name, what in FIGURES.items() if name in figures]
    table = ["| figure | value |", "|---|---|", *rows] if rows else ["The run recorded no figures."]
    return "\n".join(
        [
            f"# {title}",
            "",
            f"A student that rlkd distilled on {data_name}. The figures below are of the run that made it.",
            "",
            *table,
            "",
            "## Files",
            "",
            *(f"- `{name}`: {what}" for name, what in files.items()),
            "",
            "## Inputs and outputs",
            "",
            *(f"- {line}" for line in inputs),
            "",
            "## Checked at the export",
            "",
            *(f"- {line}" for line in notes),
            "",
            "## Use",
            "",
            "```python",
            usage.rstrip(),
            "```",
            "",
        ]
    )


def scale_line(scale: Any) -> str:
    """Return in words how raw inputs become what the student takes."""
    if isinstance(scale, str):
        return f"Inputs are {scale}."
    if not isinstance(scale, Mapping):
        return "Inputs are scaled as in the training."
    limit = scale.get("limit")
    bound = f", then bounded to +-{limit:g}" if isinstance(limit, int | float) else ""
    offset, divisor = (_short(scale.get(name)) for name in ("offset", "divisor"))
    return f"Inputs are (raw - offset) / divisor{bound}, with offset {offset} and divisor {divisor}."


def _short(values: Any) -> str:
    if isinstance(values, list | tuple) and len(values) == 1:
        return f"{values[0]:g}"
    return f"of each input as `input_scale` in student.json has it ({len(values)} numbers)" if values else "unknown"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)
