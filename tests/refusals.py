"""The check that a command line refuses mistakes in one line each."""

from collections.abc import Callable, Mapping, Sequence

import pytest


def check_refusals(
    call: Callable[[str, Sequence[str]], int],
    cases: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Call each case; it must return exit code 2, and its last line on standard error must hold the case's words.

    Args:
        call: given the name of a case and its options.
        cases: options and words by name.
        capsys: of the test.
    """
    for name, (options, words) in cases.items():
        assert call(name, options) == 2, name
        error = capsys.readouterr().err
        line = error.strip().splitlines()[-1]
        assert line.startswith("rlkd: "), (name, error)
        assert "Traceback" not in error, name
        assert [word for word in words if word not in line] == [], (name, line)
