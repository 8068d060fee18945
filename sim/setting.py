"""Under which circumstances a policy is replayed and priced."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from policies.errors import UserError

if TYPE_CHECKING:  # the commands read this file for --help, which loads no torch
    from policies.contract import Policy

RAGGED = ("max", "sum")
SCHEDULES = ("joining", "fixed")
EXECUTIONS = ("serial", "pipelined")
EXACT_KINDS = ("lm", "training-free")
"""Kinds of drafter whose proposals depend on committed tokens alone, so that pipelining changes none of them."""


@dataclass(frozen=True)
class Setting:
    """What is not the policy's to choose.

    drafter         name of a recorded drafter, a training-free one with its parameters, or one before the other (RULE+NETWORK)
    batch           requests that decode together
    ragged          what unequal requests of a batch pay for: "max" (padded to the largest) or "sum" (packed tokens)
    context_offset  tokens to put before every text, in price only: what a long prompt would cost
    execution       "serial", or "pipelined": drafting overlaps verification (see sim.pipelining)
    temperature     replay only the texts that were sampled at it; None is all texts
    schedule        who decodes together when ``batch`` is above 1 (see sim.schedule): "joining" (the next request takes the place
                    of one that has ended) or "fixed" (groups that admit nobody). One for all that are compared, plain decoding
                    included: groups that shrink take more steps for the same texts
    """

    drafter: str
    batch: int = 1
    ragged: str = "max"
    context_offset: int = 0
    execution: str = "serial"
    temperature: float | None = None
    schedule: str = "joining"

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"--schedule must be {' or '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.batch < 1:
            raise UserError(f"--batch must be 1 or more, not {self.batch}")
        if self.context_offset < 0:
            raise UserError(f"--context-offset must be 0 or more, not {self.context_offset}")
        if self.execution == "pipelined" and self.batch > 1:
            raise UserError("pipelined execution is priced for one request at a time: give --batch 1, or --execution serial")

    def scheduled(self, policies: Iterable[Policy | type[Policy]], schedule: str | None = None) -> Setting:
        """The same under the one schedule that can price all the policies: "fixed" where one of them decides for a whole batch.

        :param schedule: take this one instead.   :raises UserError: when it cannot price one of them.
        """
        policies = list(policies)
        groups = self.batch > 1 and any(policy.batch_wide for policy in policies)
        found = replace(self, schedule=schedule or ("fixed" if groups else "joining"))
        for policy in policies:
            found.check(policy)
        return found

    def check(self, policy: Policy | type[Policy]) -> None:
        """Replay runs a policy that decides for the whole batch in fixed groups: no other schedule prices what it saw.

        :raises UserError: when this setting's is another one.
        """
        if self.batch > 1 and policy.batch_wide and self.schedule != "fixed":
            raise UserError(
                f"{policy.name} decides for the whole batch and is replayed in fixed groups, so requests that join cannot be "
                "priced: say --schedule fixed, or leave it out"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
