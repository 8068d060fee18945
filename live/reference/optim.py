"""Optimisation: Muon for the hidden matrices, AdamW for everything else, and the learning-rate schedule."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from live.reference.checkpoint import multiplies_bfloat16

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

#: Quintic Newton-Schulz coefficients (Jordan et al., https://kellerjordan.github.io/posts/muon/).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix's singular value decomposition; matrices [n, rows, columns], any float dtype.

    In bfloat16 where the hardware multiplies it, else in float32 (emulated products are a hundred times slower).
    """
    work = matrices.to(torch.bfloat16 if multiplies_bfloat16(matrices.device) else torch.float32)
    tall = work.shape[1] > work.shape[2]
    if tall:
        work = work.transpose(1, 2)
    work = work / (work.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = work @ work.transpose(1, 2)
        work = torch.baddbmm(work, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), work, beta=a)
    return (work.transpose(1, 2) if tall else work).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; for 2-D hidden weights only.

    Differs from torch.optim.Muon in that equal shapes are orthogonalised in one batch, in float32 where bfloat16 is emulated.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[tuple(parameter.shape)].append(parameter)
            for (rows, columns), parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov
                step = orthogonalise(torch.stack(updates))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(parameters, step, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


class Optimiser:
    """Muon and AdamW behind one face; both follow `schedule` times their own base rate."""

    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float, weight_decay: float = 0.0) -> None:
        hidden, rest = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
                (hidden if matrix else rest).append(parameter)
        self.parts = (
            Muon(hidden, lr=muon_lr, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True),
        )
        self.base = (muon_lr, adam_lr)
        self.parameters = hidden + rest

    def step(self, scale: float, clip: float = 1.0) -> float:
        """Clip the gradient to `clip`, update at `scale` times the base rates, clear; returns the gradient's norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for part, base in zip(self.parts, self.base, strict=True):
            for group in part.param_groups:
                group["lr"] = base * scale
            part.step()
            part.zero_grad(set_to_none=False)
        return float(norm)

    def state_dict(self) -> list[dict[str, Any]]:
        """Both parts' states, in order."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Put back what `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def schedule(step: int, steps: int, warmup: int = 30, decay: float = 0.45) -> float:
    """Warm-up, constant, then linear decay to zero over the last `decay` of `steps`; a factor in (0, 1]."""
    rise = min(1.0, (step + 1) / warmup)
    fall = min(1.0, (steps - step) / max(1.0, decay * steps))
    return min(rise, max(fall, 0.0))
