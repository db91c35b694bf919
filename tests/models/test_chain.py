"""Chains: what they say of their own parameters."""

import pytest

from rlkd.models import StudentConfig, build_student


@pytest.mark.parametrize(
    ("student", "factors"),
    [
        (StudentConfig(widths=(128, 64), exits=(1,)), {}),
        # 512 units are read by the second block and the first head, 256 by the last head; the first block reads inputs
        (
            StudentConfig(widths=(512, 256), exits=(1,)),
            {"layers.1.weight": 0.25, "heads.0.weight": 0.25, "heads.1.weight": 0.5},
        ),
        (StudentConfig("conv", (8, 16), (1,)), {}),  # channels count, not positions
    ],
)
def test_weights_that_read_more_than_128_units_have_smaller_steps(
    student: StudentConfig, factors: dict[str, float]
) -> None:
    chain = build_student(student, (1, 28, 28) if student.kind == "conv" else (640,), 10)
    assert chain.rate_factors() == factors
    assert set(factors) <= {name for name, _ in chain.named_parameters()}
