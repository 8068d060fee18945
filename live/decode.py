"""The live decoding loop: real networks around the shared draft-verify-accept cycle."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from live.border import fetched
from live.distribution import told_of
from live.faults import DraftFailed, GuardedDrafter, check_prompt, drafting, holder_of
from live.looking_up_first import Drafts, live_drafter
from live.model import CachedModel
from live.sampling import GREEDY, Sampler
from live.verifier import LiveVerifier
from policies.autoregressive import Autoregressive
from policies.contract import Cycle, Once, Policy, Sampling, State
from policies.cost import Cost
from policies.drafting import Drafter
from policies.errors import BrokenDraft
from policies.loop import Cycled, Step, gather_rows, run_cycle
from policies.one_row import every

PER_ROW = ("row", "root", "sequence", "position", "number", "last", "told_last", "context", "root_logits", "group", "going")
"""What a decoder knows of each row that still decodes: tensors [R] on the host, but for the root's logits [R, V]."""


@dataclass(frozen=True)
class LiveStep(Step):
    """A live cycle and its new tokens, int64 [B, A + 1], of which the first ``gained`` count."""

    tokens: Tensor


@dataclass
class Decoded:
    """Generated texts and what they took.

    tokens      per prompt, the generated token ids; nothing after EOS or past the limit
    cycles      draft-verify cycles per prompt
    prefill_ms  milliseconds until the first tokens stood
    decode_ms   milliseconds from there to the end
    failed      per prompt that failed, the sentence that says why; its tokens are what stood before
    draft_error why the draft crashed, if it did; the texts went on without it
    plain       cycles that were decoded plainly because of that
    """

    tokens: list[list[int]]
    cycles: list[int]
    prefill_ms: float
    decode_ms: float
    failed: dict[int, str] = field(default_factory=dict)
    draft_error: str | None = None
    plain: int = 0


class SpeculativeDecoder:
    """Speculative decoding of a batch of prompts with any policy. The text is the target's own, whatever the policy: greedy,
    or sampled by uniform numbers that depend on seed, text and position alone."""

    def __init__(
        self,
        target: CachedModel,
        drafts: Drafts,
        policy: Policy,
        end_tokens: Sequence[int] = (),
        cost: Cost | None = None,
        context_limit: int | None = None,
    ):
        """:param drafts: a draft network, a training-free rule, or a rule that is asked before a network.
        :param context_limit: tokens that fit in the context of target and draft; the target's by default."""
        policy.check_fitted()
        self.target, self.policy, self.cost = target, policy, cost
        self.drafter = live_drafter(drafts)
        self.asked: Drafter = self.drafter  # whom the drafting loop asks; fidelity puts a tape in between
        ends = torch.tensor(list(end_tokens), dtype=torch.int64)
        self.verifier = LiveVerifier(target, ends)
        self.context_limit = context_limit or target.context_limit
        self._last_place = torch.tensor(self.context_limit - 1)
        self.state: State | None = None

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        on_step: Callable[[LiveStep], None] | None = None,
        on_first: Callable[[Tensor], None] | None = None,
        sampling: Sampling = GREEDY,
        text: Tensor | None = None,
    ) -> Decoded:
        """Decode prompts (token ids) side by side.

        :param max_new_tokens: limit, or one per prompt; the first token counts.
        :param on_step: called behind each cycle, for streaming and for logs.
        :param on_first: called with the first tokens int64 [R], which prefill gave.
        :param sampling: how tokens are chosen; its fields are numbers or tensors [R].
        :param text: int64 [R], numbers of the texts, which key their uniform numbers; 0, 1, 2, ... by default.
        """
        started = time.perf_counter()
        self.prefill(prompts, max_new_tokens, sampling=sampling, text=text)
        texts = [[] if row in self.failed else [token] for row, token in enumerate(self._root.tolist())]
        cycles = [0] * len(prompts)
        prefilled = time.perf_counter()
        if on_first is not None:
            on_first(self._root)
        with self.target.streams.hanging():
            while (step := self.step()) is not None:
                for row, new, count in zip(step.row.tolist(), step.tokens.tolist(), step.gained.tolist(), strict=True):
                    texts[row].extend(new[:count])
                    cycles[row] += 1
                if on_step is not None:
                    on_step(step)
        ended = time.perf_counter()
        took = 1e3 * (prefilled - started), 1e3 * (ended - prefilled)
        return Decoded(texts, cycles, *took, self.failed, self.draft_error, self.plain)

    def end(self, row: int) -> None:
        """Let text number ``row`` end where it is; to be called from ``on_first`` or ``on_step``."""
        self._going = self._going & (self._row != row)

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        root: Tensor | None = None,
        sequence: Tensor | None = None,
        position: Tensor | None = None,
        number: Tensor | None = None,
        state: State | None = None,
        sampling: Sampling = GREEDY,
        text: Tensor | None = None,
        told_limit: int | None = None,
        row: Tensor | None = None,
    ) -> None:
        """Run the prompts through target and draft, ready for :meth:`step`; ``sampling`` and ``text`` as in :meth:`generate`.

        The other optional arguments resume texts in mid-generation: the root tokens int64 [R], the sequences' numbers, the roots'
        places among the generated tokens (``prompts`` then hold all that stands before the roots), cycles done, and the
        policy's state. ``told_limit`` is the limit that the policy hears of, where it must not know the true one.
        ``row`` int64 [R] are the numbers that steps call the texts by; 0, 1, 2, ... by default.
        """
        rows = len(prompts)
        limits = [max_new_tokens] * rows if isinstance(max_new_tokens, int) else list(max_new_tokens)
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            self.check(f"prompt {index}", len(prompt), limit)
        counts = torch.tensor([len(prompt) for prompt in prompts])
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(prompt)) for prompt in prompts], batch_first=True)
        self.target.reset(rows)
        output = self.target.prefill(tokens, counts, logits="last")
        logits = output.logits[:, 0]
        self._row = torch.arange(rows) if row is None else row
        sampler = Sampler(sampling, self._row if text is None else text, tokens, counts, logits)
        self._root = fetched(sampler.choose(output.logits, torch.zeros_like(counts)[:, None]))[:, 0] if root is None else root
        sampler.commit(self._root[:, None], torch.ones_like(counts))
        self.verifier.sampler = sampler
        self.failed: dict[int, str] = {}
        self.draft_error: str | None = None
        self.plain = 0
        self._drafting(lambda: self.drafter.prefill(tokens, counts, output.captured, self._root))
        self._root_logits = logits
        self._context = counts
        fits = self.context_limit - counts + 1  # the last token need not be run
        fits = fits if position is None else fits + position
        self._last = torch.tensor(limits).minimum(fits) - 1  # the place of the last token that may come
        self._told_last = self._last if told_limit is None else (fits.clamp(max=told_limit) - 1).maximum(self._last)
        self._sequence = self._row if sequence is None else sequence
        self._position = torch.zeros_like(self._row) if position is None else position
        self._number = torch.zeros_like(self._row) if number is None else number
        self._group = torch.zeros_like(self._row)  # they decode as one batch
        if state is None:
            goes_on = self.policy.scope == "stream" and self.state is not None
            state = self.state if goes_on else self.policy.init(rows, self._sequence)
        self.state = state
        broken = fetched(logits.amax(-1)).isnan()  # a maximum passes NaN on
        self._going = (self._position < self._last) & ~self.verifier.ends(self._root) & ~broken
        self._tell_broken(broken)

    @torch.inference_mode()
    def step(self) -> LiveStep | None:
        """One cycle of every row that still decodes; None when none does."""
        if not self._keep_going():
            return None
        cycle = Cycle(
            active=self._going,
            sequence=self._sequence,
            number=self._number,
            position=self._position,
            context_length=self._context,
            room=self._told_last - self._position,
            reach=self._last_place - self._context,
            root_told=Once(partial(told_of, self._root_logits, self._root)),
            group=self._group,
            sampling=self.verifier.sampler.sampling,
            cost=self.cost,
        )
        done = self._run(cycle)
        tokens, counts = self.verifier.committed(done.kept, done.walk)
        left = self._last - self._position
        gained = counts.minimum(left)
        going = gained < left
        if (open_ended := self.verifier.go_on(done.walk.bonus)) is not None:
            going = going & open_ended
        if (broken := self.verifier.broken()) is not None:
            gained, going = gained.masked_fill(broken, 0), going & ~broken
            self._tell_broken(broken)
        step = LiveStep(cycle, done, gained, self._row, tokens)
        self._going = going
        if any(going.tolist()):
            if self.draft_error is None:
                if self.drafter.top:
                    self.drafter.hear(*self.verifier.target_top(cycle, done.kept, done.walk, self.drafter.top))
                self.drafter.commit(tokens, self.verifier.features, counts)
            self._root = done.walk.bonus  # -1 in rows that have ended, which leave before the next cycle
            self.verifier.sampler.commit(tokens, counts)
            self._root_logits = self.verifier.bonus_logits(done.walk)
        self.state = done.state
        self._context = self._context + counts  # one too few for rows that have ended, which leave now
        self._position, self._number = self._position + gained, self._number + 1
        return step

    def _run(self, cycle: Cycle) -> Cycled:
        """The cycle under the policy, or plainly once the draft has crashed."""
        if self.draft_error is None:
            try:
                return run_cycle(self.policy, GuardedDrafter(self.asked), self.verifier, cycle, self.state)
            except (DraftFailed, BrokenDraft) as error:
                self.draft_error = str(error)
        self.plain += 1
        done = run_cycle(Autoregressive(), _RootOnly(self._root), self.verifier, cycle, {})
        return done._replace(state=self.state)

    def _drafting(self, call: Callable[[], None]) -> None:
        """Do something with the draft; a crash ends drafting, not decoding."""
        try:
            drafting(call)
        except DraftFailed as error:
            self.draft_error = str(error)

    def _tell_broken(self, broken: Tensor) -> None:
        if bool(broken.any()):
            for row, place in zip(self._row[broken].tolist(), self._position[broken].tolist(), strict=True):
                self.failed[row] = (
                    f"the target's logits of prompt {row} are not numbers (NaN) behind {place + 1} generated tokens: "
                    "use another --dtype, or check the model's weights"
                )

    def _keep_going(self) -> bool:
        """Let rows that have ended leave; whether any is left."""
        if every(self._going):
            return True
        keep = self._going.nonzero()[:, 0]
        if not len(keep):
            return False
        self.state = gather_rows(self.state, keep, len(self._row), self.policy.scope)
        self.target.gather_rows(keep)
        if self.draft_error is None:
            self._drafting(lambda: self.drafter.gather_rows(keep))
        self.verifier.sampler.gather_rows(keep)
        for name in PER_ROW:
            setattr(self, f"_{name}", getattr(self, f"_{name}")[keep])
        return True

    def check(self, name: str, tokens: int, limit: int) -> None:
        """Raise a UserError when a prompt of so many tokens, called ``name``, cannot be decoded up to a limit of new ones."""
        holder = holder_of(self.context_limit, (self.target.context_limit, self.target.limit_name))
        check_prompt(name, tokens, limit, self.context_limit, holder)


class _RootOnly:
    """In place of a draft that has crashed: it knows the roots int64 [B] and is asked for nothing else."""

    deepest = None

    def __init__(self, root: Tensor):
        self._root = root

    def root(self, cycle: Cycle) -> Tensor:
        return self._root
