"""Peak memory of a whole-vocabulary divergence, block by block and from whole logits, each in a process of its own.

    python experiments/chunked_memory.py --out docs/results/chunked_memory

One and eight sequences of 256 positions, a vocabulary of 49,152, width 576 (SmolLM2-135M): forward and backward. Memory is the
greatest resident size of the process less its size before the loss, after a small problem has loaded the libraries' code.
It holds the gradients that the loss returns. With a frozen head these are gradients of hidden states alone.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.io.files import write_whole
from rlkd.io.records import write_json
from rlkd.losses.chunked import BLOCK, Head, chunked_divergence
from rlkd.losses.response import response

POSITIONS, VOCABULARY, WIDTH = (256, 2048), 49_152, 576
FORMS = ("term", "kl_div", "chunked")
BAR = 0.35


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def loss_of(form: str, student: Head, teacher: Head) -> Tensor:
    """KL(teacher || student), mean over positions."""
    if form == "chunked":
        return chunked_divergence(student, teacher)
    if form == "term":
        return response(student.hidden @ student.weight.T, teacher.hidden @ teacher.weight.T, 1.0)
    answers = (teacher.hidden @ teacher.weight.T).log_softmax(-1)
    return F.kl_div(
        (student.hidden @ student.weight.T).log_softmax(-1), answers, reduction="batchmean", log_target=True
    )


def measure(form: str, positions: int, vocabulary: int, frozen: bool) -> dict[str, Any]:
    """Loss, gradients, seconds, and the peak above the memory before, of one form in this process."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(*shape, generator=g) * (2 / WIDTH**0.5) ** 0.5  # logits with a standard deviation of 2
        for shape in ((positions, WIDTH), (vocabulary, WIDTH), (positions, WIDTH), (vocabulary, WIDTH))
    )
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    before, peak, done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident_bytes())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    loss = loss_of(form, Head(hidden, weight), Head(teacher_hidden, teacher_weight))
    loss.backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    gradients = [t.grad.flatten()[:2000].tolist() for t in (hidden, weight) if t.grad is not None]
    return {"peak_bytes": peak[0] - before, "seconds": seconds, "gradients": gradients}


def compared(positions: int, frozen: bool) -> dict[str, Any]:
    """Measure all forms, each in a process of its own."""
    rows = {}
    for form in FORMS:
        command = [
            sys.executable,
            __file__,
            "--form",
            form,
            "--positions",
            str(positions),
            *(["--frozen"] if frozen else []),
        ]
        rows[form] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    pairs = zip(rows["term"]["gradients"], rows["chunked"]["gradients"], strict=True)
    return {
        "positions": positions,
        "head": "frozen" if frozen else "trained",
        "peak_bytes": {form: row["peak_bytes"] for form, row in rows.items()},
        "seconds": {form: row["seconds"] for form, row in rows.items()},
        "share": {form: rows["chunked"]["peak_bytes"] / rows[form]["peak_bytes"] for form in FORMS[:2]},
        "gradient_bytes": (positions + (0 if frozen else VOCABULARY)) * WIDTH * 4,
        "largest_gradient_difference": max(
            abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True)
        ),
        "largest_gradient": max(abs(a) for first in rows["term"]["gradients"] for a in first),
    }


def page(rows: list[dict[str, Any]], command: str, date: str) -> str:
    """The page of results."""
    lines = [
        "# Memory of a whole-vocabulary divergence",
        "",
        f"Command: `{command}`, {date}. Vocabulary {VOCABULARY:,}, width {WIDTH}, float32, one thread; forward and backward.",
        "*Term* is rlkd's own loss term `kl` on whole logits, *kl_div* the leanest plain form (`F.kl_div` on two `log_softmax`), *blocks*",
        f"`rlkd.losses.chunked`, {BLOCK} tokens of the vocabulary at a time. Peaks hold the gradients that every form returns.",
        "",
        "| positions | head | term | kl_div | blocks | of these: gradients | share of term | share of kl_div | largest difference of gradients | relative to the largest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mib = {form: f"{row['peak_bytes'][form] / 2**20:.0f} MiB, {row['seconds'][form]:.1f} s" for form in FORMS}
        lines.append(
            f"| {row['positions']:,} | {row['head']} | {mib['term']} | {mib['kl_div']} | {mib['chunked']} | "
            f"{row['gradient_bytes'] / 2**20:.0f} MiB | {row['share']['term']:.0%} | {row['share']['kl_div']:.0%} | "
            f"{row['largest_gradient_difference']:.1e} | {row['largest_gradient_difference'] / row['largest_gradient']:.1e} |"
        )
    first = rows[0]
    least = first["gradient_bytes"] / first["peak_bytes"]["kl_div"]
    reached = {form: "reached" if first["share"][form] <= BAR else "not reached" for form in FORMS[:2]}
    lines += [
        "",
        f"The bar at {first['positions']} positions with a trained head, at most {BAR:.0%}: {reached['term']} beside rlkd's term "
        f"({first['share']['term']:.1%}), {reached['kl_div']} beside `F.kl_div` ({first['share']['kl_div']:.1%}). The gradients alone are "
        f"{least:.0%} of the latter's peak, so no form that trains the head can reach the bar there.",
        "Seconds are from one run each on a shared machine.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS, default=None, help="measure this form alone, as JSON")
    parser.add_argument("--positions", type=int, default=POSITIONS[0])
    parser.add_argument("--frozen", action="store_true", help="measure --form with a head that is not trained")
    parser.add_argument("--out", type=Path, default=None, help="path without .md and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.form is not None:
        measure(options.form, 32, 512, options.frozen)  # loads the code of the libraries
        print(json.dumps(measure(options.form, options.positions, VOCABULARY, options.frozen)))
        return 0
    rows = [compared(positions, frozen) for positions in POSITIONS for frozen in (False, True)]
    command, date = shlex.join(["python", *sys.argv]), time.strftime("%Y-%m-%d")
    text = page(rows, command, date)
    print(text)
    if options.out is not None:
        write_whole(options.out.with_suffix(".md"), text)
        write_json(options.out.with_suffix(".json"), {"command": command, "date": date, "block": BLOCK, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
