"""`rlkd measure`."""

import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rlkd.cli.arguments import new_parser, parse
from rlkd.cli.verify import config_of_run
from rlkd.errors import UserError
from rlkd.export import need_onnx
from rlkd.hardware import hardware_names, load_hardware
from rlkd.io.records import write_json
from rlkd.runs.folder import use_one_thread
from rlkd.runs.shipped import ShippedData, open_shipped

MAX_BATCH = 65_536
TABLE_WIDTH = 150
SEEN_BYTES = 1e5  # of peak memory; what is below may come from pages that the process already has
AGAINST = "against"  # beginning of the names of the other student's forms


def run(argv: list[str]) -> int:
    """Measure one student and print the table."""
    need_onnx()
    from rlkd.runs.measure import measure_student, open_against

    parser = new_parser(
        "measure",
        "Measure a shipped student on this machine, in PyTorch and in onnxruntime: latency, throughput, memory, size, "
        "work and energy. What is compared is timed in turns.",
        [
            "runs/mine",
            "runs/mine --against teacher --batch_sizes [1,32]",
            "runs/mine --against runs/other --hardware edge --out measured.json",
        ],
    )
    parser.add_argument("student", type=Path, help="run folder of rlkd distil, or the folder of a student")
    text = "teacher (that of the run), the folder of another student, or of a model of transformers"
    parser.add_argument("--against", type=str | None, default=None, help=text)
    text = f"the target, for batches and threads: {', '.join(hardware_names())}, or a YAML file"
    parser.add_argument("--hardware", type=str, default="cpu", help=text)
    text = "samples that one call answers; by default those of the target"
    parser.add_argument("--batch_sizes", type=tuple[int, ...] | None, default=None, help=text)
    text = "data set or path of data; by default that of the run"
    parser.add_argument("--data", type=str | None, default=None, help=text)
    parser.add_argument("--out", type=Path | None, default=None, help="also write the figures as JSON")
    _, options = parse(parser, argv)
    hardware = load_hardware(options.hardware)
    sizes = hardware.batch_sizes if options.batch_sizes is None else options.batch_sizes
    if not sizes or not all(1 <= size <= MAX_BATCH for size in sizes):
        raise UserError(f"--batch_sizes: got {list(sizes)}; allowed: 1 to {MAX_BATCH}")
    if hardware.device == "gpu" and not torch.cuda.is_available():
        raise UserError(f"--hardware: got {hardware.name}, a gpu, and torch finds none here; allowed: a cpu")
    use_one_thread()

    def reload() -> ShippedData:
        return open_shipped(Path(options.student), config_of_run, options.data)

    opened, against = reload(), None
    if options.against is not None and _is_student(Path(options.against)):
        against = open_shipped(Path(options.against), config_of_run, options.data)
        if against.data_name != opened.data_name:
            raise UserError(f"--against: answers {against.data_name}, the student {opened.data_name}; give --data")
    elif options.against is not None:
        against = open_against(options.against, opened, config_of_run, options.data)
    result = measure_student(opened, reload, against, hardware=hardware, batch_sizes=tuple(sizes))
    for table in tables(result):
        Console(width=max(Console().width, TABLE_WIDTH)).print(table)
    if options.out is not None:
        write_json(options.out, result)
        print(f"figures: {options.out}")
    return 0


def _is_student(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("student.json", "student/student.json"))


def tables(result: dict[str, Any]) -> list[Table]:
    """Return what was measured: one table of the forms, and one of the calls."""
    forms = Table(title=f"forms on {result['data']}", title_justify="left")
    for column in ("form", "parameters", "MACs", "file", "peak memory", "test accuracy"):
        forms.add_column(column, justify="left" if column == "form" else "right", no_wrap=True)
    others = [row for row in result["forms"] if row["form"].startswith(AGAINST)]
    reference = (others or result["forms"])[0]  # of the speed-ups
    kinds = {at["energy_kind"] for row in result["forms"] for at in row["batches"].values()}
    calls = Table(
        title=f"calls on {result['threads']} thread(s), timed in turns (median, interquartile range, 95th percentile)\n"
        f"speed-up over: {reference['form']}; energy: {', '.join(sorted(kinds))}",
        title_justify="left",
    )
    names = ("form", "batch", "median", "IQR", "p95", "samples/s", "speed-up", "J/sample", "accuracy/J")
    for column in names:
        calls.add_column(column, justify="left" if column == "form" else "right", no_wrap=True)
    for row in result["forms"]:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
        peak = row["peak_memory_bytes"]
        memory = f"below {shown(SEEN_BYTES, 'B')}" if peak is not None and peak < SEEN_BYTES else shown(peak, "B")
        sizes = [shown(row["file_bytes"], "B"), memory]
        forms.add_row(row["form"], shown(row["parameters"]), shown(row["macs"]), *sizes, accuracy)
        for size, at in row["batches"].items():
            calls.add_row(
                row["form"],
                size,
                *(shown(at[name], "s") for name in ("latency_s", "spread_s", "p95_s")),
                shown(at["throughput_per_s"]),
                f"{reference['batches'][size]['latency_s'] / at['latency_s']:.2f}",
                shown(at["energy_j"], "J"),
                shown(at["accuracy_per_joule"]),
            )
    return [forms, calls]


def shown(value: float | None, unit: str = "") -> str:
    """Return a number with three digits and a prefix of its unit: 12.3 us, 4.50 MB."""
    if value is None:
        return "-"
    steps = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"), (1e-12, "p"))
    for scale, prefix in steps:
        if value >= scale * (1 - 5e-4):
            digits = max(0, 2 - math.floor(math.log10(value / scale) + 5e-4))
            return f"{value / scale:.{digits}f} {prefix}{unit}".strip()
    return f"{value:.2g} {unit}".strip()
