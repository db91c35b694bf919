"""A policy learned on tiny students against fixed weights and fine-tuning, on a vision transformer and Fashion-MNIST.

    sh experiments/fetch_data.sh data && python experiments/fashion.py --data data/fashion-mnist --policy P --out runs/fashion

A ViT (6 layers of width 128, 17 tokens) is trained once as the teacher, on the train split, by labels alone. Then every
method trains the same student, 3 layers cut from the teacher, for the same number of steps, from the same weights on the
same batches, once a seed: see real_study.py for the methods, for stopping and going on, and for the tables.
"""

import argparse
import json
import sys
import time
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
from rlkd.models.real.pretrained import new_model, quiet, transformers
from rlkd.runs.folder import use_one_thread
from rlkd.students.optimizers import new_optimizer, schedule
from rlkd.students.real.module import ModuleTrainConfig

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
COLUMNS = ColumnConfig(classes=list(CLASSES))  # what the labels 0 to 9 of the files mean
RATE, BATCH = 1e-3, 64


def train_teacher(data_folder: Path, folder: Path, num_steps: int) -> dict[str, Any]:
    """A ViT from fresh weights, trained on the train split alone; kept in `folder`."""
    if (folder / "teacher.json").exists():
        return dict(json.loads((folder / "teacher.json").read_text()))
    began = time.perf_counter()
    data = make_examples(read_table(data_folder, COLUMNS), None, CLASSES, COLUMNS)
    config = transformers().ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
        architectures=["ViTForImageClassification"],
    )
    model: Any = new_model(config, "image_classification", seed=0)
    optimizer = new_optimizer(model, "adamw", RATE, 0.05)
    generator = torch.Generator().manual_seed(0)
    train = data.splits["train"]
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * schedule(step, num_steps, 0.06, 0.0)
        rows = train[torch.randint(len(train), (BATCH,), generator=generator)]
        loss = F.cross_entropy(logits_of(model.train()(**data.batch(rows))), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        parts = [
            (logits_of(model(**data.batch(rows))).argmax(-1) == data.labels[rows]).float()
            for rows in torch.split(data.splits["test"], 256)
        ]
    with quiet():
        model.save_pretrained(folder)
    card = {"num_steps": num_steps, "accuracy": float(torch.cat(parts).mean()), "wall_s": time.perf_counter() - began}
    write_json(folder / "teacher.json", card)
    return card


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real_study.add_options(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--teacher_steps", type=int, default=3000, help="of 64 images: nearly four epochs")
    parser.add_argument("--steps_per_window", type=int, default=40)
    options = parser.parse_args()
    use_one_thread()
    teacher_folder = options.out / f"teacher-{options.teacher_steps}"
    teacher = train_teacher(options.data, teacher_folder, options.teacher_steps)
    print(f"teacher: {teacher}", flush=True)
    config = RealConfig(
        teacher=str(teacher_folder),
        data=str(options.data),
        columns=COLUMNS,
        cut=StudentCut(layers=options.layers),
        train=ModuleTrainConfig(
            steps_per_window=options.steps_per_window,
            validation_size=512,
            rate_exponent=options.rate_exponent,
            batch_size=BATCH,
            learning_rate=RATE,
            evaluation_batch_size=256,
        ),
        cost=RealCostConfig(batch_size=32),
    )
    rows = real_study.rows_of(config, options)
    if options.docs is not None:
        about = (
            f"Student: {options.layers} of the teacher's 6 layers (test accuracy {teacher['accuracy']:.3f}), "
            f"{12 * options.steps_per_window} steps of {BATCH} images."
        )
        real_study.write_tables("A vision transformer on Fashion-MNIST", about, rows, teacher, options.docs)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"fashion: {error}", file=sys.stderr)
        sys.exit(2)
