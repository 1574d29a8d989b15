"""Sends many mixed requests to a server, checks every answer, and records the server's memory."""

import itertools
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from experiments.served import Reply, Served
from experiments.tabular import Table

BUDGETS = (64, 16, 8)
BAD_BUDGETS = (0, 1.5, 100_000, "many", "auto", [1])
"""Invalid budgets. Each must be refused with HTTP 400."""
BROKEN = "data:image/png;base64,AAAA"
"""An invalid image, which is refused too."""
TEXT_ONLY = "What color is the sun ?"
PARTS = 10
"""Number of memory readings."""


@dataclass
class Soak:
    """Counts and memory of many mixed requests.

    Attributes
    ----------
    asked, with_image, refused : int
        Numbers of answered or refused requests, of those with an image, and of refused bad requests.
    wrong : list of str
        Answers that differ from the same request alone, and bad requests that were not refused.
    memory_mib : list of dict
        Memory by process, after the warm-up and after each tenth of the requests.
    """

    asked: int = 0
    with_image: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    memory_mib: list[dict[str, float]] = field(default_factory=list)

    def table(self) -> str:
        counts = (
            f"{self.asked} requests, {self.with_image} with an image; {self.refused} bad ones refused; "
            f"{len(self.wrong)} wrong."
        )
        names = sorted({name for read in self.memory_mib for name in read})
        if not names:
            return f"{counts} The memory of a server that runs already is not known."
        lines = []
        for k, read in enumerate(self.memory_mib):
            values = [*(read.get(name, 0) for name in names), sum(read.values())]
            lines.append([f"{k * self.asked // PARTS}", *(f"{value:.0f}" for value in values)])
        return f"{counts} Memory in MiB:\n\n{Table(['requests', *names, 'all'], lines, n_text=0).markdown()}"


def soak(
    served: Served,
    questions: Sequence[tuple[str, str]],
    pruning: Callable[[Any], dict[str, Any] | None] | None,
    n_requests: int,
    concurrency: int = 32,
    seed: int = 0,
) -> Soak:
    """Send random requests: (image, question) pairs with budgets, text alone, and a tenth of bad requests.

    Each answer is compared with the answer to the same request alone, sent before as a warm-up.

    Parameters
    ----------
    pruning : callable or None
        Returns the request fields of a budget. None for a server that does not prune: then bad requests are bad images.
    """
    budgets = BUDGETS if pruning else (None,)
    kinds: list[tuple[str | None, str, Any]] = [(*one, keep) for one in questions for keep in budgets]
    kinds += [(None, TEXT_ONLY, None)] * (len(kinds) // 8 + 1)
    rng, found = random.Random(seed), Soak()

    def send(kind: tuple[str | None, str, Any]) -> Reply:
        url, text, keep = kind
        return served.ask(url, text, pruning(keep) if pruning and keep is not None else None)

    def bad() -> tuple[str, str, Any]:
        url, text = rng.choice(questions)
        keep = rng.choice([*BAD_BUDGETS, None]) if pruning else None
        return (BROKEN if keep is None else url), text, keep

    alone = {kind: send(kind).text for kind in tqdm(dict.fromkeys(kinds), "each alone", file=sys.stderr)}
    requests = [bad() if rng.random() < 0.1 else rng.choice(kinds) for _ in range(n_requests)]

    found.memory_mib.append(served.memory_mib())
    ends = [k * n_requests // PARTS for k in range(PARTS + 1)]
    with ThreadPoolExecutor(concurrency) as pool:
        for start, end in tqdm([*itertools.pairwise(ends)], "soak", file=sys.stderr):
            part = requests[start:end]
            for kind, reply in zip(part, pool.map(send, part), strict=True):
                judge(found, kind, reply, alone)
            found.memory_mib.append(served.memory_mib())
    return found


def judge(found: Soak, kind: tuple[str | None, str, Any], reply: Reply, alone: dict[Any, str]) -> None:
    """Check and count one reply."""
    url, text, keep = kind
    is_bad = url == BROKEN or isinstance(keep, list) or kind not in alone
    found.asked += 1
    found.with_image += url is not None
    if is_bad and reply.refused is not None and reply.refused[0] == 400:
        found.refused += 1
    elif is_bad or reply.refused is not None or reply.text != alone[kind]:
        found.wrong.append(f"{text!r} with keep={keep!r}: {reply}")
