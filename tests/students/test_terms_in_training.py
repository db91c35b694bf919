"""Terms beyond the default four in training: lock-step and solo agree, and their modules learn."""

import dataclasses

import pytest
import torch

from rlkd.data import draw_task
from rlkd.envs import Scenario
from rlkd.errors import UserError
from rlkd.losses import TERMS, LossConfig
from rlkd.models import StudentConfig, build_student
from rlkd.students import Controls, Population, SoloStudent, TrainConfig
from rlkd.students.adapted import OFFERED
from rlkd.teachers import Signals, compute_signals, load_teachers
from rlkd.teachers.signals import EXTRA

TRAIN = TrainConfig(steps_per_window=3, batch_size=12)
STUDENT = StudentConfig(widths=(12, 12), exits=(1,))
CHAINS = OFFERED | set(EXTRA) | {"teacher_logits", "teacher_features", "student_map", "teacher_map"}
POSSIBLE = [name for name, entry in TERMS.items() if CHAINS.issuperset(entry.needs)]
CONTROLS = Controls(
    torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([2.0]), torch.ones(1), torch.ones(1), torch.ones(1),
    torch.tensor([3e-3]),
)  # fmt: skip


@pytest.fixture(scope="module")
def signals(scenario: Scenario) -> Signals:
    teachers = load_teachers(scenario.config.teacher, scenario.data)
    return compute_signals(teachers, scenario.data, tuple(EXTRA))


def test_chains_offer_what_most_terms_need() -> None:
    missing = set(TERMS) - set(POSSIBLE)
    assert missing == {"transformer_attention", "value_relation", "mutual"}


def test_all_possible_terms_train_alike_in_lock_step_and_alone(double_scenario: Scenario, signals: Signals) -> None:
    scenario = double_scenario
    more = {name: signal.double() for name, signal in signals.more.items()}
    double = dataclasses.replace(scenario.signals, more=more)
    loss = LossConfig(tuple(POSSIBLE))
    structure = build_student(STUDENT, scenario.data.input_shape, scenario.data.num_classes)
    tasks = [draw_task(seed, scenario.config.task, scenario.data, 3) for seed in range(2)]
    together = Population(structure, scenario.data, double, 2, TRAIN, loss=loss)
    together.reset(tasks)
    start = together.state_dict()
    both = Controls(**{f.name: getattr(CONTROLS, f.name).repeat_interleave(2, 0) for f in dataclasses.fields(CONTROLS)})
    telemetry = together.train_window(both)
    for row, task in enumerate(tasks):
        structure = build_student(STUDENT, scenario.data.input_shape, scenario.data.num_classes)
        alone = SoloStudent(structure, scenario.data, double, config=TRAIN, loss=loss)
        alone.reset([task])
        single = alone.train_window(CONTROLS)
        torch.testing.assert_close(telemetry.losses[row], single.losses[0], atol=1e-7, rtol=1e-6)
        for name, parameter in alone.state_dict().items():
            torch.testing.assert_close(together.state_dict()[name][row], parameter[0], atol=1e-8, rtol=1e-6)
    own = [name for name in start if name.startswith("terms.")]
    assert {name.split(".")[1] for name in own} == {"fsp", "crd", "adversarial"}
    assert all(not torch.equal(start[name], together.state_dict()[name]) for name in own)


def test_default_terms_have_no_parameters_of_their_own(scenario: Scenario) -> None:
    structure = build_student(STUDENT, scenario.data.input_shape, scenario.data.num_classes)
    names = SoloStudent(structure, scenario.data, scenario.signals, config=TRAIN).state_dict()
    assert not [name for name in names if name.startswith("terms.")]


def test_a_term_whose_signal_was_not_computed_is_refused(scenario: Scenario) -> None:
    structure = build_student(STUDENT, scenario.data.input_shape, scenario.data.num_classes)
    with pytest.raises(UserError, match="jacobian needs teacher_input_gradient"):
        SoloStudent(
            structure, scenario.data, scenario.signals, config=TRAIN, loss=LossConfig(("cross_entropy", "jacobian"))
        )


def test_a_chain_has_one_hint_and_no_stages(scenario: Scenario) -> None:
    structure = build_student(STUDENT, scenario.data.input_shape, scenario.data.num_classes)
    with pytest.raises(UserError, match=r"loss\.stages: got 2"):
        SoloStudent(structure, scenario.data, scenario.signals, config=TRAIN, loss=LossConfig(stages=2))
