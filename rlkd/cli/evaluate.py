"""`rlkd evaluate`."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlkd.cli.arguments import new_parser, parse
from rlkd.compression import load_student
from rlkd.configs.knowledge import EvaluateConfig, RealEvaluateConfig
from rlkd.errors import UserError
from rlkd.io.records import write_json
from rlkd.runs.evaluate import draw, evaluate_student
from rlkd.runs.folder import use_one_thread


def run(argv: list[str]) -> int:
    """Evaluate a student on test data and print its metrics."""
    parser = new_parser(
        "evaluate",
        "Evaluate a distilled student beside its teacher on test data: accuracy, agreement, calibration, gradients, "
        "attacks, corruptions, classes, work.",
        [
            "runs/mine --data digits",
            "runs/mine/student --transfer fashion_mnist_8x8 --out evaluation",
            "runs/reviews/student --data reviews.csv --teacher models/bert",
        ],
    )
    parser.add_argument("student", type=Path, help="run folder of rlkd distil, or the folder of a student")
    parser.add_argument("--out", type=Path | None, default=None, help="folder for evaluation.json and evaluation.png")
    metrics: dict[str, Any]
    use_one_thread()
    if any(_is_real(_inner(Path(given))) for given in argv if not given.startswith("-")):
        from rlkd.runs.evaluate_real import evaluate_real  # the extra hf

        real, options = parse(parser, argv, RealEvaluateConfig)
        assert real is not None
        metrics = evaluate_real(_inner(options.student), real)
    else:
        config, options = parse(parser, argv, EvaluateConfig)
        assert config is not None
        config.check()
        folder = _inner(options.student)
        if not (folder / "student.json").exists():
            raise UserError(f"{folder}: holds no student.json and no student/student.json; give a run of `rlkd distil`")
        metrics = evaluate_student(load_student(folder), config)
    table = Table(title=f"{options.student} on {metrics['num_samples']} test samples of {metrics['data']}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        if name not in ("data", "num_samples"):
            table.add_row(name, _text(value))
    Console(width=None if Console().is_terminal else 120).print(table)
    if options.out:
        write_json(options.out / "evaluation.json", metrics)
        draw(metrics, options.out / "evaluation.png")
    return 0


def _inner(given: Path) -> Path:
    """Return the folder `student` of a run, or the folder itself."""
    return given if (given / "student.json").exists() or not (given / "student").is_dir() else given / "student"


def _is_real(folder: Path) -> bool:
    """Whether the folder holds a student that is a transformers model."""
    return (folder / "student.json").is_file() and (folder / "model").is_dir()


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return " ".join(_text(part) for part in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return "-" if value is None else str(value)
