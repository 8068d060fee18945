"""The policy contract: what a policy is asked, what it may know, and how it travels as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from policies.cost import Cost
from policies.errors import UserError
from policies.tree import DraftTree

State = dict[str, Tensor]
"""What changes while decoding: tensors whose first axis is the row (scope cycle, sequence) or is 1 (stream, batch). Rows of
numbers that hold less than others beside them have -1 at the end of the last axis. What :meth:`Policy.begin` puts there for one
cycle alone may be anything, if :meth:`Policy.observe` takes it out again."""


@dataclass(frozen=True)
class Sampling:
    """How the target's token is chosen. Temperature 0 is greedy (argmax, lowest id on ties).

    Processors as in Hugging Face, in its order: repetition penalty, temperature, top-k (0 = off), top-p (1 = off). Each field
    is a number; inside a cycle of the decoding loops it is a tensor [B], since rows may differ (:meth:`by_row`).
    """

    temperature: float | Tensor = 0.0
    top_k: int | Tensor = 0
    top_p: float | Tensor = 1.0
    repetition_penalty: float | Tensor = 1.0
    seed: int | Tensor = 0

    def by_row(self, rows: Tensor) -> Sampling:
        """The settings of the given rows, int64 [B]: float64 and int64 tensors [B] on their device."""

        def column(value: float | Tensor, dtype: torch.dtype) -> Tensor:
            if isinstance(value, Tensor):
                return value[rows]
            return torch.full(rows.shape, value, dtype=dtype, device=rows.device)

        whole = ("top_k", "seed")
        kinds = {field.name: torch.int64 if field.name in whole else torch.float64 for field in dataclasses.fields(self)}
        return Sampling(**{name: column(getattr(self, name), kind) for name, kind in kinds.items()})


class Once:
    """A value that is worked out when it is first asked for."""

    def __init__(self, work_out: Callable[[], Any]):
        self._work_out, self._known, self._value = work_out, False, None

    def __call__(self) -> Any:
        if not self._known:
            self._value, self._known = self._work_out(), True
        return self._value


@dataclass(frozen=True)
class Cycle:
    """One draft-verify-accept cycle, for B rows.

    active          bool    [B]  rows that still decode; the others are padding
    sequence        int64   [B]  which sequence the row decodes (with ``number``, the key of a randomised policy)
    number          int64   [B]  cycles this sequence has finished
    position        int64   [B]  place of the root among the generated tokens, 0 = the token that prefill gave
    context_length  int64   [B]  tokens before the root (prompt and generated)
    room            int64   [B]  tokens that still count after the root, up to the token limit
    reach           int64   [B]  deepest node that fits in the context of target and draft, and that the draft can draft
    root_told       () -> (``root_entropy``, ``root_logprob``), worked out when a policy looks at them
    group           int64   [B]  rows with the same number decode together as one serving batch
    sampling        how the target's tokens are chosen, its fields tensors [B]
    cost            what time costs on this machine, or None
    """

    active: Tensor
    sequence: Tensor
    number: Tensor
    position: Tensor
    context_length: Tensor
    room: Tensor
    reach: Tensor
    root_told: Callable[[], tuple[Tensor, Tensor]]
    group: Tensor
    sampling: Sampling = Sampling()
    cost: Cost | None = None

    def up_to(self, deepest: int | None) -> Cycle:
        """The same for a drafter that drafts nodes of depth 1 .. ``deepest`` only; None: as deep as asked."""
        return self if deepest is None else dataclasses.replace(self, reach=self.reach.clamp(max=deepest))

    @property
    def root_entropy(self) -> Tensor:
        """float32 [B]: entropy (nats) of the target's distribution that gave the root."""
        return self.root_told()[0]

    @property
    def root_logprob(self) -> Tensor:
        """float32 [B]: the root's raw log-probability under it."""
        return self.root_told()[1]


@dataclass(frozen=True)
class Outcome:
    """What verification taught: only what replay and live decoding both know.

    accepted     int64   [B]     kept nodes on the true path
    bonus        int64   [B]     the target's own token behind them, -1 after an end-of-sequence token
    status       int8    [B, N]  per tree node: 1 accepted, 0 rejected, -1 untested or not kept
    tree         the draft tree the statuses refer to
    ask_top      what the target is asked by when ``top_tokens`` or ``top_logprobs`` are read for the first time: they take a
                 pass over the vocabulary, and a live target knows them until its next cycle
    top_tokens   int64   [B, A, M] the target's most probable tokens at the root and each accepted node, -1 padding
    top_logprobs float32 [B, A, M] their raw log-probabilities (nats)
    """

    accepted: Tensor
    bonus: Tensor
    status: Tensor
    tree: DraftTree
    ask_top: Callable[[], tuple[Tensor, Tensor]]

    @cached_property
    def _top(self) -> tuple[Tensor, Tensor]:
        return self.ask_top()

    @property
    def top_tokens(self) -> Tensor:
        return self._top[0]

    @property
    def top_logprobs(self) -> Tensor:
        return self._top[1]


class Expansion(NamedTuple):
    """Nodes to run the draft on next, int64 [B, W] with -1 = none, and how many children each (int or int64 [B, W])."""

    nodes: Tensor
    branching: int | Tensor


class Policy:
    """Base of all policies: a frozen dataclass whose fields are its parameters.

    A field whose name ends with an underscore holds what :meth:`fit` learned. Nothing else is kept in the object: what
    changes while decoding lives in the state.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    kind: ClassVar[str] = "policy"
    """"policy" decides from what it may know; "control" is a yardstick; an oracle is a type of its own."""
    scope: ClassVar[str] = "cycle"
    """How long the state lives: cycle, sequence, stream (across requests, in request order) or batch."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Optional tree columns that the policy reads: "entropy", "topk_entropy"."""
    batch_wide: ClassVar[bool] = False
    """Whether a row's decision looks at the other rows of its group."""
    published: ClassVar[str] = ""
    """How to write the published form, where the defaults are a capped one that a default recording covers (nearly)."""
    fits_on_nodes: ClassVar[bool] = False
    """Whether :meth:`fit` reads the table of tested nodes besides the table of positions."""
    levels: ClassVar[str | None] = None
    """The parameter that is nothing but the number of draft levels: policies that differ in it alone expand the same nodes as far
    as both go, each level out of the one before. A class says so itself; it is not inherited."""
    budget: ClassVar[str | None] = None
    """The parameter that is nothing but how many tokens are verified, root included: :meth:`select` gives the nodes of highest path
    probability, in total order. With ``levels`` it lets a sweep draft once for a whole grid (`sim.family`). Not inherited."""
    fits_on_whole_trees: ClassVar[int] = 0
    """0: that table lists the tested nodes. k: it lists the accepted ones and, tested or not, every k-th of the others."""
    fits_on_cost: ClassVar[bool] = False
    """Whether fitting weighs time: it then needs a cost model."""
    source: ClassVar[str] = ""
    """FILE.py:Class of a policy from outside this folder; it stands for the name in JSON."""
    called: ClassVar[str | None] = None
    """What this object goes by instead of its spec; see :func:`named`."""

    def init(self, rows: int, key: Tensor) -> State:
        """State of ``rows`` fresh sequences; ``key`` int64 [rows] numbers them. Stateless by default."""
        return {}

    def begin(self, cycle: Cycle, state: State) -> State:
        """Reset the scratch part of the state for a new cycle."""
        return state

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        """Which nodes to run the draft on next. None, or no node in a row, ends the (row's) drafting for this cycle."""
        raise NotImplementedError

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        """Which nodes to verify: bool [B, N], ancestor-closed; the root is verified in any case."""
        raise NotImplementedError

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        """Learn from a verified cycle."""
        return state

    @classmethod
    def required_fit(cls) -> tuple[str, ...]:
        """Names of the learned fields that must be filled before the policy can run."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name.endswith("_"))

    def check_fitted(self) -> None:
        """Raise a :class:`UserError` when a learned field is still empty."""
        empty = [name for name in self.required_fit() if getattr(self, name) is None]
        if not empty:
            return
        command = f"`python -m sim.fit TRACE --policy {self.source or self.name} --out {self.name}.json`"
        if len(empty) < len(self.required_fit()):  # fitted before the policy learned as much as it does now
            raise UserError(f"policy '{self.name}' was fitted without {' and '.join(empty)}: fit it again, with {command}")
        raise UserError(f"policy '{self.name}' must be fitted first: run {command} and pass the JSON file")

    def fit_base(self) -> Policy:
        """The policy that drafts the trees which :meth:`measure` looks at, at every recorded position."""
        return self

    def measure(self, tree: DraftTree, cycle: Cycle) -> dict[str, Tensor]:
        """Columns [B] for :meth:`fit`, one value per position, from a tree that :meth:`fit_base` has drafted."""
        return {}

    def fit(self, samples: Any) -> Policy:
        """A fitted copy, from the table of samples that ``sim.fit`` builds out of a recording's training split."""
        raise UserError(f"policy '{self.name}' has nothing to fit: run it as it is")

    def variants(self, ms_per_token: float) -> list[Policy]:
        """Settings near this one, among which ``sim.fit`` chooses by predicted time, again and again until none is faster.

        :param ms_per_token: what this one is predicted to take on the training texts.
        """
        return []

    def expected_acceptance(self, samples: Any) -> Any:
        """float64 [n]: the chance that each of ``samples.nodes`` is accepted, given that its parent is; None: no estimate."""
        return None

    def describe_fit(self, samples: Any) -> list[str]:
        """Lines that say what was learned and how it does on ``samples`` held out from fitting."""
        return []

    def parameters(self) -> dict[str, Any]:
        """All parameters and learned values, as plain JSON types."""
        return dataclasses.asdict(self)

    def to_json(self) -> dict[str, Any]:
        return {"policy": self.source or self.name, "parameters": self.parameters()}

    def spec(self) -> str:
        """How to write this policy on a command line: its name and the parameters that differ from the defaults; or what it is
        called, where that would be another's too."""
        if self.called is not None:
            return self.called
        changed = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_"):
                if value is not None and "fitted" not in changed:
                    changed.append("fitted")
            elif value != field.default:
                changed.append(f"{field.name}={value}")
        return f"{self.name}({', '.join(changed)})" if changed else self.name


def named(policy: Policy, called: str) -> Policy:
    """The same policy under a name of its own: two fits have one :meth:`Policy.spec`, which does not spell out what was learned."""
    copy = dataclasses.replace(policy)
    object.__setattr__(copy, "called", called)
    return copy


def require(condition: bool, policy: str, message: str) -> None:
    """Parameter check in a policy's ``__post_init__``: raise a :class:`UserError` unless the condition holds."""
    if not condition:
        raise UserError(f"policy '{policy}': {message}")
