"""`rlkd list`."""

from rlkd.agents.baselines.methods import METHODS
from rlkd.cli.arguments import CONFIG_FOLDER, config_names, new_parser, parse
from rlkd.data import DATASETS
from rlkd.envs.action import CONTROLS
from rlkd.envs.observation import OBSERVATIONS
from rlkd.losses import TERMS


def run(argv: list[str]) -> int:
    """Print what there is."""
    parse(new_parser("list", "List tasks, models, terms, controllers and configs.", [""]), argv)
    sections = {
        "data sets (--task.dataset)": {name: _first_line(make) for name, make in DATASETS.items()},
        "students (--student.kind)": {
            "mlp": "linear blocks; --student.widths, --student.exits",
            "conv": "3x3 convolutions, each halving height and width; the same options",
        },
        "loss terms (--loss.terms, by the family whose weight they share)": {
            name: f"{term.family}: {term.summary}" for name, term in TERMS.items()
        },
        "controllers (rlkd compare --methods)": {name: method.meaning for name, method in METHODS.items()},
        "configs (--config)": {
            name: (CONFIG_FOLDER / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ") for name in config_names()
        },
    }
    for title, entries in sections.items():
        print(title)
        width = max(map(len, entries))
        for name, what in entries.items():
            print(f"  {name:<{width}}  {what}")
        print()
    print(f"controls, in the order of an action: {', '.join(CONTROLS)}\n")
    print(f"observations: {', '.join(OBSERVATIONS)}")
    return 0


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]
