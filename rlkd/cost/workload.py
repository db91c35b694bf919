"""Count the work of an inference exactly, from kept inputs and units and from exit rates, without a clock."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlkd.compression.selection import exit_ends
from rlkd.models import ChainStudent, layers_of, num_positions


@dataclass(frozen=True)
class Workload:
    """Work of one inference with early exits; means over samples, or expectations over a batch. Each [N]."""

    macs: Tensor  # multiply-accumulates a sample
    activations: Tensor  # values written a sample: outputs of layers and heads
    weights: Tensor  # parameters read by a batch
    layers: Tensor  # layers and heads run by a batch
    decisions: Tensor  # exit decisions run by a batch
    decided: Tensor  # exit decisions a sample
    gathers: Tensor  # 1 where inputs are selected, else 0
    inputs: Tensor  # input values read a sample
    parameters: Tensor  # of the compacted student

    def regressors(self, batch_size: int) -> Tensor:
        """Return [N, 8], the regressors of a batch's latency (`CostProfile`)."""
        return torch.stack(
            [
                torch.ones_like(self.layers),
                self.layers,
                batch_size * self.macs,
                batch_size * self.activations,
                self.decisions,
                batch_size * self.decided,
                self.gathers,
                batch_size * self.gathers * self.inputs,
            ],
            dim=-1,
        ).double()


REGRESSORS = ("call_s", "layer_s", "mac_s", "activation_s", "decision_s", "decided_s", "gather_s", "gathered_s")


def workload(
    student: ChainStudent, kept: Tensor, exit_rates: Tensor, *, exit_threshold: Tensor, batch_size: int
) -> Workload:
    """Count the work of the compacted student (`rlkd.compression.compact`) with these masks and exits.

    A block runs for a batch if any of its samples reaches it, which has probability 1 - (1 - r)^B for a share r of
    samples. Early heads are absent if the threshold lets no sample leave early, and everything behind the first exit is
    absent if it lets all samples leave; neither case computes a decision.

    Args:
        student: gives the structure.
        kept: [N, G] inputs and units of every block that are kept.
        exit_rates: [N, E] share of samples that leave at each exit.
        exit_threshold: [N].
        batch_size: B.
    """
    always, never = exit_ends(exit_threshold, student.num_classes)  # each [N]
    kept = kept.double()
    reach = torch.ones(len(kept), dtype=torch.float64)  # [N] share of samples that get to this block
    macs, activations, weights, layers, decisions, decided, parameters = torch.zeros(7, len(kept), dtype=torch.float64)
    has_block = torch.ones_like(reach)  # [N], 1 where the compacted student has this block
    is_full = torch.as_tensor(kept[:, 0] >= student.group_sizes[0])
    for block, layer in enumerate(layers_of(student.layers), start=1):
        positions = num_positions(student.is_conv, student.input_shape, block)
        kernel = layer.weight[0, 0].numel()
        fan_in = kept[:, block - 1] * (student.input_shape[0] if student.is_conv and block == 1 else 1) * kernel
        runs = 1 - (1 - reach) ** batch_size  # [N]
        macs += reach * fan_in * kept[:, block] * positions
        activations += reach * kept[:, block] * positions
        weights += runs * (fan_in + 1) * kept[:, block]
        layers += runs
        parameters += has_block * (fan_in + 1) * kept[:, block]
        if block not in student.exits:
            continue
        exit_index = student.exits.index(block)
        is_last = exit_index == len(student.exits) - 1
        present = torch.ones_like(reach) if is_last else (~never).double()  # [N]
        macs += present * reach * kept[:, block] * positions * student.num_classes
        activations += present * reach * student.num_classes
        weights += present * runs * (kept[:, block] * positions + 1) * student.num_classes
        layers += present * runs
        parameters += present * has_block * (kept[:, block] * positions + 1) * student.num_classes
        if not is_last:
            decides = present * (~always).double()  # [N]
            decisions += decides * runs
            decided += decides * reach
            if student.gates:  # one more linear layer, from C + 1 values to one
                macs += decides * reach * (student.num_classes + 1)
                activations += decides * reach
                weights += decides * runs * (student.num_classes + 2)
                layers += decides * runs
                parameters += decides * has_block * (student.num_classes + 2)
            has_block = has_block * (~always).double()
            reach = (reach - exit_rates[:, exit_index].double()).clamp_min(0.0)
    gathers = (~is_full).double()
    num_inputs = kept[:, 0] * (torch.Size(student.input_shape).numel() if student.is_conv else 1)
    return Workload(macs, activations, weights, layers, decisions, decided, gathers, num_inputs, parameters)


def dense_workload(student: ChainStudent, batch_size: int) -> Workload:
    """Count the work of the dense student, the denominator of every ratio. Fields [1]."""
    kept = torch.tensor([student.group_sizes])
    rates = torch.zeros(1, len(student.exits))
    return workload(student, kept, rates, exit_threshold=torch.ones(1), batch_size=batch_size)
