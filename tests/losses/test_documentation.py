import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlkd.cli.main import main
from rlkd.losses import SIGNALS, TERMS, LossConfig, Objective, registry

ROOT = Path(__file__).parents[2]


def test_the_page_holds_the_registry_as_it_is() -> None:
    page = (ROOT / "docs" / "knowledge.md").read_text()
    assert registry.table() in page, "write registry.table() into docs/knowledge.md"
    assert all(f"| `{name}` | {meaning} |" in page for name, meaning in SIGNALS.items())


def test_list_names_every_term(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    names = [*TERMS, "born-again", "gate", "data-free", "progressive", "teacher assistant"]
    assert all(re.search(rf"^  {name} ", printed, re.MULTILINE) for name in names)


def test_the_new_term_of_contributing_trains_and_is_fifteen_lines() -> None:
    block = re.search(r"```python\n(.*?cosine_hint.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert block is not None
    lines = [line for line in block.group(1).splitlines() if line.strip()]
    assert len(lines) <= 15
    names: dict[str, object] = {}
    try:
        exec(block.group(1), names)
        entry = TERMS["cosine_hint"]
        assert entry.needs == ("adapted_features", "teacher_features")
        student, teacher = torch.tensor([[1.0, 0.0], [3.0, 4.0]], requires_grad=True), torch.tensor([[0.0, 2.0]] * 2)
        given: dict[str, Tensor | tuple[Tensor, ...]] = {
            "exit_logits": (torch.zeros(2, 2),),
            "labels": torch.tensor([0, 1]),
            "adapted_features": student,
            "teacher_features": teacher,
        }
        losses = Objective(LossConfig(("cross_entropy", "cosine_hint")), frozenset(SIGNALS))(given)
        # cosines 0 and 0.8: 0.6, at the scale 1 * 0.5 / 0.15
        assert losses[2].item() == pytest.approx(0.6 / 0.3)
        losses[2].backward()
        assert student.grad is not None
    finally:
        registry._TERMS.pop("cosine_hint", None)
