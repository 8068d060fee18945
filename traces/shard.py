"""Record one shard: the conversations of one domain and sampling group, turn by turn, then what each text looked like."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from live.faults import out_of_memory
from live.pair import Pair, encode_prompt
from policies.contract import Sampling
from traces.capture import BrokenLogits, CaptureSettings, Columns, TargetCapture, Text, capture_forest, generate_texts
from traces.halving import Halving, too_much
from traces.manifest import ShardPlan
from traces.plan import Turn
from traces.prompts import joined
from traces.schema import from_arrow, nodes_schema, positions_schema
from traces.writer import merge_nodes


class Answer(NamedTuple):
    """A text, and the conversation it answers to, without roles."""

    text: Text
    asked: str


class Shard(NamedTuple):
    """The three tables of a shard and what could not be recorded; see :meth:`RecordingWriter.write_shard`."""

    sequences: list[dict[str, Any]]
    positions: Columns
    nodes: Columns
    skipped: list[dict[str, Any]]


@dataclass
class ShardRecorder:
    """Records shards of one plan.

    turns          every text to record, by number
    samplings      settings of each group
    chat_template  whether to write prompts as the tokenizer's template defines
    keep_text      False leaves prompts and texts out; prompt tokens are hashed
    on_text        called with 1 for each text that is done
    say            called with a sentence for each text that cannot be recorded, and where memory ran out
    seconds        what was spent on what, so far: generating, the target's pass over each text, each drafter's forest, writing
    """

    pair: Pair
    turns: Sequence[Turn]
    samplings: Sequence[Sampling]
    settings: CaptureSettings
    chat_template: bool = True
    keep_text: bool = True
    on_text: Callable[[int], Any] = lambda count: None
    say: Callable[[str], Any] = lambda sentence: None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        forests = [f"forest of {name}" for name in self.pair.networks]
        self.seconds |= dict.fromkeys(("generate", "target", *forests, "write"), 0.0)

    def record(self, plan: ShardPlan) -> Shard:
        """The shard's tables. A text that cannot be recorded is left out, named and counted; the others never notice.

        Where memory runs out, fewer texts are generated, or fewer trees grown, side by side. Raises UserError when it runs out
        all the same.
        """
        cure = "lower --max-new-tokens, use a smaller --dtype, or --device-map auto; what is finished is safe, go on with --resume"
        self._batch = Halving(len(plan.sequences), "texts", cure, self.say)
        self._trees = Halving(self.settings.positions, "positions", cure, self.say)
        try:
            return self._record(plan)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise too_much("texts", cure) from error  # in a pass over one text, which cannot be halved

    def _record(self, plan: ShardPlan) -> Shard:
        answers, skipped = self._talk(plan)
        target = self.pair.target()
        rows: list[dict[str, Any]] = []
        positions: list[Columns] = []
        nodes: list[Columns] = []
        for number, answer in sorted(answers.items()):
            turn = self.turns[number]
            try:
                mine, trees = self._capture(target, turn, answer.text)
            except BrokenLogits as error:
                self._skip(skipped, turn, str(error))
                continue
            rows.append(self._row(turn, answer))
            positions.append(mine)
            nodes += trees
            self.on_text(1)
        started = time.perf_counter()
        shard = Shard(rows, self._positions(positions), self._nodes(nodes), skipped)
        self.seconds["write"] += time.perf_counter() - started
        return shard

    def _talk(self, plan: ShardPlan) -> tuple[dict[int, Answer], list[dict[str, Any]]]:
        """Lead the shard's conversations, all their first turns as one batch, then all second ones; the answers by number."""
        answers: dict[int, Answer] = {}
        skipped: list[dict[str, Any]] = []
        said: dict[tuple, list[str]] = {self.turns[number].conversation: [] for number in plan.sequences}
        started = time.perf_counter()
        for depth in range(max(self.turns[number].turn for number in plan.sequences) + 1):
            batch, asked, prompts = [], [], []
            for turn in (self.turns[number] for number in plan.sequences):
                if turn.turn != depth:
                    continue
                if len(said[turn.conversation]) < depth:
                    self._skip(skipped, turn, "the turn before it could not be recorded")
                    continue
                messages = turn.prompt.conversation(said[turn.conversation])
                ids = encode_prompt(self.pair.tokenizer, messages, self.chat_template)
                if len(ids) > room(self.pair, self.settings):
                    self._skip(skipped, turn, f"with the answers so far it has {len(ids)} tokens and leaves no room in the context")
                    continue
                batch.append(turn)
                asked.append(joined(messages))
                prompts.append(ids)
            if not batch:
                continue
            numbers = [turn.number for turn in batch]
            found = generate_texts(self.pair, prompts, self.settings, self.samplings[batch[0].group], numbers, self._batch)
            for turn, text, question in zip(batch, found, asked, strict=True):
                if text.broken:
                    self._skip(skipped, turn, str(BrokenLogits("the target", text.length)))
                    continue
                answers[turn.number] = Answer(text, question)
                said[turn.conversation].append(self._decoded(text))
        self.seconds["generate"] += time.perf_counter() - started
        return answers, skipped

    def _capture(self, target, turn: Turn, text: Text) -> tuple[Columns, list[Columns]]:
        """The positions of one text, and its draft nodes, one table per drafter."""
        started = time.perf_counter()
        capture = TargetCapture(target, text, self.samplings[turn.group], turn.number)
        positions = {"sequence": np.full(len(text.tokens), turn.number), **capture.columns(self.settings.top_m)}
        captured = time.perf_counter()
        self.seconds["target"] += captured - started
        nodes = []
        for index, (name, network) in enumerate(self.pair.networks.items()):
            started = time.perf_counter()
            columns = capture_forest(network, capture, text, self.settings, self.pair.context_limit, self._trees)
            if columns:
                count = len(columns["node"])
                drafter = np.full(count, index, dtype=np.int8)
                nodes.append({"sequence": np.full(count, turn.number), "drafter": drafter, **columns})
            self.seconds[f"forest of {name}"] += time.perf_counter() - started
        return positions, nodes

    def _row(self, turn: Turn, answer: Answer) -> dict[str, Any]:
        """The text's row in the sequences table."""
        text = answer.text
        row = {
            "sequence": turn.number,
            "domain": turn.prompt.domain,
            "prompt_id": turn.prompt.turn_id(turn.turn),
            "prompt_tokens": text.prompt if self.keep_text else hashed(text.prompt),
            "tokens": text.tokens,
            "length": text.length,
            "finish": text.finish,
            "temperature": float(self.samplings[turn.group].temperature),
        }
        return row | {"prompt_text": answer.asked, "text": self._decoded(text)} if self.keep_text else row

    def _decoded(self, text: Text) -> str:
        """The counted tokens as text."""
        return self.pair.tokenizer.decode(text.tokens[: text.length], skip_special_tokens=True)

    def _skip(self, skipped: list[dict[str, Any]], turn: Turn, reason: str) -> None:
        """Leave a text out, and say so."""
        name = turn.prompt.turn_id(turn.turn)
        skipped.append({"sequence": turn.number, "domain": turn.prompt.domain, "prompt_id": name, "reason": reason})
        self.say(f"skipped prompt {name} of {turn.prompt.domain}: {reason}")
        self.on_text(1)

    def _positions(self, parts: list[Columns]) -> Columns:
        if parts:
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        vocabulary = self.pair.description["target"]["vocabulary"]
        return from_arrow(positions_schema(min(self.settings.top_m, vocabulary)).empty_table())

    def _nodes(self, parts: list[Columns]) -> Columns:
        return merge_nodes(*parts) if parts else from_arrow(nodes_schema(self.settings.fanout).empty_table())


def room(pair: Pair, settings: CaptureSettings) -> int:
    """Prompt tokens that fit in the context beside the new ones and the trees behind the last of them."""
    return pair.context_limit - settings.max_new_tokens - 2 * settings.overrun


def hashed(prompt: Sequence[int]) -> list[int]:
    """One number below -1 for each token of a private prompt.

    Each depends on the whole prompt and its place, so that tokens can be neither read nor tried out one by one; the same
    prompt gives the same numbers.
    """
    key = hashlib.sha256(np.asarray(prompt, dtype="<i4").tobytes()).digest()
    places = (hashlib.sha256(key + place.to_bytes(4, "little")).digest() for place in range(len(prompt)))
    return [-2 - int.from_bytes(digest[:8], "little") % ((1 << 31) - 2) for digest in places]
