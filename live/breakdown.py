"""Where the time of a cycle goes: timers around the parts of a live decoder, for ``python -m live.bench --breakdown``.

Each millisecond is counted once: a timed call inside another one is taken off the outer. On a GPU every border waits for the
device, so the shares are right there while the whole is slower than without timers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from live.decode import SpeculativeDecoder

PARTS = ("draft", "verify", "policy", "cache", "python")
"""draft and verify: the two networks' forward passes; policy: its own decisions; cache: committing the accepted path;
python: everything else (masks, the tree, ranking, the walk, the loop). In fixed shapes (live/graphed.py) masks and ranking belong
to the networks' passes."""

_OF_POLICY = ("begin", "expand", "select", "observe")


@dataclass
class Breakdown:
    """Milliseconds by part over ``cycles`` cycles. ``overhead`` is the share that is not the two networks' forward passes."""

    ms: dict[str, float]
    cycles: int

    @property
    def total(self) -> float:
        return sum(self.ms.values())

    @property
    def overhead(self) -> float:
        return 1 - (self.ms["draft"] + self.ms["verify"]) / self.total if self.total else 0.0

    def __add__(self, other: Breakdown) -> Breakdown:
        return Breakdown({part: self.ms[part] + other.ms[part] for part in PARTS}, self.cycles + other.cycles)

    def per_cycle(self) -> dict[str, float]:
        """Milliseconds of a mean cycle by part."""
        return {part: ms / max(self.cycles, 1) for part, ms in self.ms.items()}


@dataclass
class _Clock:
    """Exclusive timers. The part on top of the stack is running."""

    device: torch.device
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    running: list[str] = field(default_factory=lambda: ["python"])
    since: float = 0.0

    def __post_init__(self) -> None:
        self._waits = self.device.type == "cuda"  # asked once: timers are read some thirty times a cycle

    def turn(self) -> None:
        """Charge the time since the last border to the part that ran."""
        if self._waits:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.spent[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, part: str, call: Callable) -> Callable:
        def measured(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self.running.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                self.turn()
                self.running.pop()

        return measured


class Breaker:
    """Timers on one decoder while :meth:`watching`; :meth:`begin` when decoding starts, :meth:`end` when it is over."""

    def __init__(self, decoder: SpeculativeDecoder):
        self.decoder, self._clock = decoder, _Clock(decoder.target.device)

    @contextmanager
    def watching(self) -> Iterator[Breaker]:
        """Within, the decoder's parts are timed; behind it they are as before."""
        decoder = self.decoder
        timed = [(decoder.policy, name, "policy") for name in _OF_POLICY if _has(decoder.policy, name)]
        timed += [(decoder.target, "run", "verify"), (decoder.target, "commit", "cache"), (decoder.drafter, "commit", "cache")]
        timed += [(owner, name, "draft") for owner, name in decoder.drafter.forwards()]
        for owner, name, part in timed:  # in the instance's own dictionary: a policy is frozen, and classes are shared
            vars(owner)[name] = self._clock.timed(part, getattr(owner, name))
        try:
            yield self
        finally:
            for owner, name, _ in timed:
                vars(owner).pop(name, None)

    def begin(self) -> None:
        self._clock.turn()
        self._clock.spent = dict.fromkeys(PARTS, 0.0)

    def end(self, cycles: int) -> Breakdown:
        self._clock.turn()
        return Breakdown({part: 1e3 * seconds for part, seconds in self._clock.spent.items()}, cycles)


def _has(policy: Any, name: str) -> bool:
    """Whether the policy does something of its own there."""
    from policies.contract import Policy

    return getattr(type(policy), name) is not getattr(Policy, name)
