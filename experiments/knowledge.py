"""Every kind of knowledge on digits and Fashion-MNIST 8x8: what each loss term brings beside the hard label.

    python experiments/knowledge.py --out docs/results/knowledge

A tiny student (two blocks of 16 units, one early exit) learns from 200 labelled samples and a teacher's signals of the
same samples. The learning rate is the one of six that is best for training from scratch, which favours scratch; every
method then has three weights beside the hard label, 0.3, 1 and 3 times the published one, and six seeds. A seed has the
same samples, first weights and batches under every method (mutual learning alone draws batches of its own). The weight
is chosen by mean validation accuracy, and so is, for each student, the epoch of the second result. What was finished is
kept in --state, and a run that was stopped goes on from there.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call, vmap

from rlkd.agents.policy.bundled import find_policy
from rlkd.agents.policy.controllers import run
from rlkd.data import DataSet, Range, TaskDistribution, draw_task, load_dataset
from rlkd.envs.references import References
from rlkd.envs.scenario import EnvConfig, build_scenario
from rlkd.losses import DEFAULT_TERMS, PUBLISHED, TERMS, LossConfig, cross_entropy, mutual
from rlkd.models import ChainStudent, StudentConfig, build_student
from rlkd.runs.folder import use_one_thread
from rlkd.students import Controls, Population, TrainConfig
from rlkd.students.adapted import OFFERED
from rlkd.teachers import Signals, TeacherConfig, compute_signals, load_teachers
from rlkd.teachers.data_free import DataFreeConfig, Generator, distil_without_data
from rlkd.teachers.signals import EXTRA

DATASETS = ("digits", "fashion_mnist_8x8")
STUDENT = StudentConfig(widths=(16, 16), exits=(1,))
ASSISTANT = StudentConfig(widths=(48, 32), exits=(1,))
TEACHER = TeacherConfig(widths=(128, 64), num_samples=(0,), num_steps=1000)
TRAIN = TrainConfig(steps_per_window=15, batch_size=32)
NUM_WINDOWS, NUM_LABELS, NUM_SEEDS = 20, 200, 6
MULTIPLIERS, RATES = (0.3, 1.0, 3.0), (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
TEMPERATURE = 4.0
SHARE = 0.9  # of the teacher's accuracy, the bar of distillation without data
POSSIBLE = OFFERED | set(EXTRA) | {"teacher_logits", "teacher_features", "student_map", "teacher_map"}

NINE = ("cross_entropy", "kl", "dkd", "dist", "fitnets", "similarity", "rkd_distance", "pkt", "attention_transfer")
NUM_POLICY_TASKS = 24
MIXES = ("mix of the best two", "mix of the best three", "default four terms")
OTHERS = (*MIXES, "born-again", "teacher assistant", "mutual", "under the policy")

Grid = list[tuple[float, float]]


def tasks_of(data: DataSet, num_seeds: int) -> list[Any]:
    """One task a seed; its teacher is counted by the seed where there are several."""
    given = TaskDistribution(data.name, label_noise=Range(0.0, 0.0), num_labels=Range(NUM_LABELS, NUM_LABELS))
    return [draw_task(seed, given, data, 1) for seed in range(num_seeds)]


def weights_of(terms: Sequence[str], multiplier: float) -> list[float]:
    """Family weights at the published ratios, all but the hard label's times `multiplier`; they sum to one."""
    used = {TERMS[name].family for name in terms}
    raw = [w * (1.0 if f == "hard_label" else multiplier) if f in used else 0.0 for f, w in PUBLISHED.items()]
    return [w / sum(raw) for w in raw]


class Trained:
    """A grid of settings times seeds of one method, trained in lock-step."""

    def __init__(self, accuracy: dict[str, np.ndarray], grid: Grid, states: dict[str, Tensor]) -> None:
        self.accuracy = accuracy  # split -> [windows, settings, seeds]
        self.grid, self._states = grid, states
        self.chosen = int(accuracy["validation"][-1].mean(-1).argmax())

    def result(self) -> dict[str, Any]:
        """What the study keeps of the method."""
        validation, test = (self.accuracy[split][:, self.chosen] for split in ("validation", "test"))  # [W, seeds]
        best = validation.argmax(0)
        multiplier, rate = self.grid[self.chosen]
        return {
            "multiplier": multiplier,
            "learning_rate": rate,
            "validation": float(validation[-1].mean()),
            "last": test[-1].tolist(),
            "best_epoch": test[best, np.arange(test.shape[1])].tolist(),
        }

    def students(self, template: Callable[[], ChainStudent]) -> list[ChainStudent]:
        """The chosen setting's students, one a seed."""
        num_seeds = self.accuracy["test"].shape[-1]
        made = []
        for seed in range(num_seeds):
            student = template()
            row = self.chosen * num_seeds + seed
            names = student.state_dict()
            student.load_state_dict({name: self._states[name][row] for name in names})
            made.append(student.requires_grad_(False))
        return made


def train(
    data: DataSet,
    signals: Signals,
    terms: Sequence[str],
    *,
    student: StudentConfig = STUDENT,
    own_teacher: bool = False,
    multipliers: Sequence[float] = MULTIPLIERS,
    rates: Sequence[float],
) -> Trained:
    """Train every setting and seed of one method together.

    Args:
        data: the data set.
        signals: of one teacher, or with `own_teacher` of one for each seed.
        terms: of the loss.
        student: its architecture.
        own_teacher: whether seed i has teacher i.
        multipliers: of the weights beside the hard label.
        rates: learning rates.
    """
    tasks = tasks_of(data, NUM_SEEDS)
    if own_teacher:
        tasks = [dataclasses.replace(task, teacher=seed) for seed, task in enumerate(tasks)]
    grid = [(m, r) for m in multipliers for r in rates]
    n = len(grid) * NUM_SEEDS
    structure = build_student(student, data.input_shape, data.num_classes)
    students = Population(structure, data, signals, n, TRAIN, loss=LossConfig(tuple(terms)))
    students.reset([task for _ in grid for task in tasks])
    ones = torch.ones(n)
    weights = torch.tensor([weights_of(terms, m) for m, _ in grid for _ in tasks])
    rate = torch.tensor([r for _, r in grid for _ in tasks])
    controls = Controls(weights, TEMPERATURE * ones, ones, ones, ones, rate)
    rows: dict[str, list[np.ndarray]] = {"validation": [], "test": []}
    for _ in range(NUM_WINDOWS):
        students.train_window(controls)
        for split, found in rows.items():
            reached = students.evaluate(split).exit_accuracy[:, -1]  # type: ignore[arg-type]
            found.append(reached.reshape(len(grid), -1).numpy())
    return Trained({split: np.stack(found) for split, found in rows.items()}, grid, students.state_dict())


def train_mutual(data: DataSet, learning_rate: float) -> Trained:
    """Train two students a seed that teach each other, all pairs in one loop; the first of each pair is reported."""
    tasks = tasks_of(data, NUM_SEEDS)
    grid = [(m, learning_rate) for m in MULTIPLIERS]
    structure = build_student(STUDENT, data.input_shape, data.num_classes)
    masks = structure.full_masks()
    n = 2 * len(grid) * NUM_SEEDS
    starter = Population(structure, data, _no_signals(data), n, TRAIN, loss=LossConfig(("cross_entropy",)))
    # the second of a pair has first weights of its own, and the samples of the first
    first = [task for _ in grid for task in tasks]
    starter.reset([*first, *(dataclasses.replace(task, seed=task.seed + 10_000) for task in first)])
    state = {k: v for k, v in starter.state_dict().items() if not k.startswith("adapter.")}
    parameters = {k: v.clone().requires_grad_() for k, v in state.items()}
    multiplier = torch.tensor([m for m, _ in grid for _ in tasks]).repeat(2)
    rate = torch.tensor([r for _, r in grid for _ in tasks]).repeat(2)
    optimizer = torch.optim.Adam(parameters.values(), lr=1.0)
    samples = torch.stack([task.samples for task in first])  # [N / 2, L]

    def logits_of(inputs: Tensor) -> Tensor:
        """[N, B, C] of inputs [N, B, ...]."""
        return vmap(lambda p, x: functional_call(structure, p, (x, masks)).logits[-1])(parameters, inputs)

    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list[np.ndarray]] = {"validation": [], "test": []}
    for _ in range(NUM_WINDOWS):
        for _ in range(TRAIN.steps_per_window):
            positions = torch.randint(NUM_LABELS, (len(first), TRAIN.batch_size), generator=generator)
            chosen = samples.gather(1, positions).repeat(2, 1)  # [N, B]
            logits = logits_of(data.inputs[chosen])
            hard = vmap(cross_entropy)(logits, data.labels[chosen])
            peer = vmap(mutual)(logits, logits.roll(n // 2, 0).detach())
            optimizer.zero_grad()
            (hard + multiplier * peer).sum().backward()
            _step(optimizer, parameters, rate)
        with torch.no_grad():
            for split, found in rows.items():
                index = data.splits[split]  # type: ignore[index]
                answers = logits_of(data.inputs[index].expand(n, *data.inputs[index].shape)).argmax(-1)
                reached = (answers == data.labels[index]).float().mean(-1)[: n // 2]
                found.append(reached.reshape(len(grid), -1).numpy())
    return Trained({split: np.stack(found) for split, found in rows.items()}, grid, {})


def _step(optimizer: torch.optim.Adam, parameters: dict[str, Tensor], rate: Tensor) -> None:
    """An Adam step in which row i moves by `rate[i]` times what a learning rate of one would."""
    before = {k: p.detach().clone() for k, p in parameters.items()}
    optimizer.step()
    with torch.no_grad():
        for name, parameter in parameters.items():
            moved = parameter - before[name]
            parameter.copy_(before[name] + rate.reshape(-1, *(1,) * (moved.ndim - 1)) * moved)


def _no_signals(data: DataSet) -> Signals:
    """Signals of an untrained teacher, for students that use none."""
    teacher = build_student(StudentConfig(widths=(4,), exits=()), data.input_shape, data.num_classes)
    for parameter in teacher.parameters():
        nn.init.zeros_(parameter)
    return compute_signals([teacher], data)


def without_data(data: DataSet, teacher: ChainStudent) -> dict[str, Any]:
    """Distil students of the default size (two layers of 48 units) without any image, one a seed."""
    masks = teacher.full_masks()
    teacher.requires_grad_(False)
    num_inputs = data.inputs[0].numel()
    test = data.splits["test"]
    reached = []
    for seed in range(5):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = nn.Sequential(
                nn.Linear(num_inputs, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, data.num_classes)
            )
            generator = Generator(32, num_inputs, (0.0, 1.0))
        random = torch.Generator().manual_seed(seed)
        distil_without_data(lambda x: teacher(x, masks).logits[-1], student, generator, DataFreeConfig(), random)
        with torch.no_grad():
            answers = student(data.inputs[test].flatten(1)).argmax(-1)
        reached.append(float((answers == data.labels[test]).float().mean()))
    with torch.no_grad():
        answers = teacher(data.inputs[test], masks).logits[-1].argmax(-1)
    accuracy = float((answers == data.labels[test]).float().mean())
    return {"teacher": accuracy, "last": reached, "share": [a / accuracy for a in reached]}


def under_policy(name: str) -> dict[str, Any]:
    """Students under the bundled policy, which was trained with four terms, with those and with nine, paired."""
    bundle = find_policy(None)
    given = TaskDistribution(name, label_noise=Range(0.0, 0.0), num_labels=Range(NUM_LABELS, NUM_LABELS))
    config = EnvConfig(task=given, teacher=TEACHER, controls=bundle.policy.controls)
    scenario = build_scenario(config, bundle.policy.start)
    found: dict[str, Any] = {"terms": list(NINE), "policy": bundle.digest[:12]}
    for label, terms in (("four", DEFAULT_TERMS), ("nine", NINE)):
        other = dataclasses.replace(
            scenario, config=dataclasses.replace(config, loss=LossConfig(terms)), known=References()
        )
        results = run(other, bundle.policy.controller(), range(NUM_POLICY_TASKS), given)
        found[label] = {"accuracy": results.accuracy.tolist(), "diverged": int(results.diverged.sum())}
    return found


def study(name: str, keep: Callable[[str, Callable[[], Any]], Any]) -> None:
    """All methods on one data set; `keep` remembers a method's result or computes it."""
    data = load_dataset(name)
    (teacher,) = load_teachers(TEACHER, data)
    signals = compute_signals([teacher], data, tuple(EXTRA))
    test = data.splits["test"]
    keep("teacher", lambda: float((signals.logits[0, test].argmax(-1) == data.labels[test]).float().mean()))
    scratch = keep(
        "scratch", lambda: train(data, signals, ("cross_entropy",), multipliers=(1.0,), rates=RATES).result()
    )
    rates = (scratch["learning_rate"],)
    singles = [t for t in TERMS if t != "cross_entropy" and POSSIBLE.issuperset(TERMS[t].needs)]
    found = {}
    for term in singles:
        terms = (term,) if TERMS[term].kind == "hard_label" else ("cross_entropy", term)
        found[term] = keep(term, lambda terms=terms: train(data, signals, terms, rates=rates).result())
    by_validation = sorted((t for t in found if TERMS[t].kind != "hard_label"), key=lambda t: -found[t]["validation"])
    mixed = ("cross_entropy", *by_validation[:2]), ("cross_entropy", *by_validation[:3]), DEFAULT_TERMS
    for label, terms in zip(MIXES, mixed, strict=True):
        keep(label, lambda terms=terms: {**train(data, signals, terms, rates=rates).result(), "terms": list(terms)})
    _chains(data, signals, keep, rates)
    keep("mutual", lambda: train_mutual(data, *rates).result())
    keep("under the policy", lambda: under_policy(name))
    if name == "digits":
        keep("without data", lambda: without_data(data, teacher))


def _chains(
    data: DataSet, signals: Signals, keep: Callable[[str, Callable[[], Any]], Any], rates: Sequence[float]
) -> None:
    """Born-again students, and an assistant between teacher and student."""

    def built(config: StudentConfig) -> Callable[[], ChainStudent]:
        return lambda: build_student(config, data.input_shape, data.num_classes)

    def born_again() -> dict[str, Any]:
        first = train(data, signals, ("cross_entropy",), multipliers=(1.0,), rates=rates).students(built(STUDENT))
        return train(
            data, compute_signals(first, data), ("cross_entropy", "kl"), own_teacher=True, rates=rates
        ).result()

    def assisted() -> dict[str, Any]:
        assistants = train(data, signals, ("cross_entropy", "kl"), student=ASSISTANT, rates=rates).students(
            built(ASSISTANT)
        )
        return train(
            data, compute_signals(assistants, data), ("cross_entropy", "kl"), own_teacher=True, rates=rates
        ).result()

    keep("born-again", born_again)
    keep("teacher assistant", assisted)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t interval."""
    a = np.asarray(values)
    return float(a.mean()), float(stats.t.ppf(0.975, len(a) - 1) * a.std(ddof=1) / len(a) ** 0.5)


def page(results: dict[str, Any], facts: dict[str, str]) -> str:
    """The results as a page."""
    lines = ["# What each kind of knowledge brings", "", (__doc__ or "").partition("\n\n    python")[0].strip(), ""]
    lines += [(__doc__ or "").split("\n\n")[-1].strip(), "", f"`{facts['command']}`, {facts['date']}, "
              f"{facts['cpu_s']} CPU seconds.", ""]  # fmt: skip
    for name, found in results.items():
        lines += [f"## {name}", "", f"The teacher has {found['teacher']:.3f} on test data. Test accuracies are means "
                  f"over {NUM_SEEDS} seeds with 95 % intervals; differences are paired by seed.", "",
                  "| method | weight x | rate | last epoch | chosen epoch | less scratch | less plain KD (kl) |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        rows = {m: r for m, r in found.items() if isinstance(r, dict) and "best_epoch" in r}
        for method, row in sorted(rows.items(), key=lambda item: -float(np.mean(item[1]["last"]))):
            cells = [f"{mean:.3f} ± {half:.3f}" for mean, half in (interval(row["last"]), interval(row["best_epoch"]))]
            for baseline in ("scratch", "kl"):
                if baseline == method or baseline not in found:
                    cells.append("")
                    continue
                mean, half = interval(np.subtract(row["last"], found[baseline]["last"]).tolist())
                cells.append(f"{mean:+.3f} ± {half:.3f}")
            label = f"{method} ({', '.join(row['terms'])})" if "terms" in row else method
            lines.append(f"| {label} | {row['multiplier']:g} | {row['learning_rate']:g} | {' | '.join(cells)} |")
        lines.append("")
        if "under the policy" in found:
            four, nine = (found["under the policy"][label] for label in ("four", "nine"))
            mean, half = interval(np.subtract(nine["accuracy"], four["accuracy"]).tolist())
            lines += [f"The bundled policy (sha256 {found['under the policy']['policy']}), which was trained with four terms, drives students with nine "
                      f"({', '.join(found['under the policy']['terms'])}): over {NUM_POLICY_TASKS} paired tasks test accuracy "
                      f"is {np.mean(nine['accuracy']):.3f} with nine and {np.mean(four['accuracy']):.3f} with four, a "
                      f"difference of {mean:+.3f} ± {half:.3f}; {nine['diverged']} of nine's students diverged.", ""]  # fmt: skip
        if "without data" in found:
            row = found["without data"]
            mean, half = interval(row["share"])
            verdict = "met" if mean - half >= SHARE else "not met"
            lines += ["### Without data", "", f"Students of two layers of 48 units that saw no image reach "
                      f"{np.mean(row['last']):.3f} on test data, {mean:.3f} ± {half:.3f} of the teacher's "
                      f"{row['teacher']:.3f} (5 seeds, lowest {min(row['share']):.3f}). The bar, {SHARE:g} with its "
                      f"interval, is {verdict}.", ""]  # fmt: skip
        better, worse = [], []
        for method, row in rows.items():
            mean, half = interval(np.subtract(row["last"], found["scratch"]["last"]).tolist())
            if method != "scratch" and mean - half > 0:
                better.append(method)
            if method != "scratch" and mean + half < 0:
                worse.append(method)
        unclear = [m for m in rows if m not in better and m not in worse and m != "scratch"]
        wanted = [t for t in TERMS if t != "cross_entropy" and POSSIBLE.issuperset(TERMS[t].needs)]
        missing = [m for m in (*wanted, *OTHERS) if m not in found]
        lines += [f"Not run on these data: {', '.join(missing)}.", ""] if missing else []
        lines += [f"Better than scratch beyond the interval: {', '.join(better) or 'none'}.", "",
                  f"No difference that {NUM_SEEDS} seeds show: {', '.join(unclear) or 'none'}.", "",
                  f"Worse: {', '.join(worse) or 'none'}.", ""]  # fmt: skip
    lines += [f"Intervals are not corrected for the number of methods: of {len(rows)} without any effect, about one "
              "would stand outside its interval by chance.", ""]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Run the study, or what is left of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/knowledge"), help="path without its ending")
    parser.add_argument("--state", type=Path, default=Path("runs/knowledge.json"), help="what was finished so far")
    options = parser.parse_args()
    use_one_thread()
    state: dict[str, Any] = json.loads(options.state.read_text()) if options.state.is_file() else {"cpu_s": 0.0}

    def keeper(name: str) -> Callable[[str, Callable[[], Any]], Any]:
        def keep(method: str, compute: Callable[[], Any]) -> Any:
            done = state.setdefault(name, {})
            if method not in done:
                began = time.process_time()
                done[method] = compute()
                state["cpu_s"] += time.process_time() - began
                options.state.parent.mkdir(parents=True, exist_ok=True)
                options.state.write_text(json.dumps(state))
                print(name, method, f"{time.process_time() - began:.1f} s", flush=True)
            return done[method]

        return keep

    for name in DATASETS:
        study(name, keeper(name))
    facts = {
        "command": "python experiments/knowledge.py",
        "date": time.strftime("%Y-%m-%d"),
        "cpu_s": f"{state['cpu_s']:.0f}",
    }
    results = {name: state[name] for name in DATASETS}
    options.out.with_suffix(".json").write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(results, facts))


if __name__ == "__main__":
    main()
