"""Study: rlkd against FastNAS (NVIDIA Model-Optimizer) at equal measured latency, on a residual network.

    pip install --no-deps nvidia-modelopt==0.47.0 omegaconf pulp torchprofile==0.0.4
    python experiments/real.py resnet --work data --out runs/real/resnet
    python experiments/against_fastnas.py --work data --run runs/real/resnet --docs docs/results/fastnas

rlkd's students are those of `policy` in the first study's folder. FastNAS narrows convolutions under a limit on operations and
scores subnets by their accuracy on validation samples. It begins with the teacher, or with the cut student that rlkd's begin with,
and is searched for at every limit of LIMITS. For each seed, the subnet with the most operations that is not slower than rlkd's
student in PyTorch at batch 32 counts, or the smallest where all are slower. It takes plain distillation, half labels and
half the teacher's answers at T = 4, on the same batches, with the same number of steps and schedule, and the best of three
step sizes on validation.
"""

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from against_torch_pruning import SLACK, lead_cells, leads_of, processor_seconds
from against_torch_pruning_vit import BATCH, NUM_ROUNDS, RATE_FACTORS, first_model
from plain_distillation import accuracy, distilled
from real import resnet
from ships import interval
from study_results import write_results
from torch import Tensor, nn

from rlkd.compression.real.student_folder import load_module_student
from rlkd.data import Goal
from rlkd.envs.action import ControlConfig
from rlkd.envs.build_real import build_real_scenario
from rlkd.envs.real import RealScenario
from rlkd.io.records import write_json
from rlkd.models.real.attachment import AttachConfig
from rlkd.models.real.hooks import logits_of
from rlkd.runs.folder import use_one_thread

LIMITS = tuple(i / 20 for i in range(19, 1, -1))  # on operations, as shares of those of the network that is narrowed
NUM_SCORED, NUM_CALIBRATED = 1024, 16  # validation samples of a score, training batches that set batch normalisation
DIVISOR = 8  # of channels; the default of 32 leaves nothing to choose in layers of 32 channels


class Logits(nn.Module):
    """A model of images whose output is its logits alone, as FastNAS wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits [B, C] of pixels [B, 1, 28, 28]."""
        return logits_of(self.model(pixel_values))


def subnet(model: nn.Module, limit: float, scenario: RealScenario, checkpoint: Path) -> nn.Module:
    """Return the subnet of a trained `model` that FastNAS finds under a limit on operations; `model` stays as it is."""
    import modelopt.torch.prune

    train = scenario.data.splits["train"]

    def batches() -> Iterator[Tensor]:
        for rows in train[: NUM_CALIBRATED * scenario.config.train.batch_size].split(scenario.config.train.batch_size):
            yield scenario.data.batch(rows)["pixel_values"]

    rules = {
        "nn.Conv2d": {"*": {"channel_divisor": DIVISOR}},
        "nn.BatchNorm2d": {"*": {"feature_divisor": DIVISOR}},
        "nn.Linear": {"*": {"feature_divisor": DIVISOR}},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - the tool draws from it
        found, _ = modelopt.torch.prune.prune(
            Logits(copy.deepcopy(model)).eval(),
            mode=[("fastnas", rules)],
            constraints={"flops": f"{100 * limit:g}%"},
            dummy_input=next(batches())[:1],
            config={
                "data_loader": list(batches()),
                "collect_func": lambda batch: batch,
                "score_func": lambda network: accuracy(network, scenario, "validation", NUM_SCORED),
                "checkpoint": str(checkpoint),
                "verbose": False,
            },
        )
    return found.eval()


def channels(model: nn.Module) -> list[int]:
    """Return the output channels of all convolutions."""
    return [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]


def row_of(
    scenario: RealScenario, subnets: dict[str, dict[float, nn.Module]], folder: Path, seed: int
) -> dict[str, Any]:
    """Compare on one seed."""
    own = load_module_student(folder)
    batch = scenario.data.batch(scenario.data.splits["test"][:BATCH])
    row: dict[str, Any] = {
        "rlkd": accuracy(own, scenario, "test"),
        "methods": {},
        "limit": {},
        "latency_s": {},
        "channels": {},
    }
    for start, networks in subnets.items():
        calls = {"rlkd": partial(own, **batch)} | {f"{limit:g}": partial(n, **batch) for limit, n in networks.items()}
        seconds = processor_seconds(calls, NUM_ROUNDS)
        fast = [limit for limit in networks if seconds[f"{limit:g}"] <= SLACK * seconds["rlkd"]]
        limit = max(fast, default=min(networks))
        rates = [factor * scenario.config.train.learning_rate for factor in RATE_FACTORS]
        models = [distilled(copy.deepcopy(networks[limit]), scenario, seed, learning_rate=rate) for rate in rates]
        best = max(models, key=lambda model: accuracy(model, scenario, "validation"))
        row["methods"][start], row["limit"][start] = accuracy(best, scenario, "test"), limit
        row["latency_s"][start] = {"rlkd": seconds["rlkd"], "fastnas": seconds[f"{limit:g}"]}
        row["channels"][start] = channels(best)
        print(
            f"seed {seed}, from the {start}: {row['methods'][start]:.4f} at {rates[models.index(best)]:g}, limit {limit:g}, "
            f"{seconds[f'{limit:g}'] / seconds['rlkd']:.2f} times rlkd's latency; rlkd {row['rlkd']:.4f}",
            flush=True,
        )
    return row


def page(rows: list[dict[str, Any]], keep: float, command: str) -> str:
    """Write the page."""
    leads = leads_of(rows)
    lines = [
        "# Against FastNAS at equal measured latency: a residual network",
        "",
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}, nvidia-modelopt 0.47.0; {len(rows)} seeds,",
        "in brackets 95 % t-intervals over seeds, paired. Fashion-MNIST, the teacher of `experiments/real.py resnet`, whose `policy` students",
        f"({keep:g} of the teacher's accuracy) are rlkd's. FastNAS narrows convolutions of the teacher, or of the cut student that rlkd's begin",
        f"with, in steps of {DIVISOR} channels, scored on {NUM_SCORED:,} validation samples. The subnet with the most operations that is not slower than rlkd's",
        "student in PyTorch at batch 32 (processor time, in turns), or the smallest where all are slower, takes plain distillation with rlkd's batches and number of steps; of three",
        "trainings with a third, one and three times rlkd's step size, the best on validation counts.",
        "",
        "Bar: at equal accuracy latency not higher; read here as accuracy not below at equal latency: the mean lead of rlkd is not negative.",
        "",
        "| FastNAS begins with the | latency over rlkd's | accuracy | rlkd's lead, points | not below |",
        "|---|---|---|---|---|",
    ]
    for name in leads:
        ratio = interval([row["latency_s"][name]["fastnas"] / row["latency_s"][name]["rlkd"] for row in rows])
        lines.append(f"| {name} | {ratio} | {lead_cells(rows, name)} |")
    lines += [
        "",
        "| seed | rlkd | " + " | ".join(f"FastNAS from the {name} | limit on operations" for name in leads) + " |",
        "|" + "---|" * (2 + 2 * len(leads)),
    ]
    for seed, row in enumerate(rows):
        cells = " | ".join(f"{row['methods'][name]:.4f} | {row['limit'][name]:g}" for name in leads)
        lines.append(f"| {seed} | {row['rlkd']:.4f} | {cells} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Do what is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="as of experiments/real.py")
    parser.add_argument(
        "--run", type=Path, required=True, help="--out of `experiments/real.py resnet`; rows are kept here, too"
    )
    parser.add_argument("--keep", type=float, default=0.98, help="of that run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--docs", type=Path, default=None)
    options = parser.parse_args()
    use_one_thread()
    config = replace(
        resnet(options.work), attach=AttachConfig(exits=()), goal=Goal(keep=options.keep, reference="teacher")
    )
    profile = next(iter(sorted(options.run.glob("cost_profile-none-0.json"))), None)
    if profile is not None:  # nothing is timed anew
        config = replace(config, cost=replace(config.cost, profile=str(profile)))
    scenario = build_real_scenario(config, ControlConfig())
    assert scenario.teacher is not None
    starts = {"teacher": scenario.teacher.cpu().eval(), "cut student": first_model(scenario).eval()}
    rows: list[dict[str, Any]] = []
    subnets: dict[str, dict[float, nn.Module]] = {}
    for seed in range(options.seeds):
        file = options.run / "rows" / f"fastnas-{seed}.json"
        if not file.exists():
            if not subnets:
                subnets = searched(starts, scenario, options.run)
            write_json(file, row_of(scenario, subnets, options.run / "students" / f"policy-{seed}", seed))
        rows.append(json.loads(file.read_text()))
    command = shlex.join(["python", *sys.argv])
    write_results(options.docs, page(rows, options.keep, command), {"command": command, "rows": rows})
    return 0


def searched(starts: dict[str, nn.Module], scenario: RealScenario, folder: Path) -> dict[str, dict[float, nn.Module]]:
    """Return the subnets of both networks at every limit that can be met."""
    subnets: dict[str, dict[float, nn.Module]] = {}
    for start, model in starts.items():
        subnets[start] = {}
        for limit in LIMITS:
            began, checkpoint = time.perf_counter(), folder / f"fastnas-{start.replace(' ', '_')}.pth"
            try:
                subnets[start][limit] = subnet(model, limit, scenario, checkpoint)
            except ValueError as error:
                if "NOT all constraints" not in str(error):
                    raise
                print(f"{start}, limit {limit:g} and below: no subnet is so small", flush=True)
                break
            print(
                f"{start}, limit {limit:g}: {channels(subnets[start][limit])}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return subnets


if __name__ == "__main__":
    sys.exit(main())
