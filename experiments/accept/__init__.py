"""Acceptance test: checks a model on this machine against expected values, and writes one report."""
