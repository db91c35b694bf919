"""What the environment costs: a solo run under the agent against a bare PyTorch loop with the same updates.

    python experiments/overhead.py --docs docs/results/overhead

Both train the same small vision transformer on digits from the same weights, on the same batches, with the same
teacher's logits, features and attention maps, terms, weights, optimizer and course of the learning rate; that they end at
the same parameters is checked. The bare loop is written by hand below: no hooks, no telemetry, no evaluation. The run is
what `rlkd distil --goal.keep 0.98` does between loading and the test: masks and exits, the probe of gradients, what-if
probes, a snapshot and an evaluation on validation each window, observation, cost, reward, the guard with its larger
sample of validation, and the policy's answer, which is then left aside for a fixed setting with nothing pruned, because a
pruned student would train faster than the bare loop. The floor is one that the student meets on its way.

A pair is one of each, in turn; figures are medians over pairs of the ratio. "With the same evaluations" adds what the
bare loop needs for the same number of evaluations on the same samples.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import full_fashion
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from study_results import write_results
from torch import Tensor, nn

from rlkd.agents.policy.bundled import find_policy
from rlkd.agents.policy.controllers import Controller
from rlkd.data import Goal, Preference, draw_task, task_generator
from rlkd.envs.action import decode, published_setting
from rlkd.envs.build_real import build_real_scenario
from rlkd.envs.guard import GuardConfig
from rlkd.envs.real import RealScenario
from rlkd.envs.real_config import RealConfig, RealCostConfig
from rlkd.errors import UserError
from rlkd.losses import attention_transfer, cross_entropy, hint, response
from rlkd.models.chain import initialise
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.pretrained import new_model, quiet, transformers
from rlkd.runs.distil import run_windows
from rlkd.runs.folder import use_one_thread
from rlkd.runs.goals import with_goal
from rlkd.students.optimizers import new_optimizer, schedule
from rlkd.students.real.train_config import ModuleTrainConfig

NUM_WINDOWS = 4
REFERENCE = 0.3  # accuracy that the floor is a share of
NUM_IMAGES = 20_000  # of Fashion-MNIST: enough for a validation split beyond `confirm_size`


@dataclass(frozen=True)
class Setting:
    """Name a vision transformer, its data and the length of a window."""

    data: str
    image_size: int
    patch_size: int
    width: int
    layers: int
    """Number of the teacher's blocks; the student has half of them."""
    steps_per_window: int
    batch_size: int
    validation_size: int


# The first is the bar's: the transformer of real.py, windows and samples as by default.
SETTINGS = (
    Setting("Fashion-MNIST", 28, 7, 128, 6, steps_per_window=100, batch_size=64, validation_size=512),
    Setting("digits", 8, 2, 64, 4, steps_per_window=100, batch_size=32, validation_size=128),
    Setting("digits", 8, 2, 64, 4, steps_per_window=15, batch_size=32, validation_size=512),
)


def make_files(folder: Path, setting: Setting) -> tuple[Path, Path]:
    """Images as arrays, and a vision transformer with random weights as the teacher: what it knows costs no time."""
    data = folder / "data.npz"
    if setting.data == "digits":
        bunch = load_digits()
        np.savez(data, inputs=(bunch.images[:, None] / 16.0).astype(np.float32), labels=bunch.target)
    else:
        images, labels = full_fashion.load_data()["train"]
        np.savez(data, inputs=images[:NUM_IMAGES].numpy(), labels=labels[:NUM_IMAGES].numpy())
    config = transformers().ViTConfig(
        image_size=setting.image_size,
        patch_size=setting.patch_size,
        num_channels=1,
        hidden_size=setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=10,
        architectures=["ViTForImageClassification"],
    )
    with quiet():
        model: Any = new_model(config, "image_classification", seed=0)
        model.save_pretrained(folder / "teacher")
    return folder / "teacher", data


def make_scenario(folder: Path, setting: Setting, controls: Any) -> RealScenario:
    """The scenario of the student, half of the teacher's layers."""
    teacher, data = make_files(folder, setting)
    config = RealConfig(
        teacher=str(teacher),
        data=str(data),
        num_windows=NUM_WINDOWS,
        goal=Goal(keep=0.98, reference=REFERENCE),
        cut=StudentCut(layers=setting.layers // 2),
        train=ModuleTrainConfig(
            steps_per_window=setting.steps_per_window,
            batch_size=setting.batch_size,
            learning_rate=3e-4,
            validation_size=setting.validation_size,
            max_rollbacks=0,
        ),
        cost=RealCostConfig(batch_size=8),
    )
    return with_goal(build_real_scenario(config, controls), config.goal, Preference())


@dataclass
class Clock:
    """Seconds since it was made, of the wall and of this process's processor."""

    wall_began: float = field(default_factory=time.perf_counter)
    cpu_began: float = field(default_factory=time.process_time)

    def read(self) -> tuple[float, float]:
        """(wall, processor)."""
        return time.perf_counter() - self.wall_began, time.process_time() - self.cpu_began


def under_agent(scenario: RealScenario, policy: Controller) -> tuple[tuple[float, float], dict[str, Tensor]]:
    """Seconds of a run, wall and processor, and its final parameters."""
    position = published_setting(scenario.config.controls)[None]
    running: list[Any] = []
    final: dict[str, Tensor] = {}

    def controller(observation: Tensor, episodes: Any, window: int) -> Tensor:
        running[:] = [episodes]
        policy(observation, episodes, window)
        return position.clone()

    def on_window(row: dict[str, float], observation: Tensor) -> None:
        if row["window"] == NUM_WINDOWS:  # kept here, because the guard then brings back the best window
            final.update({name: value[0].clone() for name, value in running[0].students.state_dict().items()})

    clock = Clock()
    trained = run_windows(scenario, controller, 0, on_window, None, GuardConfig())
    seconds = clock.read()
    assert not trained.last["num_diverged"]
    assert 0 < trained.last["floor"] <= trained.last["accuracy"], "there is no floor, or the student misses it"
    return seconds, final


def bare(scenario: RealScenario) -> tuple[tuple[float, float], tuple[float, float], dict[str, Tensor]]:
    """Seconds (wall, processor) of the loop, of as many evaluations as a run has, and the final parameters."""
    config, data, signals, plan = scenario.config.train, scenario.data, scenario.signals, scenario.student.plan
    controls = decode(published_setting(scenario.config.controls)[None], scenario.config.controls, data.num_classes)
    described: Any = scenario.student.model.config
    model: Any = new_model(described, "image_classification", seed=0)  # the scenario's own has hooks on it
    model.load_state_dict(scenario.initial)
    task = draw_task(0, scenario.config.task, data, 1)
    heads = nn.ModuleList(nn.Linear(plan.widths[block - 1], plan.num_classes) for block in plan.exits)
    initialise(heads, task_generator(task.seed, "parameters"))
    batches = task_generator(task.seed, "batches")
    logits, features, maps = signals.logits[0], signals.features[0], signals.maps[0]
    weights, temperature = controls.weights[0], controls.temperature[0]
    both = nn.ModuleDict({"model": model, "heads": heads})
    total = NUM_WINDOWS * config.steps_per_window
    clock = Clock()
    optimizer = new_optimizer(both, "adamw", config.learning_rate, config.weight_decay)
    both.train()
    for window in range(NUM_WINDOWS):
        positions = torch.randint(len(task.samples), (config.steps_per_window, config.batch_size), generator=batches)
        for step in range(config.steps_per_window):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * schedule(
                    window * config.steps_per_window + step, total, config.warmup, config.floor
                )
            rows = task.samples[positions[step]]
            out = model(data.inputs["pixel_values"][rows], output_hidden_states=True, output_attentions=True)
            early = [head(out.hidden_states[b].mean(1)) for b, head in zip(plan.exits, heads, strict=True)]
            ours = F.normalize(out.attentions[-1].mean(1).mean(1), dim=-1, eps=1e-8)
            exits = (*early, out.logits)
            losses = torch.stack(
                [
                    sum(cross_entropy(z, task.labels[positions[step]]) for z in exits) / len(exits),
                    sum(response(z, logits[rows], temperature) for z in exits) / len(exits),
                    hint(out.hidden_states[-1].mean(1), features[rows]),
                    attention_transfer(ours, maps[rows]),
                ]
            )
            optimizer.zero_grad()
            (losses * weights).sum().backward()
            nn.utils.clip_grad_norm_(both.parameters(), config.clip_norm)
            optimizer.step()
    trained, clock = clock.read(), Clock()
    index = data.splits["validation"][: config.validation_size or None]
    with torch.inference_mode():
        for _ in range(NUM_WINDOWS + 1):
            both.eval()
            answers = [
                model(data.inputs["pixel_values"][rows]).logits.argmax(-1)
                for rows in torch.split(index, config.evaluation_batch_size)
            ]
            (torch.cat(answers) == data.labels[index]).float().mean()
    evaluated = clock.read()
    return trained, evaluated, {k.removeprefix("model."): p.detach().clone() for k, p in both.named_parameters()}


def measure(setting: Setting, scenario: RealScenario, policy: Controller, num_pairs: int) -> dict[str, Any]:
    """Seconds of every pair, and medians over pairs of the ratios."""
    rows = []
    for pair in range(num_pairs + 1):
        if pair % 2:
            seconds, ours = under_agent(scenario, policy)
            trained, evaluated, theirs = bare(scenario)
        else:
            trained, evaluated, theirs = bare(scenario)
            seconds, ours = under_agent(scenario, policy)
        if pair == 0:  # a warm-up; that both did the same updates is checked on it
            difference = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
            moved = max(
                float((theirs[name] - scenario.initial[name]).abs().max())
                for name in theirs
                if name in scenario.initial
            )
            assert difference < 0.05 * moved, f"the updates differ: {difference:g} after a way of {moved:g}"
            continue
        names = ("wall", "processor")
        rows.append(
            {
                **{f"agent_{name}_s": x for name, x in zip(names, seconds, strict=True)},
                **{f"bare_{name}_s": x for name, x in zip(names, trained, strict=True)},
                **{f"evaluations_{name}_s": x for name, x in zip(names, evaluated, strict=True)},
            }
        )
    return {
        **asdict(setting),
        "largest_difference": difference,
        **{f"overhead_{name}": statistics.median(overheads(rows, name)) for name in ("wall", "processor")},
        "overhead_over_same_evaluations": statistics.median(overheads(rows, "processor", with_evaluations=True)),
        "pairs": rows,
    }


def overheads(rows: list[dict[str, float]], name: str, with_evaluations: bool = False) -> list[float]:
    """Of every pair, what the run took beyond the bare loop, as a share of it."""
    more = [row[f"evaluations_{name}_s"] if with_evaluations else 0.0 for row in rows]
    return [row[f"agent_{name}_s"] / (row[f"bare_{name}_s"] + m) - 1 for row, m in zip(rows, more, strict=True)]


def table(results: list[dict[str, Any]], command: str) -> str:
    """The figures as a page."""
    lines = [
        "# What the environment costs",
        "",
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}, {os.cpu_count()} cores,",
        f"load {os.getloadavg()[0]:.1f} while it ran. Vision transformers, {NUM_WINDOWS} windows; medians of {len(results[0]['pairs'])} interleaved pairs, in",
        f"brackets the lowest and the highest pair. The policy is the bundled one, with probes and guard; the floor is 0.98 of {REFERENCE}.",
        "The bar of 10 % is on wall time in the first row: the transformer of `real.py`, windows and samples as by default.",
        "Evaluations are those on validation that end the windows; the bare loop has none, and with the same ones the third share.",
        "",
        "| data | width, layers | steps a window | batch | validation samples | wall | processor | processor, same evaluations | agent, wall | bare, wall |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        shares = {name: overheads(r["pairs"], name) for name in ("wall", "processor")}
        cells = [f"{statistics.median(x):+.1%} ({min(x):+.1%} to {max(x):+.1%})" for x in shares.values()]
        agent, alone = (statistics.median(row[f"{who}_wall_s"] for row in r["pairs"]) for who in ("agent", "bare"))
        lines.append(
            f"| {r['data']} | {r['width']}, {r['layers'] // 2} | {r['steps_per_window']} | {r['batch_size']} | {r['validation_size']} | {cells[0]} | {cells[1]} | "
            f"{r['overhead_over_same_evaluations']:+.1%} | {agent:.2f} s | {alone:.2f} s |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=None, help="by default the bundled one")
    parser.add_argument("--num_pairs", type=int, default=5)
    parser.add_argument("--num_settings", type=int, default=len(SETTINGS))
    parser.add_argument("--docs", type=Path, default=None, help="write the table to this path with .md and .json")
    options = parser.parse_args()
    use_one_thread()
    bundle = find_policy(options.policy)
    results = []
    for setting in SETTINGS[: options.num_settings]:
        with tempfile.TemporaryDirectory() as folder:
            scenario = make_scenario(Path(folder), setting, bundle.policy.controls)
            results.append(measure(setting, scenario, bundle.policy.controller(), options.num_pairs))
        print(json.dumps({k: v for k, v in results[-1].items() if k != "pairs"}), flush=True)
    page = table(results, shlex.join(["python", *sys.argv]))
    write_results(options.docs, page, {"schema": 1, "settings": results})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"overhead: {error}", file=sys.stderr)
        sys.exit(2)
