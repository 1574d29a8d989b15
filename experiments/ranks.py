"""The processes that share a run under torchrun or accelerate launch, and their synchronisation.

    torchrun --nproc-per-node 4 run.py model=llava15_7b dataset=gqa keep=64

Only scores and files pass between them, so the group is gloo's on CPUs and GPUs alike.
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
    """This process, ``rank``, of ``n``."""

    rank: int = 0
    n: int = 1

    @classmethod
    def join(cls) -> "Ranks":
        """Meet the other processes, and take the GPU of this one; alone if nothing launched several."""
        if not dist.is_torchelastic_launched():
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            store, rank, n = next(dist.rendezvous("env://"))
            # torchrun --max-restarts keeps its store: addresses of processes that are gone must not be found there
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            patience = timedelta(days=7)  # the launcher ends everybody if one is gone
            dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=patience)
            atexit.register(dist.destroy_process_group)
        return cls(dist.get_rank(), dist.get_world_size())

    def wait(self) -> None:
        """Return when every process has reached this call."""
        if self.n > 1:
            dist.barrier()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part, a run of neighbours: equal parts, up to one item."""
        return items[len(items) * self.rank // self.n : len(items) * (self.rank + 1) // self.n]

    def largest(self, value: float) -> float:
        """The largest of what the processes say."""
        if self.n > 1:
            values = torch.tensor(value, dtype=torch.float64)
            dist.all_reduce(values, dist.ReduceOp.MAX)
            value = values.item()
        return value


ALONE = Ranks()
