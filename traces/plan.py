"""What is to be recorded: every turn of every prompt in every sampling group, and which shard holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from traces.manifest import ShardPlan
from traces.prompts import Prompt


@dataclass(frozen=True)
class Turn:
    """One text to record.

    number  of the sequence, unique in the recording
    prompt  whose conversation it belongs to
    turn    which of the target's answers it is, counted from 0
    group   index of the sampling settings
    """

    number: int
    prompt: Prompt
    turn: int
    group: int

    @property
    def conversation(self) -> tuple[int, str, str]:
        """What the turns of one conversation share."""
        return self.group, self.prompt.domain, self.prompt.id


def turns_of(prompts: Sequence[Prompt], groups: int = 1) -> list[Turn]:
    """All texts in the order of their numbers: group by group, prompt by prompt, turn by turn."""
    wanted = [(prompt, turn, group) for group in range(groups) for prompt in prompts for turn in range(prompt.turns)]
    return [Turn(number, *which) for number, which in enumerate(wanted)]


def shard_plan(turns: Sequence[Turn], size: int) -> list[ShardPlan]:
    """Shards of at most ``size`` whole conversations of one group and domain, in order."""
    plan: list[ShardPlan] = []
    for group, domain in dict.fromkeys((turn.group, turn.prompt.domain) for turn in turns):
        members = [turn for turn in turns if (turn.group, turn.prompt.domain) == (group, domain)]
        talks = list(dict.fromkeys(turn.conversation for turn in members))
        for start in range(0, len(talks), size):
            here = set(talks[start : start + size])
            numbers = tuple(turn.number for turn in members if turn.conversation in here)
            plan.append(ShardPlan(len(plan), numbers, domain))
    return plan
