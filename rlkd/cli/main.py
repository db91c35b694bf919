"""`rlkd VERB ...`: finds the verb, and turns a user's mistake into one line and exit code 2."""

import importlib
import sys
import warnings

import rlkd
from rlkd.errors import UserError

VERBS = {
    "train": "learn a policy with PPO over a population of students, and compare it on held-out tasks",
    "replay": "distil a new student under a learned policy, in one training run",
    "compare": "train the same tasks under several controllers, paired",
    "analyze": "figures and one HTML page from the event files of runs",
    "calibrate": "time compacted students on this machine and write a cost profile",
    "bench": "student updates per second: lock-step population against its rivals",
    "list": "tasks, models, terms, controllers, configs",
}
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def usage() -> str:
    """The help page of `rlkd` itself."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return (
        "usage: rlkd VERB [options]\n\nReinforcement-learning-guided knowledge distillation.\n\n"
        f"{verbs}\n\nrlkd VERB --help tells a verb's options. Examples:\n"
        "  rlkd train --out runs/first\n"
        "  rlkd replay --policy runs/first/policy --preference.accuracy 0.9\n"
        "  rlkd analyze runs/first\n\n"
        "exit codes: 0 done, 1 failed, 2 a mistake in the command or its files, 130 interrupted"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return OK if args else USAGE
    if args[0] == "--version":
        print(f"rlkd {rlkd.__version__}")
        return OK
    try:
        if args[0] not in VERBS:
            from rlkd.cli.arguments import closest

            raise UserError(f"no verb {args[0]!r}; allowed: {', '.join(VERBS)}{closest(args[0], VERBS)}")
        with warnings.catch_warnings():
            # SB3 advises against 1 window an episode and the like on every start; errors stay errors
            warnings.filterwarnings("ignore", category=UserWarning, module="stable_baselines3")
            module = {"list": "listing"}.get(args[0], args[0])
            code: int = importlib.import_module(f"rlkd.cli.{module}").run(args[1:])
        return code
    except UserError as error:
        print(f"rlkd: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("rlkd: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
