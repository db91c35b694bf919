"""Study: rlkd against Torch-Pruning (PyPI torch-pruning 1.6.1) at equal measured latency, on a vision transformer.

    pip install --no-deps torch-pruning==1.6.1
    python experiments/real.py fashion --work data --out runs/real/fashion
    python experiments/against_torch_pruning_vit.py --work data --run runs/real/fashion --docs docs/results/torch_pruning_vit

rlkd's students are those of `policy` in the first study's folder. Torch-Pruning's magnitude pruner (L1) starts from the same
three layers of the teacher and sees the same batches; it takes plain distillation, half labels and half the teacher's answers at
T = 4, with the same number of steps and schedule, and the best of three step sizes on validation. It prunes hidden units and whole
heads, the same share in every layer; sizes of heads stay, so the scale of attention stays right. The share is the smallest at which
its student is not slower than rlkd's in PyTorch at batch 32. `one-shot` prunes once, at two fifths of the training, `iterative` in
five steps from one fifth to seven tenths, with all heads at the third of them.
"""

import argparse
import copy
import json
import shlex
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from against_torch_pruning import (
    SCHEDULES,
    SHARES,
    fast_share,
    latency_ratio,
    lead_cells,
    leads_of,
    processor_seconds,
)
from plain_distillation import accuracy, distilled
from real import fashion
from ships import interval
from study_results import write_results
from torch import Tensor, nn

from rlkd.compression.real.student_folder import load_module_student
from rlkd.envs.action import ControlConfig
from rlkd.envs.build_real import build_real_scenario
from rlkd.envs.real import RealScenario
from rlkd.io.records import write_json
from rlkd.models.real.attachment import AttachConfig
from rlkd.runs.folder import use_one_thread

BATCH, NUM_ROUNDS = 32, 31
RATE_FACTORS = (1 / 3, 1.0, 3.0)  # times the step size that the range test found; the best on validation counts


def pruner_of(model: nn.Module, share: float, inputs: dict[str, Tensor], num_steps: int = 1, *, heads: bool) -> Any:
    """Return Torch-Pruning's L1 pruner of hidden units, or of whole heads.

    In several steps, version 1.6.1 takes the share of the heads that are left at each of them, and may leave none. So heads are
    pruned in one step.
    """
    import torch_pruning

    modules, num_heads = dict(model.named_modules()), model.config.num_attention_heads
    projections = [m for name, m in modules.items() if name.endswith(("q_proj", "k_proj", "v_proj"))]
    hidden = [m for name, m in modules.items() if name.endswith("fc1")]
    written = [m for name, m in modules.items() if name.endswith(("o_proj", "fc2", "projection", "classifier"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside of layers, which no pruned unit reaches
        return torch_pruning.pruner.MagnitudePruner(
            model,
            inputs,
            importance=torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=share,
            iterative_steps=num_steps,
            ignored_layers=[*written, *(hidden if heads else projections)],
            num_heads=dict.fromkeys(projections, num_heads) if heads else {},
            prune_num_heads=heads,
            prune_head_dims=False,
            head_pruning_ratio=min(share, 1 - 1 / num_heads) if heads else 0.0,
            output_transform=lambda output: output.logits.sum(),
        )


def first_model(scenario: RealScenario) -> nn.Module:
    """Return the student's model with the weights that every training starts from, without attachments."""
    scenario.student.model.load_state_dict(scenario.initial)
    return copy.deepcopy(scenario.student.clean_copy()).cpu()


def pruned(scenario: RealScenario, share: float) -> nn.Module:
    """Return the untrained student pruned once."""
    model, few = first_model(scenario), scenario.data.batch(scenario.data.splits["train"][:2])
    if share > 0:
        pruner_of(model, share, few, heads=False).step()
        pruner_of(model, share, few, heads=True).step()
    return model.eval()


def trained(
    scenario: RealScenario, seed: int, share: float, cuts: tuple[float, ...], *, learning_rate: float
) -> nn.Module:
    """Distil for as many steps as rlkd does and prune on the way."""
    config = scenario.config
    model, few = first_model(scenario), scenario.data.batch(scenario.data.splits["train"][:2])
    units = pruner_of(model, share, few, len(cuts), heads=False) if share > 0 else None
    at = [round(cut * config.num_windows * config.train.steps_per_window) for cut in cuts]

    def prune(step: int) -> bool:
        if units is None or step not in at:
            return False
        units.step()
        if step == at[len(at) // 2]:
            pruner_of(model, share, few, heads=True).step()
        return True

    return distilled(model, scenario, seed, learning_rate=learning_rate, prune=prune)


def row_of(scenario: RealScenario, folder: Path, seed: int) -> dict[str, Any]:
    """Compare on one seed."""
    own = load_module_student(folder)
    batch = scenario.data.batch(scenario.data.splits["test"][:BATCH])
    sizes = {share: pruned(scenario, share) for share in SHARES}
    calls = {"rlkd": partial(own, **batch)} | {f"{share:g}": partial(model, **batch) for share, model in sizes.items()}
    seconds = processor_seconds(calls, NUM_ROUNDS)
    share, is_fast_enough = fast_share(seconds)
    methods = {}
    for name, cuts in SCHEDULES.items():
        rates = [factor * scenario.config.train.learning_rate for factor in RATE_FACTORS]
        models = [trained(scenario, seed, share, cuts, learning_rate=rate) for rate in rates]
        shapes = [p.shape for p in sizes[share].parameters()]
        assert all([p.shape for p in model.parameters()] == shapes for model in models)
        best = max(models, key=lambda model: accuracy(model, scenario, "validation"))
        methods[name] = accuracy(best, scenario, "test")
        print(f"seed {seed}, {name}: {methods[name]:.4f} at {rates[models.index(best)]:g}", flush=True)
    return {
        "rlkd": accuracy(own, scenario, "test"),
        "methods": methods,
        "share": share,
        "is_fast_enough": is_fast_enough,
        "latency_s": seconds,
    }


def page(rows: list[dict[str, Any]], command: str) -> str:
    """Write the page."""
    leads = leads_of(rows)
    lines = [
        "# Against Torch-Pruning at equal measured latency: a vision transformer",
        "",
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}, torch-pruning 1.6.1; {len(rows)} seeds,",
        "in brackets 95 % t-intervals over seeds, paired. Fashion-MNIST, three layers of the ViT teacher of `experiments/real.py fashion`,",
        "whose `policy` students are rlkd's. Torch-Pruning prunes hidden units and heads by L1, the same share in every layer: the smallest",
        "share at which it is not slower than rlkd's student in PyTorch at batch 32 (processor time, in turns). Same first weights, batches,",
        "teacher and number of steps; of three trainings with a third, one and three times the step size that the range test found, the best",
        "on validation counts.",
        "",
        f"Latency of Torch-Pruning's student over rlkd's: {latency_ratio(rows)}. Test accuracy of rlkd's student:",
        f"{interval([row['rlkd'] for row in rows])}.",
        "",
        "Bar: accuracy not below: the mean lead of rlkd is not negative.",
        "",
        "| Torch-Pruning | accuracy | rlkd's lead, points | not below |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} L1 | {lead_cells(rows, name)} |" for name in leads]
    lines += [
        "",
        "| seed | share pruned | as fast as rlkd's | rlkd | " + " | ".join(leads) + " |",
        "|" + "---|" * (4 + len(leads)),
    ]
    for seed, row in enumerate(rows):
        cells = " | ".join(f"{row['methods'][name]:.4f}" for name in leads)
        fast = "yes" if row["is_fast_enough"] else "no: the largest share is slower"
        lines.append(f"| {seed} | {row['share']:g} | {fast} | {row['rlkd']:.4f} | {cells} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Do what is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="as of experiments/real.py")
    parser.add_argument(
        "--run", type=Path, required=True, help="--out of `experiments/real.py fashion`; rows are kept here, too"
    )
    parser.add_argument("--out", type=Path, default=None, help="another folder for the rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--docs", type=Path, default=None)
    options = parser.parse_args()
    use_one_thread()
    profile = next(iter(sorted(options.run.glob("cost_profile-none-0.json"))), None)
    config = replace(fashion(options.work), attach=AttachConfig(exits=()))
    if profile is not None:  # nothing is timed anew
        config = replace(config, cost=replace(config.cost, profile=str(profile)))
    scenario = build_real_scenario(config, ControlConfig())
    out, rows = options.out or options.run, []
    for seed in range(options.seeds):
        file = out / "rows" / f"torch_pruning-{seed}.json"
        if not file.exists():
            write_json(file, row_of(scenario, options.run / "students" / f"policy-{seed}", seed))
        rows.append(json.loads(file.read_text()))
    command = shlex.join(["python", *sys.argv])
    write_results(options.docs, page(rows, command), {"command": command, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
