"""A live run and its replay side by side, compared cycle by cycle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from live.explain import TOLERANCE, TapedDrafter, largest_difference, same_decision, same_kept
from policies.contract import Sampling, State
from policies.loop import Step
from sim.looked_up import replayed_drafter
from sim.recorded import RecordedText
from sim.replay import ReplayRun

if TYPE_CHECKING:
    from live.decode import SpeculativeDecoder
    from live.fidelity import Report
    from traces.recording import Recording


class Tandem:
    """Decodes recorded texts with real networks and from the recording, and counts how the cycles compare.

    Both runs write down what their drafters answered. After a difference the live run is put where the replay stands.
    """

    def __init__(self, recording: Recording, drafter: str, decoder: SpeculativeDecoder, report: Report):
        self.recording, self.decoder, self.policy, self.report = recording, decoder, decoder.policy, report
        self.text_data = RecordedText(recording)
        self.recorded = TapedDrafter(replayed_drafter(recording, drafter, self.text_data))
        self.live = decoder.asked = TapedDrafter(decoder.drafter)
        self.replay = ReplayRun(recording, self.text_data, self.recorded, self.policy, decoder.cost)
        self.exact = recording.manifest.get("dtype") == "float64"
        self.carried: State | None = None  # what earlier texts taught a policy that learns across requests

    def text(self, sequence: int) -> None:
        """Compare all cycles of one recorded text."""
        self.replay.start(torch.tensor([sequence]), state=self.carried)
        self._seat(sequence)
        while len(self.replay.sequence):
            state = self.decoder.state
            recorded = self.replay.step()
            live = self.decoder.step()
            self.report.cycles += 1
            if int(recorded.done.draft.missing.sum()):
                self.report.lacking += 1
                self._seat(sequence)
                continue
            gap = largest_difference(self.live.answers, self.recorded.answers)
            self.report.largest = max(self.report.largest, gap)
            if live is not None and identical(live, recorded):
                if self.exact and gap >= TOLERANCE:  # the next policy would trip over it
                    place = f"text {sequence}, position {int(recorded.cycle.position[0])}"
                    self._differs(f"{place}: the same decision on numbers that differ by {gap:.1e} nats", explained=False)
                else:
                    self.report.identical += 1
                continue
            explained, reason = self._explain(live, recorded, state)
            self._differs(reason, explained)
            self._seat(sequence)
        if self.policy.scope == "stream":
            self.carried = self.replay.state

    def _seat(self, sequence: int) -> None:
        """Put the live run where the replay stands: same text so far, same position, same state of the policy."""
        if not len(self.replay.sequence):
            return
        text, replay = self.text_data, self.replay
        first, position = int(text.offset[sequence]), int(replay.position[0])
        tokens = text.token[first : first + position + 1].tolist()
        self.decoder.prefill(
            [self.recording.prompt_tokens(sequence).tolist() + tokens[:-1]],
            int(text.length[sequence]),
            told_limit=int(text.limit[sequence]),
            root=torch.tensor(tokens[-1:]),
            sequence=replay.sequence,
            position=replay.position,
            number=replay.number,
            state=replay.state,
            sampling=Sampling(**self.recording.sampling(sequence)),
            text=torch.tensor([self.recording.uniform_keys[sequence]]),
        )
        if self.decoder.drafter.top:  # it forgot what the target said on the way here
            told = slice(first + 1, first + position + 1)
            self.decoder.drafter.recall(text.top_tokens[told], text.top_logprobs[told])

    def _differs(self, reason: str, explained: bool) -> None:
        if explained:
            self.report.explained += 1
        else:
            self.report.unexplained += 1
        self.report.notes.append(reason)

    def _explain(self, live: Step | None, recorded: Step, state) -> tuple[bool, str]:
        """Whether a differing cycle is explained, and by what."""
        place = f"text {int(recorded.cycle.sequence[0])}, position {int(recorded.cycle.position[0])}"
        if live is None or int(live.cycle.position[0]) != int(recorded.cycle.position[0]):
            return False, f"{place}: the live run stands elsewhere"
        if not same_kept(live.done.kept, recorded.done.kept):
            root = int(live.done.draft.tree.token[0, 0])
            if not same_decision(self.policy, live.cycle, state, self.live, live.done.kept, root):
                return False, f"{place}: the live run kept other nodes than its policy decides on the same numbers"
            gap = largest_difference(self.live.answers, self.recorded.answers)
            return gap < TOLERANCE, f"{place}: other nodes kept; the draft's numbers differ by up to {gap:.1e} nats"
        margin = self._margin(live, recorded)
        return margin < TOLERANCE, f"{place}: another path accepted; the target's margin there is {margin:.1e}"

    def _margin(self, live: Step, recorded: Step) -> float:
        """The recorded margin of the target's choice where the two accepted paths part: the gap (nats) between its two best
        tokens, or how far the uniform number lay from choosing another one."""
        ours, theirs = live.done.walk.path[0].tolist(), recorded.done.walk.path[0].tolist()
        common = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        first = int(self.text_data.offset[recorded.cycle.sequence[0]])
        place = first + int(recorded.cycle.position[0]) + common + 1
        return float(self.recording.margin[place])


def identical(live: Step, recorded: Step) -> bool:
    """The same start, kept nodes (tokens and parents, in order), accepted path, bonus and count (one row each)."""
    one, two = live.done, recorded.done
    return (
        int(live.cycle.position[0]) == int(recorded.cycle.position[0])
        and same_kept(one.kept, two.kept)
        and one.walk.path[0].tolist() == two.walk.path[0].tolist()
        and int(live.gained[0]) == int(recorded.gained[0])
        and one.draft.widths[0].tolist() == two.draft.widths[0].tolist()
    )
