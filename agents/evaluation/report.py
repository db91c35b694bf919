"""Read runs back from their TensorBoard event files and results, and write their report: figures and one HTML page."""

import io
import time
import warnings
from pathlib import Path
from typing import Any

from rlkd.agents.evaluation.events import read_scalars
from rlkd.agents.evaluation.figures import accuracy_cost, controls, controls_over_windows, points_of, reward_curves
from rlkd.agents.evaluation.recorded_run import Run
from rlkd.agents.evaluation.report_page import page, section
from rlkd.errors import UserError
from rlkd.io.files import MAX_JSON_BYTES, inside, parse_json, read_bytes, read_json, reason, write_whole

MAX_EVENT_FILES = 64


def read_run(folder: Path | str) -> Run:
    """Read one run folder.

    Raises:
        UserError: no such folder, no event file in it, or a file that cannot be read.
    """
    folder = Path(folder)
    events = folder / "tensorboard"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    files = sorted(events.glob("*tfevents*")) if events.is_dir() else []
    if not files:
        raise UserError(f"{events}: holds no TensorBoard event file; give the folder of a train, distil or compare run")
    if len(files) > MAX_EVENT_FILES:
        raise UserError(f"{events}: holds {len(files)} event files; allowed: at most {MAX_EVENT_FILES}")
    scalars, notes = read_scalars([inside(folder, f"tensorboard/{file.name}") for file in files])
    if notes and not scalars:
        raise UserError(f"{notes[0]}; give the folder of another run")
    result = None
    if (folder / "result.json").exists():
        result = read_json(inside(folder, "result.json"), "a run's result")
    names = ("command.txt", "versions.json", "config.yaml")
    texts = {
        name: read_bytes(inside(folder, name), MAX_JSON_BYTES).decode(errors="replace")
        for name in names
        if (folder / name).exists()
    }
    date = time.strftime("%Y-%m-%d", time.localtime(max(file.stat().st_mtime for file in files)))
    run = Run(folder, scalars, result, texts, tuple(notes), _read_windows(folder), date)
    try:
        section(run), points_of(run), controls_over_windows([run])  # all that the report takes is there, of its kind
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{folder / 'result.json'}: not a run's result, or a damaged one ({reason(error):.100})"
        ) from error
    return run


def _read_windows(folder: Path) -> tuple[dict[str, Any], ...]:
    """Return the rows of the windows of a run's one student; empty where there are none."""
    for name in ("windows.jsonl", "metrics.jsonl"):
        if (folder / name).exists():
            text = read_bytes(inside(folder, name), MAX_JSON_BYTES).decode(errors="replace")
            lines = [line for line in text.splitlines() if line.strip()]
            rows = [parse_json(line.encode(), f"{folder / name}: line {i}") for i, line in enumerate(lines[:-1], 1)]
            if lines and text.endswith("\n"):  # the last line of a run that was killed may be torn
                rows.append(parse_json(lines[-1].encode(), f"{folder / name}: line {len(lines)}"))
            if all("window" in row and "temperature" in row for row in rows):
                return tuple(rows)
    return ()


def write_report(runs: list[Run], out: Path) -> list[Path]:
    """Write the figures that the runs have data for, and `report.html`; returns their paths."""
    figures = {
        "reward_curves": reward_curves(runs),
        "controls": controls(runs),
        "controls_over_windows": controls_over_windows(runs),
        "accuracy_cost": accuracy_cost(runs),
    }
    images = {}
    for name, figure in figures.items():
        if not any(axis.has_data() for axis in figure.axes):
            continue
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a run's name may be in any script
            figure.savefig(buffer, format="png", dpi=150)
        images[name] = buffer.getvalue()
        write_whole(out / f"{name}.png", images[name])
    write_whole(out / "report.html", page(runs, images))
    return [*(out / f"{name}.png" for name in images), out / "report.html"]
