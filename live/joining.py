"""How texts join others that are being decoded: they are prefilled beside them, then their rows go behind the others'.

So a prompt is run for its own rows only, whatever the others' state and length, and nothing of theirs is touched: every number
of a row comes from its own tokens. The rows of both then decode as one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from live.decode import PER_ROW, SpeculativeDecoder
from policies.contract import Policy, State
from policies.order import NONE


def beside(decoder: SpeculativeDecoder) -> SpeculativeDecoder:
    """A decoder of the same models under the same policy, with caches of its own: weights are shared."""
    target, drafts = decoder.target.beside(), decoder.drafter.beside()
    ends = decoder.verifier.end_tokens.tolist()
    return SpeculativeDecoder(target, drafts, decoder.policy, ends, decoder.cost, decoder.context_limit)


def join(decoder: SpeculativeDecoder, other: SpeculativeDecoder) -> None:
    """Let the rows of ``other`` that still decode go on in ``decoder``, behind its own; ``other`` must be thrown away.

    :param decoder: between two steps, at least one of its rows still decoding.
    :param other: made by :func:`beside`, with its prompts prefilled. If its draft crashed there, all decode on plainly.
    """
    if not other._keep_going():
        return
    if not decoder._keep_going():
        raise ValueError("join() needs a batch in flight: prefill the decoder itself instead")
    decoder.state = joined_states(decoder.policy, [(decoder.state, len(decoder._row)), (other.state, len(other._row))])
    decoder.target.join(other.target)
    decoder.draft_error = decoder.draft_error or other.draft_error
    if decoder.draft_error is None:
        decoder._drafting(lambda: decoder.drafter.join(other.drafter))
    decoder.verifier.sampler.join(other.verifier.sampler)
    for name in PER_ROW:
        setattr(decoder, f"_{name}", torch.cat([getattr(decoder, f"_{name}"), getattr(other, f"_{name}")]))


def forget(decoder: SpeculativeDecoder) -> None:
    """Let the caches go: no row is left. The policy's state stays, for policies that learn across requests."""
    decoder.target.reset(0)
    decoder.drafter.forget()


def joined_states(policy: Policy, parts: list[tuple[State, int]]) -> State:
    """One state of the rows of several states, each given with its number of rows.

    What outlives its rows (scope stream or batch) is the first part's. The scratch of a cycle is left out: ``begin`` makes it.
    """
    (first, rows), *_ = parts
    if policy.scope in ("stream", "batch"):
        return first
    lasting = policy.init(1, torch.zeros(1, dtype=torch.int64))
    joined: State = {}
    for name in lasting:
        values = [state[name] for state, _ in parts]
        by_row = all(value.shape[:1] == (count,) for value, (_, count) in zip(values, parts, strict=True))
        joined[name] = torch.cat(as_wide(values)) if by_row else first[name]
    return joined


def as_wide(values: list[Tensor]) -> list[Tensor]:
    """The same with -1 at the end of rows that hold less than others: what a row remembers may grow with its text."""
    width = max(value.shape[-1] for value in values)
    return [pad(value, (0, width - value.shape[-1]), value=NONE) if value.dim() > 1 else value for value in values]
