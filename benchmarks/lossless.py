"""Is the text the target's own? ``python -m benchmarks.lossless [--architectures]``.

Decodes prompts with policies and drafters, alone and in batches that requests join and leave, and compares texts: at temperature 0
with ``model.generate``, above it with our plain loop at the same seed. In float64 every text must be identical. In float32 the
first token that differs must be one of which the target itself was unsure: a margin below 1e-4 (the gap in nats between its two
best tokens; or what its uniform number lacked to choose another). In bfloat16, where sums round to three digits, agreement is
reported, and the margin where texts part. Exit code 1 when float64 or float32 fall short. Target and drafters are the shipped ones
unless named; ``--architectures`` adds tiny random models of each family, in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from policies.errors import UserError, check_counts, run_command

if TYPE_CHECKING:
    from benchmarks.lossless_subjects import Subject
    from policies.contract import Policy, Sampling

POLICIES = (
    "chain(k=3)",
    "static",
    "eagle3(total_tokens=16, depth=5, top_k=8)",
    "heterospec(thresholds_=[1.0, 2.0, 4.0, 6.0], depth=4)",
    "svip",
    "gammatune",
    "ucbspec",
)
"""Chain, static tree, dynamic tree, tree that deepens, chain that stops by entropy, chain that learns, bandit."""

UNSURE = 1e-4
"""Margins below it explain a difference in float32."""


@dataclass
class Row:
    """One policy with one drafter, in one dtype at one temperature, over all texts.

    alone, batched  texts identical to the reference, decoded alone and in batches
    agreeing        share of the reference's tokens that stand before any difference, over both
    first           place of the earliest difference; None where there is none
    margin          the target's largest margin where a text first differs (see the module's text)
    unexplained     texts that differ at a margin of 1e-4 or more
    """

    subject: str
    dtype: str
    temperature: float
    drafter: str
    policy: str
    texts: int
    alone: int
    batched: int
    agreeing: float
    first: int | None
    margin: float | None
    unexplained: int

    @property
    def holds(self) -> bool:
        """What the dtype promises."""
        if self.dtype == "float64":
            return self.alone == self.batched == self.texts
        return self.dtype != "float32" or not self.unexplained


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.lossless", description=__doc__.split("\n")[0])
    parse.add_argument("--target", default="reference", help="hub id or folder of the target (default: the shipped one)")
    parse.add_argument("--draft", action="append", default=[], help="may be repeated (default: the shipped drafters)")
    parse.add_argument("--policy", action="append", default=[], help="may be repeated (default: one of each kind)")
    parse.add_argument("--prompts", nargs="+", metavar="DOMAIN=FILE", help="prompt files (default: the shipped held-out prompts)")
    parse.add_argument("--texts", type=int, default=1, help="prompts per domain (default 1)")
    parse.add_argument("--max-new-tokens", type=int, default=48)
    parse.add_argument("--batch", type=int, default=3, help="requests in flight in the batched runs (default 3)")
    parse.add_argument("--dtype", action="append", default=[], help="may be repeated (default: float64, float32, bfloat16)")
    parse.add_argument("--temperature", type=float, default=0.8, help="of the sampled texts (default 0.8)")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--architectures", action="store_true", help="tiny random models of each family as well, in float64")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    from sim.outputs import check_writable, write_text

    check_writable(args.json)
    check_counts(("--texts", args.texts), ("--max-new-tokens", args.max_new_tokens), ("--batch", args.batch))
    if args.temperature <= 0:
        raise UserError(f"--temperature is that of the sampled texts and must be above 0, not {args.temperature:g}")
    from tqdm import tqdm

    from benchmarks.lossless_subjects import loaded, tiny_subjects
    from policies.contract import Sampling
    from policies.registry import load_policy

    policies = [load_policy(spec) for spec in args.policy or POLICIES]
    for policy in policies:
        policy.check_fitted()
    samplings = [Sampling(), Sampling(args.temperature, seed=args.seed)]

    def subjects() -> Iterator[Subject]:
        for dtype in args.dtype or ["float64", "float32", "bfloat16"]:
            yield loaded(args.target, args.draft, dtype, args.device, args.prompts, args.texts)
        if args.architectures:
            yield from tiny_subjects()

    rows: list[Row] = []
    with tqdm(desc="decoding", unit="row", file=sys.stderr) as bar:
        for subject in subjects():
            for sampling in samplings:
                for row in rows_of(subject, policies, sampling, args.max_new_tokens, args.batch):
                    rows.append(row)
                    bar.update()
    print(table(rows))
    if args.json:
        write_text(args.json, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if broken := [row for row in rows if not row.holds]:
        worst = broken[0]
        print(f"\nNOT LOSSLESS in {len(broken)} of {len(rows)} rows, the first: {worst.policy}, {worst.drafter}, {worst.dtype}")
        raise SystemExit(1)
    proven = sum(row.dtype in ("float64", "float32") for row in rows)
    measured = f"; {len(rows) - proven} in half precision are measured" if proven < len(rows) else ""
    print(f"\nlossless: {proven} rows hold{measured}")


def rows_of(subject: Subject, policies: Sequence[Policy], sampling: Sampling, limit: int, batch: int) -> Iterator[Row]:
    """A row per drafter and policy, at one temperature."""
    from live.batcher import Batcher
    from live.decode import SpeculativeDecoder

    wanted = subject.reference(sampling, limit)
    for drafter, network in subject.networks.items():
        for policy in policies:
            decoder = SpeculativeDecoder(subject.target(), network, policy, subject.ends, context_limit=subject.context_limit)

            def decoded(size: int, decoder: SpeculativeDecoder = decoder) -> list[list[int]]:
                batcher = Batcher(decoder, size)
                requests = [batcher.submit(prompt, limit, sampling) for prompt in subject.prompts]
                batcher.run()
                return [request.tokens for request in requests]

            yield compared(subject, policy.spec(), drafter, sampling, wanted, decoded(1), decoded(batch))


def compared(
    subject: Subject,
    policy: str,
    drafter: str,
    sampling: Sampling,
    wanted: list[list[int]],
    alone: list[list[int]],
    batched: list[list[int]],
) -> Row:
    """The row of texts decoded twice, against the texts that were wanted."""
    places, margins, agreeing = [], [], 0
    for texts in (alone, batched):
        for number, (text, other) in enumerate(zip(texts, wanted, strict=True)):
            place = first_difference(text, other)
            agreeing += len(other) if place is None else place
            if place is not None:
                places.append(place)
                margins.append(subject.margin(number, other[:place], sampling))
    return Row(
        subject=subject.name,
        dtype=subject.dtype,
        temperature=float(sampling.temperature),
        drafter=drafter,
        policy=policy,
        texts=len(wanted),
        alone=sum(text == other for text, other in zip(alone, wanted, strict=True)),
        batched=sum(text == other for text, other in zip(batched, wanted, strict=True)),
        agreeing=agreeing / (2 * sum(map(len, wanted))),
        first=min(places, default=None),
        margin=max(margins, default=None),
        unexplained=sum(not margin < UNSURE for margin in margins),
    )


def first_difference(text: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place where two texts differ, the end of the shorter one included; None when they are the same."""
    if list(text) == list(other):
        return None
    return next((place for place, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def table(rows: Sequence[Row]) -> str:
    """The lossless table."""
    from sim.table import text_table

    header = ["target", "dtype", "T", "drafter", "policy", "identical\nalone", "identical\nbatched", "tokens\nagreeing"]
    header += ["first\ndifference", "largest\nmargin", "unexplained"]
    lines = []
    for row in rows:
        shares = [f"{count}/{row.texts}" for count in (row.alone, row.batched)]
        place = "-" if row.first is None else f"token {row.first}"
        margin = "-" if row.margin is None else f"{row.margin:.1e}"
        told = [row.subject, row.dtype, f"{row.temperature:g}", row.drafter, row.policy, *shares, f"{row.agreeing:.1%}"]
        lines.append([*told, place, margin, str(row.unexplained)])
    return text_table(header, lines)


if __name__ == "__main__":
    run_command(main)
