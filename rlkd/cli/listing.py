"""`rlkd list`."""

from rlkd.agents.baselines.methods import METHODS
from rlkd.agents.baselines.teacher_weights import learn_teacher_weights
from rlkd.cli.arguments import CONFIG_FOLDER, config_names, new_parser, parse
from rlkd.data import DATASETS
from rlkd.envs.action import CONTROLS
from rlkd.envs.observation import OBSERVATIONS
from rlkd.losses import TERMS, MemoryCRD
from rlkd.models.adapters import Bottleneck, DomainNorm
from rlkd.models.layer_mapping import LayerHints, map_layers
from rlkd.teachers.augmented import hard_samples, mixup, noisy_logits
from rlkd.teachers.data_free import distil_without_data
from rlkd.teachers.several import TeacherGate, chain, confidence_weights, mean_weights

# What the literature calls it -> the function or class of a training loop.
TEACHING = {
    "mean teachers": mean_weights,
    "confidence (ca-mkd)": confidence_weights,
    "gate": TeacherGate,
    "mtkd-rl": learn_teacher_weights,
    "teacher assistant": chain,
    "born-again": chain,
    "data-free": distil_without_data,
    "noisy logits": noisy_logits,
    "mixup": mixup,
    "hard samples": hard_samples,
    "crd memory": MemoryCRD,
    "progressive": LayerHints,
    "layer mapping": map_layers,
    "bottleneck adapter": Bottleneck,
    "domain adaptation": DomainNorm,
}


def run(argv: list[str]) -> int:
    """Print what there is."""
    what = "List data sets, students, loss terms, methods, configs, controls and observations."
    parse(new_parser("list", what, [""]), argv)
    sections = {
        "data sets (--task.dataset)": {name: _first_line(make) for name, make in DATASETS.items()},
        "students (--student.kind)": {
            "mlp": "linear blocks; --student.widths, --student.exits",
            "conv": "3x3 convolutions, each halving height and width; the same options",
        },
        "loss terms (--loss.terms, by the family whose weight they share)": {
            name: f"{term.family}: {term.summary}" for name, term in TERMS.items()
        },
        "teachers and samples (Python)": {name: _first_line(thing) for name, thing in TEACHING.items()},
        "methods (rlkd compare --methods)": {name: method.meaning for name, method in METHODS.items()},
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
    lines = (thing.__doc__ or "").strip().splitlines()
    return lines[0] if lines else "no description"
