from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from rlkd.data.memory import read_parts
from rlkd.errors import UserError

INPUTS, LABELS = torch.arange(12.0).reshape(6, 2), torch.arange(6) % 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((INPUTS, ["a", "b"] * 3), "inputs and labels are no arrays of numbers .*; give numbers, labels as 0 to C - 1"),
        ((INPUTS, LABELS.float()), r"got inputs \[6, 2\] and labels \[6\] of torch.float32 and torch.float32; a"),
        ((torch.tensor(3.0), torch.zeros(0, dtype=torch.long)), r"got inputs \[\] and labels \[0\]"),
        ((torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)), r"got inputs \[0, 2\] and labels \[0\]"),
        (
            (INPUTS.to(torch.complex64), LABELS),
            r"of torch.complex64 and torch.int64; allowed: \[samples, ...\] real and",
        ),
        ((INPUTS, LABELS[:, None]), r"and labels \[6, 1\]"),
        (TensorDataset(INPUTS, LABELS + 0.5), r"labels \[6\] of torch.float32 and torch.float32"),
        ([(INPUTS[i], 0) for i in range(6)], "data: got list for data; allowed"),
        (None, "data: got NoneType"),
    ],
)
def test_data_that_cannot_be_read_for_certain_are_refused(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_parts(data)
    assert "\n" not in str(error.value)


def test_inputs_that_are_not_finite_are_counted_and_the_first_is_named() -> None:
    inputs = INPUTS.clone()
    inputs[2, 0], inputs[4, 1] = torch.nan, torch.inf
    with pytest.raises(
        UserError, match=r"data: got inputs that are not finite in 2 samples, the first at 2 \(from 0\)"
    ):
        read_parts((inputs, LABELS))
    with pytest.raises(UserError, match="not finite in 1 samples"):
        read_parts((torch.tensor([[1e300], [0.0]], dtype=torch.float64), LABELS[:2]))


def test_a_split_that_is_a_number_is_refused_by_its_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "numbers.npz", inputs=INPUTS.numpy(), labels=LABELS.numpy(), split=np.arange(6) % 2)
    with pytest.raises(UserError, match=r"data: got the splits \['0', '1'\]; allowed: train, validation, test"):
        read_parts(tmp_path / "numbers.npz")


def test_numbers_of_other_types_are_taken_as_they_are() -> None:
    inputs, labels = read_parts((INPUTS.double().numpy(), LABELS.to(torch.uint8).numpy()))[""]
    assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(inputs, INPUTS)
    whole, _ = read_parts((INPUTS.to(torch.int32), LABELS.bool()))[""]
    assert whole.dtype == torch.int64  # an embedding needs whole numbers
    again, same = read_parts(TensorDataset(INPUTS, LABELS))[""]
    assert torch.equal(again, INPUTS)
    assert torch.equal(same, LABELS)
