"""Work of one inference of a real student, counted in a dry pass: MACs, values written, weights read.

MACs of linear layers and convolutions come from hooks, MACs of attention from torch's operation counter. Masked units
and heads count as removed, as the shipped student lacks them; keys and values that several heads share stay. A block
that is skipped costs nothing. A layer
between two groups of units shrinks with both. Tokens
that are left out count as absent from later blocks (attention's own products shrink with the square of the kept share).
Blocks behind an exit count for the samples that reach them, in a language model for whole texts unless every token has
left.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rlkd.compression.selection import exit_ends
from rlkd.models.real.attachment import Plan
from rlkd.models.real.hooks import forward, tensor_at

NONE_LEFT = 1e-6  # rates are single precision
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
}
COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Work(NamedTuple):
    """MACs, values written, weights read."""

    macs: float
    activations: float
    weights: float


class ReadWork(NamedTuple):
    """Work of a layer that reads units of a group that another block has, or that the layer's own units follow on."""

    work: Work  # shrinks with the product of the kept shares
    groups: tuple[int, ...]  # of the plan, from 0


@dataclass(frozen=True)
class BlockWork:
    """Work of one block for one sample, in parts that shrink with different kept shares."""

    fixed: Work
    groups: tuple[Work, ...]  # one a group of the plan in this block; shrinks with the group's kept units
    reads: tuple[ReadWork, ...]
    products_macs: float  # attention's two products; shrink with the kept heads and the square of the kept tokens
    parameters: float  # of the whole block, norms too


@dataclass(frozen=True)
class ModuleWork:
    """Work of a whole student for one sample."""

    before: Work  # ahead of the blocks
    blocks: tuple[BlockWork, ...]
    after: Work  # behind the blocks: the model's own head
    after_reads: tuple[ReadWork, ...]  # the part of it that reads units of a group
    after_parameters: float  # of what runs behind the blocks alone
    exits: tuple[Work, ...]
    parameters: float  # of the whole model, embeddings and norms too

    @property
    def dense_macs(self) -> float:
        """MACs of the dense student."""
        return self.dense.macs

    @property
    def dense(self) -> Work:
        """Work of the dense student, from its input to its last head."""
        products = Work(sum(block.products_macs for block in self.blocks), 0.0, 0.0)
        inner = [part for block in self.blocks for part in (block.fixed, *block.groups)]
        reads = [read.work for part in (*(block.reads for block in self.blocks), self.after_reads) for read in part]
        return _sum([self.before, *inner, *reads, products, self.after])

    @property
    def shapes(self) -> tuple[int, ...]:
        """For each block the number of its shape: blocks of equal work have one number."""
        seen: dict[BlockWork, int] = {}
        return tuple(seen.setdefault(block, len(seen)) for block in self.blocks)


@torch.no_grad()
def count_work(model: nn.Module, inputs: Mapping[str, Tensor], plan: Plan) -> ModuleWork:
    """Count the work of one dry pass.

    Args:
        model: the student without its attachments.
        inputs: of one sample, unpadded: [1, ...].
        plan: of the student.
    """
    leaves: dict[str, Work] = {}
    order: list[str] = []
    handles = []
    products = _Products()
    for path in plan.blocks:
        block = model.get_submodule(path)
        handles.append(block.register_forward_pre_hook(lambda *_, path=path: products.enter(path)))
        handles.append(block.register_forward_hook(lambda *_: products.enter("")))
    for name, module in model.named_modules():
        if isinstance(module, COUNTED) or type(module).__name__ == "Conv1D":

            def hook(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                work = _leaf_work(module, tensor_at(output, 0, name))
                before = leaves.get(name, Work(0, 0, 0))  # a layer that runs several times reads its weights each time
                leaves[name] = Work(*(a + b for a, b in zip(before, work, strict=True)))
                order.append(name)

            handles.append(module.register_forward_hook(hook))
    was_training = model.training
    try:
        with products:
            forward(model.eval(), inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    inside = {name for name in leaves if any(name.startswith(f"{block}.") or name == block for block in plan.blocks)}
    first = min((order.index(name) for name in inside), default=len(order))
    before = [leaves[n] for n in leaves if n not in inside and order.index(n) < first]
    before += [Work(max(0.0, products.macs[""] - sum(leaves[n].macs for n in leaves if n not in inside)), 0.0, 0.0)]
    behind = [n for n in leaves if n not in inside and order.index(n) > first]
    after_reads = [_read(model, plan, leaves[n], n) for n in behind if _group_read(plan, n) is not None]
    after = _less(_sum([leaves[n] for n in behind]), [read.work for read in after_reads])
    blocks = []
    for index, path in enumerate(plan.blocks):
        blocks.append(_block_work(model, plan, index, leaves, products.macs[path]))
    answers = next(iter(inputs.values())).shape[1] if plan.per_token else 1
    exits = tuple(
        Work(
            answers * plan.widths[b - 1] * plan.num_classes,
            answers * plan.num_classes,
            (plan.widths[b - 1] + 1) * plan.num_classes,
        )
        for b in plan.exits
    )
    return ModuleWork(
        before=_sum(before),
        blocks=tuple(blocks),
        after=after,
        after_reads=tuple(after_reads),
        after_parameters=_num_parameters(*(model.get_submodule(path) for path in plan.after)),
        exits=exits,
        parameters=_num_parameters(model),
    )


def _num_parameters(*modules: nn.Module) -> float:
    return float(sum({id(p): p.numel() for module in modules for p in module.parameters()}.values()))


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the MACs of matrix products and convolutions for each block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[str] = Counter()
        self._block = ""

    def enter(self, block: str) -> None:
        """Count the following operations for `block`; "" is outside of all blocks."""
        self._block = block

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        count = FLOPS.get(func.overloadpacket)
        if count is None:
            with self:
                inside = func.decompose(*args, **given)
            if inside is not NotImplemented:
                return inside
        out = func(*args, **given)
        if count is not None:
            self.macs[self._block] += count(*args, **given, out_val=out) // 2
        return out


def _leaf_work(module: nn.Module, output: Tensor) -> Work:
    weight = torch.as_tensor(module.weight)
    per_output = weight[0].numel() if isinstance(module, COUNTED) else weight.shape[0]  # Conv1D is [in, out]
    return Work(output.numel() * per_output, output.numel(), sum(p.numel() for p in module.parameters()))


def _block_work(model: nn.Module, plan: Plan, number: int, leaves: Mapping[str, Work], total_macs: float) -> BlockWork:
    path = plan.blocks[number]
    inside = {name: work for name, work in leaves.items() if name == path or name.startswith(f"{path}.")}
    total, products = _sum(list(inside.values())), max(0.0, total_macs - sum(work.macs for work in inside.values()))
    groups, reads = [], []
    writers = {name: index for index, group in enumerate(plan.groups) for name in group.writers}
    for group in (group for group in plan.groups if group.block == number):
        parts = []
        for name in (name for name in group.writers if name in inside):
            if _group_read(plan, name) is None:
                parts.append(inside[name])
            else:  # a layer between two groups
                read = _read(model, plan, inside[name], name)
                reads.append(read._replace(groups=(*read.groups, writers[name])))
                parts.append(_less(inside[name], [read.work]))
        if group.reader in inside and group.reader not in writers:
            parts.append(_read(model, plan, inside[group.reader], group.reader).work)
        groups.append(_sum(parts))
    for name in (name for name in inside if name not in writers):
        index = _group_read(plan, name)
        if index is not None and plan.groups[index].block != number:
            reads.append(_read(model, plan, inside[name], name))
    fixed = _less(total, [*groups, *(read.work for read in reads)])
    norms = [_num_parameters(*map(model.get_submodule, g.norms)) for g in plan.groups if g.block == number]
    groups = [g._replace(weights=g.weights + extra) for g, extra in zip(groups, norms, strict=True)]
    return BlockWork(fixed, tuple(groups), tuple(reads), products, _num_parameters(model.get_submodule(path)))


def _group_read(plan: Plan, name: str) -> int | None:
    """Return the group, from 0, whose units the layer `name` reads; None where it reads no group."""
    return next((index for index, group in enumerate(plan.groups) if group.reader == name), None)


def _read(model: nn.Module, plan: Plan, work: Work, name: str) -> ReadWork:
    """Return the part of a layer's work that shrinks with the units that it reads."""
    index = _group_read(plan, name)
    assert index is not None
    return ReadWork(Work(work.macs, 0, torch.as_tensor(model.get_submodule(name).weight).numel()), (index,))


def _sum(parts: Sequence[Work]) -> Work:
    return Work(*(float(sum(part[i] for part in parts)) for i in range(3)))


def _less(whole: Work, parts: Sequence[Work]) -> Work:
    return Work(*(float(value - sum(part[i] for part in parts)) for i, value in enumerate(whole)))


@dataclass(frozen=True)
class Use:
    """Expected work of one batch under some controls."""

    total: Work  # of one sample, but weights are those that the batch reads
    outside_macs: float  # of one sample, ahead of the blocks, behind them and in exits
    runs: tuple[float, ...]  # for each shape of block: how many of them a batch runs
    linear_macs: tuple[float, ...]  # for each shape of block, of one sample: layers
    products_macs: tuple[float, ...]  # for each shape of block, of one sample: products of attention
    num_decisions: float  # exits at which a batch decides who leaves
    decided: float  # samples over which they decide, for each sample of the batch
    selects: float  # 1 where tokens are left out


def shares_kept(plan: Plan, kept: Tensor) -> list[float]:
    """Return the kept share of every group's units in the shipped student; groups that are not cut keep all.

    Args:
        plan: of the student.
        kept: [G], token positions, then units of every group.
    """
    return [
        group.settled(float(count)) / group.size if group.kind in plan.cuts else 1.0
        for group, count in zip(plan.groups, kept[1:].tolist(), strict=False)
    ]


def use_of(
    work: ModuleWork, plan: Plan, kept: Tensor, exit_rates: Tensor, threshold: Tensor, *, batch_size: int
) -> Use:
    """Add up what a batch runs.

    Args:
        work: of the student.
        plan: of the student.
        kept: [G], token positions and units of every group that are kept.
        exit_rates: [E].
        threshold: [] or [1], of the exits.
        batch_size: samples of the batch.
    """
    always, never = (bool(end) for end in exit_ends(threshold, plan.num_classes))
    shares, tokens_kept = shares_kept(plan, kept), float(kept[0]) / plan.num_positions
    shapes = work.shapes
    runs, linear, products = ([0.0] * len(set(shapes)) for _ in range(3))
    outside, reach, num_decisions, decided = [work.before], 1.0, 0.0, 0.0
    inside = []
    skipped = plan.skipped(kept[1:].tolist()) if plan.order else ()
    first = 0  # group of the block
    for position, block in enumerate(work.blocks):
        run = 1.0 - (1.0 - reach) ** batch_size
        tokens = tokens_kept if plan.select_after is not None and position >= plan.select_after else 1.0
        own = range(first, first + len(block.groups))
        first += len(block.groups)
        scaled = [_scaled(g, shares[i]) for g, i in zip(block.groups, own, strict=True)]
        part = _sum([block.fixed, *scaled, *_scaled_reads(block.reads, shares)])
        heads = min((shares[i] for i in own if plan.groups[i].kind == "heads"), default=1.0)
        multiplied = tokens * tokens * heads * block.products_macs
        if position + 1 not in skipped:
            shape = shapes[position]
            runs[shape] += run
            linear[shape] += reach * tokens * part.macs
            products[shape] += reach * multiplied
            inside.append(
                Work(reach * (tokens * part.macs + multiplied), reach * tokens * part.activations, run * part.weights)
            )
        if position + 1 in plan.exits and not never:
            index = plan.exits.index(position + 1)
            head = work.exits[index]
            outside.append(Work(reach * head.macs, reach * head.activations, run * head.weights))
            if not always:
                num_decisions += run
                decided += reach
            reach = 0.0 if always else max(0.0, reach - float(exit_rates[index]))
            if plan.per_token:  # tokens that left stay in the text: the others attend to them
                reach = float(reach > NONE_LEFT)
    run, after = 1.0 - (1.0 - reach) ** batch_size, _sum([work.after, *_scaled_reads(work.after_reads, shares)])
    outside.append(Work(reach * after.macs, reach * after.activations, run * after.weights))
    return Use(
        total=_sum([*outside, *inside]),
        outside_macs=_sum(outside).macs,
        runs=tuple(runs),
        linear_macs=tuple(linear),
        products_macs=tuple(products),
        num_decisions=num_decisions,
        decided=decided,
        selects=float(plan.select_after is not None and tokens_kept < 1.0),
    )


def num_parameters(work: ModuleWork, plan: Plan, kept: Tensor, threshold: Tensor) -> float:
    """Count the parameters of the shipped student: without cut units and without what no sample reaches."""
    always, never = (bool(end) for end in exit_ends(threshold, plan.num_classes))
    exits = () if never else plan.exits[:1] if always else plan.exits
    depth = exits[0] if always and exits and plan.cuts_depth else len(work.blocks)
    shares = shares_kept(plan, kept)
    skipped = plan.skipped(kept[1:].tolist()) if plan.order else ()
    gone = sum(block.parameters for block in work.blocks[depth:])
    gone += work.after_parameters if depth < len(work.blocks) else 0.0
    first = 0
    for number, block in enumerate(work.blocks[:depth], start=1):
        if number in skipped:
            gone += block.parameters
        else:
            gone += sum((1.0 - shares[first + i]) * group.weights for i, group in enumerate(block.groups))
            gone += _weights_gone(block.reads, shares)
        first += len(block.groups)
    if depth == len(work.blocks):
        gone += _weights_gone(work.after_reads, shares)
    if plan.per_token:  # an exit adds a norm and answers through the model's own head
        return work.parameters - gone + sum(plan.widths[block - 1] for block in exits)
    return work.parameters - gone + sum(head.weights for head in work.exits[: len(exits)])


def _weights_gone(reads: Sequence[ReadWork], shares: Sequence[float]) -> float:
    """Count the weights that `reads` lose."""
    left = sum(work.weights for work in _scaled_reads(reads, shares))
    return sum(read.work.weights for read in reads) - left


def _scaled_reads(reads: Sequence[ReadWork], shares: Sequence[float]) -> list[Work]:
    """Return the work that is left of `reads`."""
    return [_scaled(read.work, math.prod(shares[index] for index in read.groups)) for read in reads]


def _scaled(work: Work, share: float) -> Work:
    return Work(*(share * value for value in work))
