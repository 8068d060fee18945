"""What HedgeSpec would do if it knew every setting after every cycle: its full-information form, as a bound.

Liu et al. 2025, "Not-a-Bandit" (https://arxiv.org/abs/2510.20064), section 4: every expert is scored on each verified text. Live,
a setting whose tree does not lie inside the verified one would have to be drafted and verified again, at a price (so
`policies.hedgespec` lets it sleep); a recording knows for nothing what each would have had accepted. It looks at no truth ahead
of a decision, but what it learns is not to be had at its price: compare with it, do not rank it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from policies.chain import Chain
from policies.contract import Cycle, Outcome, Policy
from policies.eagle3 import Eagle3
from policies.hedgespec import HedgeSpec
from sim.recorded import RecordedText
from sim.samples import build_samples
from traces.recording import Recording


class KnowingHedge(HedgeSpec):
    """HedgeSpec whose every arm is known in every cycle. Not registered: no live decoder can run it."""

    kind = "bound"
    know: Callable[[Cycle], Tensor]

    def spec(self) -> str:
        return f"[{super().spec()}, every arm known]"

    def counterfactual(self, outcome: Outcome, cycle: Cycle, arm: Tensor) -> tuple[Tensor, Tensor]:
        accepted = self.know(cycle)
        return accepted, torch.ones_like(accepted, dtype=torch.bool)


def knowing(hedge: HedgeSpec, recording: Recording, drafter: str, sequences: np.ndarray | None = None) -> KnowingHedge:
    """The full-information form of ``hedge`` on some of a recording's texts (indices; all by default).

    It can be replayed on those texts, like a policy, and nowhere else.
    """
    text = RecordedText(recording)
    chosen = np.arange(len(text.length)) if sequences is None else np.sort(sequences)
    accepted = [build_samples(recording, setting(arm), drafter, chosen).accepted for arm in hedge.arms]
    table = torch.from_numpy(np.stack(accepted, axis=1))
    starts = torch.zeros_like(text.length)
    count = (text.length[chosen] - 1).clamp(min=0)
    starts[chosen] = count.cumsum(0) - count
    known = KnowingHedge(**{field.name: getattr(hedge, field.name) for field in fields(HedgeSpec)})
    vars(known)["know"] = lambda cycle: table[starts[cycle.sequence] + cycle.position]
    return known


def setting(arm: int | tuple[int, int, int]) -> Policy:
    """An arm as the policy that it is."""
    return Chain(arm) if isinstance(arm, int) else Eagle3(*arm)
