"""The generated family: a function of the name, with an error that its difficulty sets."""

from itertools import pairwise

import pytest
import torch

from rlkd.data import TaskDistribution, load_dataset
from rlkd.data.generated import MODES, Recipe, generate, parse_name
from rlkd.errors import UserError


def test_a_name_determines_the_data_set() -> None:
    name = "generated:seed=3,classes=5,inputs=12,difficulty=0.3"
    first, second = load_dataset(name), load_dataset(name)
    assert first.name == name
    assert (first.input_shape, first.num_classes) == ((12,), 5)
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.labels, second.labels)
    assert torch.cat(list(first.splits.values())).sort().values.tolist() == list(range(5000))
    assert not torch.equal(first.inputs, load_dataset(name.replace("seed=3", "seed=4")).inputs)


def test_names_have_one_full_spelling() -> None:
    full = "generated:seed=0,classes=8,inputs=32,difficulty=0.2"
    assert load_dataset("generated").name == full
    assert parse_name("generated:difficulty=0.20,classes=8").name == full
    assert parse_name(full) == Recipe()
    tiny = Recipe(difficulty=1e-5)
    assert parse_name(tiny.name) == tiny


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("", "allowed: generated:key=value"),
        ("noise=1", "seed, classes, inputs, difficulty once at most"),
        ("seed=1,seed=2", "once at most"),
        ("seed=1,", "once at most"),
        ("seed", "got seed=''"),
        ("seed=-1", "got seed='-1'"),
        ("seed=1_0", "a whole number from 0"),
        ("seed= 1", "a whole number from 0"),
        ("classes=1", "a whole number from 2 to 100"),
        ("inputs=1.5", "a whole number from 2 to 1024"),
        ("difficulty=0.91", r"a number from 0\.0 to 0\.9"),
        ("difficulty=0.1_5", r"a number from 0\.0 to 0\.9"),
        ("difficulty=nan", r"a number from 0\.0 to 0\.9"),
        ("difficulty=hard", r"a number from 0\.0 to 0\.9"),
    ],
)
def test_other_names_are_refused_in_one_line(rest: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        TaskDistribution(dataset=f"generated:{rest}").check()
    assert "\n" not in str(error.value)


def bayes_hits(recipe: Recipe) -> float:
    """Accuracy of the classifier that knows each cluster's mean and spread, measured from the samples themselves."""
    data, g = generate(recipe), torch.Generator().manual_seed(recipe.seed)
    num_clusters = recipe.classes * MODES
    torch.randn(num_clusters, recipe.inputs, generator=g, dtype=torch.float64)  # the centres come first
    picked = torch.randint(num_clusters, (5000,), generator=g)
    assert torch.equal(picked // MODES, data.labels)
    clusters = [data.inputs[picked == cluster].double() for cluster in range(num_clusters)]
    means = torch.stack([samples.mean(0) for samples in clusters])
    spread = torch.stack([samples.var(0) for samples in clusters]).mean(0).sqrt()
    distance = torch.cdist(data.inputs.double() / spread, means / spread)
    votes = (-0.5 * distance.square()).softmax(1).reshape(-1, recipe.classes, MODES).sum(-1)
    return (votes.argmax(1) == data.labels).float().mean().item()


def test_difficulty_sets_the_best_accuracy() -> None:
    hits = []
    for difficulty in (0.0, 0.1, 0.3, 0.6, 0.9):
        recipe = Recipe(seed=1, classes=4, inputs=16, difficulty=difficulty)
        hits.append(bayes_hits(recipe))
        # The means above are estimated from some 400 samples a cluster, hence the tolerance.
        assert hits[-1] == pytest.approx(recipe.best_accuracy, abs=0.03)
    assert all(a > b + 0.03 for a, b in pairwise(hits))


def test_classes_are_about_equally_common_and_inputs_bounded() -> None:
    data = load_dataset("generated")
    counts = torch.bincount(data.labels, minlength=8)
    assert counts.min() > 5000 / 8 * 0.8
    assert data.inputs.abs().max() <= 4
    assert data.inputs[data.splits["train"]].double().std(0).sub(1).abs().max() < 0.02
    assert MODES > 1
