"""Distil a student of the handwritten digits under a goal, and use it."""

import sys

import torch

import rlkd


def main(num_windows: int = 12) -> None:
    """Print what the student reaches on test data."""
    goal = rlkd.Goal(keep=0.98)
    result = rlkd.distil(data="digits", goal=goal, options={"num_windows": num_windows})
    print(f"goal met: {result.goal_met}, accuracy {result.metrics['accuracy']:.4f}")
    print("answer to a blank image:", int(result.student(torch.zeros(1, 8, 8)).argmax()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
