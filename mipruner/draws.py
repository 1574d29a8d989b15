"""Random generators per sample, seeded by run seed and sample name, independent of batch and device."""

import zlib

import torch


def generator(seed: int, sample: str) -> torch.Generator:
    """CPU generator with the same random numbers for a sample in every run."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{sample}".encode()))
