import pytest
import torch

from rlkd.agents.planner.surrogate import PhaseSurrogate, SurrogateConfig, Trained, _features, _forward, _networks
from rlkd.envs import CONTROLS, OBSERVATIONS
from rlkd.envs.schedule import EXIT

UNIT, TEMPERATURE = CONTROLS.index("unit_keep"), CONTROLS.index("temperature")
TEACHER = OBSERVATIONS.index("teacher_accuracy")
PREFERENCE = OBSERVATIONS.index("preference_accuracy")
START = torch.full((9,), 0.5)
CONFIG = SurrogateConfig(num_members=3, critic_hidden=32, actor_hidden=16, num_steps=400, weight_decay=0.01)


def trainings(count: int, seed: int = 0) -> Trained:
    """A scenario by hand: accuracy is 1 less the square of how far the temperature is from the teacher's accuracy, and
    0.2 more if none leaves early; latency saved is 1 less the share of units kept."""
    g = torch.Generator().manual_seed(seed)
    seen = torch.rand(count, len(OBSERVATIONS), generator=g)
    settings = torch.rand(count, 1, 9, generator=g)
    settings[:, 0, EXIT] = torch.rand(count, generator=g).round()
    off = settings[:, 0, TEMPERATURE] - seen[:, TEACHER]
    accuracy = 0.7 - off.square() + 0.2 * settings[:, 0, EXIT]
    saved = 1 - settings[:, 0, UNIT]
    return Trained((seen,), settings, torch.stack([accuracy, saved, saved], dim=-1))


def fitted(config: SurrogateConfig = CONFIG, num_rounds: int = 4) -> PhaseSurrogate:
    surrogate = PhaseSurrogate(0, 0, 1, START, config, torch.Generator().manual_seed(1))
    for _ in range(num_rounds):
        surrogate.fit(trainings(1500))
    return surrogate


@pytest.fixture(scope="module")
def surrogate() -> PhaseSurrogate:
    return fitted()


def asked(count: int, accuracy_weight: float) -> torch.Tensor:
    seen = torch.rand(count, len(OBSERVATIONS), generator=torch.Generator().manual_seed(5))
    seen[:, PREFERENCE : PREFERENCE + 3] = torch.tensor([accuracy_weight, 0.75, 0.25]) * torch.tensor(
        [1.0, 1 - accuracy_weight, 1 - accuracy_weight]
    )
    return seen


def test_it_plans_what_is_best_for_the_task_and_the_preference(surrogate: PhaseSurrogate) -> None:
    seen = asked(200, 0.9)
    plan = surrogate.network().decide(seen)[:, 0]  # [200, 9]
    assert (plan[:, TEMPERATURE] - seen[:, TEACHER]).abs().mean() < 0.15
    assert (plan[:, EXIT] == 1.0).all()  # where the actor begins the samples all leave at the first exit
    assert plan[:, UNIT].mean() < 0.15


def test_before_any_training_it_plans_the_start() -> None:
    blank = PhaseSurrogate(0, 0, 1, torch.full((9,), 0.3), CONFIG, torch.Generator().manual_seed(1))
    plan = blank.propose(asked(5, 0.6), torch.zeros(5, dtype=torch.int64))[:, 0]
    others = [i for i in range(9) if i != EXIT]
    torch.testing.assert_close(plan[:, others], torch.full((5, 8), 0.3))
    assert (plan[:, EXIT] == 0.0).all()


def test_explorers_differ_from_the_actor_and_from_each_other(surrogate: PhaseSurrogate) -> None:
    seen = asked(50, 0.6)
    plans = [surrogate.propose(seen, torch.full((50,), m)) for m in range(4)]
    for i in range(4):
        for j in range(i):
            assert (plans[i] - plans[j]).abs().mean() > 1e-3


def test_it_doubts_tasks_unlike_those_it_knows() -> None:
    surrogate = PhaseSurrogate(0, 0, 1, START, CONFIG, torch.Generator().manual_seed(1))
    known = trainings(1500)
    rare = known.observations[0].clone()
    rare[:, TEACHER] = 0.3 + 0.2 * rare[:, TEACHER]  # poor teachers and excellent ones were never seen
    for _ in range(3):
        surrogate.fit(Trained((rare,), known.settings, known.terms))
    near, far = asked(300, 0.6), asked(300, 0.6)
    near[:, TEACHER], far[:, TEACHER] = 0.4, 0.8
    assert surrogate.doubt(far).mean() > surrogate.doubt(near).mean()


def test_the_same_generator_gives_the_same_networks() -> None:
    quick = SurrogateConfig(num_members=2, critic_hidden=8, actor_hidden=8, num_steps=5)
    one, two = (fitted(quick, 1).network() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.layers, two.layers, strict=True))


def test_the_exit_is_told_by_its_kind_and_by_the_last_phase_alone() -> None:
    settings = torch.full((4, 2, 9), 0.5)
    settings[:, 1, EXIT] = torch.tensor([0.0, 0.15, 1.0, 0.5])
    settings[3, 0, EXIT] = 1.0
    told = _features(settings)[:, -3:]
    torch.testing.assert_close(told[0], told[1])  # both let all leave at the first exit
    assert told[:, 0].tolist() == [1.0, 1.0, -1.0, -1.0]
    assert told[:, 1].tolist() == [-1.0, -1.0, 1.0, -1.0]
    assert told[3, 2] == 0.0


def test_networks_side_by_side_are_each_on_its_own() -> None:
    layers = [t.detach() for t in _networks(3, 4, 5, 2, torch.Generator().manual_seed(0))]
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    together = _forward(layers, x)
    for e in range(3):
        alone = _forward([t[e : e + 1] for t in layers], x)[0]
        torch.testing.assert_close(together[e], alone)


def test_a_fact_that_never_varied_does_not_move_the_plan() -> None:
    surrogate = PhaseSurrogate(0, 0, 1, START, CONFIG, torch.Generator().manual_seed(1))
    known, column = trainings(400), OBSERVATIONS.index("latency_saving_exit")
    seen = known.observations[0].clone()
    seen[:, column] = 0.42
    surrogate.fit(Trained((seen,), known.settings, known.terms))
    usual, unusual = asked(20, 0.6), asked(20, 0.6)
    usual[:, column], unusual[:, column] = 0.42, 0.9
    network = surrogate.network()
    torch.testing.assert_close(network.decide(usual), network.decide(unusual), atol=1e-4, rtol=0.0)
    unusual[:, TEACHER] += 0.5
    assert (network.decide(usual) - network.decide(unusual)).abs().max() > 1e-3
