"""Running out of memory is one line that says what to do, wherever a real model works."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlkd.errors import UserError
from rlkd.io.memory import enough_memory


def too_much(*_: Any) -> None:
    torch.empty(2**58, dtype=torch.float32)  # more than any address space


def raises(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "work",
    [
        too_much,
        lambda: raises(MemoryError()),
        lambda: raises(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")),
    ],
    ids=["processor", "python", "gpu"],
)
def test_every_kind_is_one_line(work: Callable[[], None]) -> None:
    words = r"not enough memory for a cake \(.*\); bake a smaller one"
    with pytest.raises(UserError, match=words) as told, enough_memory("a cake", "bake a smaller one"):
        work()
    assert "\n" not in str(told.value)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), enough_memory("a", "b"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_a_student_and_its_teacher_say_which_option_helps(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import module_students

    monkeypatch.setenv("RLKD_CACHE", str(tmp_path))
    student = module_students.student_of()
    handle = student.student.model.register_forward_pre_hook(too_much)
    with pytest.raises(UserError, match=r"batches of 12 in 1 parts .*--train\.micro_batches"):
        student.train_window(module_students.controls())
    with pytest.raises(UserError, match=r"64 samples at once .*--train\.evaluation_batch_size"):
        student.evaluate("test")
    handle.remove()
    student.train_window(module_students.controls())  # nothing is left behind
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr("rlkd.teachers.real.module_signals.logits_of", too_much)
    with pytest.raises(UserError, match=r"the teacher's answers .*--teacher_device_map auto"):
        module_students.student_of()


def test_a_language_model_and_its_teacher_say_it_too(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from students.real import test_causal

    monkeypatch.setenv("RLKD_CACHE", str(tmp_path))
    student = test_causal.student_of()
    student.student.model.register_forward_pre_hook(too_much)
    with pytest.raises(UserError, match=r"64 samples at once .*--train\.evaluation_batch_size"):
        student.evaluate("test")
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr("rlkd.teachers.real.token_signals.logits_of", too_much)
    with pytest.raises(UserError, match=r"the teacher's answers .*--teacher_device_map auto"):
        test_causal.student_of()
