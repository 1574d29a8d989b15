"""Per-sample random generators, seeded by run seed and sample name, independent of batch and device."""

import zlib

import torch


def generator(seed: int, sample: str) -> torch.Generator:
    """A CPU generator that gives a sample the same random numbers in every run."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{sample}".encode()))
