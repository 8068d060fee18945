"""Tokens per second of many requests in batches: policies with joining requests, and plain batched decoding, taking turns.

The clock runs from the first prompt to the last token of all requests, prefill included, since requests that join are prefilled
while others decode. Hugging Face's ``generate`` gets its requests in left-padded groups, in order, each group until its longest
text has ended; tokens behind a text's own end do not count. Our own plain loop admits requests as the policies' batches do, so that
what joining gives and what drafting gives can be told apart.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from live.batcher import Batcher
from live.decode import SpeculativeDecoder
from policies.autoregressive import Autoregressive
from policies.contract import Sampling
from policies.errors import UserError
from policies.plural import counted

if TYPE_CHECKING:
    from live.pair import Pair
    from policies.contract import Policy
    from policies.cost import Cost
    from traces.costs import CostModel
    from traces.recording import Recording

PLAIN, GENERATE = "plain loop", "model.generate"


class Job(NamedTuple):
    """A request: prompt (token ids), most new tokens, how they are chosen, and the number that keys its uniform numbers."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    text: int


class Round(NamedTuple):
    """One pass over all jobs: tokens generated, seconds, and how many texts were those of our own plain loop."""

    tokens: int
    seconds: float
    identical: int

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass
class Figures:
    """What the rounds of one contender came to: tokens per second, and the share of texts that the plain loop wrote alike."""

    median: float
    lowest: float
    highest: float
    identical: float


Contender = Callable[[Sequence[Job]], list[list[int]]]
"""Decodes all jobs; their texts."""


def contenders(pair: Pair, policies: Sequence[Policy], drafter: str, batch: int, cost: Cost | None = None) -> dict[str, Contender]:
    """Everyone by name, decoding ``batch`` requests at a time."""

    def batched(policy: Policy, name: str) -> Contender:
        decoder = SpeculativeDecoder(pair.target(), pair.draft(name), policy, pair.end_tokens, cost, pair.context_limit)

        def decode(jobs: Sequence[Job]) -> list[list[int]]:
            decoder.state = None  # a policy that learns across requests begins each pass anew, as the prediction does
            batcher = Batcher(decoder, batch, say=lambda sentence: print(sentence, file=sys.stderr))
            requests = [batcher.submit(*job) for job in jobs]
            batcher.run()
            if failed := next((request.error for request in requests if request.error), None):
                raise UserError(failed)
            return [request.tokens for request in requests]

        return decode

    def generate(jobs: Sequence[Job]) -> list[list[int]]:
        texts: list[list[int]] = []
        for first in range(0, len(jobs), batch):
            texts += _generate(pair, jobs[first : first + batch])
        return texts

    everyone = {policy.spec(): batched(policy, drafter) for policy in policies}
    return everyone | {PLAIN: batched(Autoregressive(), "prompt_lookup"), GENERATE: generate}


def _generate(pair: Pair, jobs: Sequence[Job]) -> list[list[int]]:
    """The jobs as one left-padded batch of ``model.generate``. At T > 0 its texts are other ones, held to the same lengths."""
    from live.contenders import as_generate_takes_it

    width, longest = max(len(job.prompt) for job in jobs), max(job.max_new_tokens for job in jobs)
    padding = [width - len(job.prompt) for job in jobs]
    ids = torch.tensor([[0] * spare + job.prompt for spare, job in zip(padding, jobs, strict=True)], device=pair.model.device)
    mask = torch.tensor([[0] * spare + [1] * (width - spare) for spare in padding], device=pair.model.device)
    settings = as_generate_takes_it(asdict(jobs[0].sampling), longest)
    output = pair.model.generate(ids, attention_mask=mask, max_new_tokens=longest, pad_token_id=0, **settings)
    texts = []
    for job, row in zip(jobs, output[:, width:].tolist(), strict=True):
        text = row[: job.max_new_tokens]
        end = next((place for place, token in enumerate(text) if token in pair.end_tokens), len(text))
        texts.append(text[: end + 1])
    return texts


def recorded_jobs(recording: Recording, texts: Sequence[int]) -> list[Job]:
    """The prompts of recorded texts, domains in turn, each up to its recorded length and sampled as it was recorded."""
    seen: dict[int, int] = {}
    rank = {}
    for text in texts:
        domain = int(recording.domain_index[text])
        rank[text] = seen[domain] = seen.get(domain, -1) + 1
    return [
        Job(
            recording.prompt_tokens(text).tolist(),
            int(recording.length[text]),
            Sampling(**recording.sampling(text)),
            int(recording.uniform_keys[text]),
        )
        for text in sorted(texts, key=rank.__getitem__)
    ]


def measure(everyone: dict[str, Contender], jobs: Sequence[Job], rounds: int) -> dict[str, list[Round]]:
    """Let everyone decode all jobs, round by round in an order drawn anew; the first pass, which warms up, is not kept."""
    found: dict[str, list[Round]] = {name: [] for name in everyone}
    names, order = list(everyone), torch.Generator().manual_seed(0)
    expected = everyone[PLAIN](jobs)
    with tqdm(total=(rounds + 1) * len(names) - 1, desc="decoding in batches", unit="pass", file=sys.stderr) as bar:
        for number in range(rounds + 1):
            for index in torch.randperm(len(names), generator=order).tolist():
                name = names[index]
                if number == 0 and name == PLAIN:
                    continue
                bar.set_postfix_str(name)
                started = time.perf_counter()
                texts = everyone[name](jobs)
                seconds = time.perf_counter() - started
                if number:
                    identical = sum(text == other for text, other in zip(texts, expected, strict=True))
                    found[name].append(Round(sum(map(len, texts)), seconds, identical))
                bar.update()
    return found


def bench_in_batches(
    recording: Recording,
    pair: Pair,
    policies: list[Policy],
    drafter: str,
    texts: list[int],
    members: list[int],
    batch: int,
    rounds: int,
    cost: CostModel | None,
) -> dict[str, Any]:
    """What ``live.bench --batch`` does: decode ``texts`` and print the table, beside what replay of ``members`` predicts at that
    batch; its figures, as plain JSON types."""
    from sim.metrics import result_rows
    from sim.setting import Setting
    from sim.trial import run_trial

    setting, predicted = Setting(drafter, batch=batch).scheduled(policies), {}
    for policy in policies if cost is not None else []:
        tally = run_trial(recording, policy, setting, cost, torch.tensor(members))
        predicted[policy.spec()] = result_rows(tally, policy, setting)[-1].speedup
    jobs = recorded_jobs(recording, texts)
    found = measure(contenders(pair, policies, drafter, batch, cost), jobs, rounds)
    print("\n" + report({name: summed_up(own, len(jobs)) for name, own in found.items()}, predicted or None))
    left_out = " (the prediction leaves it out)" if predicted else ""
    size = f"{counted(len(jobs), 'text')}, {counted(batch, 'request')} at a time, {counted(rounds, 'round')}"
    print(f"\n{size}; prefill included{left_out}.")
    if predicted and batch > 1:
        told = {"joining": "in the predictions too", "fixed": "the predictions, plain decoding's too, are for fixed groups"}
        print(f"Requests join as others end; {told[setting.schedule]}.")
    facts = {"batch": batch, "predicted_schedule": setting.schedule, "predicted_speedup": predicted}
    return facts | {"throughput": as_json(found)}


def summed_up(rounds: Sequence[Round], jobs: int) -> Figures:
    """Median and spread over the rounds, and the share of the jobs' texts that were alike in all of them."""
    speeds = [one.speed for one in rounds]
    return Figures(statistics.median(speeds), min(speeds), max(speeds), min(one.identical for one in rounds) / jobs)


def report(figures: dict[str, Figures], predicted: dict[str, float | None] | None = None) -> str:
    """The table: tokens per second, what that is to ``model.generate``, and to the faster of the two plain ones."""
    from sim.table import number, text_table

    rows = []
    for name, own in figures.items():
        shown = f"({name})" if name in (PLAIN, GENERATE) else name
        cells = [shown, number(own.median, 1), f"{own.lowest:.1f} to {own.highest:.1f}"]
        cells += [number(own.median / figures[plain].median, 2, "x") for plain in (GENERATE, PLAIN)]
        if predicted is not None:
            cells.append(number(predicted.get(name), 2, "x"))
        rows.append([*cells, f"{own.identical:.0%}"])
    header = ["contender", "tokens/s\nmedian", "lowest to\nhighest", "against\ngenerate", "against\nplain loop"]
    header += ["predicted against\nplain loop"] if predicted is not None else []
    return text_table([*header, "same text as\nplain loop"], rows)


def as_json(found: dict[str, list[Round]]) -> dict[str, list[dict[str, Any]]]:
    """Every round of every contender, as plain JSON types."""
    return {name: [one._asdict() | {"tokens_per_second": one.speed} for one in rounds] for name, rounds in found.items()}
