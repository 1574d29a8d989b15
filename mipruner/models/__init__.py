"""Adapters: what differs between model families, and nothing else."""
