"""Between the loop, which lies on the host, and the networks, which lie on their device.

Drafting, the tree, the policy's decisions and the walk are a few dozen small numbers a cycle. A GPU takes longer to be asked for
one operation on them than the host takes for all of it, so they stay here: what a network needs is sent to it, what it says of a
level or of the kept nodes is fetched in one piece. With CUDA graphs (live/graphed.py) the host waits for nothing else; without
them, settling ties waits too. On a CPU nothing moves.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on ``device``, without waiting for what that is doing: a GPU's driver takes its copy of them at once."""
    return values if values.device == device else values.to(device, non_blocking=True)


def fetched(values: Tensor) -> Tensor:
    """The values on the host, once the device has worked them out."""
    return values if values.is_cpu else values.cpu()
