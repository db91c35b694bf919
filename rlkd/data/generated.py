"""A family of generated classification problems whose best possible accuracy is known.

A data set of the family is its name: `generated:seed=3,classes=8,inputs=32,difficulty=0.2`. Every part may be left out.
"""

import math
import re
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlkd.data.samples import MOST_SAMPLES, DataSet, splits_in_order, standard_scale
from rlkd.errors import UserError

PREFIX = "generated"
MODES = 3  # Gaussian clusters of each class: with one, a linear student would be as good as any


@dataclass(frozen=True)
class Recipe:
    """What a generated data set is made from."""

    seed: int = 0
    classes: int = 8
    inputs: int = 32
    difficulty: float = 0.2
    """Best possible error as a share of chance's: no classifier beats 1 - difficulty (1 - 1 / classes)."""

    @property
    def name(self) -> str:
        """The one full spelling, so that the same data set never has two names."""
        return f"{PREFIX}:" + ",".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))

    @property
    def best_accuracy(self) -> float:
        """Expected accuracy of the Bayes classifier, which knows the clusters."""
        return 1.0 - self.difficulty * (1.0 - 1.0 / self.classes)


WHOLE = ("a whole number", r"\d{1,10}", int)
NUMBER = ("a number", r"\d+(\.\d+)?(e-\d+)?", float)
LIMITS = {"seed": (0, 2**32 - 1), "classes": (2, 100), "inputs": (2, 1024), "difficulty": (0.0, 0.9)}


def parse_name(name: str) -> Recipe:
    """Parse `generated` or `generated:key=value,...` into a recipe.

    Raises:
        UserError: an unknown or repeated key, or a value out of its range.
    """
    prefix, colon, rest = name.partition(":")
    given: dict[str, int | float] = {}
    for part in rest.split(",") if colon else ():
        key, _, text = part.partition("=")
        if prefix != PREFIX or key not in LIMITS or key in given:
            raise UserError(
                f"task.dataset: got {name!r}; allowed: {PREFIX}:key=value,... with {', '.join(LIMITS)} once at most"
            )
        low, high = LIMITS[key]
        kind, form, read = NUMBER if key == "difficulty" else WHOLE
        # Python itself would also take "1_000", " 3" and "nan".
        value = read(text) if re.fullmatch(form, text, re.ASCII) else -1
        if not low <= value <= high:
            raise UserError(
                f"task.dataset: got {key}={text!r} in {name!r}; allowed: {kind} from {low} to {high}, as in "
                f"{Recipe().name}"
            )
        given[key] = value
    return Recipe(**given)  # type: ignore[arg-type]  # the loop gave every key its own type


def _posterior(noise: Tensor, picked: Tensor, means: Tensor, deviation: float) -> Tensor:
    """Probability of each class for samples means[picked] + deviation noise.

    Args:
        noise: [S, D] float64, standard normal.
        picked: [S] int64, the cluster of each sample.
        means: [C * MODES, D] float64, clusters of class c being c * MODES up to (c + 1) * MODES.
        deviation: of every cluster in every direction.

    Returns:
        [S, C].
    """
    distance = torch.cdist(means[picked] / deviation + noise, means / deviation)  # [S, C * MODES]
    return (-0.5 * distance.square()).softmax(dim=1).reshape(len(noise), -1, MODES).sum(-1)


def _find_deviation(recipe: Recipe, noise: Tensor, picked: Tensor, means: Tensor) -> float:
    """Find the noise at which the mean accuracy of the Bayes classifier is the one of the recipe.

    The mean of the largest posterior estimates its accuracy with less variance than counting its hits.
    """
    low, high = math.log(1e-2), math.log(1e3)
    target = min(recipe.best_accuracy, 0.9999)  # at exactly 1 any noise below some value would do
    for _ in range(40):
        middle = (low + high) / 2
        accuracy = _posterior(noise, picked, means, math.exp(middle)).amax(dim=1).mean().item()
        low, high = (middle, high) if accuracy > target else (low, middle)
    return math.exp(low)


def generate(recipe: Recipe) -> DataSet:
    """Draw a mixture of MODES Gaussian clusters a class, all equally likely, with centres and samples from the seed.

    The problem is a function of the recipe alone; 2,000 / 1,000 / 2,000 samples. The same seed, classes and inputs
    give the same clusters and the same draws at every difficulty: only the noise grows.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    num_samples, num_clusters = sum(MOST_SAMPLES.values()), recipe.classes * MODES
    means = torch.randn(num_clusters, recipe.inputs, generator=generator, dtype=torch.float64)
    picked = torch.randint(num_clusters, (num_samples,), generator=generator)  # [S]
    noise = torch.randn(num_samples, recipe.inputs, generator=generator, dtype=torch.float64)
    deviation = _find_deviation(recipe, noise, picked, means)
    splits = splits_in_order(MOST_SAMPLES["train"] + MOST_SAMPLES["validation"], MOST_SAMPLES["test"])
    raw = means[picked] + deviation * noise  # [S, D]
    scale = standard_scale(raw, splits["train"])
    return DataSet(recipe.name, scale.apply(raw), picked // MODES, recipe.classes, splits, scale)
