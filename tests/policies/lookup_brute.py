"""The training-free rules once more, for one row, in plain lists and loops: slow, and nothing shared with the real ones."""

from __future__ import annotations

import heapq
import math
from collections import Counter

Path = tuple[int, ...]


def match_length(text: list[int], place: int, longest: int) -> int:
    """Tokens up to ``place`` that are those which end the text."""
    length = 0
    while length < longest and length <= place and text[place - length] == text[-1 - length]:
        length += 1
    return length


def prompt_lookup(text: list[int], ngram: int, tokens: int) -> list[int]:
    for size in range(min(ngram, len(text) - 1), 0, -1):
        for start in range(len(text) - size):
            if text[start : start + size] == text[-size:]:
                return text[start + size : start + size + tokens]
    return []


def counts(text: list[int], places: list[int], depth: int) -> Counter[Path]:
    """How many continuations pass through each path."""
    found: Counter[Path] = Counter()
    for place in places:
        behind = text[place + 1 : place + 1 + depth]
        found.update(tuple(behind[:size]) for size in range(1, len(behind) + 1))
    return found


def suffix(text: list[int], longest: int, depth: int, tokens: int, factor: float, least: float) -> dict[Path, float]:
    """Path probabilities of the proposed nodes; by a heap, as the paper grows its trees."""
    best_score, best_tree = 0.0, {}
    for length in range(1, longest + 1):
        places = [p for p in range(len(text) - 1) if match_length(text, p, longest) >= length]
        if not places:
            break
        found, total = counts(text, places, depth), len(places) + 1
        tree: dict[Path, float] = {}
        heap = [(-found[path] / total, path) for path in found if len(path) == 1]
        heapq.heapify(heap)
        while heap and len(tree) < min(tokens, int(factor * length)):
            negative, path = heapq.heappop(heap)
            if -negative < least:
                break
            tree[path] = -negative
            for child in found:
                if child[:-1] == path:
                    heapq.heappush(heap, (-found[child] / total, child))
        score = sum(tree.values())
        if score >= best_score - 1e-12:
            best_score, best_tree = score, tree
    return best_tree


def racer(
    text: list[int], path: Path, told: dict[int, list[tuple[int, float]]], longest: int, shortest: int, depth: int, weight: float
) -> dict[int, float]:
    """Probabilities of the tokens behind a path. ``told[i]``: the target's (token, log-probability) list that gave token i."""
    lengths = [match_length(text, p, longest) for p in range(len(text) - 1)]
    most = max(lengths, default=0)
    places = [p for p, length in enumerate(lengths) if length == most >= shortest]
    found = counts(text, places, depth)
    above = found[path] if path else len(places)
    retrieved = {p[-1]: n / above for p, n in found.items() if p[:-1] == path}
    token = path[-1] if path else text[-1]
    last = max((p for p in range(len(text) - 1) if text[p] == token and p + 1 in told), default=None)
    copied = {} if last is None else {t: math.exp(v) for t, v in told[last + 1]}
    if not (retrieved and copied):
        return retrieved or copied
    return {t: weight * retrieved.get(t, 0.0) + (1 - weight) * copied.get(t, 0.0) for t in retrieved.keys() | copied.keys()}
