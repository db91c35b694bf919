"""`rlkd VERB ...`: finds the verb, and turns a user's mistake into one line and exit code 2."""

import importlib
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import rlkd
from rlkd.cli.output import complain, named_streams, shown_messages
from rlkd.errors import UserError

VERBS = {
    "train": "learn a policy with PPO over a population of students, and compare it on held-out tasks",
    "tune": "search PPO's hyperparameters on the validation scenarios of an experiment",
    "distil": "distil a new student to a goal under a learned policy, in one training run",
    "search": "choose a student's depth, width and exits under cost limits, by short trainings",
    "policies": "the policies that come with rlkd, with their cards",
    "compare": "train the same tasks under several methods, paired",
    "evaluate": "metrics of a distilled student beside its teacher: agreement, calibration, robustness, classes",
    "signals": "write a teacher's answers to data as shards, computed here, asked of a server, or imported",
    "inspect-teacher": "whether a teacher suits a student, before any distillation",
    "verify": "compute a run's final table again from what it saved, and compare",
    "export": "write a student as ONNX, torch or transformers, checked against PyTorch on real samples",
    "measure": "latency, memory, size, work and energy of a student, beside another one or a teacher",
    "analyze": "figures and one HTML page from the event files of runs",
    "calibrate": "time compacted students on this machine and write a cost profile",
    "bench": "student updates per second: lock-step population against its baselines",
    "push": "upload a policy or a student to the Hugging Face hub",
    "pull": "download a policy or a student from the Hugging Face hub, and check it",
    "list": "data sets, students, loss terms, methods, configs, controls, observations",
}
MODULES = {"list": "listing", "inspect-teacher": "inspect_teacher"}  # where a verb's name is no name of a module
RENAMED = {"replay": "distil"}  # verbs that answer under their old name
OK, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def usage() -> str:
    """Return the help page of `rlkd` itself."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return (
        "usage: rlkd VERB [options]\n\nReinforcement-learning-guided knowledge distillation.\n\n"
        f"{verbs}\n\nrlkd VERB --help lists a verb's options. Examples:\n"
        "  rlkd train --out runs/first\n"
        "  rlkd distil --goal.keep 0.98\n"
        "  rlkd analyze runs/first\n\n"
        "exit codes: 0 done, 1 failed, 2 a mistake in the command or its files, 130 interrupted, "
        "143 terminated"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Called without `argv`, as the installed command is, it hides the warnings of libraries, about which a user can do
    nothing; `python -W` and PYTHONWARNINGS bring them back.
    """
    args = sys.argv[1:] if argv is None else argv
    if argv is None and not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        with named_streams(), shown_messages(), _quiet_libraries():
            verb, rest = _verb(args)
            if verb is None:
                return OK if args else USAGE
            code: int = importlib.import_module(f"rlkd.cli.{MODULES.get(verb, verb)}").run(rest)
            return code
    except UserError as error:
        complain(f"rlkd: {one_line(str(error))}")
        return USAGE
    except KeyboardInterrupt as error:
        is_signal = type(error) is not KeyboardInterrupt
        what = "terminated" if is_signal else "interrupted"
        complain(f"rlkd: {what}{f'; {one_line(str(error))}' if error.args else ''}")
        return TERMINATED if is_signal else INTERRUPTED
    except BrokenPipeError:
        return FAILED
    except (MemoryError, RuntimeError) as error:
        words = ("allocate memory", "out of memory")  # of the CPU's allocator and of a GPU's
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        complain(f"rlkd: not enough memory ({one_line(str(error)):.100}); ask for less at once")
        return USAGE
    except OSError as error:  # a folder that cannot be written or a full disk, in a library that raises no UserError
        if error.errno is None:
            raise
        from rlkd.io.files import write_error  # torch, which takes seconds to load, comes with it

        complain(f"rlkd: {one_line(str(write_error(error.filename or 'output', error)))}")
        return USAGE


def _verb(args: list[str]) -> tuple[str | None, list[str]]:
    """Return the verb and its arguments; print help or version, and return None, where these are asked for."""
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return None, []
    if args[0] == "--version":
        print(f"rlkd {rlkd.__version__}")
        return None, []
    if args[0] in RENAMED:
        complain(f"rlkd: {args[0]} is now called {RENAMED[args[0]]}")
        args = [RENAMED[args[0]], *args[1:]]
    if args[0] not in VERBS:
        from rlkd.errors import closest

        raise UserError(f"no verb {args[0]!r}; allowed: {', '.join(VERBS)}{closest(args[0], VERBS)}")
    return args[0], args[1:]


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide stable-baselines3's advice, and raise what a thread of TensorBoard cannot write once the block has ended."""
    with warnings.catch_warnings(), _failures_of_threads() as failures:
        # SB3 advises against 1 window an episode and the like on every start; errors stay errors
        warnings.filterwarnings("ignore", category=UserWarning, module="stable_baselines3")
        yield
    if failures:
        raise failures[0]


@contextmanager
def _failures_of_threads() -> Iterator[list[OSError]]:
    """Collect what the thread that writes event files cannot write, which it would print as a traceback."""
    failures: list[OSError] = []
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, OSError):
            failures.append(args.exc_value)
        else:
            before(args)

    threading.excepthook = hook
    try:
        yield failures
    finally:
        threading.excepthook = before


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, which names and values from a file may hold."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


if __name__ == "__main__":
    sys.exit(main())
