"""Acceptance test: checks a model on this machine against the statements of this repository. Writes one report."""
