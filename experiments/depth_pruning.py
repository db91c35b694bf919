"""Remove blocks of a language model by their influence, at once or in steps while it is distilled.

The influence of a block is that of ShortGPT (Men et al. 2024, https://arxiv.org/abs/2403.03853).
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkd.data import task_generator
from rlkd.data.examples import PADDING_MASK, TokenExamples
from rlkd.envs.real import RealScenario
from rlkd.losses.tokens import token_cross_entropy, token_response_top_k
from rlkd.models.real.blocks import block_paths
from rlkd.models.real.hooks import capture, forward, logits_of
from rlkd.runs.goals import task_of
from rlkd.students.optimizers import new_optimizer, schedule
from rlkd.teachers.real.token_signals import TokenSignals

EMBEDDING = "model.embed_tokens"  # of a Llama
NUM_CALIBRATED = 8  # training texts that influence is read from


def removals(num_steps: int, num_removed: int, share: float) -> list[int]:
    """Return the steps, from 0, before which a block is removed: evenly spread over the first `share` of all steps."""
    return [round(share * num_steps * k / num_removed) for k in range(1, num_removed + 1)]


@torch.no_grad()
def influences(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[float]:
    """Return 1 - the mean cosine between what enters and what leaves each block (Men et al. 2024, arXiv 2403.03853)."""
    blocks = block_paths(model)
    with capture(model, [EMBEDDING, *blocks]) as seen:
        forward(model, inputs)
    real = inputs[PADDING_MASK].bool()  # [B, L]
    hidden = [seen[place].float()[real] for place in (EMBEDDING, *blocks)]  # [M, D] each
    return [float(1 - F.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairwise(hidden)]


def remove_block(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Take the block of least influence out of a model and return its place, from 0."""
    found = influences(model, inputs)
    place = found.index(min(found))
    blocks: Any = model.get_submodule(block_paths(model)[place].rpartition(".")[0])
    del blocks[place]
    return place


def chosen_blocks(teacher: nn.Module, inputs: Mapping[str, Tensor], count: int) -> list[int]:
    """Return the numbers, from 1, of the blocks that stay when those of least influence are removed one by one."""
    model = copy.deepcopy(teacher)
    left = list(range(1, len(block_paths(model)) + 1))
    while len(left) > count:
        del left[remove_block(model, inputs)]
    return left


def token_parts(scenario: RealScenario) -> tuple[TokenExamples, TokenSignals]:
    """Return the texts and the teacher's signals of a language model."""
    assert isinstance(scenario.data, TokenExamples)
    assert isinstance(scenario.signals, TokenSignals)
    return scenario.data, scenario.signals


def batches(scenario: RealScenario, seed: int) -> Iterator[Tensor]:
    """Yield the samples [B] of every step, as rlkd's loop draws them under that seed."""
    task, train = task_of(scenario, seed), scenario.config.train
    generator = task_generator(task.seed, "batches")
    for _ in range(scenario.config.num_windows):
        drawn = torch.randint(len(task.samples), (train.steps_per_window, train.batch_size), generator=generator)
        yield from task.samples[drawn]


def train_by_hand(model: nn.Module, scenario: RealScenario, seed: int, remove_before: Sequence[int] = ()) -> list[int]:
    """Distil a model as rlkd's loop does with labels and the teacher's likeliest tokens half and half at T = 1.

    Args:
        model: changed in place.
        scenario: has data, signals and the options of the training.
        seed: of the batches.
        remove_before: steps, from 0, before which the block of least influence is removed.

    Returns:
        The place of each removed block, from 0, among the blocks that were there.
    """
    data, signals = token_parts(scenario)
    train = scenario.config.train
    num_steps = scenario.config.num_windows * train.steps_per_window
    optimizer = new_optimizer(model, train.optimizer, train.learning_rate, train.weight_decay)
    calibrated = data.batch(data.splits["train"][:NUM_CALIBRATED])
    removed = []
    for step, samples in enumerate(batches(scenario, seed)):
        for _ in range(list(remove_before).count(step)):
            removed.append(remove_block(model, calibrated))
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate * schedule(step, num_steps, train.warmup, train.floor)
        inputs = data.batch(samples)
        ids = inputs["input_ids"]
        counted, top = data.counted_of(samples, ids.shape[1]), signals.top(samples, ids.shape[1])
        with torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bfloat16"):
            logits = logits_of(forward(model, inputs))
        hard = token_cross_entropy(logits.float(), ids, counted)
        soft = token_response_top_k(logits.float(), top, counted, temperature=1.0)
        optimizer.zero_grad()
        (0.5 * hard + 0.5 * soft).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
    return removed
