"""Plain distillation of any module, for studies of other tools: half labels, half the teacher's answers at T = 4.

Batches, number of steps, optimizer and schedule are those of rlkd's training of the same scenario and seed.
"""

from collections.abc import Callable

import torch
from torch import nn

from rlkd.data import Split, draw_task
from rlkd.data.distribution import task_generator
from rlkd.envs.real import RealScenario
from rlkd.losses.hard_label import cross_entropy
from rlkd.losses.response import response
from rlkd.models.real.hooks import logits_of
from rlkd.students.optimizers import new_optimizer, schedule

TEMPERATURE = 4.0


def distilled(
    model: nn.Module,
    scenario: RealScenario,
    seed: int,
    *,
    learning_rate: float,
    prune: Callable[[int], bool] = lambda step: False,
) -> nn.Module:
    """Train `model` itself and return it in evaluation mode; the state of the last step ships.

    Args:
        model: takes the inputs of the scenario's data by name.
        scenario: data, teacher's answers and length of the training.
        seed: of the batches.
        learning_rate: highest of the schedule.
        prune: is called before every step, counted from 0, and returns whether it changed the sizes of the model.
    """
    config, data, c = scenario.config, scenario.data, scenario.config.train
    task = draw_task(seed, config.task, data, len(scenario.signals.accuracy))
    batches, num_steps = task_generator(task.seed, "batches"), config.num_windows * c.steps_per_window
    model.train().requires_grad_(True)
    optimizer = new_optimizer(model, c.optimizer, learning_rate, c.weight_decay)
    for window in range(config.num_windows):
        drawn = torch.randint(len(task.samples), (c.steps_per_window, c.batch_size), generator=batches)
        for step, rows in enumerate(drawn, start=window * c.steps_per_window):
            if prune(step):  # moments have the old sizes
                optimizer = new_optimizer(model, c.optimizer, learning_rate, c.weight_decay)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step, num_steps, c.warmup, c.floor)
            samples = task.samples[rows]
            logits = logits_of(model(**data.batch(samples)))
            teacher = scenario.signals.logits[task.teacher, samples]
            loss = 0.5 * cross_entropy(logits, task.labels[rows]) + 0.5 * response(logits, teacher, TEMPERATURE)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm)
            optimizer.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, scenario: RealScenario, split: Split, num_samples: int | None = None) -> float:
    """Return the accuracy on a split, or on its first `num_samples`."""
    data, index = scenario.data, scenario.data.splits[split][:num_samples]
    right = [
        (logits_of(model(**data.batch(rows))).argmax(-1) == data.labels[rows]).double() for rows in index.split(256)
    ]
    return float(torch.cat(right).mean())
