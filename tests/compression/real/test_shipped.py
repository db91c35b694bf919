"""A shipped student answers as the trained one did, and is smaller."""

import pytest
import tiny_models
import torch
from shipped_students import KINDS, trained

from rlkd.compression.real.cut import ship
from rlkd.models.real.attachment import AttachConfig
from rlkd.models.real.instrumented import Instrumented, choose_tokens
from rlkd.models.real.pretrained import Kind

THRESHOLDS = {"never": 1.0, "always": 0.5, "some": 0.0}


def expected(
    student: Instrumented,
    masks: tuple[torch.Tensor, ...],
    keep: float,
    threshold: float,
    inputs: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, list[int]]:
    """Logits by the rule, sample by sample, and at which exit each left."""
    patience = student.plan.patience
    with torch.no_grad():
        logits = student(inputs, masks, keep).logits
    rows, left = [], []
    for i in range(len(logits[0])):
        answers = [int(z[i].argmax()) for z in logits]
        for e, z in enumerate(logits):
            confident = threshold <= 0.5 or (threshold < 1.0 and float(z[i].softmax(-1).max()) >= threshold)
            agree = 0 < patience <= e + 1 and 0.5 < threshold < 1.0 and len(set(answers[e + 1 - patience : e + 1])) == 1
            if confident or agree or e == len(logits) - 1:
                rows.append(z[i])
                left.append(e)
                break
    return torch.stack(rows), left


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "resnet", "convnext", "llama_classifier"])
@pytest.mark.parametrize("when", THRESHOLDS)
@pytest.mark.parametrize("patience", [0, 2])
def test_a_shipped_student_answers_as_the_trained_one(family: str, when: str, patience: int) -> None:
    exits = (1,) if family in tiny_models.CONV_FAMILIES else (1, 2)
    student = trained(family, AttachConfig(exits=exits, patience=patience))
    inputs = tiny_models.batch(family, size=12)
    masks = tuple((torch.arange(g.size) % 2).float() for g in student.plan.groups)
    keep = 0.5 if student.plan.select_after else 1.0
    threshold = THRESHOLDS[when]
    if when == "some":
        with torch.no_grad():
            threshold = float(student(inputs, masks, keep).logits[0].softmax(-1).amax(-1).median()) - 1e-7
    wanted, left = expected(student, masks, keep, threshold, inputs)
    if when == "some":
        assert len(set(left)) > 1  # the case is worth its name
    shipped = ship(student, KINDS.get(family, "sequence_classification"), masks, keep, threshold)
    with torch.no_grad():
        torch.testing.assert_close(shipped(**inputs), wanted, atol=1e-5, rtol=1e-4)
        for i in (0, 5):
            one = {name: values[i : i + 1] for name, values in inputs.items()}
            torch.testing.assert_close(shipped(**one)[0], wanted[i], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_a_shipped_student_is_called_as_its_model(family: str) -> None:
    student = trained(family, AttachConfig(exits=()))
    kind: Kind = "causal_lm" if family == "llama" else KINDS.get(family, "sequence_classification")
    masks = tuple(torch.ones(group.size) for group in student.plan.groups)
    shipped, inputs = ship(student, kind, masks, 1.0, 1.0), tiny_models.batch(family)
    first = next(iter(inputs))
    rest = {name: value for name, value in inputs.items() if name != first}
    with torch.no_grad():
        wanted = shipped(**inputs)
        assert torch.equal(shipped(inputs[first], **rest), wanted)
        assert torch.equal(shipped(*inputs.values()), wanted)  # ids and mask stand first in every text model here
        with pytest.raises(TypeError, match=f"got {first} by position and by name"):
            shipped(inputs[first], **inputs)


def test_a_batch_that_has_left_does_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    student = trained("bert", AttachConfig(exits=(1,)))
    masks = tuple(torch.ones(g.size) for g in student.plan.groups)
    shipped = ship(student, "sequence_classification", masks, 1.0, 0.5)
    ran: list[int] = []
    for number, path in enumerate(shipped.shipment.blocks, start=1):
        shipped.model.get_submodule(path).register_forward_pre_hook(lambda *_, n=number: ran.append(n))
    shipped(**tiny_models.batch("bert"))
    assert ran == [1]


def test_units_that_differ_in_number_are_gone_too() -> None:
    student = trained("bert", AttachConfig())
    masks = tuple((torch.arange(g.size) < 3 + i).float() for i, g in enumerate(student.plan.groups))
    shipped = ship(student, "sequence_classification", masks, 1.0, 1.0)
    sizes = [shipped.model.get_submodule(g.reader).in_features for g in student.plan.groups if g.kind == "units"]
    assert sizes == [3, 5, 7]
    inputs = tiny_models.batch("bert")
    with torch.no_grad():
        torch.testing.assert_close(shipped(**inputs), student(inputs, masks, 1.0).logits[-1])


def test_tokens_are_chosen_by_the_heads_that_stay() -> None:
    student, inputs = trained("bert", AttachConfig(exits=())), tiny_models.batch("bert", size=12)
    masks = tuple((torch.arange(g.size) == g.size - 1).float() for g in student.plan.groups)
    with torch.no_grad():
        weights = student.model(**inputs, output_attentions=True).attentions[0][:, -1:]  # of the last head alone
        chosen, _ = choose_tokens(weights, inputs["attention_mask"].bool(), 0.4)
        outputs = student(inputs, masks, 0.4)
        assert torch.equal(outputs.positions, chosen)
        shipped = ship(student, "sequence_classification", masks, 0.4, 1.0)
        torch.testing.assert_close(shipped(**inputs), outputs.logits[-1])
