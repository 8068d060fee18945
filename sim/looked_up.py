"""Drafters of a replay by name: recorded ones answer from their forest, training-free ones run again on the recorded text."""

from __future__ import annotations

import numpy as np
import torch

from policies.contract import Cycle
from policies.drafting import Drafter
from policies.errors import UserError
from policies.lookup.drafter import LookupDrafter
from policies.lookup.first import LookupFirst
from policies.lookup.name import DrafterName, read_name
from policies.lookup.past import Past
from policies.lookup.rule import Rule, load_rule
from sim.recorded import RecordedDrafter, RecordedText, tensor
from traces.recording import Recording


def replayed_drafter(recording: Recording, name: str | None, text: RecordedText) -> Drafter:
    """The drafter that a replay asks.

    :param name: of a recorded drafter (None: the first), or how a training-free one is written, ``suffix(depth=8)``, or one that
        is asked first, ``suffix+eagle3``.
    :raises UserError: when there is none such, or the recording lacks what it reads.
    """
    asked = asked_of(recording, name)
    network = None if asked.network is None else RecordedDrafter(recording, asked.network, text)
    if asked.rule is None:
        return network
    rule = load_rule(asked.rule)
    check_readable(recording, rule)
    lookup = LookupDrafter(rule, RecordedPast(recording, text))
    return lookup if network is None else LookupFirst(lookup, network)


def asked_of(recording: Recording, name: str | None) -> DrafterName:
    """Which rule runs again and which forest is read for a drafter's name (None: the first recorded one)."""
    return read_name(recording.drafters[0] if name is None else name, recording.drafters)


def check_drafter(recording: Recording, name: str | None) -> DrafterName:
    """The same. :raises UserError: when the recording holds no such forest, or not what the rule reads."""
    asked = asked_of(recording, name)
    if asked.network is not None:
        recording.forest(asked.network)
    if asked.rule is not None:
        check_readable(recording, load_rule(asked.rule))
    return asked


def check_readable(recording: Recording, rule: Rule) -> None:
    """:raises UserError: when the recording holds no prompts, or fewer of the target's best tokens than the rule reads; when the
    rule's corpus is of another tokenizer, or answers prompts of the recording."""
    held = recording.top_tokens.shape[1]
    if rule.top > held:
        raise UserError(
            f"drafter '{rule.name}' reads the target's {rule.top} best tokens, the recording holds {held}: "
            f"write {rule.name}(top={held}), or record with --top-m {rule.top}"
        )
    if len(recording.length):
        recording.prompt_tokens(0)
    if rule.frozen is not None:
        rule.frozen.check_tokenizer(recording.manifest.get("target", {}).get("tokenizer_sha256"), "the recording")
        rule.frozen.check_unseen(map(recording.prompt_tokens, range(len(recording.length))))


class RecordedPast:
    """What each row of a cycle has committed, out of a recording: prompts and texts side by side in one tensor."""

    def __init__(self, recording: Recording, text: RecordedText):
        prompts = [recording.prompt_tokens(sequence) for sequence in range(len(text.length))]
        texts = np.split(recording.token, recording.offset[1:-1])
        parts = [part for both in zip(prompts, texts, strict=True) for part in both]
        self.text = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        self.prompt = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
        self.first = text.offset[:-1] + self.prompt.cumsum(0) - self.prompt
        self.shift = self.first + self.prompt - text.offset[:-1]
        self.top_tokens, self.top_logprobs = tensor(recording.top_tokens), tensor(recording.top_logprobs)

    def __call__(self, cycle: Cycle) -> Past:
        sequence = cycle.sequence
        first = self.first[sequence]
        generated = first + self.prompt[sequence]
        root = generated + cycle.position
        return Past(self.text, first, root, self.top_tokens, self.top_logprobs, self.shift[sequence], generated + 1)
