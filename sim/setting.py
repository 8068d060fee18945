"""Under which circumstances a policy is replayed and priced."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from policies.errors import UserError

RAGGED = ("max", "sum")
EXECUTIONS = ("serial", "pipelined")
EXACT_KINDS = ("lm", "training-free")
"""Kinds of drafter whose proposals depend on committed tokens alone, so that pipelining changes none of them."""


@dataclass(frozen=True)
class Setting:
    """What is not the policy's to choose.

    drafter         name of a recorded drafter, or a training-free one with its parameters
    batch           requests that decode together
    ragged          what unequal requests of a batch pay for: "max" (padded to the largest) or "sum" (packed tokens)
    context_offset  tokens to put before every text, in price only: what a long prompt would cost
    execution       "serial", or "pipelined": drafting overlaps verification (see sim.pipelining)
    temperature     replay only the texts that were sampled at it; None is all texts
    """

    drafter: str
    batch: int = 1
    ragged: str = "max"
    context_offset: int = 0
    execution: str = "serial"
    temperature: float | None = None

    def __post_init__(self):
        if self.batch < 1:
            raise UserError(f"--batch must be 1 or more, not {self.batch}")
        if self.context_offset < 0:
            raise UserError(f"--context-offset must be 0 or more, not {self.context_offset}")
        if self.execution == "pipelined" and self.batch > 1:
            raise UserError("pipelined execution is priced for one request at a time: give --batch 1, or --execution serial")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
