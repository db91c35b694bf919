"""Prune and distil a PyTorch module of your own; the module stays as it was."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import rlkd


def main(num_windows: int = 8, num_steps: int = 400) -> None:
    """Train a teacher, distil a pruned copy of it, and print sizes and accuracies."""
    digits = load_digits()
    inputs, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(teacher.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        index = torch.randint(1200, (64,), generator=generator)
        loss = nn.functional.cross_entropy(teacher(inputs[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    splits = {
        "train": (inputs[:1200], labels[:1200]),
        "validation": (inputs[1200:1500], labels[1200:1500]),
        "test": (inputs[1500:], labels[1500:]),
    }
    options = {"num_windows": num_windows, "train.steps_per_window": 30}
    result = rlkd.distil(teacher, data=splits, goal=rlkd.Goal(keep=0.98), options=options)
    print(f"accuracy {result.metrics['accuracy']:.4f} of the teacher's {result.metrics['teacher_accuracy']:.4f}")
    print(f"{result.metrics['size_ratio']:.0%} of the parameters, goal met: {result.goal_met}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
