"""Time per stage, with the device synchronised at both ends."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """``with watch("prefill"): ...`` adds to ``watch.ms["prefill"]``.

    Parameters
    ----------
    device : torch.device
    clock : callable
        Returns a time in seconds; by default wall time.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock = device, clock
        self.ms: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        """Time in seconds, after all work of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.ms[stage] += 1000 * (self.now() - start)
