"""`rlkd verify`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkd.cli.arguments import check_seed, new_parser, parse
from rlkd.cli.configfile import MAX_CONFIG_BYTES, plain_yaml
from rlkd.cli.main import FAILED, OK, one_line
from rlkd.cli.progress import Bar
from rlkd.configs import CompareConfig, DistilConfig, ExperimentConfig
from rlkd.errors import UserError
from rlkd.io.files import inside, read_bytes
from rlkd.runs.folder import use_one_thread
from rlkd.runs.verify import Row, read_result, verify_compare, verify_distil, verify_real_distil, verify_train

NUM_SHOWN = 3  # differences of one row


def run(argv: list[str]) -> int:
    """Compute a run's final table again and print every row; 1 if one of them does not hold."""
    parser = new_parser(
        "verify",
        "Compute the final table of a train, compare or distil run again from what it saved, and compare row by row. "
        "Exit code 1: a row does not hold.",
        ["runs/first", "runs/compare --policy runs/first/policy"],
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--policy", type=Path | None, default=None, help="of a compare run, where it is now; by default where it was"
    )
    _, options = parse(parser, argv)
    use_one_thread()
    rows = _rows(Path(options.run), options.policy)
    for row in rows:
        print(f"{'differs' if row.differences else 'holds':<8} {one_line(row.name)}")
        for difference in row.differences[:NUM_SHOWN]:
            print(f"{'':<8}   {one_line(difference)}")
        if len(row.differences) > NUM_SHOWN:
            print(f"{'':<8}   and {len(row.differences) - NUM_SHOWN} more")
    wrong = [row.name for row in rows if row.differences]
    if not wrong:
        print(f"all {len(rows)} rows hold")
        return OK
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    print(f"rlkd: {one_line(wrong[0])}{more} of {len(rows)} rows differ from what the run saved", file=sys.stderr)
    return FAILED


def _rows(folder: Path, policy: Path | None) -> list[Row]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    read_result(folder)
    tree = _config_tree(folder)
    if "data" in tree:
        from rlkd.envs.real_config import RealConfig  # the extra hf

        return verify_real_distil(folder, config_of_run(folder, RealConfig)[0])
    if "methods" in tree:
        compared, seed = config_of_run(folder, CompareConfig)
        with Bar(compared.train.steps_per_window) as bar:
            return verify_compare(folder, compared, seed, progress=bar, policy=policy)
    if "ppo" in tree:
        trained, seed = config_of_run(folder, ExperimentConfig)
        with Bar(trained.steps_per_window) as bar:
            return verify_train(folder, trained, seed, bar)
    return verify_distil(folder, *config_of_run(folder, DistilConfig))


def _config_tree(folder: Path) -> Mapping[str, Any]:
    """Read the sections of the run's config.yaml, which show what kind of run it was."""
    path = inside(folder, "config.yaml")
    text = read_bytes(path, MAX_CONFIG_BYTES).decode("utf-8", errors="replace")
    tree = plain_yaml(text, str(path))
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: not a run's config; give the folder of a train, compare or distil run")
    return tree


def config_of_run(folder: Path, config_class: type[Any]) -> tuple[Any, int]:
    """Return the config and the seed of the run in a folder."""
    parser = new_parser("verify", "", [])
    parser.add_argument("--seed", type=int, default=0)
    if not hasattr(config_class, "policy"):
        parser.add_argument("--policy", type=Path)  # of a distil run, which stands beside its config
    config, options = parse(parser, ["--config", str(folder / "config.yaml")], config_class)
    assert config is not None
    check_seed(options.seed)
    config.check()
    return config, options.seed
