"""Errors that a user can cause. Each message says what to do."""


class InputError(ValueError):
    """A question, image, budget or feature that cannot be used."""


class PromptError(InputError):
    """One question or image that cannot be used. Other prompts are not affected."""


class ModelError(Exception):
    """The model cannot be loaded."""
