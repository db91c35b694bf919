"""Standard output and standard error that cannot be written, and what a user is not shown."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlkd.cli.output import shown_messages
from rlkd.cli.progress import Bar

CALL = [sys.executable, "-c", "import sys; from rlkd.cli.main import main; sys.exit(main())"]


def shell(command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `command` with $RLKD standing for the command line."""
    env = {**os.environ, "PY": sys.executable, "CODE": CALL[2], **more}
    return subprocess.run(
        ["bash", "-c", command.replace("$RLKD", '"$PY" -c "$CODE"')],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=env,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "verb",
    [
        "list",
        "--help",
        "--version",
        pytest.param("calibrate --student.widths [8] --student.exits []", marks=pytest.mark.slow),
    ],
)
def test_a_full_device_names_standard_output(verb: str, tmp_path: Path) -> None:
    done = shell(f"$RLKD {verb} > /dev/full", tmp_path)
    assert done.stderr == (
        "rlkd: standard output: cannot write it, the disk is full (No space left on device); free some room, then run "
        "it again\n"
    )
    assert done.returncode == 2


@pytest.mark.slow
def test_closed_streams_end_in_one_line_or_in_silence(tmp_path: Path) -> None:
    done = shell("$RLKD list >&-", tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "rlkd: standard output is closed; redirect it to a file or to /dev/null\n",
    )
    assert shell("$RLKD trian 2>&-", tmp_path).returncode == 2
    done = shell("$RLKD trian 2>/dev/full", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    done = shell("set -o pipefail; $RLKD list | head -c 1", tmp_path)
    assert done.stderr == ""
    assert done.stdout == "d"


def test_characters_that_a_terminal_cannot_show_are_escaped(tmp_path: Path) -> None:
    done = shell("$RLKD analyze 'läuft'", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr == "rlkd: l\\xe4uft: no such run folder\n"


@pytest.mark.slow
def test_warnings_of_libraries_are_shown_only_on_request(tmp_path: Path) -> None:
    noisy = (
        "import sys, warnings; from rlkd.cli import listing, main; run = listing.run\n"
        "def loud(argv):\n    warnings.warn('glyph missing'); return run(argv)\n"
        "listing.run = loud; sys.argv = ['rlkd', 'list']; sys.exit(main.main())"
    )
    shown = [
        subprocess.run([sys.executable, *flags, "-c", noisy], capture_output=True, text=True, check=True).stderr
        for flags in ([], ["-W", "default"])
    ]
    assert shown[0] == ""
    assert "glyph missing" in shown[1]


def test_ctrl_c_while_libraries_are_loaded_is_one_line(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, threading; from rlkd.cli.main import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests in the background of a shell ignore it
        "threading.Thread(target=lambda: (os.read(0, 1), os._exit(9)), daemon=True).start()\n"  # ends with the tests
        "print('ready', flush=True); sys.exit(main())"
    )
    call = [sys.executable, "-c", code, "bench", "--rounds", "1000"]
    reading, writing = os.pipe()  # whatever ends the tests closes the end for writing
    with os.fdopen(writing, "wb"), os.fdopen(reading, "rb") as stdin:
        run = subprocess.Popen(
            call, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=60)[1] == "rlkd: interrupted\n"
    assert run.returncode == 130


@pytest.mark.parametrize("has_bar", [False, True])
def test_messages_go_to_standard_error_as_they_are(has_bar: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("rlkd.io.cache")
    with shown_messages():
        if has_bar:
            with Bar(1):
                logger.info("[red]100 %[/red] of " + 90 * "x" + " is read")
        else:
            logger.info("[red]100 %[/red] of " + 90 * "x" + " is read")
        logger.warning("damaged")
        logger.debug("not for users")
    logger.info("after the command")
    assert capsys.readouterr() == ("", "[red]100 %[/red] of " + 90 * "x" + " is read\ndamaged\n")


def test_a_message_that_cannot_be_written_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "full.py").write_text(
        "import logging, rlkd.cli.listing\n"
        "from rlkd.cli.main import main\n"
        "rlkd.cli.listing.run = lambda argv: logging.getLogger('rlkd.io').warning('damaged')\n"
        "raise SystemExit(main(['list']))\n"
    )
    done = shell('"$PY" full.py 2>/dev/full', tmp_path)
    assert done.returncode == 2


def test_the_library_leaves_logging_to_its_user(tmp_path: Path) -> None:
    code = (
        "import logging, rlkd.runs.train, rlkd.cli.main\n"
        "loggers = [logging.getLogger(name) for name in (None, 'rlkd')]\n"
        "assert [logger.handlers for logger in loggers] == [[], []]\n"
        "assert logging.getLogger('rlkd').level == logging.NOTSET\n"
    )
    assert shell(f'"$PY" -c "{code}"', tmp_path).stderr == ""
