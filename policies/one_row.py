"""One request on a CPU: its tree is some dozen small integers, and plain Python is done before a few tensor operations start.

The same decisions as `policies.verification`, `policies.tree` and `live.verifier` make for many rows at once; a test compares them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.order import NONE


def alone(values: Tensor) -> bool:
    """Whether these are values of a single row that lies in the host's memory: [1, ...]."""
    return len(values) == 1 and values.device.type == "cpu"


def integers(values: list, like: Tensor) -> Tensor:
    """An int64 tensor of these values (a list, or a list of lists), where ``like`` lies."""
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def nodes_in(slot: Tensor, node: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """(the nodes in slots int64 [1, W] of a level, -1 = none; those slots, 0 for none): int64 [1, W] each.

    :param node: int64 [1, M], the node in each slot; None: they are numbered from ``first`` on.
    """
    own = slot[0].tolist()
    held = range(first, first + max(own, default=0) + 1) if node is None else node[0].tolist()
    found = [held[place] if place >= 0 else NONE for place in own]
    return integers([found], slot), integers([[max(place, 0) for place in own]], slot)


def accepted_path(token: list[int], parent: list[int], choice: list[int]) -> tuple[list[int], int]:
    """(places of the accepted nodes, the target's token behind the last of them), from lists over the kept nodes, root first."""
    path, current = [], 0
    for place in range(1, len(token)):  # in node order, so that a parent comes before its children
        if parent[place] == current and token[place] == choice[current]:
            path.append(place)
            current = place
    return path, choice[current]


def status_of(node: list[int], parent: list[int], path: list[int], ended: bool, width: int) -> list[int]:
    """Status of each of ``width`` tree nodes. ``node`` and ``parent`` are lists over the kept nodes; ``ended``: no bonus."""
    status, on_path = [NONE] * width, {0, *path}
    tested_below = on_path - {[0, *path][-1]} if ended else on_path
    for place in range(1, len(node)):
        if parent[place] in tested_below:
            status[node[place]] = int(place in on_path)
    return status


def ancestors(parent: Tensor) -> Tensor:
    """bool [1, V, V]: which kept nodes each kept node attends to, itself and its ancestors, from int64 [1, V]."""
    sees = torch.eye(parent.shape[1], dtype=torch.bool, device=parent.device)
    own = sees.numpy()
    for place, above in enumerate(parent[0].tolist()[1:], 1):
        own[place] |= own[max(above, 0)]
    return sees[None]
