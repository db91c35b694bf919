"""Peak memory of a whole-vocabulary divergence, chunk by chunk and plain, each in a process of its own.

    python experiments/chunked_memory.py --out docs/results/chunked_memory

One and eight sequences of 256 positions, a vocabulary of 49,152, width 576 (SmolLM2-135M): forward and backward. Memory is the
greatest resident size of the process less its size before the loss, so it holds the gradients of the head, too.
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

from rlkd.io.files import write_whole
from rlkd.io.records import write_json
from rlkd.losses.chunked import chunked_divergence

POSITIONS, VOCABULARY, WIDTH = (256, 2048), 49_152, 576
CHUNK = 16


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(form: str, positions: int) -> dict[str, Any]:
    """Loss, gradient sums, and the peak above the memory before, of one form in this process."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(*shape, generator=g) / WIDTH**0.5
        for shape in ((positions, WIDTH), (VOCABULARY, WIDTH), (positions, WIDTH), (VOCABULARY, WIDTH))
    )
    hidden.requires_grad_()
    head.requires_grad_()
    before, peak, done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident_bytes())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    if form == "chunked":
        loss = chunked_divergence(hidden, head, teacher_hidden, teacher_head, chunk_size=CHUNK)
    else:
        answers = (teacher_hidden @ teacher_head.T).log_softmax(-1)
        logits = (hidden @ head.T).log_softmax(-1)
        loss = F.kl_div(logits, answers, reduction="batchmean", log_target=True)
    loss.backward()  # type: ignore[no-untyped-call]
    done.set()
    thread.join()
    assert hidden.grad is not None
    assert head.grad is not None
    return {
        "loss": float(loss.detach()),
        "peak_bytes": peak[0] - before,
        "hidden_gradient": hidden.grad.flatten()[:2000].tolist(),
        "head_gradient": head.grad.flatten()[:2000].tolist(),
    }


def compared(positions: int) -> dict[str, Any]:
    """Measure both forms, each in a process of its own."""
    rows = {}
    for form in ("plain", "chunked"):
        command = [sys.executable, __file__, "--form", form, "--positions", str(positions)]
        rows[form] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    differences = [
        max(abs(a - b) for a, b in zip(rows["plain"][key], rows["chunked"][key], strict=True))
        for key in ("hidden_gradient", "head_gradient")
    ]
    peaks = {form: row["peak_bytes"] for form, row in rows.items()}
    return {
        "positions": positions,
        "peak_bytes": peaks,
        "share": peaks["chunked"] / peaks["plain"],
        "gradient_bytes": (VOCABULARY + positions) * WIDTH * 4,
        "largest_gradient_difference": max(differences),
    }


def main() -> int:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=("chunked", "plain"), default=None, help="measure this form alone, as JSON")
    parser.add_argument("--positions", type=int, default=POSITIONS[0])
    parser.add_argument("--out", type=Path, default=None, help="path without .md and .json")
    options = parser.parse_args()
    if options.form is not None:
        print(json.dumps(measure(options.form, options.positions)))
        return 0
    rows = [compared(positions) for positions in POSITIONS]
    command, date = shlex.join(["python", *sys.argv]), time.strftime("%Y-%m-%d")
    lines = [
        "# Memory of a whole-vocabulary divergence",
        "",
        f"Command: `{command}`, {date}. Vocabulary {VOCABULARY:,}, width {WIDTH}, float32, one thread; forward and backward. ",
        f"Chunks of {CHUNK} positions. Both forms return gradients of the head and the hidden states, which are part of the peak.",
        "",
        "| positions | plain | chunked | share | of both: the gradients | largest difference of gradients (2,000 entries each) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain, chunked = (row["peak_bytes"][form] / 2**20 for form in ("plain", "chunked"))
        lines.append(
            f"| {row['positions']:,} | {plain:.0f} MiB | {chunked:.0f} MiB | {row['share']:.0%} | "
            f"{row['gradient_bytes'] / 2**20:.0f} MiB | {row['largest_gradient_difference']:.1e} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        write_whole(options.out.with_suffix(".md"), text)
        write_json(
            options.out.with_suffix(".json"), {"command": command, "date": date, "chunk_size": CHUNK, "rows": rows}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
