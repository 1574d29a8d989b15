"""Acceptance: does a model on this machine do what this repository says of it? One report, every line checked here."""
