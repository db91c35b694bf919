"""`rlkd calibrate`."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlkd.cli.arguments import new_parser, parse
from rlkd.cost import calibrate, save_profile
from rlkd.cost.profile import MAX_BATCH
from rlkd.cost.workload import REGRESSORS
from rlkd.data import load_dataset
from rlkd.errors import UserError
from rlkd.models import StudentConfig, build_student
from rlkd.runs.folder import use_one_thread


@dataclass(frozen=True)
class CalibrateConfig:
    """Which student to time."""

    dataset: str = "digits"
    """Gives the inputs' shape and the number of classes."""
    student: StudentConfig = field(default_factory=StudentConfig)
    batch_size: int = 1024
    """Samples that one inference answers together."""


def run(argv: list[str]) -> int:
    """Time, fit, write, and show the fit."""
    parser = new_parser(
        "calibrate",
        "Time physically smaller students over keep ratios and exit rates on one thread; write a cost profile.",
        ["--out profile.json", "--student.widths [96,64] --batch_size 64 --out p64.json"],
    )
    parser.add_argument("--out", type=Path, default=Path("cost_profile.json"), help="file to write")
    config, options = parse(parser, argv, CalibrateConfig)
    assert config is not None
    if not 1 <= config.batch_size <= MAX_BATCH:
        raise UserError(f"batch_size: got {config.batch_size}; allowed: 1 to {MAX_BATCH}")
    use_one_thread()
    data = load_dataset(config.dataset)
    profile = calibrate(build_student(config.student, data.input_shape, data.num_classes), config.batch_size)
    save_profile(profile, options.out)
    table = Table(title=f"latency of a batch of {config.batch_size}, one thread, microseconds", title_justify="left")
    for column in ("inputs kept", "units kept", "exit rate", "measured", "spread (IQR)", "fitted"):
        table.add_column(column, justify="right", overflow="fold")
    for row in profile.provenance["grid"]:
        times = (f"{row[key] * 1e6:.1f}" for key in ("latency_s", "spread_s", "fitted_s"))
        table.add_row(*(f"{row[key]:.2f}" for key in ("feature_keep", "unit_keep", "exit_rate")), *times)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    residual = profile.provenance["relative_residual"]
    console.print(
        f"relative residual {residual:.1%}; "
        + ", ".join(f"{name} {value:.3g}" for name, value in zip(REGRESSORS, profile.coefficients, strict=True)),
        highlight=False,
    )
    console.print(f"written to {options.out}; use it with --cost.profile {options.out}", highlight=False)
    return 0
