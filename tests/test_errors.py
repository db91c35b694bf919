import pytest

from rlkd.errors import LONGEST, UserError, closest


@pytest.mark.parametrize(("given", "hint"), [("trian", "train"), ("distill", "distil"), ("compair", "compare")])
def test_a_slip_gets_a_hint(given: str, hint: str) -> None:
    assert closest(given, ["train", "distil", "compare"]) == f"; did you mean {hint}?"


@pytest.mark.parametrize("given", ["run", "mnist", "learn", "trace", ""])
def test_a_word_that_is_far_from_all_names_gets_none(given: str) -> None:
    assert closest(given, ["train", "distil", "compare", "fashion_mnist"]) == ""


def test_a_long_message_loses_its_middle() -> None:
    text = str(UserError("a" * 5000 + "end"))
    assert len(text) <= LONGEST
    assert text.endswith("end")
