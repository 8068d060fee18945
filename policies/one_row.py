"""One request on a CPU: its tree is some dozen small integers, and plain Python is done before a few tensor operations start.

The same decisions as `policies.verification`, `policies.tree` and the verifiers make for many rows at once; a test compares them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from policies.order import FEW, NONE


def alone(values: Tensor) -> bool:
    """Whether these are values of a single row that lies in the host's memory: [1, ...]."""
    return values.shape[0] == 1 and values.is_cpu


def least(values: Tensor) -> int:
    """The least of numbers int64 [...], of which there is one at least; a few on the host without an operation of its own."""
    return min(values.flatten().tolist()) if values.is_cpu and values.numel() <= FEW else int(values.min())


def every(flags: Tensor) -> bool:
    """Whether all of bool [...] are true; a few on the host as in :func:`least`."""
    return all(flags.flatten().tolist()) if flags.is_cpu and flags.numel() <= FEW else bool(flags.all())


def integers(values: list, like: Tensor | None = None) -> Tensor:
    """An int64 tensor of these values (a list, or a list of lists of one length), where ``like`` lies, or on the host."""
    found = torch.from_numpy(np.array(values, dtype=np.int64))  # torch.tensor takes thrice as long
    return found if like is None or like.is_cpu else found.to(like.device)


@lru_cache(maxsize=2)
def flag(value: bool) -> Tensor:
    """bool [1]; nobody writes into it."""
    return torch.tensor([value])


def with_root(path: Tensor) -> Tensor:
    """Root (0) and accepted path int64 [B, A], as places in the kept list: int64 [B, A + 1]."""
    return integers([[0, *path[0].tolist()]], path) if alone(path) else torch.nn.functional.pad(path, (1, 0))


def nodes_in(slot: list[int], node: Tensor | None, first: int) -> list[int]:
    """The nodes in slots of a level, -1 = none.

    :param node: int64 [1, M], the node in each slot; None: they are numbered from ``first`` on.
    """
    if node is None:
        return [first + place if place >= 0 else NONE for place in slot]
    held = node[0].tolist()
    return [held[place] if place >= 0 else NONE for place in slot]


def packed(node: list[int], token: list[int], parent: list[int], depth: list[int]) -> list[list[int]] | None:
    """Node, token, place of the parent and depth of each kept ``node``, root first, from columns over the tree's nodes; None where
    a kept node's parent is not kept."""
    place = {NONE: NONE} | {index: own for own, index in enumerate(node)}
    above = [place.get(parent[index]) for index in node]
    return None if None in above else [node, [token[index] for index in node], above, [depth[index] for index in node]]


def accepted_path(token: list[int], parent: list[int], choice: list[int]) -> tuple[list[int], int]:
    """(places of the accepted nodes, the target's token behind the last of them), from lists over the kept nodes, root first."""
    path, current = [], 0
    for place in range(1, len(token)):  # in node order, so that a parent comes before its children
        if parent[place] == current and token[place] == choice[current]:
            path.append(place)
            current = place
    return path, choice[current]


def status_of(node: list[int], parent: list[int], path: list[int], ended: bool, width: int) -> np.ndarray:
    """Status int8 [1, ``width``] of each tree node. ``node`` and ``parent`` are lists over the kept nodes; ``ended``: no bonus."""
    status, on_path = np.full((1, width), NONE, dtype=np.int8), {0, *path}
    tested_below = on_path - {[0, *path][-1]} if ended else on_path
    for place in range(1, len(node)):
        if parent[place] in tested_below:
            status[0, node[place]] = place in on_path
    return status


def ancestors(parent: Tensor) -> Tensor:
    """bool [1, V, V], not to be written: which kept nodes each kept node sees, itself and its ancestors, from int64 [1, V]."""
    return _ancestors(tuple(parent[0].tolist()))


@lru_cache(maxsize=256)
def _ancestors(parents: tuple[int, ...]) -> Tensor:
    """The same; chains and fixed trees come again and again."""
    sees, own, count = [], 1, len(parents)  # a number for each node, a bit for each node that it sees
    for above in parents:
        sees.append(own | sees[above] if above >= 0 else own)
        own <<= 1
    size = -(-count // 8)
    packed_bits = np.frombuffer(b"".join([bits.to_bytes(size, "little") for bits in sees]), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed_bits.reshape(1, count, size), 2, count, "little").view(np.bool_))
