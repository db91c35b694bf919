"""`rlkd signals`: write a teacher's answers to data into a folder, for `rlkd distil --teacher_signals`."""

import os
from pathlib import Path

from rlkd.cli.arguments import new_parser, parse
from rlkd.configs.signals import SignalsConfig
from rlkd.errors import UserError
from rlkd.runs.folder import use_one_thread
from rlkd.runs.signals import write_signals


def run(argv: list[str]) -> int:
    """Write one shard, and say whether the folder is complete."""
    parser = new_parser(
        "signals",
        "Write a teacher's answers to data as shards of a folder, for rlkd distil --teacher_signals: computed here, "
        "asked of a server, or imported. Several processes, on several machines, write a shard each.",
        [
            "--teacher models/smollm --data novels --out answers",
            "--teacher models/smollm --data novels --out answers --shard 1/4",
            "--teacher models/large --data novels --teacher_url http://localhost:8000/v1 --top_k 20 --out answers",
            "--teacher models/large --data novels --import_file top20.safetensors --out answers",
        ],
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--shard",
        type=str,
        default="",
        help="I/N: the I-th (from 1) of N shards; under torchrun, by default, each process's",
    )
    config, options = parse(parser, argv, SignalsConfig)
    assert config is not None
    number, total = _shard(options.shard)
    use_one_thread()
    done = write_signals(config, options.out, number, total)
    found, state = done.described, "written" if done.is_new else "there already"
    size = f"{found.num_samples} samples, {found.k} of {found.vocabulary} a position"
    print(f"shard {number + 1} of {total}: {state}; {size}")
    print(f"{options.out}: {'complete' if done.is_complete else 'other shards are still missing'}")
    return 0


def _shard(text: str) -> tuple[int, int]:
    """Return number (from 0) and total of a shard."""
    if not text:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise UserError(f"--shard: got {text!r:.20}; allowed: I/N, such as 1/4")
    return int(first) - 1, int(second)
