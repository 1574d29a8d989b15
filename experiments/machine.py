"""Describes the machine of a measurement: name, speed limits, memory and clocks."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from experiments import results
from mipruner.timing import Stopwatch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Clocks by name. CPU time of the process is for one thread on a busy CPU: it does not count other processes."""


def spread(ms: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    cuts = quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else [ms[0]] * 4
    return {"median": round(median(ms), 3), "p20": round(cuts[0], 3), "p80": round(cuts[3], 3)}


class Memory:
    """Memory in GiB: of the allocator on a GPU, of the process on a CPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def reset_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_bytes(b"5")  # resets the peak of resident memory

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else self._of_process("VmHWM")

    def now(self) -> float:
        return torch.cuda.memory_allocated() / 2**30 if self.on_gpu else self._of_process("VmRSS")

    def reserved(self) -> float:
        """Memory including that of recorded graphs, which belongs to no tensor."""
        if not self.on_gpu:
            return self.now()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() / 2**30

    def _of_process(self, key: str) -> float:
        if sys.platform != "linux":
            return results.peak_memory_gib(torch.device("cpu"))
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
        return int(status[key].split()[0]) / 2**20


def measure_limits(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> dict[str, float]:
    """Speed limits of the device: copy bandwidth in GB/s (bytes read and written), matrix product in TFLOP/s."""
    n_bytes, side = (2**30, 8192) if device.type == "cuda" else (2**27, 1536)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    copy_ms = fastest(Stopwatch(device, clock), lambda: target.copy_(source))
    product_ms = fastest(Stopwatch(device, clock), lambda: torch.mm(a, a, out=out))
    return {"copy_gb_per_s": 2 * n_bytes / copy_ms / 1e6, "product_tflop_per_s": 2 * side**3 / product_ms / 1e9}


def fastest(watch: Stopwatch, function: Callable[[], Any]) -> float:
    """Shortest time of ten calls, in ms."""
    for repetition in range(10):
        with watch(str(repetition)):
            function()
    return min(watch.ms.values())


def provenance(overrides: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Facts for every measurement: command, commit, date, versions and `machine`."""
    return {
        "command": results.command(overrides),
        "git_commit": results.git_commit(),
        "date": results.now(),
        "versions": results.versions(),
        "machine": machine(device),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Properties of machine and software that the numbers depend on."""
    found = {"device": results.device_name(device), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        fields = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"
        found["cuda"] = torch.version.cuda
        if shutil.which("nvidia-smi"):  # missing in many containers
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={uuid}"]
            values = subprocess.run(command, capture_output=True, text=True).stdout.strip().split(", ")
            found |= dict(zip(fields.split(","), values, strict=False))
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found["cpu"] = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        found["load_average"] = os.getloadavg()[0]
    return found
