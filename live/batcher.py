"""A queue of requests that decode together, joining and leaving as they come and end (continuous batching, Yu et al. 2022, "Orca").

    batcher = Batcher(decoder, batch=8)
    requests = [batcher.submit(prompt, max_new_tokens=64) for prompt in prompts]
    for request, tokens in batcher.stream():
        ...                                         # new tokens of one request, as they come

At most ``batch`` requests are in flight. When one has ended, the next in order of submission takes its place at the following step;
its prompt is prefilled beside the others. What a request says does not depend on its company: the target's own text, greedy, or
sampled by numbers that its seed and its ``text`` number key.

Replay says the same of such a batch: of a policy that decides row by row, each text's cycles are those of its replay alone, at the
steps that sim.schedule counts. Batch-wide policies see the rows in flight as one group; replay runs them in fixed groups, which is
``joining=False``. Policies that learn across requests (scope "stream") learn from whoever is in flight, in one state for all.

What fails, fails by name, and the others go on: logits that are not numbers fail their request; a draft that crashes ends drafting
until the batch has next run empty; when memory runs out, the batch is halved and what was in flight goes on from where it stood.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from live.decode import LiveStep, SpeculativeDecoder
from live.faults import no_memory_for, out_of_memory
from live.joining import beside, forget, join, joined_states
from live.sampling import GREEDY
from policies.contract import Sampling, State
from policies.errors import UserError
from policies.loop import gather_rows

News = list[tuple["Request", list[int]]]
"""New tokens by request; of a request that ended without any, an empty list."""


@dataclass(eq=False)
class Request:
    """One prompt and what became of it.

    number      place in the order of submission, from 0; what randomised policies are keyed by
    text        with the seed and the position, keys the uniform numbers that choose sampled tokens
    tokens      generated so far
    cycles      draft-verify-accept cycles so far
    finish      None while it waits or decodes, then "end" (an end token), "length", "stopped" or "failed"
    error       the sentence that says why it failed
    """

    number: int
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    text: int
    tokens: list[int] = field(default_factory=list)
    cycles: int = 0
    finish: str | None = None
    error: str | None = None
    state: State | None = field(default=None, repr=False)  # the policy's, kept while the request is out of the batch


class Batcher:
    """Decodes requests in batches; see the module's text."""

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        batch: int = 8,
        joining: bool = True,
        say: Callable[[str], None] | None = None,
        on_step: Callable[[LiveStep], None] | None = None,
    ):
        """:param batch: most requests in flight.
        :param joining: False admits the next ones only when the batch has run empty (groups in order of submission, as replay
            has them for batch-wide policies).
        :param say: told, in a sentence, of a smaller batch and of a draft that crashed.
        :param on_step: called behind each cycle, whose ``row`` holds the requests' numbers.
        """
        if batch < 1:
            raise UserError(f"a batch holds 1 request or more, not {batch}")
        self.decoder, self.batch, self.joining = decoder, batch, joining
        self.on_step = on_step
        self.crashes: list[str] = []  # why the draft crashed, each time
        self.plain = 0  # cycles that were decoded plainly because of that
        self._say = say or (lambda sentence: None)
        self._end_tokens = set(decoder.verifier.end_tokens.tolist())
        self._crash: str | None = None  # what was said last
        self._news: News = []
        self._waiting: deque[Request] = deque()
        self._flying: dict[int, Request] = {}
        self._submitted = 0
        self._last: LiveStep | None = None

    @property
    def in_flight(self) -> list[Request]:
        """The requests that decode at the moment."""
        return list(self._flying.values())

    @property
    def waiting(self) -> list[Request]:
        """The requests that wait for a place, the next one first."""
        return list(self._waiting)

    def submit(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = GREEDY, text: int | None = None) -> Request:
        """Queue a prompt (token ids).

        :param max_new_tokens: limit; the first token counts.
        :param text: what keys the uniform numbers, with the seed; by default the request's own number.
        :raises UserError: at once, for a prompt that cannot be decoded; the queue stays as it is.
        """
        number = self._submitted
        self.decoder.check(f"prompt {number}", len(prompt), max_new_tokens)
        request = Request(number, list(prompt), max_new_tokens, sampling, number if text is None else text)
        self._submitted += 1
        self._waiting.append(request)
        return request

    def stop(self, request: Request) -> None:
        """End a request where it stands; its place is free at the next step."""
        if request.finish is None:
            request.finish = "stopped"
            self.decoder.end(request.number) if request.number in self._flying else self._waiting.remove(request)
            self._flying.pop(request.number, None)

    def stream(self) -> Iterator[tuple[Request, list[int]]]:
        """New tokens, request by request, until nobody waits or decodes; more may be submitted meanwhile."""
        while self._waiting or self._flying:
            for request, tokens in self.step():
                if request.finish != "stopped":  # by whoever heard the first part of these news
                    yield request, tokens

    def run(self) -> None:
        """Decode until nobody waits or decodes."""
        with self.decoder.target.streams.hanging():
            for _ in self.stream():
                pass

    def step(self) -> News:
        """Admit who has a place, then one cycle of everybody in flight; the news of both.

        When something unforeseen is raised (an interrupt, say), the requests keep what they have, and the next step goes on.
        """
        full = False
        try:
            self._admit()
            if self._flying:
                self._cycle()
        except BaseException as error:
            if not (out_of_memory(error) and self._flying):
                self._withdraw()
                raise
            full = True
        if full:  # outside of the handler, which would keep the failed step's tensors alive
            self._shrink()
        news, self._news = self._news, []
        return news

    # ---- who decodes ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Fill the free places. A request may end with its first token, so that its place is free again."""
        if self._flying and not self.joining:
            return
        while self._waiting and len(self._flying) < self.batch:
            places = min(self.batch - len(self._flying), len(self._waiting))
            resumed = bool(self._waiting[0].tokens)
            joining: list[Request] = []
            while self._waiting and len(joining) < places and bool(self._waiting[0].tokens) == resumed:
                joining.append(self._waiting.popleft())
            in_flight = bool(self._flying)
            self._flying |= {request.number: request for request in joining}
            if in_flight:
                other = beside(self.decoder)
                other.state = self.decoder.state  # of a policy that learns across requests
                self._prefill(other, joining)
                join(self.decoder, other)
            else:
                self._prefill(self.decoder, joining)
            self._tell_crash()

    def _prefill(self, decoder: SpeculativeDecoder, joining: list[Request]) -> None:
        """Prefill requests in ``decoder``: either all fresh, or all resumed behind the tokens that they have."""

        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64)

        numbers, resumed = column([request.number for request in joining]), {}
        if joining[0].tokens:
            states = [(self._state_of(request), 1) for request in joining]
            resumed = {
                "root": column([request.tokens[-1] for request in joining]),
                "position": column([len(request.tokens) - 1 for request in joining]),
                "number": column([request.cycles for request in joining]),
                "state": joined_states(decoder.policy, states) if decoder.policy.scope != "stream" else decoder.state,
            }
        decoder.prefill(
            [request.prompt + request.tokens[:-1] for request in joining],
            [request.max_new_tokens for request in joining],
            sampling=side_by_side([request.sampling for request in joining]),
            text=column([request.text for request in joining]),
            sequence=numbers,
            row=numbers,
            **resumed,
        )
        for request, root, goes_on in zip(joining, decoder._root.tolist(), decoder._going.tolist(), strict=True):
            new = [] if resumed or request.number in decoder.failed else [root]
            self._tell(request, new, goes_on, decoder.failed.get(request.number))

    def _cycle(self) -> None:
        step = self.decoder.step()
        self.plain += self.decoder.draft_error is not None
        self._tell_crash()
        going = self.decoder._going.tolist()
        for number, new, count, goes_on in zip(step.row.tolist(), step.tokens.tolist(), step.gained.tolist(), going, strict=True):
            request = self._flying[number]
            request.cycles += 1
            self._tell(request, new[:count], goes_on, self.decoder.failed.get(number))
        self._last = step
        if self.on_step is not None:
            self.on_step(step)

    def _tell(self, request: Request, new: list[int], goes_on: bool, error: str | None) -> None:
        """Give a request its new tokens, and let it leave when it has ended."""
        request.tokens += new
        if not goes_on:
            ended = bool(request.tokens) and request.tokens[-1] in self._end_tokens
            request.finish, request.error = ("failed", error) if error else ("end" if ended else "length", None)
            del self._flying[request.number]
        if new or not goes_on:
            self._news.append((request, new))

    # ---- faults -----------------------------------------------------------------------------------------------------

    def _tell_crash(self) -> None:
        """Once per crash: the decoder holds its reason until the batch has run empty."""
        error = self.decoder.draft_error
        if error is not None and error is not self._crash:
            self.crashes.append(error)
            self._say(f"the draft crashed ({error}): going on plainly until the batch has run empty")
        self._crash = error

    def _withdraw(self) -> list[Request]:
        """Put everybody in flight back in front of the queue, with tokens and policy state; nothing else is kept of them."""
        back = sorted(self._flying.values(), key=lambda request: request.number)
        for request in back:
            request.state = self._state_of(request)
        self._waiting.extendleft(reversed(back))
        self._flying, self._last = {}, None
        forget(self.decoder)
        return back

    def _state_of(self, request: Request) -> State:
        """The policy's state of one request behind its last finished cycle; a fresh one before the first."""
        policy, last = self.decoder.policy, self._last
        if last is not None and request.number in (rows := last.row.tolist()):
            place = torch.tensor([rows.index(request.number)])
            return gather_rows(last.done.state, place, len(rows), policy.scope)
        if request.state is not None:
            return request.state
        return policy.init(1, torch.tensor([request.number]))

    def _shrink(self) -> None:
        """Memory ran out: go on with half of those who were in flight; a request that was alone fails."""
        back = self._withdraw()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(back) > 1:
            self.batch = len(back) // 2
            self._say(f"memory ran out: going on with a batch of {self.batch}")
        elif back:
            (request,) = back
            self._waiting.popleft()
            request.finish, request.error = "failed", no_memory_for(len(request.prompt) + len(request.tokens))
            self._news.append((request, []))


def side_by_side(samplings: list[Sampling]) -> Sampling:
    """The settings of several texts as one, its fields tensors [R]."""
    whole = ("top_k", "seed")

    def column(name: str) -> Tensor:
        values = [getattr(sampling, name) for sampling in samplings]
        return torch.tensor(values, dtype=torch.int64 if name in whole else torch.float64)

    return Sampling(**{field.name: column(field.name) for field in dataclasses.fields(Sampling)})
