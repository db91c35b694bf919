"""A plan: where the controls stand when no action changes them, decided phase by phase from what is observed.

An episode has a few phases, each with one setting. A fixed plan gives every student the same settings. A learned
one asks a network, when one of its phases begins, for the settings of that phase and of those after it: at the
beginning from the task features of the task and of the student, later from how the training goes, too. Networks read
standardised, clipped figures, so that an unusual student moves a plan no further than an unusual training task did.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlkd.envs.action import CONTROLS, EXIT_DEAD_ZONE, NUM_CONTROLS
from rlkd.envs.observation import OBSERVATIONS, SAVINGS
from rlkd.teachers.landmarks import LANDMARKS

PREFERENCE = ("preference_accuracy", "preference_latency", "preference_energy")
FACTS = (
    "input_spread",
    "teacher_accuracy",
    "teacher_entropy",
    "teacher_label_agreement",
    *(f"landmark_{name}" for name in LANDMARKS),
    "labels_per_class",
    "num_classes",
    *SAVINGS,
)
STATE = (
    "accuracy",
    "first_exit_accuracy",
    "last_exit_accuracy",
    "first_exit_loss",
    "last_exit_loss",
    "hard_label_loss",
    "response_loss",
    "feature_loss",
    "gradient_share_hard_label",
    "gradient_cosine",
    "teacher_agreement",
    "divergence",
    "unit_spread",
)
CLIP = 3.0  # of standardised figures
EXIT = CONTROLS.index("exit_threshold")
OTHERS = tuple(i for i in range(NUM_CONTROLS) if i != EXIT)
_PREFERENCE_CENTRE, _PREFERENCE_SCALE = (0.6, 0.3, 0.1), (0.2, 0.15, 0.1)


def phase_inputs(phase: int) -> tuple[str, ...]:
    """Observations that a network of this phase reads beside the preference."""
    return FACTS if phase == 0 else FACTS + STATE


def num_outputs(num_phases: int) -> int:
    """Outputs of a network that decides `num_phases` phases: eight controls each, and four numbers for one exit."""
    return len(OTHERS) * num_phases + 4


@dataclass(frozen=True)
class PhaseNetwork:
    """Two layers with SiLU from F figures and the preference to the settings of one phase and those after it."""

    phase: int  # whose beginning it decides at
    mean: Tensor  # [F], of `phase_inputs`
    deviation: Tensor  # [F] > 0
    layers: tuple[Tensor, ...]  # weight and bias of each: [F + 3, H], [H], [H, H], [H], [H, Q], [Q]

    def figures(self, observation: Tensor) -> Tensor:
        """[N, F + 3], what the network reads of `observation` [N, O]."""
        seen = standardised(observation, self.phase, self.mean, self.deviation)
        return torch.cat([seen, preference_figures(observation)], dim=-1)

    def decide(self, observation: Tensor) -> Tensor:
        """Settings [N, R, 9] of its phase and those after it, for `observation` [N, O]."""
        x = self.figures(observation)
        for layer in range(3):
            x = x @ self.layers[2 * layer] + self.layers[2 * layer + 1]
            x = F.silu(x) if layer < 2 else x
        scalars, inner, choice = split_outputs(x)
        return to_settings(scalars, exit_position(inner, choice))


@dataclass(frozen=True)
class ControlPlan:
    """What actions change: settings by phase, fixed, or decided by networks in the order of their phases."""

    starts: tuple[float, ...]  # share of the episode after which each of K phases begins; the first 0, ascending
    settings: Tensor  # [K, 9]; with networks, only what holds until the first of them has decided
    networks: tuple[PhaseNetwork, ...] = ()

    def begin(self, num_students: int) -> Tensor:
        """[N, K, 9], before anything is decided."""
        return self.settings.expand(num_students, *self.settings.shape).clone()

    def revise(self, held: Tensor, observation: Tensor, window: Tensor, num_windows: int) -> Tensor:
        """[N, K, 9], `held` after the networks whose phase begins at `window` ([N], windows done) have decided."""
        for network in self.networks:
            now = window == self.begins(network.phase, num_windows)  # [N]
            if now.any():
                held = held.clone()
                held[now, network.phase :] = network.decide(observation[now]).to(held.dtype)
        return held

    def now(self, held: Tensor, window: Tensor, num_windows: int) -> Tensor:
        """[N, 9], the settings of the phase that `window` ([N]) lies in."""
        begins = torch.tensor([self.begins(k, num_windows) for k in range(len(self.starts))])  # [K]
        phase = (window[:, None] >= begins).sum(-1) - 1  # [N]
        return held[torch.arange(len(held)), phase]

    def tensors(self) -> dict[str, Tensor]:
        """All of its tensors by name: `settings`, and `<i>.mean`, `<i>.deviation`, `<i>.layers.<k>` of network i."""
        named = {"settings": self.settings}
        for i, network in enumerate(self.networks):
            named |= {f"{i}.mean": network.mean, f"{i}.deviation": network.deviation}
            named |= {f"{i}.layers.{k}": tensor for k, tensor in enumerate(network.layers)}
        return named

    def begins(self, phase: int, num_windows: int) -> int:
        """The window, counted from 0, that a phase begins with."""
        return round(self.starts[phase] * num_windows)


def network_shapes(phase: int, num_phases: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's tensors by their names in `ControlPlan.tensors`, less the number in front."""
    num_figures, num_out = len(phase_inputs(phase)), num_outputs(num_phases - phase)
    sizes = ((num_figures + len(PREFERENCE), hidden), (hidden, hidden), (hidden, num_out))
    shapes: dict[str, tuple[int, ...]] = {"mean": (num_figures,), "deviation": (num_figures,)}
    for k, size in enumerate(sizes):
        shapes |= {f"layers.{2 * k}": size, f"layers.{2 * k + 1}": size[1:]}
    return shapes


def fixed_plan(settings: Tensor) -> ControlPlan:
    """The plan that has `settings` [K, 9] in K equal parts of every episode."""
    return ControlPlan(tuple(k / len(settings) for k in range(len(settings))), settings)


def standardised(observation: Tensor, phase: int, mean: Tensor, deviation: Tensor) -> Tensor:
    """[N, F], the figures of `phase_inputs` in `observation` [N, O], standardised and clipped."""
    columns = [OBSERVATIONS.index(name) for name in phase_inputs(phase)]
    return ((observation[:, columns] - mean) / deviation).clamp(-CLIP, CLIP)


def preference_figures(observation: Tensor) -> Tensor:
    """[N, 3], the preference on a scale of about one."""
    columns = [OBSERVATIONS.index(name) for name in PREFERENCE]
    return (observation[:, columns] - torch.tensor(_PREFERENCE_CENTRE)) / torch.tensor(_PREFERENCE_SCALE)


def split_outputs(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the other controls [*N, R, 8], an exit that decides [*N], logits of the kind of exit [*N, 3]."""
    scalars = torch.sigmoid(outputs[..., :-4])
    inner = EXIT_DEAD_ZONE + (1.0 - 2 * EXIT_DEAD_ZONE) * torch.sigmoid(outputs[..., -4])
    return scalars.reshape(*scalars.shape[:-1], -1, len(OTHERS)), inner, outputs[..., -3:]


def exit_position(inner: Tensor, choice: Tensor) -> Tensor:
    """Exit control [*N]: all leave at the first exit (0), none leaves early (1), or `inner` decides, by `choice`."""
    best = choice.argmax(-1)
    return torch.where(best == 0, torch.zeros_like(inner), torch.where(best == 1, torch.ones_like(inner), inner))


def to_settings(scalars: Tensor, exit_control: Tensor) -> Tensor:
    """[*N, R, 9] from the other controls [*N, R, 8] and one exit control [*N] for all R phases."""
    held = exit_control[..., None, None].expand(*scalars.shape[:-1], 1)
    return torch.cat([scalars[..., :EXIT], held, scalars[..., EXIT:]], dim=-1)
