"""Sentences that LLaVA-1.5's question files add after a question, on a separate line."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."

PROMPTS = ("short_answer", "plain")


def check_prompt(prompt: str) -> str:
    """Return ``prompt`` or raise ValueError naming the valid ones.

    short_answer adds LLaVA's sentence, which is also the default of lmms-eval and, according to Fig. 7, of the paper's
    Qwen runs. plain adds nothing.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"prompt={prompt!r} is not one of {', '.join(PROMPTS)}")
    return prompt


def with_format(question: str, prompt: str) -> str:
    """Text of the user that asks for a short answer."""
    return f"{question}\n{SHORT_ANSWER}" if check_prompt(prompt) == "short_answer" else question
