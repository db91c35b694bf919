"""Which workers a run has."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlkd.errors import UserError
from rlkd.workers.interface import IN_PROCESS, Workers
from rlkd.workers.processes import ProcessWorkers

KINDS = ("none", "processes", "ray")


@dataclass(frozen=True)
class WorkersConfig:
    """Who trains the students of a run. It belongs to the machine and not to the run, which ends the same anyway."""

    kind: str = "none"
    """none, processes or ray."""
    num_workers: int | None = None
    """By default one for every processor that this process, or the Ray cluster, may use."""
    ray_address: str | None = None
    """Of a running Ray cluster; by default one is started on this machine for the run."""
    gpu_share: float = 0.0
    """Share of a GPU for every worker."""

    def check(self, device: str = "cpu") -> None:
        """Raise UserError for what contradicts itself, or for students on a GPU without a share of it."""
        if self.kind not in KINDS:
            raise UserError(f"--workers: got {self.kind!r}; allowed: {', '.join(KINDS)}")
        if self.num_workers is not None and self.num_workers < 1:
            raise UserError(f"--num_workers: got {self.num_workers}; allowed: at least 1")
        if self.kind == "none" and (self.num_workers is not None or self.gpu_share):
            raise UserError("--num_workers, --gpu_share: got without --workers; add --workers processes or ray")
        if self.ray_address is not None and self.kind != "ray":
            raise UserError(f"--ray_address: got with --workers {self.kind}; allowed: with --workers ray")
        if not (math.isfinite(self.gpu_share) and 0 <= self.gpu_share <= 1):
            raise UserError(f"--gpu_share: got {self.gpu_share:g}; allowed: 0 to 1, the share of a GPU for each worker")
        if self.kind != "none" and device != "cpu" and not self.gpu_share:
            raise UserError(
                f"--gpu_share: got none, but students train on {device}; allowed: above 0, such as 0.25 for four "
                "workers on each GPU"
            )


@contextmanager
def open_workers(config: WorkersConfig) -> Iterator[Workers]:
    """Start the workers, and end them with the block.

    Raises:
        UserError: as of `WorkersConfig.check`; Ray is not installed or has no such cluster.
    """
    config.check()
    if config.kind == "none":
        yield IN_PROCESS
    elif config.kind == "processes":
        num_workers = config.num_workers or num_processors()
        count = torch.cuda.device_count() if config.gpu_share else 0
        if config.gpu_share and num_workers > count * int(1 / config.gpu_share):
            raise UserError(
                f"--num_workers: got {num_workers} with --gpu_share {config.gpu_share:g} on {count} GPUs; "
                "allowed: as many as their shares admit"
            )
        with ProcessWorkers(num_workers, config.gpu_share) as workers:
            yield workers
    else:
        from rlkd.workers.ray import RayWorkers

        with RayWorkers(config.num_workers, config.ray_address, config.gpu_share) as cluster:
            yield cluster


def num_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
