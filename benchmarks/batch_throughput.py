"""Throughput in batches against plain batched ``model.generate``: ``python -m benchmarks.batch_throughput``.

Decodes prompts of all domains, in turn, in batches in which requests join and leave; at each batch size everyone takes turns, round
by round, in one process. The figures are tokens per second of all requests together, prefill included (see live/bench_batches.py).
Texts have limits that differ, since that is what requests are like: those of a domain get 1/2, 1 and 3/2 of ``--max-new-tokens``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from live.options import add_sampling_options, sampling_of
from policies.errors import UserError, check_counts, run_command

if TYPE_CHECKING:
    from live.bench_batches import Job
    from live.pair import Pair
    from policies.contract import Sampling

POLICIES = ("chain(k=3)", "eagle3(total_tokens=8, depth=4, top_k=4)", "eagle3(total_tokens=16, depth=5, top_k=8)")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.batch_throughput", description=__doc__.split("\n")[0])
    parse.add_argument("--target", default="reference", help="hub id or folder of the target (default: the shipped one)")
    parse.add_argument(
        "--draft", default="reference/eagle3", help="hub id or folder of the drafter (default: the shipped EAGLE-3 head)"
    )
    parse.add_argument("--policy", action="append", default=[], help="may be repeated (default: a chain and two trees)")
    parse.add_argument("--prompts", nargs="+", metavar="DOMAIN=FILE", help="prompt files (default: the shipped held-out prompts)")
    parse.add_argument("--batch", type=int, action="append", default=[], help="may be repeated (default: 1, 4 and 8)")
    parse.add_argument("--texts", type=int, default=4, help="prompts per domain (default 4)")
    parse.add_argument("--max-new-tokens", type=int, default=64, help="mean limit of a text (default 64)")
    parse.add_argument("--rounds", type=int, default=3, help="times that everyone decodes everything (default 3)")
    add_sampling_options(parse)
    parse.add_argument("--dtype", default="float32", help="float32, float64, bfloat16 or float16")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--profile", metavar="FILE", help="what traces.profile measured, for policies that weigh costs")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    from sim.outputs import check_writable, write_text

    check_writable(args.json)
    batches = args.batch or [1, 4, 8]
    check_counts(("--texts", args.texts), ("--rounds", args.rounds), ("--batch", min(batches)))
    if args.max_new_tokens < 2:
        raise UserError(f"--max-new-tokens must be 2 or more, not {args.max_new_tokens}")
    sampling = sampling_of(args, args.temperature)
    from live.bench_batches import as_json, contenders, measure, report, summed_up
    from live.pair import load_pair
    from policies.registry import load_policy
    from traces.prompts import sample_specs

    policies = [load_policy(spec) for spec in args.policy or POLICIES]
    for policy in policies:
        policy.check_fitted()
    pair = load_pair(args.target, [args.draft], args.dtype, args.device)
    (drafter,) = pair.networks
    cost = None
    if args.profile:
        from traces.costs import load_profile

        cost = load_profile(args.profile).cost(drafter)
    jobs = jobs_of(pair, args.prompts or sample_specs(), args.texts, args.max_new_tokens, sampling)
    content = {"device": pair.description["device"], "dtype": args.dtype, "jobs": len(jobs), "batches": {}}
    for batch in batches:
        found = measure(contenders(pair, policies, drafter, batch, cost), jobs, args.rounds)
        print(f"\nbatch {batch}: {len(jobs)} texts, {args.rounds} rounds, {content['device']}, {args.dtype}\n")
        print(report({name: summed_up(rounds, len(jobs)) for name, rounds in found.items()}))
        content["batches"][batch] = as_json(found)
    if args.json:
        write_text(args.json, json.dumps(content, indent=1) + "\n")


def jobs_of(pair: Pair, specs: list[str], per_domain: int, limit: int, sampling: Sampling) -> list[Job]:
    """Requests of the domains in turn, with limits around ``limit`` that differ."""
    from live.bench_batches import Job
    from live.pair import encode_prompt
    from traces.prompts import load_prompts

    by_domain: dict[str, list[list[int]]] = {}
    for prompt in load_prompts(specs, limit=per_domain):
        by_domain.setdefault(prompt.domain, []).append(encode_prompt(pair.tokenizer, prompt.messages))
    ordered = [
        (texts[place], max(limit * (1 + place % 3) // 2, 1))
        for place in range(per_domain)
        for texts in by_domain.values()
        if place < len(texts)
    ]
    return [Job(prompt, most, sampling, number) for number, (prompt, most) in enumerate(ordered)]


if __name__ == "__main__":
    run_command(main)
