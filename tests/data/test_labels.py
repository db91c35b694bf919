"""Labels meet a model's classes by one rule: for every spelling the right class, or one line that refuses it."""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.data.labels import NumberedName, class_names, describe_matches, match_labels
from rlkd.errors import UserError

SORTED = ["0", "1", "10", "11", *(str(i) for i in range(2, 10))]  # names as a string sort of the numbers orders them
DEFAULT = [f"LABEL_{i}" for i in range(12)]


@dataclass
class Config:
    """The part of a transformers configuration that names classes."""

    id2label: dict[Any, Any]
    label2id: dict[str, int] | None = None
    problem_type: str | None = None


def numbers(labels: list[Any], names: list[str], **options: Any) -> list[int]:
    places = [("data.csv", row) for row in range(1, len(labels) + 1)]
    return match_labels(labels, names, places, **options)[0].tolist()  # type: ignore[no-any-return]


def refused(labels: list[Any], names: list[str], **options: Any) -> str:
    with pytest.raises(UserError) as error:
        numbers(labels, names, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "spell", [int, str, float, lambda i: f"{i}.0", np.int64, np.float32, Decimal, lambda i: f" {i}"]
)
def test_numbers_are_found_among_names_that_are_numbers(spell: Callable[[int], Any]) -> None:
    assert numbers([spell(i) for i in range(12)], SORTED) == [SORTED.index(str(i)) for i in range(12)]
    assert numbers([spell(i) for i in (3, 1, 2)], ["1", "2", "3"]) == [2, 0, 1]


@pytest.mark.parametrize(
    "spell", [int, str, float, lambda i: f"{i}.0", lambda i: f"LABEL_{i}", lambda i: f"label_{i}", Decimal]
)
def test_numbers_mean_the_number_in_default_names(spell: Callable[[int], Any]) -> None:
    assert numbers([spell(i) for i in range(12)], DEFAULT) == list(range(12))
    assert numbers([spell(1), spell(2)], DEFAULT[:3]) == [1, 2]  # no row has the first class: nothing is shifted
    turned = ["LABEL_2", "LABEL_0", "LABEL_1"]
    assert numbers([spell(0), spell(2)], turned) == [1, 0]


def test_numbered_names_mean_their_names() -> None:
    column = ["pos", "neutral", "neg"]
    cells = [NumberedName(column[i], i) for i in (0, 1, 2, 0)]
    assert numbers(cells, ["neg", "neutral", "pos"]) == [2, 1, 0, 2]
    assert numbers(cells, ["LABEL_0", "LABEL_1", "LABEL_2"]) == [0, 1, 2, 0]
    ratings = [NumberedName(str(i + 1), i) for i in range(3)]
    assert numbers(ratings, ["1", "2", "3"]) == [0, 1, 2]
    assert "name and number mean two classes" in refused(ratings[:2], ["LABEL_0", "LABEL_1", "LABEL_2"])


def test_truth_values() -> None:
    assert numbers([True, False], ["False", "True"]) == [1, 0]
    assert numbers([True, False], ["true", "false"]) == [0, 1]
    assert numbers([True, np.bool_(False)], ["LABEL_0", "LABEL_1"]) == [1, 0]
    assert numbers([True, False], ["0", "1"]) == [1, 0]
    assert "'True'" in refused([True], ["neg", "pos"])


def test_case_is_folded_only_where_that_stays_unique() -> None:
    assert numbers(["A", "a", "B"], ["A", "a", "B"]) == [0, 1, 2]
    assert numbers(["A", "a", "b"], ["A", "a", "B"]) == [0, 1, 2]
    assert numbers(["POS", " neg "], ["neg", "pos"]) == [1, 0]
    assert numbers(["cafe\u0301"], ["caf\u00e9", "bar"]) == [0]  # the same text, composed and decomposed
    assert "would both be the class 'a'" in refused(["A", "a", "B"], ["a", "b"])
    assert "got label 'ä'" in refused(["ä"], ["a", "b"])
    assert "got label 'STRASSE'" in refused(["STRASSE"], ["strasse", "straße"])


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (0.5, "row 2: got label '0.5'"),
        ("0.5", "row 2: got label '0.5'"),
        (2.5, "got label '2.5'"),
        (-1, "got label '-1'"),
        (3, "got label '3'; allowed: the model's classes [LABEL_0, LABEL_1, LABEL_2]"),
        ("1_0", "got label '1_0'"),
        ("neg", "--columns.classes [a,b,...] tells the names of the numbers"),
        ([0, 1, 0], "row 2: got a label of type list"),
        ({"a": 1}, "type dict"),
        (None, "row 2: got no label"),
        (float("nan"), "row 2: got no label"),
        (float("inf"), "type float (inf)"),
        (b"1", "type bytes"),
    ],
)
def test_everything_else_is_refused_with_its_row(label: Any, words: str) -> None:
    assert words in refused([1, label], DEFAULT[:3])


def test_numbers_are_no_place_among_names() -> None:
    message = refused([0, 1], ["neg", "pos"])
    assert message == (
        "data.csv: row 1: got label '0'; allowed: the model's classes [neg, pos]; "
        "--columns.classes [a,b,...] tells the names of the numbers 0, 1, ..."
    )
    assert numbers([0, "1", 1.0], ["neg", "pos"], classes=["pos", "neg"]) == [1, 0, 0]
    assert numbers(["pos", 1], ["LABEL_0", "LABEL_1"], classes=["pos", "neg"]) == [0, 1]
    assert numbers(["LABEL_1", "pos"], ["LABEL_0", "LABEL_1"], classes=["pos", "neg"]) == [1, 0]
    assert "got 1 names; allowed: 2" in refused([0], ["LABEL_0", "LABEL_1"], classes=["pos"])
    assert "every name once" in refused([0], ["LABEL_0", "LABEL_1"], classes=["pos", "pos"])
    assert "got label '2'" in refused([2], ["neg", "pos"], classes=["pos", "neg"])
    assert "got label '1'" in refused([1], ["neg", "pos"], classes=["pos", "other"])


def test_names_of_numbers_that_no_label_needs_are_refused() -> None:
    words = "columns.classes: got [pos, neg], which no label needs: all are names of the model's classes ["
    for labels in (["neg", "pos"], ["NEG"], [NumberedName("neg", 0)]):
        assert words in refused(labels, ["neg", "pos"], classes=["pos", "neg"])
    assert words in refused(["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"], classes=["pos", "neg"])
    assert numbers(["neg", 0], ["neg", "pos"], classes=["pos", "neg"]) == [0, 1]  # one number is enough
    assert numbers(["POS"], ["LABEL_0", "LABEL_1"], classes=["pos", "neg"]) == [0]


def test_names_that_are_equal_numbers_match_exactly_or_not_at_all() -> None:
    assert numbers(["01", "1"], ["01", "1"]) == [0, 1]
    assert "got label '1.0'" in refused(["1.0"], ["01", "1"])
    assert numbers([1, "1"], ["1.0", "0.5"]) == [0, 0]
    assert numbers([0.1], ["1.0", "0.1"]) == [1]  # a fraction that is a name


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (Config({0: "neg", 1: "pos"}), ("neg", "pos")),
        (Config({"1": "pos", "0": "neg"}), ("neg", "pos")),
        (Config({0: "neg", 1: "pos"}, {"LABEL_0": 0, "LABEL_1": 1}), ("neg", "pos")),
        (Config({0: "neg", 1: "pos"}, {"pos": 1, "neg": 0}), ("neg", "pos")),
        (Config({0: "LABEL_0", 1: "LABEL_1"}, {"pos": 0, "neg": 1}), ("pos", "neg")),
        (Config({0: 1, 1: 2}), ("1", "2")),
        (Config({0: "a", 1: "b"}, None, "single_label_classification"), ("a", "b")),
    ],
)
def test_names_come_from_id2label(config: Config, names: tuple[str, ...]) -> None:
    assert class_names(config, "m") == names


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config({0: "neg", 1: "pos"}, {"pos": 0, "neg": 1}), "contradict each other"),
        (Config({0: "LABEL_0", 1: "LABEL_1"}, {"a": 0, "b": 1, "c": 2}), "got class numbers [0, 1, 2]"),
        (Config({1: "neg", 2: "pos"}), "got class numbers [1, 2] in id2label; allowed: 0 to 1"),
        (Config({0: "neg", 1: "neg"}), "two classes are called 'neg'"),
        (Config({0: None, 1: "neg"}), "got class name None"),
        (Config({0: "LABEL_0"}), "with 1 output, as a regression has"),
        (Config({0: "a", 1: "b"}, None, "multi_label_classification"), "a model for multi label classification"),
        (Config({0: "a", 1: "b"}, None, "regression"), "a model for regression"),
    ],
)
def test_models_that_do_not_name_one_class_a_sample_are_refused(config: Config, words: str) -> None:
    with pytest.raises(UserError) as error:
        class_names(config, "models/bert")
    assert words in str(error.value)
    assert str(error.value).startswith("models/bert: ")


def test_the_mapping_is_a_table() -> None:
    _, matches = match_labels(["1", 1, "LABEL_0"], DEFAULT[:2], [("a.csv", row) for row in (1, 2, 3)])
    lines = describe_matches(matches).splitlines()
    assert lines[0].split() == [
        "label",
        "in",
        "the",
        "data",
        "rows",
        "class",
        "name",
        "of",
        "the",
        "class",
        "matched",
        "by",
    ]
    assert [line.split(maxsplit=4) for line in lines[1:]] == [
        ["LABEL_0", "1", "0", "LABEL_0", "name"],
        ["1", "1", "1", "LABEL_1", "number in LABEL_<i>"],
        ["1", "1", "1", "LABEL_1", "number in LABEL_<i>"],
    ]


def one_line(error: UserError) -> None:
    assert "\n" not in str(error)


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=6)
NAMES = st.one_of(
    st.lists(WORDS.filter(str.strip), min_size=2, max_size=9, unique=True),
    st.integers(2, 12).map(lambda n: [f"LABEL_{i}" for i in range(n)]),
    st.integers(2, 12).flatmap(lambda n: st.permutations([str(i) for i in range(n)])),
    st.integers(2, 12).flatmap(lambda n: st.permutations([str(i + 1) for i in range(n)])),
    st.sampled_from([["A", "a", "B"], ["True", "False"], ["neg", "neutral", "pos"], ["01", "1", "1.0"], ["0.5", "1"]]),
)
SPELLINGS: list[Callable[[str], Any]] = [
    lambda name: name,
    str.upper,
    str.lower,
    lambda name: f" {name}",
    lambda name: int(name.removeprefix("LABEL_")),
    lambda name: float(name.removeprefix("LABEL_")),
    lambda name: f"{int(name.removeprefix('LABEL_'))}.0",
    lambda name: name.removeprefix("LABEL_"),
    lambda name: Decimal(name.removeprefix("LABEL_")),
    lambda name: np.int64(name),
    lambda name: {"true": True, "false": False}[name.lower()],
]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_perfect_teacher_stays_perfect_or_the_labels_are_refused(data: st.DataObject) -> None:
    """Rows mean classes at random; each is written in some spelling of the class's name."""
    names = data.draw(NAMES)
    truth = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=20))  # some classes are missing
    spell = data.draw(st.sampled_from(SPELLINGS))
    try:
        labels = [spell(names[i]) for i in truth]
    except (ValueError, ArithmeticError, KeyError):
        return  # no such spelling of these names
    try:
        given_numbers = numbers(labels, names)
    except UserError as error:
        one_line(error)
        assert labels != [names[i] for i in truth], "exact names were refused"
        return
    for label, i, number in zip(labels, truth, given_numbers, strict=True):
        # a spelling such as "A" for "a" may be another class's exact name: then that class is right
        assert number == i or (isinstance(label, str) and label == names[number])
