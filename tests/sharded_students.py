"""Students and teachers with sharded weights beside whole ones, in every process that torchrun starts with this file.

    torchrun --nproc_per_node 2 tests/sharded_students.py FOLDER

Each process writes its tensors to FOLDER/INDEX.safetensors and the messages that it met to FOLDER/INDEX.json.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import module_students
import tiny_models
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlkd.data.anchors import Anchors
from rlkd.data.examples import TokenExamples, next_token_mask
from rlkd.errors import UserError
from rlkd.io import processes
from rlkd.models.real.attachment import AttachConfig, make_plan
from rlkd.models.real.hooks import link_places
from rlkd.models.real.instrumented import Instrumented
from rlkd.models.real.sharding import part
from rlkd.students.real.causal import CausalStudent
from rlkd.students.real.module import ModuleStudent
from rlkd.students.real.sharded import check_sharding
from rlkd.students.real.train_config import ModuleTrainConfig
from rlkd.students.rollback import Snapshot
from rlkd.teachers.real.module_signals import module_signals
from rlkd.teachers.real.sharded import shard_teacher
from rlkd.teachers.real.token_signals import token_signals

TRAIN = ModuleTrainConfig(steps_per_window=2, batch_size=8, micro_batches=2, learning_rate=1e-3, warmup=0.0)
CONTROLS = {"unit_keep": 0.5, "feature_keep": 0.6, "exit_threshold": 0.6}
CPU = torch.device("cpu")
V = 40


def bert(shard: bool) -> ModuleStudent:
    """A classifier of three blocks, whose exit, masks, tokens, hints and attention map are all in use."""
    return module_students.student_of(config=replace(TRAIN, shard=shard), attach=AttachConfig(hints="all"))


def ragged_texts() -> TokenExamples:
    """Some of them have one token, so that nothing in them is counted."""
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, V, (40, 8), generator=g)
    mask = (torch.arange(8) < torch.randint(1, 9, (40, 1), generator=g)).long()
    order = torch.arange(40)
    splits: Any = {"train": order[:24], "validation": order[24:32], "test": order[32:]}
    return TokenExamples(
        "toy", {"input_ids": ids * mask, "attention_mask": mask}, order * 0, V, splits, next_token_mask(mask)
    )


def llama(shard: bool) -> CausalStudent:
    """A language model with tied embeddings, checkpointed blocks, micro-batches of one text, and its teacher beside."""
    data = ragged_texts()
    student, teacher = tiny_models.tiny("llama", tie_word_embeddings=True), tiny_models.tiny("llama", seed=1, layers=3)
    inputs = data.batch(data.splits["train"][:2])
    plan, theirs = (make_plan(m, inputs, AttachConfig(), data.num_positions) for m in (student, teacher))
    links = link_places(student, teacher, plan.blocks[-1:], theirs.blocks, inputs, inputs)
    if shard:
        shard_teacher(teacher, theirs.blocks, inputs, CPU)
    signals = token_signals(teacher, theirs, [link.teacher for link in links], data, 5, Anchors(V, 1.0))
    config = replace(TRAIN, micro_batches=4, gradient_checkpointing=True, shard=shard)
    made = CausalStudent(Instrumented(student, plan, links), data, signals, config, 4, "js", teacher=teacher)
    made.reset([module_students.task(data)])
    return made


MAKERS = {"bert": bert, "llama": llama}


def train(student: ModuleStudent) -> dict[str, Tensor]:
    """Two windows; returns what they report, the states after each, and what this process holds."""
    told = module_students.controls(**CONTROLS)
    first = student.train_window(told)
    found = {f"state1.{name}": tensor for name, tensor in student.training_state().items()}
    second = student.train_window(told)
    student.set_controls(told)
    metrics = student.evaluate("validation")
    found |= {f"state2.{name}": tensor for name, tensor in student.training_state().items()}
    for i, telemetry in enumerate((first, second)):
        found[f"losses{i}"], found[f"norms{i}"] = telemetry.losses, telemetry.gradient_norms
        found[f"cosine{i}"] = telemetry.gradient_cosine
    found |= {
        "accuracy": metrics.accuracy,
        "exit_loss": metrics.exit_loss,
        "kept": metrics.kept,
        "spread": metrics.spread,
    }
    found["probe"] = student.probe(torch.tensor([1.0]), torch.tensor([0.3]))
    student._train_step(torch.arange(8), torch.full((4,), 0.25), torch.tensor(2.0), 0.0)  # a step of size 0
    moments = [m for row in student._optimizer.state.values() for name, m in row.items() if name != "step"]
    parameters = list(student.student.parameters())
    held = [*parameters, *(p.grad for p in parameters if p.grad is not None), *moments]
    found["held_bytes"] = torch.tensor(sum(part(t).numel() * t.element_size() for t in held))
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    """Whether all tensors have the same bits."""
    return torch.tensor(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a))


def returns(family: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """How a sharded student goes on from a state, comes back to it, and becomes whole."""
    student = MAKERS[family](True)
    student.load_training_state(state)
    found = {"loaded": same(student.training_state(), state)}
    before = Snapshot(student.student, student._optimizer)
    student.train_window(module_students.controls(**CONTROLS))
    student.set_controls(module_students.controls(**CONTROLS))
    student.evaluate("validation")
    found |= {f"again.{name}": tensor for name, tensor in student.training_state().items()}
    before.put_back(student.student, student._optimizer)
    back = student.training_state()
    learned = [name for name in back if name.startswith(("module.", "optimizer."))]
    found["put back"] = same({n: back[n] for n in learned}, {n: state[n] for n in learned})
    sharded = student.evaluate("validation").exit_loss
    student.gather()
    now = {f"module.{name}": tensor for name, tensor in student.student.state_dict().items()}
    found["gathered"] = same(now, {n: back[n] for n in now})
    found["gathered gap"] = (student.evaluate("validation").exit_loss - sharded).abs().max()
    return found


def signals_of(shard: bool) -> dict[str, Tensor]:
    """Signals of a classifier over five batches, as many as two processes cannot share evenly."""
    data, teacher = module_students.texts(), tiny_models.tiny("bert", seed=1, layers=3)
    inputs = data.batch(data.splits["train"][:2])
    plan = make_plan(teacher, inputs, AttachConfig(exits=()), data.num_positions)
    if shard:
        shard_teacher(teacher, plan.blocks, inputs, CPU)
    signals = module_signals(teacher, plan, plan.blocks[-2:], data, 20)
    held = torch.tensor(sum(part(p).numel() * p.element_size() for p in teacher.parameters()))
    return {"logits": signals.logits, "features": signals.features, "maps": signals.maps, "held_bytes": held}


def refusals(cache: str) -> dict[str, str]:
    """Messages about what cannot be sharded."""
    found = {}
    resnet, data = tiny_models.tiny("resnet"), module_students.images()
    inputs = data.batch(data.splits["train"][:2])
    try:
        check_sharding(Instrumented(resnet, make_plan(resnet, inputs, AttachConfig(), None), []), inputs, CPU)
    except UserError as error:
        found["batch norm"] = str(error)
    os.environ["RLKD_CACHE"] = f"{cache}-{processes.index()}"
    try:
        signals_of(True)
    except UserError as error:
        found["cache"] = str(error)
    return found


def main(folder: Path) -> None:
    """Write what this process finds."""
    torch.set_num_threads(1)
    processes.join("cpu")
    cache, found = str(folder / "cache"), {}
    for shard in (False, True):
        # a whole teacher answers in each process for itself, a sharded one in both together
        os.environ["RLKD_CACHE"] = f"{cache}-shared" if shard else f"{cache}-whole-{processes.index()}"
        found |= {f"signals.{shard}.{name}": tensor for name, tensor in signals_of(shard).items()}
        for family, make in MAKERS.items():
            found |= {f"{family}.{shard}.{name}": tensor for name, tensor in train(make(shard)).items()}
    for family in MAKERS:
        begin = f"{family}.True.state1."
        state = {name.removeprefix(begin): tensor for name, tensor in found.items() if name.startswith(begin)}
        found |= {f"{family}.{name}": tensor for name, tensor in returns(family, state).items()}
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in found.items()},
        folder / f"{processes.index()}.safetensors",
    )
    (folder / f"{processes.index()}.json").write_text(json.dumps(refusals(cache)))
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
