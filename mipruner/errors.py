"""What a user can get wrong, as opposed to what we got wrong. Each message says what to do."""


class InputError(ValueError):
    """A question, image, budget or feature that cannot be used."""


class PromptError(InputError):
    """One question or image that cannot be used; the next one may be."""


class ModelError(Exception):
    """The model cannot be loaded."""
