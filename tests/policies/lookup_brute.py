"""The training-free rules once more, for one row, in plain lists and loops: slow, and nothing shared with the real ones."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from fractions import Fraction

Path = tuple[int, ...]
Texts = list[list[int]]
Match = tuple[int, list[int]]
"""Its length, and what stands behind it."""


def match_length(text: list[int], place: int, longest: int) -> int:
    """Tokens up to ``place`` that are those which end the text."""
    length = 0
    while length < longest and length <= place and text[place - length] == text[-1 - length]:
        length += 1
    return length


def own_matches(text: list[int], longest: int) -> list[Match]:
    places = [(match_length(text, place, longest), place) for place in range(len(text) - 1)]
    return [(length, text[place + 1 :]) for length, place in places if length]


def frozen_places(texts: Texts, text: list[int], longest: int, count: int) -> list[tuple[int, int, int]]:
    """(length, number of the text, place in it) of the matches in a corpus: the longest; of the shortest length among them, every
    so manieth in the order of the texts read backwards."""
    places = [(texts[number][place::-1], number, place) for number in range(len(texts)) for place in range(len(texts[number]))]
    known = []
    for backwards, number, place in sorted(places):
        agree = [a == b for a, b in zip(backwards, text[::-1][:longest], strict=False)]
        known.append((([*agree, False]).index(False), number, place))
    for shortest in range(longest, 0, -1):
        longer = [entry for entry in known if entry[0] > shortest]
        equal = [entry for entry in known if entry[0] == shortest]
        if len(longer) + len(equal) >= count or shortest == 1:
            room = min(count - len(longer), len(equal))
            return longer + [equal[(2 * seat + 1) * len(equal) // (2 * room)] for seat in range(room)]
    return []


def frozen_matches(texts: Texts, text: list[int], longest: int, count: int) -> list[Match]:
    found = frozen_places(texts, text, longest, count)
    return [(length, texts[number][place + 1 :]) for length, number, place in found]


def prompt_lookup(text: list[int], ngram: int, tokens: int, texts: Texts = (), least: int = 1) -> list[int]:
    """By whole runs of tokens; the earliest place of the text, the middle one of the corpus."""
    for size in range(min(ngram, len(text) - 1 if not texts else len(text)), least - 1, -1):
        for start in range(len(text) - size):
            if text[start : start + size] == text[-size:]:
                return text[start + size : start + size + tokens]
        if any(one[start : start + size] == text[-size:] for one in texts for start in range(len(one) - size + 1)):
            return frozen_matches(texts, text, ngram, 1)[0][1][:tokens]
    return []


def counts(behind: list[list[int]], depth: int) -> Counter[Path]:
    """How many continuations pass through each path."""
    found: Counter[Path] = Counter()
    for tokens in behind:
        found.update(tuple(tokens[:size]) for size in range(1, min(depth, len(tokens)) + 1))
    return found


def suffix(
    text: list[int], depth: int, tree: bool, tokens: int, factor: float, least: float, texts: Texts = ()
) -> dict[Path, float]:
    """Path probabilities of the proposed nodes; a tree by a heap, as the paper grows it."""
    own = sorted(own_matches(text, depth - 1)[::-1], key=lambda match: -match[0])  # the longest, of equals the latest, first
    score, found = likeliest(own, depth, tree, tokens, factor, least, 1)
    if texts:
        other = likeliest(frozen_matches(texts, text, depth - 1, 10**6), depth, tree, tokens, factor, least, 0)
        if other[0] > score:
            score, found = other
    return {path: float(value) for path, value in found.items()}


def likeliest(
    matches: list[Match], depth: int, tree: bool, tokens: int, factor: float, least: float, itself: int
) -> tuple[Fraction, dict[Path, Fraction]]:
    """The nodes of the length of match whose probabilities have the largest sum, and that sum."""
    best_score, best_nodes = Fraction(0), {}
    for length in range(1, depth):
        behind = [tokens_ for long, tokens_ in matches if long >= length]
        if not behind:
            break
        grow = grown_tree if tree else grown_path
        nodes = grow(behind, depth - length, len(behind) + itself, min(tokens, int(factor * length)), least)
        score = sum(nodes.values(), Fraction(0))
        if score > best_score:
            best_score, best_nodes = score, nodes
    return best_score, best_nodes


def grown_tree(behind: list[list[int]], depth: int, total: int, most: int, least: float) -> dict[Path, Fraction]:
    found, nodes = counts(behind, depth), {}
    heap = [(-Fraction(found[path], total), path) for path in found if len(path) == 1]
    heapq.heapify(heap)
    while heap and len(nodes) < most:
        negative, path = heapq.heappop(heap)
        if float(-negative) < least:
            break
        nodes[path] = -negative
        for child in found:
            if child[:-1] == path:
                heapq.heappush(heap, (-Fraction(found[child], total), child))
    return nodes


def grown_path(behind: list[list[int]], depth: int, total: int, most: int, least: float) -> dict[Path, Fraction]:
    path, nodes = (), {}
    for _ in range(min(most, depth)):
        behind = [tokens for tokens in behind if len(tokens) > len(path) and tuple(tokens[: len(path)]) == path]
        if not behind:
            break
        (token, count), *_ = Counter(tokens[len(path)] for tokens in behind).most_common(1)  # of equals the first seen
        if count / total < least:
            break
        path = (*path, token)
        nodes[path] = Fraction(count, total)
    return nodes


def racer(
    text: list[int], path: Path, told: dict[int, list[tuple[int, float]]], longest: int, shortest: int, depth: int, weight: float,
    texts: Texts = (),
) -> dict[int, float]:  # fmt: skip
    """Probabilities of the tokens behind a path. ``told[i]``: the target's (token, log-probability) list that gave token i."""
    matches = own_matches(text, longest) + frozen_matches(texts, text, longest, 10**6)
    most = max((length for length, _ in matches), default=0)
    behind = [tokens for length, tokens in matches if length == most >= shortest]
    found = counts(behind, depth)
    above = found[path] if path else len(behind)
    retrieved = {p[-1]: n / above for p, n in found.items() if p[:-1] == path}
    token = path[-1] if path else text[-1]
    last = max((p for p in range(len(text) - 1) if text[p] == token and p + 1 in told), default=None)
    copied = {} if last is None else {t: math.exp(v) for t, v in told[last + 1]}
    if not (retrieved and copied):
        return retrieved or copied
    return {t: weight * retrieved.get(t, 0.0) + (1 - weight) * copied.get(t, 0.0) for t in retrieved.keys() | copied.keys()}
