"""Cost of one inference of a real student: MACs counted in a dry pass, latency from two measured points.

MACs of linear layers and convolutions come from hooks, MACs of attention from torch's operation counter. Masked units
and heads count as removed. Tokens that are left out count as absent from later blocks (attention's own products shrink
with the square of the kept share). Blocks behind an exit count for the samples that reach them, in a language model for
whole texts unless every token has left. Latency is a line through two measured batch sizes of the dense student:
overhead and time of one MAC. The latency that pruning saves is therefore modelled, not measured.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rlkd.compression.selection import exit_ends
from rlkd.cost.profile import ENERGY_MODEL, MAX_FIGURE, Cost, machine
from rlkd.cost.timing import time_calls
from rlkd.errors import UserError
from rlkd.io.files import number, read_json, reason, write_whole
from rlkd.models.real.attachment import Plan
from rlkd.models.real.blocks import Group
from rlkd.models.real.hooks import forward, tensor_at

FORMAT = 1
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


@dataclass(frozen=True)
class BlockWork:
    """Work of one block for one sample, in parts that shrink with different kept shares."""

    fixed: Work
    units: Work  # shrinks with the kept hidden units or inner channels
    heads: Work  # shrinks with the kept heads
    products_macs: float  # attention's two products; shrink with the kept heads and the square of the kept tokens


@dataclass(frozen=True)
class ModuleWork:
    """Work of a whole student for one sample."""

    before: Work  # ahead of the blocks
    blocks: tuple[BlockWork, ...]
    after: Work  # behind the blocks: the model's own head
    exits: tuple[Work, ...]
    parameters: float  # of the whole model, embeddings and norms too

    @property
    def dense_macs(self) -> float:
        """MACs of the dense student."""
        inner = sum(b.fixed.macs + b.units.macs + b.heads.macs + b.products_macs for b in self.blocks)
        return self.before.macs + inner + self.after.macs


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
    after = [leaves[n] for n in leaves if n not in inside and order.index(n) > first]
    blocks = []
    for index, path in enumerate(plan.blocks):
        blocks.append(_block_work(path, index, plan, leaves, products.macs[path]))
    answers = next(iter(inputs.values())).shape[1] if plan.per_token else 1
    exits = tuple(
        Work(
            answers * plan.widths[b - 1] * plan.num_classes,
            answers * plan.num_classes,
            (plan.widths[b - 1] + 1) * plan.num_classes,
        )
        for b in plan.exits
    )
    parameters = float(sum(p.numel() for p in model.parameters()))
    return ModuleWork(_sum(before), tuple(blocks), _sum(after), exits, parameters)


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


def _block_work(path: str, number: int, plan: Plan, leaves: Mapping[str, Work], total_macs: float) -> BlockWork:
    inside = {name: work for name, work in leaves.items() if name == path or name.startswith(f"{path}.")}
    shares: dict[str, list[str]] = {"units": [], "heads": []}
    for group in plan.groups:
        if group.block == number:
            shares[_shrinks_as(group)] += [n for n in inside if n in group.writers or n == group.reader]
    grouped = {name for names in shares.values() for name in names}
    fixed = [work for name, work in inside.items() if name not in grouped]
    products = max(0.0, total_macs - sum(work.macs for work in inside.values()))
    units, heads = (_sum([inside[n] for n in shares[kind]]) for kind in ("units", "heads"))
    return BlockWork(_sum(fixed), units, heads, products)


def _shrinks_as(group: Group) -> str:
    """Return the part of the work that a group shrinks; inner channels count as hidden units."""
    return "heads" if group.kind == "heads" else "units"


def _sum(parts: Sequence[Work]) -> Work:
    return Work(*(float(sum(part[i] for part in parts)) for i in range(3)))


@dataclass(frozen=True)
class ModuleProfile:
    """Work and speed of one student, from which the reward takes its costs."""

    plan: Plan
    work: ModuleWork
    batch_size: int
    overhead_s: float  # of a call with all blocks
    mac_s: float
    energy: dict[str, Any]
    provenance: dict[str, Any]

    def cost(self, kept: Tensor, exit_rates: Tensor, exit_threshold: Tensor) -> Cost:
        """Return the cost with ratios to the dense student, fields [1].

        Args:
            kept: [1, G], token positions and units of every group that are kept.
            exit_rates: [1, E].
            exit_threshold: [1].
        """
        now = self._costs(kept[0].double(), exit_rates[0].double(), exit_threshold)
        sizes = torch.tensor(self.plan.group_sizes, dtype=torch.float64)
        dense = self._costs(sizes, torch.zeros(len(self.plan.exits) + 1), torch.ones(1))
        ratios = [a / b for a, b in zip(now, dense, strict=True)]
        size = self._parameters(kept[0].double(), exit_threshold)
        values = (*now, *ratios, size, size / self.work.parameters)
        return Cost(*(torch.tensor([float(value)]) for value in values))

    def _parameters(self, kept: Tensor, threshold: Tensor) -> float:
        """Count the parameters without masked units and heads and without blocks that are never reached."""
        always, never = (bool(end) for end in exit_ends(threshold, self.plan.num_classes))
        share = self._shares(kept)
        last = self.plan.exits[0] if always and self.plan.exits else len(self.work.blocks)
        cut = 0.0
        for position, block in enumerate(self.work.blocks):
            if position >= last:
                cut += block.fixed.weights + block.units.weights + block.heads.weights
            else:
                cut += (1.0 - share.get(("units", position), 1.0)) * block.units.weights
                cut += (1.0 - share.get(("heads", position), 1.0)) * block.heads.weights
        exits = self.plan.exits[:1] if always else () if never else self.plan.exits
        if self.plan.per_token:  # an exit adds a norm and answers through the model's own head
            return self.work.parameters - cut + sum(self.plan.widths[block - 1] for block in exits)
        after = self.work.after.weights if always and exits else 0.0
        return self.work.parameters - cut - after + sum(head.weights for head in self.work.exits[: len(exits)])

    def _shares(self, kept: Tensor) -> dict[tuple[str, int], float]:
        """Return the kept share of every block's units and heads."""
        return {(_shrinks_as(g), g.block): float(kept[i + 1]) / g.size for i, g in enumerate(self.plan.groups)}

    def _costs(self, kept: Tensor, exit_rates: Tensor, threshold: Tensor) -> tuple[float, float, float]:
        """Return seconds of a batch, joules and MACs of a sample."""
        work, runs = self._work(kept, exit_rates, threshold)
        seconds = self.overhead_s * runs / len(self.work.blocks) + self.mac_s * work.macs * self.batch_size
        e = self.energy
        joules = (
            work.macs * e["mac_j"]
            + work.activations * e["activation_j"]
            + work.weights * e["weight_j"] / self.batch_size
        )
        return seconds, joules, work.macs

    def _work(self, kept: Tensor, exit_rates: Tensor, threshold: Tensor) -> tuple[Work, float]:
        """Return the mean work of a sample (weights: of a batch) and the mean number of blocks that a batch runs."""
        always, never = (bool(end) for end in exit_ends(threshold, self.plan.num_classes))
        share = self._shares(kept)
        tokens_kept = float(kept[0]) / self.plan.num_positions
        parts, reach, total_runs = [self.work.before], 1.0, 0.0
        for position, block in enumerate(self.work.blocks):
            runs = 1.0 - (1.0 - reach) ** self.batch_size
            total_runs += runs
            selected = self.plan.select_after is not None and position >= self.plan.select_after
            tokens = tokens_kept if selected else 1.0
            units, heads = share.get(("units", position), 1.0), share.get(("heads", position), 1.0)
            macs = tokens * (
                block.fixed.macs + units * block.units.macs + heads * (block.heads.macs + tokens * block.products_macs)
            )
            written = block.fixed.activations + units * block.units.activations + heads * block.heads.activations
            read = block.fixed.weights + units * block.units.weights + heads * block.heads.weights
            parts.append(Work(reach * macs, reach * tokens * written, runs * read))
            if position + 1 in self.plan.exits and not never:
                index = self.plan.exits.index(position + 1)
                head = self.work.exits[index]
                parts.append(Work(reach * head.macs, reach * head.activations, runs * head.weights))
                reach = 0.0 if always else max(0.0, reach - float(exit_rates[index]))
                if self.plan.per_token:  # tokens that left stay in the text: the others attend to them
                    reach = float(reach > NONE_LEFT)
        runs = 1.0 - (1.0 - reach) ** self.batch_size
        after = self.work.after
        parts.append(Work(reach * after.macs, reach * after.activations, runs * after.weights))
        return _sum(parts), total_runs

    def save(self, path: Path) -> None:
        """Write speed and counts as JSON."""
        card = {
            "format": FORMAT,
            "batch_size": self.batch_size,
            "overhead_s": self.overhead_s,
            "mac_s": self.mac_s,
            "energy": self.energy,
            "provenance": self.provenance,
            "dense_macs": self.work.dense_macs,
            "work": asdict(self.work),
        }
        write_whole(path, json.dumps(card, indent=1) + "\n")


def profile_module(model: nn.Module, inputs: Mapping[str, Tensor], plan: Plan, batch_size: int) -> ModuleProfile:
    """Count the student's work on one sample and time it at two batch sizes.

    Args:
        model: the student without its attachments, in evaluation mode.
        inputs: of one sample, [1, ...].
        plan: of the student.
        batch_size: samples of one inference; the second point is at a quarter of it, or at four times it below 4.
    """
    work = count_work(model, inputs, plan)
    sizes = (batch_size, batch_size // 4 if batch_size >= 4 else 4 * batch_size)
    batches = [{name: v.repeat_interleave(size, dim=0) for name, v in inputs.items()} for size in sizes]
    measured = time_calls([partial(forward, model, batch) for batch in batches])
    points = [(size * work.dense_macs, latency.median_s) for size, latency in zip(sizes, measured, strict=True)]
    (x1, y1), (x2, y2) = points
    mac_s = max((y1 - y2) / (x1 - x2), 0.0)
    overhead_s = max(y1 - mac_s * x1, 0.0) if mac_s else y1
    if overhead_s == 0.0:
        mac_s = y1 / x1
    provenance = {
        "machine": machine(),
        "latency": "a line through two measured batch sizes of the dense student",
        "points": [{"batch_size": size, "latency_s": y} for size, (_, y) in zip(sizes, points, strict=True)],
    }
    return ModuleProfile(plan, work, batch_size, overhead_s, mac_s, dict(ENERGY_MODEL), provenance)


def load_speed(path: Path, fresh: ModuleProfile) -> ModuleProfile:
    """Return `fresh` with the speed that an earlier run wrote for the same student, so costs repeat with the seed.

    Raises:
        UserError: the file is missing, or belongs to another student or batch size.
    """
    try:
        card = read_json(path, "a cost profile of a real student")
        given = (card["format"], card["batch_size"], card["dense_macs"])
        overhead_s, mac_s = (number(card[name], name, 0.0, MAX_FIGURE) for name in ("overhead_s", "mac_s"))
        if overhead_s + mac_s <= 0:
            raise ValueError("overhead_s and mac_s are 0")
        provenance = {**dict(card["provenance"]), "read_from": path.name}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a cost profile of a real student, or a damaged one ({reason(error):.120})"
        ) from error
    wanted = (FORMAT, fresh.batch_size, fresh.work.dense_macs)
    if given != wanted:
        raise UserError(
            f"{path}: got format, batch size and dense MACs {list(given)!s:.80}; allowed: {list(wanted)}, this "
            "student's"
        )
    return ModuleProfile(fresh.plan, fresh.work, fresh.batch_size, overhead_s, mac_s, dict(ENERGY_MODEL), provenance)
