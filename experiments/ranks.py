"""Processes that share a run under torchrun or accelerate launch, and their synchronisation.

    torchrun --nproc-per-node 4 run.py model=llava15_7b dataset=gqa keep=64

They exchange only scores and files, so the process group is gloo on CPUs and on GPUs.
"""

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Process number ``rank`` of ``n``."""

    rank: int = 0
    n: int = 1

    @classmethod
    def join(cls) -> "Ranks":
        """Join the other processes, and select the GPU of this process. Without a launcher there is one process."""
        if not dist.is_torchelastic_launched():
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            store, rank, n = next(dist.rendezvous("env://"))
            # torchrun --max-restarts keeps its store: addresses of dead processes must not be found there
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            patience = timedelta(days=7)  # the launcher ends all processes if one dies
            dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=patience)
            atexit.register(dist.destroy_process_group)
        return cls(dist.get_rank(), dist.get_world_size())

    def wait(self) -> None:
        """Return when every process has reached this call."""
        if self.n > 1:
            dist.barrier()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Contiguous part of this process. Sizes of parts differ by at most one item."""
        return items[len(items) * self.rank // self.n : len(items) * (self.rank + 1) // self.n]

    def largest(self, value: float) -> float:
        """Maximum over all processes."""
        if self.n > 1:
            values = torch.tensor(value, dtype=torch.float64)
            dist.all_reduce(values, dist.ReduceOp.MAX)
            value = values.item()
        return value


ALONE = Ranks()
