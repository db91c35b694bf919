import pytest
import torch

from rlkd.teachers.augmented import hard_samples, mixup, noisy_logits
from rlkd.teachers.keyed import SignalCache

INPUTS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def test_plain_samples_are_answered_once() -> None:
    cache = SignalCache(lambda x: 2 * x, 6)
    for epoch in range(3):
        for batch in (torch.tensor([0, 3]), torch.tensor([5, 1, 3]), torch.tensor([2, 4])):
            torch.testing.assert_close(cache(INPUTS[batch], batch), 2 * INPUTS[batch])
        assert cache.num_forwards == 6, f"epoch {epoch}"


def test_an_augmentation_has_answers_of_its_own() -> None:
    cache = SignalCache(lambda x: 2 * x, 6)
    batch = torch.tensor([0, 1])
    cache(INPUTS[batch], batch)
    flipped = INPUTS[batch].flip(-1)
    torch.testing.assert_close(cache(flipped, batch, "flip"), 2 * flipped)
    torch.testing.assert_close(cache(flipped, batch, "flip"), 2 * flipped)
    assert cache.num_forwards == 4
    mixed = mixup(INPUTS[batch], 0.4, torch.Generator().manual_seed(0))
    for _ in range(2):
        torch.testing.assert_close(cache(mixed.inputs, batch, None), 2 * mixed.inputs)
    assert cache.num_forwards == 8


def test_a_stale_answer_is_an_error() -> None:
    cache = SignalCache(lambda x: 2 * x, 6)
    batch = torch.tensor([0, 1])
    cache(INPUTS[batch], batch)
    changed = INPUTS[batch].clone()
    changed[1, 2] += 1e-6
    with pytest.raises(ValueError, match=r"sample 1 differ.*'plain'"):
        cache(changed, batch)
    with pytest.raises(ValueError, match="sample 0 differ"):
        cache(INPUTS[batch].flip(-1), batch)


def test_noise_scales_with_the_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 10.0]]).expand(4000, 3)
    noisy = noisy_logits(logits, 0.1, torch.Generator().manual_seed(0))
    deviation = noisy.std(0)
    assert deviation[0] == 0
    torch.testing.assert_close(deviation[1:], torch.tensor([0.1, 1.0]), rtol=0.05, atol=0)
    torch.testing.assert_close(noisy.mean(0), logits[0], rtol=0.01, atol=0.01)


def test_mixup_mixes_with_one_share() -> None:
    mixed = mixup(INPUTS, 0.4, torch.Generator().manual_seed(1))
    assert 0 <= mixed.share <= 1
    torch.testing.assert_close(mixed.inputs, mixed.share * INPUTS + (1 - mixed.share) * INPUTS[mixed.partner])
    again = mixup(INPUTS, 0.4, torch.Generator().manual_seed(1))
    assert torch.equal(again.inputs, mixed.inputs)


def logits_of(probabilities: list[float]) -> torch.Tensor:
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p, 1 - p], -1).log()


def test_hard_samples_keep_the_ten_to_twenty_percent_rule() -> None:
    labels = torch.zeros(20, dtype=torch.int64)
    easy = [0.99] * 15
    within = hard_samples(logits_of([0.35, 0.5, 0.65, *easy, 0.01, 0.02]), labels)
    assert within.tolist() == [0, 1, 2]  # three of twenty lie within the bounds
    few = hard_samples(logits_of([0.5, *easy, 0.75, 0.01, 0.02, 0.98]), labels)
    assert few.tolist() == [0, 16]  # one lies within: the nearest joins it, to make a tenth
    many = hard_samples(logits_of([0.3, 0.45, 0.52, 0.7, 0.5, 0.6, *[0.99] * 14]), labels)
    assert many.tolist() == [1, 2, 4, 5]  # a fifth, nearest to the middle
