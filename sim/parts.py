"""A replay cut into parts: texts do not know of each other, so every core takes some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from policies.contract import Policy

MOST_ROWS = 1024
"""Texts side by side in one part: more would leave the cache, fewer would pay for the calls instead of the work."""
LEAST_ROWS = 128
"""A core of its own does not pay for fewer."""

Part = TypeVar("Part")
Result = TypeVar("Result")


def cut(policy: Policy, length: Tensor, batch: int) -> list[Tensor]:
    """Which texts, int64 [n] places in the list of texts, stand side by side.

    Serving batches are never split, and a policy whose state outlives its rows sees all rows at once.

    :param length: int64 [S], tokens of each text. Texts of like length go together, so that they end together.
    :param batch: texts in one serving batch.
    """
    texts = len(length)
    wanted = max(-(-texts // MOST_ROWS), min(torch.get_num_threads(), texts // LEAST_ROWS))
    if wanted <= 1 or policy.scope in ("stream", "batch"):
        return [torch.arange(texts)]
    places = length.argsort(descending=True, stable=True) if batch == 1 else torch.arange(texts)
    batches = -(-texts // batch)
    return list(places.split(-(-batches // wanted) * batch))


def in_threads(work: Callable[[Part], Result], parts: list[Part]) -> list[Result]:
    """``work`` on every part, as many at a time as torch has threads; each then computes with a single one."""
    workers = min(torch.get_num_threads(), len(parts))
    if workers == 1:
        return [work(part) for part in parts]
    with _one_thread_each(), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, parts))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Threads started inside compute with one thread, or they would fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
