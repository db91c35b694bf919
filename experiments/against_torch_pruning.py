"""Study: rlkd against Torch-Pruning (PyPI torch-pruning 1.6.1) at equal measured latency, on Fashion-MNIST.

    pip install --no-deps torch-pruning==1.6.1
    RLKD_DATA=data python experiments/against_torch_pruning.py --out runs/torch_pruning --docs docs/results/torch_pruning

The student has two convolutions of 16 and 32 channels on 14x14 images and no early exit. rlkd distils it with
`--goal.keep 0.98 --goal.reference dense`. Torch-Pruning's magnitude pruner (L1, the same share in every layer) starts from the
same first weights and sees the same samples, batches and teacher; it takes plain distillation, half labels and half the
teacher's answers at T = 4, and the best of three step sizes on validation. Its share is the smallest at which its student is not slower than rlkd's in onnxruntime at batch
32, all sizes timed in turns. `one-shot` prunes once, at two fifths of the training, `iterative` in five steps from one fifth to
seven tenths. Both run twice: with as many steps as rlkd, the dense part included, and with twice as many.
"""

import argparse
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ships import distilled, interval
from study_results import write_results
from torch import Tensor, nn

from rlkd.cli.verify import config_of_run
from rlkd.compression import CompactStudent
from rlkd.configs import DistilConfig
from rlkd.cost.timing import time_calls
from rlkd.data import DataSet, Split, Task, draw_task
from rlkd.data.distribution import task_generator
from rlkd.export import surgery
from rlkd.export.measure import count_macs
from rlkd.export.onnx_file import export_flat, session_of, torch_runner
from rlkd.io.records import write_json
from rlkd.losses.hard_label import cross_entropy
from rlkd.losses.response import response
from rlkd.models import build_student, initialise
from rlkd.runs.folder import use_one_thread
from rlkd.runs.shipped import CHAIN_INPUT, open_shipped

STUDENT = ["--student.kind", "conv", "--student.widths", "[16,32]", "--student.exits", "[]"]
DATA = ["--task.dataset", "fashion_mnist"]
SHARES = tuple(i / 16 for i in range(15))  # of units that are pruned
BATCH_SIZE = DistilConfig().train.batch_size  # samples of a step
BATCH, NUM_ROUNDS = 32, 51  # of what is timed
SLACK = 1.02  # of a latency, which is measured
TEMPERATURE = 4.0
LEARNING_RATES = (
    3e-3,
    6e-3,
    1.2e-2,
)  # of Torch-Pruning's trainings, the best on validation counts; rlkd's policy sets its own
SCHEDULES = {  # where pruning steps stand, as shares of the training
    "one-shot": (0.4,),
    "iterative": (0.2, 0.325, 0.45, 0.575, 0.7),
}
BUDGETS = {"same": 1, "double": 2}


NOTES = [  # written by hand after reading the tables; revise them when the study runs again
    "## Other tools",
    "",
    "NVIDIA Model-Optimizer 0.47.0 (`pip install --no-deps nvidia-modelopt omegaconf pulp torchprofile==0.0.4` in a throw-away environment): FastNAS needs",
    "torchprofile 0.0.4 (newer ones lack what it reads) and `channel_divisor` 4, since its default of 32 leaves nothing to choose in layers of 32 and 64 channels. With",
    "that it pruned an untuned student of `full_fashion.py` to 38 % of its operations in 5 seconds; it was not fine-tuned, so no",
    "accuracy is compared here; [against FastNAS](fastnas.md) does so for a residual network. `mcore_minitron` is not registered without Megatron-Core, which needs CUDA, and was not run.",
    "",
]


def dense_of(config: DistilConfig, data: DataSet, task: Task) -> CompactStudent:
    """Return the student with the first weights that rlkd's had."""
    student = build_student(config.student, data.input_shape, data.num_classes)
    initialise(student, task_generator(task.seed, "parameters"))
    layers, heads = list(student.layers), list(student.heads)
    return CompactStudent(layers, heads, student.exits, student.input_shape, None, 1.0)


def pruner_of(model: nn.Module, share: float, inputs: Tensor, num_steps: int) -> Any:
    """Return Torch-Pruning's L1 pruner; the head's answers stay."""
    import torch_pruning

    return torch_pruning.pruner.MagnitudePruner(
        model,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=share,
        iterative_steps=num_steps,
        ignored_layers=[model.get_submodule("heads.0")],
    )


def pruned(model: CompactStudent, share: float, inputs: Tensor) -> CompactStudent:
    """Return the model pruned once."""
    if share > 0:
        pruner_of(model, share, inputs, 1).step()
    return model


def trained(
    model: CompactStudent,
    data: DataSet,
    task: Task,
    teacher: Tensor,
    *,
    share: float,
    rate: float,
    cuts: tuple[float, ...],
    steps: int,
) -> CompactStudent:
    """Distil for so many steps and prune on the way; the state of the last step ships."""
    batches = task_generator(task.seed, "batches")
    at = [round(cut * steps) for cut in cuts]
    pruner = pruner_of(model, share, data.inputs[:2], len(cuts)) if share > 0 else None
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        if pruner is not None and step in at:
            pruner.step()
            optimizer = torch.optim.Adam(model.parameters(), lr=rate)  # its moments have the old sizes
        rows = torch.randint(len(task.samples), (BATCH_SIZE,), generator=batches)
        samples = task.samples[rows]
        logits = model(data.inputs[samples])
        loss = 0.5 * cross_entropy(logits, task.labels[rows]) + 0.5 * response(logits, teacher[samples], TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: CompactStudent, data: DataSet, split: Split) -> float:
    """Return the accuracy on one split."""
    index = data.splits[split]
    return float((model(data.inputs[index]).argmax(-1) == data.labels[index]).double().mean())


def call_of(model: CompactStudent, inputs: Tensor) -> Any:
    """Return a call of the model in onnxruntime on a batch."""
    graph = surgery.fold_exits(export_flat(model, {CHAIN_INPUT: inputs[:3]}, False), 0)
    return partial(session_of(graph).run, None, {CHAIN_INPUT: inputs.numpy()})


def processor_seconds(calls: dict[str, Any], num_rounds: int) -> dict[str, float]:
    """Return the median processor time of every call, timed in turns."""
    latencies = time_calls(list(calls.values()), num_rounds)
    return {name: latency.processor_s for name, latency in zip(calls, latencies, strict=True)}


def fast_share(seconds: dict[str, float]) -> tuple[float, bool]:
    """Return the smallest share whose student is not slower than rlkd's and True; the largest and False without one."""
    fast = [share for share in SHARES if seconds[f"{share:g}"] <= SLACK * seconds["rlkd"]]
    return (min(fast), True) if fast else (max(SHARES), False)


def row_of(folder: Path, seed: int) -> dict[str, Any]:
    """Compare on one seed."""
    opened = open_shipped(folder, config_of_run, None)
    config, _ = config_of_run(folder, DistilConfig)
    data, own = opened.data, opened.student
    assert data is not None
    assert opened.teacher_logits is not None
    assert isinstance(own, CompactStudent)
    teacher = opened.teacher_logits()
    task = draw_task(seed, config.task, data, 1)
    test = data.splits["test"][:BATCH]
    inputs = opened.batch(test)[CHAIN_INPUT]
    sizes = {share: pruned(dense_of(config, data, task), share, data.inputs[:2]).eval() for share in SHARES}
    calls = {"rlkd": call_of(own, inputs)} | {f"{share:g}": call_of(model, inputs) for share, model in sizes.items()}
    seconds = processor_seconds(calls, NUM_ROUNDS)
    share, _ = fast_share(seconds)
    steps = config.num_windows * config.train.steps_per_window
    methods: dict[str, Any] = {}
    for name, cuts in SCHEDULES.items():
        for budget, factor in BUDGETS.items():
            made = [
                trained(
                    dense_of(config, data, task),
                    data,
                    task,
                    teacher,
                    share=share,
                    rate=rate,
                    cuts=cuts,
                    steps=factor * steps,
                )
                for rate in LEARNING_RATES
            ]
            model = max(made, key=lambda one: accuracy(one, data, "validation"))
            assert [p.shape for p in model.parameters()] == [p.shape for p in sizes[share].parameters()]
            methods[f"{name}, {budget}"] = accuracy(model, data, "test")
    result = json.loads((folder / "result.json").read_text())
    one = [opened.batch(row[None]) for row in test[:1]]
    return {
        "rlkd": accuracy(own, data, "test"),
        "dense": result["methods"]["dense"]["accuracy"],
        "goal_met": result["goal_met"],
        "methods": methods,
        "share": share,
        "latency_s": seconds,
        "macs_ratio": count_macs(torch_runner(own), one) / count_macs(torch_runner(sizes[0.0]), one),
        "macs_ratio_torch_pruning": count_macs(torch_runner(sizes[share]), one)
        / count_macs(torch_runner(sizes[0.0]), one),
        "widths": [len(layer.weight) for layer in own.layers],
        "widths_torch_pruning": [len(layer.weight) for layer in sizes[share].layers],
    }


def leads_of(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return rlkd's lead in points of accuracy over every method, one a seed."""
    return {name: [100 * (row["rlkd"] - row["methods"][name]) for row in rows] for name in rows[0]["methods"]}


def lead_cells(rows: list[dict[str, Any]], name: str) -> str:
    """Return the cells of one method: its accuracy, rlkd's lead, and whether rlkd is not below."""
    lead = leads_of(rows)[name]
    accuracies = [row["methods"][name] for row in rows]
    return f"{interval(accuracies)} | {interval(lead)} | {'yes' if np.mean(lead) >= 0 else 'no'}"


def latency_ratio(rows: list[dict[str, Any]]) -> str:
    """Return the latency of Torch-Pruning's student over rlkd's, with its interval over seeds."""
    return interval([row["latency_s"][f"{row['share']:g}"] / row["latency_s"]["rlkd"] for row in rows])


def page(rows: list[dict[str, Any]], command: str, policy: str) -> str:
    """Write the page."""
    leads = leads_of(rows)
    lines = [
        "# Against Torch-Pruning at equal measured latency",
        "",
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}, torch-pruning 1.6.1; {len(rows)} seeds,",
        "in brackets 95 % t-intervals over seeds, paired. Fashion-MNIST at 14x14, a student of two convolutions (16 and 32 channels), the",
        f"bundled policy {policy} at",
        "`--goal.keep 0.98 --goal.reference dense`. Same first weights, samples, batches and teacher. Torch-Pruning: L1, the",
        f"best of the step sizes {', '.join(f'{rate:g}' for rate in LEARNING_RATES)} on validation for each of its methods (three trainings against one of",
        "rlkd), and the share of channels at which it is not slower than rlkd's student in onnxruntime at batch 32 (processor time, in turns).",
        "",
        f"Latency of Torch-Pruning's student over rlkd's: {latency_ratio(rows)}. Test accuracy of rlkd's student:",
        f"{interval([row['rlkd'] for row in rows])}, of the dense one {interval([row['dense'] for row in rows])}; MACs kept: "
        f"{interval([row['macs_ratio'] for row in rows])}, by Torch-Pruning",
        f"{interval([row['macs_ratio_torch_pruning'] for row in rows])}.",
        "",
        "Bar: accuracy not below, read on the methods with as many steps: the mean lead of rlkd is not negative.",
        "",
        "| Torch-Pruning | steps | accuracy | rlkd's lead, points | not below |",
        "|---|---|---|---|---|",
    ]
    for name in leads:
        method, budget = name.split(", ")
        lines.append(
            f"| {method} L1 | {'as rlkd' if budget == 'same' else 'twice as many'} | {lead_cells(rows, name)} |"
        )
    lines += [
        "",
        "| seed | rlkd's channels | Torch-Pruning's | rlkd | " + " | ".join(leads) + " |",
        "|" + "---|" * (4 + len(leads)),
    ]
    for seed, row in enumerate(rows):
        cells = " | ".join(f"{row['methods'][name]:.4f}" for name in leads)
        lines.append(f"| {seed} | {row['widths']} | {row['widths_torch_pruning']} | {row['rlkd']:.4f} | {cells} |")
    return "\n".join([*lines, "", *NOTES])


def main() -> int:
    """Do what is missing, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--docs", type=Path, default=None)
    options = parser.parse_args()
    use_one_thread()
    rows = []
    for seed in range(options.seeds):
        folder = options.out / f"{seed}"
        distilled(folder, [*DATA, *STUDENT], seed)
        if not (folder / "torch_pruning.json").exists():
            write_json(folder / "torch_pruning.json", row_of(folder, seed))
        rows.append(json.loads((folder / "torch_pruning.json").read_text()))
        print(f"seed {seed}: {rows[-1]}", file=sys.stderr, flush=True)
    command = shlex.join(["python", *sys.argv])
    policies = {
        json.loads((options.out / f"{seed}" / "student" / "student.json").read_text())["policy_sha256"]
        for seed in range(options.seeds)
    }
    text = page(rows, command, ", ".join(sorted(policy[:12] for policy in policies)))
    write_results(options.docs, text, {"command": command, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
