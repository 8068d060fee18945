"""Policies side by side, predicted and measured: ``python -m live.bench TRACE --profile profile.json``.

Replays every policy on a recording, then decodes the same prompts live with the same models in the same process, policies
taking turns prompt by prompt. Two baselines decode plainly: our own loop and ``model.generate``. Prefill is excluded. On a machine
whose speed drifts, ``--in-turns`` lets the profile's measurements take turns with them as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, check_counts, run_command
from policies.plural import counted

if TYPE_CHECKING:
    from live.breakdown import Breakdown
    from live.in_turns import ProfileInTurns
    from live.pair import Pair
    from policies.contract import Policy
    from sim.metrics import ResultRow
    from traces.recording import Recording

DEFAULT_POLICIES = (
    "autoregressive",
    "chain(k=3)",
    "static",
    "eagle3",
    "eagle3(total_tokens=16, depth=5, top_k=8)",
    "eagle3(total_tokens=8, depth=4, top_k=4)",
    "heterospec",
    "goodput",
)
SAME_MOMENT = 0.1
"""How far plain decoding may be from what the profile says before the reader is told."""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m live.bench", description=__doc__.split("\n")[0])
    parse.add_argument("trace", metavar="TRACE", help="a recording of the pair to run")
    parse.add_argument("--profile", metavar="FILE", help="what traces.profile measured on this machine")
    parse.add_argument(
        "--in-turns", type=Path, metavar="FILE",
        help="profile again in turns with decoding (up to 150 rounds), predict by that, and write it there",
    )  # fmt: skip
    parse.add_argument("--policy", action="append", default=[], help="may be repeated (default: one of each kind)")
    parse.add_argument("--drafter", help="recorded drafter (default: the first), a training-free one: suffix, or suffix+eagle3")
    parse.add_argument("--temperature", type=float, help="which of the recording's texts (default: its lowest temperature)")
    parse.add_argument("--texts", type=int, default=1, help="texts per domain to decode live (default 1)")
    parse.add_argument("--rounds", type=int, default=1, help="times that each text is decoded by each policy (default 1)")
    parse.add_argument("--batch", type=int, metavar="N", help="measure throughput at N requests at a time")
    parse.add_argument("--breakdown", action="store_true", help="print where the time of a cycle goes (decodes once more)")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    from sim.outputs import check_writable, write_text

    check_writable(args.json, args.in_turns)
    check_apart(args.profile, args.in_turns, args.json)
    check_counts(("--texts", args.texts), ("--rounds", args.rounds), ("--batch", 1 if args.batch is None else args.batch))
    from live.fidelity import check_same_models, shipped
    from live.pair import load_pair
    from sim.finding import text_digest
    from sim.looked_up import check_drafter
    from sim.opening import open_policies, open_profile
    from traces.recording import open_recording

    recording = open_recording(args.trace)
    about = recording.manifest
    asked = args.policy or shipped(DEFAULT_POLICIES)
    policies = open_policies(asked)
    drafter = args.drafter or recording.drafters[0]
    check_drafter(recording, drafter)
    profile = open_profile(args.profile, recording, drafter) if args.profile else None
    cost = profile and profile.cost(drafter)
    members = at_temperature(recording, args.temperature)
    texts = chosen_texts(recording, args.texts, members)
    for option in ("breakdown", "in_turns"):
        if args.batch and getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} looks at one request at a time: leave out --batch")
    if args.batch and args.batch > len(texts):
        raise UserError(f"a batch of {args.batch} does not fit the {len(texts)} texts to decode: raise --texts, or lower --batch")
    predicted = [] if args.batch else [predict(recording, policy, drafter, cost, members) for policy in policies]
    pair = load_pair(about["target"]["id"], [entry["id"] for entry in about["drafters"]], about["dtype"], args.device)
    check_same_models(pair, about)
    if args.batch:
        from live.bench_batches import bench_in_batches

        found = bench_in_batches(recording, pair, policies, drafter, texts, members, args.batch, args.rounds, cost)
        if args.json:
            found |= {"recording": str(args.trace), "profile": args.profile, "drafter": drafter, "device": about["device"]}
            write_text(args.json, json.dumps(found, indent=1) + "\n")
        return
    in_turns = None
    if args.in_turns:
        from live.in_turns import ProfileInTurns

        in_turns = ProfileInTurns(pair, profile, asked)
    measured = measure(recording, pair, policies, drafter, texts, args.rounds, cost, in_turns)
    if in_turns:
        profiled = in_turns.profile()
        prices = profiled.cost(drafter)
        predicted = [predict(recording, policy, drafter, cost, members, prices) for policy in policies]
    moment = f"{counted(profiled.content['method']['rounds'], 'round')} in turns with decoding" if in_turns else None
    print(report(recording, policies, predicted, measured, texts, members, moment))
    broken_down = {}
    if args.breakdown:
        from live.contenders import break_down

        broken_down = break_down(recording, pair, policies, drafter, cost, texts)
        print("\n" + breakdown_table(broken_down))
    if args.json:
        content = {"recording": str(args.trace), "profile": args.profile, "in_turns": args.in_turns and str(args.in_turns)}
        digests = {"profile": profile and profile.digest, "in_turns": in_turns and profiled.digest}
        content |= {"digests": digests | {"texts": text_digest(recording)}}
        content |= {"drafter": drafter, "device": about["device"]}
        content |= {"predicted": [row.to_json() for rows in predicted for row in rows], "measured": measured}
        if broken_down:
            content["breakdown"] = {name: found.per_cycle() | {"cycles": found.cycles} for name, found in broken_down.items()}
        write_text(args.json, json.dumps(content, indent=1) + "\n")
    if in_turns:
        write_text(args.in_turns, profiled.text())


def check_apart(*files: str | Path | None) -> None:
    """Make sure that no file is given two parts. Raises UserError."""
    named = [Path(file).resolve() for file in files if file]
    if twice := next((file for file in named if named.count(file) > 1), None):
        raise UserError(f"{twice.name} is given for two purposes: give --profile, --in-turns and --json a file each")


def at_temperature(recording: Recording, temperature: float | None) -> list[int]:
    """Indices of the texts at a temperature, by default the recording's lowest. Raises UserError when there are none."""
    of_text = [recording.sampling(index)["temperature"] for index in range(len(recording.length))]
    wanted = min(of_text) if temperature is None else temperature
    if wanted not in of_text:
        known = ", ".join(f"{known:g}" for known in sorted(set(of_text)))
        raise UserError(f"the recording has no texts at temperature {wanted:g}: choose one of its own ({known})")
    return [index for index, own in enumerate(of_text) if own == wanted]


def predict(
    recording: Recording, policy: Policy, drafter: str, cost: Any, members: list[int], prices: Any = None
) -> list[ResultRow]:
    """Replay a policy, which decides by ``cost``, on the given texts of the recording, and price it (by ``prices``, if given)."""
    import torch

    from sim.metrics import replay_rows

    return replay_rows(recording, policy, drafter, cost, torch.tensor(members), prices)


def chosen_texts(recording: Recording, per_domain: int, members: list[int]) -> list[int]:
    """Indices of the first ``per_domain`` texts of each domain among ``members`` that have at least two tokens."""
    texts: list[int] = []
    for domain in range(len(recording.domains)):
        mine = [index for index in members if recording.domain_index[index] == domain and recording.length[index] > 1]
        texts += mine[:per_domain]
    return texts


def measure(
    recording: Recording,
    pair: Pair,
    policies: list[Policy],
    drafter: str,
    texts: list[int],
    rounds: int,
    cost: Any,
    in_turns: ProfileInTurns | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Decode the texts live. Per contender (a policy's spec, "plain loop", "model.generate") one entry per text and round:
    text, domain, tokens after the first, cycles, milliseconds. ``in_turns`` has its turn before every run."""
    import torch
    from tqdm import tqdm

    from live.contenders import contenders

    everyone = contenders(recording, pair, policies, drafter, cost)
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in everyone}
    shortest = min(texts, key=lambda text: int(recording.length[text]))
    order = torch.Generator().manual_seed(0)
    with tqdm(total=(rounds * len(texts) + 1) * len(everyone), desc="decoding live", unit="run", file=sys.stderr) as bar:
        for decode in everyone.values():  # warm every shape before timing any
            decode(shortest)
            bar.update()
        if in_turns:
            in_turns.begin(rounds * len(texts) * len(everyone))
        names = list(everyone)
        for _ in range(rounds):
            for text in texts:
                for index in torch.randperm(len(names), generator=order).tolist():
                    if in_turns:
                        bar.set_postfix_str("profile")
                        in_turns.turn()
                    bar.set_postfix_str(names[index])
                    tokens, cycles, ms = everyone[names[index]](text)
                    domain = recording.domains[recording.domain_index[text]]
                    figures[names[index]].append({"text": text, "domain": domain, "tokens": tokens, "cycles": cycles, "ms": ms})
                    bar.update()
    return figures


def report(
    recording: Recording,
    policies: list[Policy],
    predicted: list[list[ResultRow]],
    measured: dict[str, list[dict[str, Any]]],
    texts: list[int],
    members: list[int],
    in_turns: str | None = None,
) -> str:
    """The one table, means over domains, and which policy wins. ``members`` were replayed, ``texts`` decoded live;
    ``in_turns`` says how the profile behind the predictions was taken, where that was here."""
    from sim.table import number, text_table
    from traces.schema import FINISHES

    plain = {name: mean_ms(measured[name]) for name in ("plain loop", "model.generate")}
    baseline = min(plain, key=plain.get)
    told, rows, speeds = plain_told(predicted[0]), [], {}
    for policy, results in zip(policies, predicted, strict=True):
        row, ms = results[-1], mean_ms(measured[policy.spec()])
        speeds[policy.spec()] = plain[baseline] / ms
        rows.append(
            [
                policy.spec(),
                number(row.tau),
                number(row.kept, 1),
                number(row.levels, 1),
                number(row.ms_per_token),
                number(ms),
                number(told and told / row.ms_per_token, 2, "x"),
                number(speeds[policy.spec()], 2, "x"),
                f"{row.coverage:.0%}",
            ]
        )
    for name, ms in plain.items():
        expected = number(told) if name == "plain loop" else "-"
        rows.append([f"({name})", "1.00", "0.0", "0.0", expected, number(ms), "-", number(plain[baseline] / ms, 2, "x"), "-"])
    header = ["policy", "tau", "kept per\ncycle", "draft levels\nper cycle", "predicted\nms/token", "measured\nms/token"]
    header += ["predicted\nspeedup", "measured\nspeedup", "coverage"]
    drafting = {spec: speed for spec, speed in speeds.items() if spec != "autoregressive"}
    best = max(drafting or speeds, key=speeds.get)
    loops = float((recording.finish[members] == FINISHES.index("loop")).mean())
    temperature = recording.sampling(members[0])["temperature"]
    heat = f" at temperature {temperature:g}" if temperature else ""
    verdict = (
        f"fastest here: {best}, {speeds[best]:.2f}x plain decoding ({baseline})"
        if speeds[best] > 1
        else f"drafting does not pay on this machine: the best policy is {best} at {speeds[best]:.2f}x plain decoding ({baseline})"
    )
    return "\n".join(
        [
            "",
            text_table(header, rows),
            "",
            f"Means over {counted(len(recording.domains), 'domain')}. Replay: {counted(len(members), 'text')}{heat}, "
            f"{loops:.0%} ended at a loop. "
            f"Live: {len(texts)} of them, prefill excluded.",
            *([f"Predicted by a profile of {in_turns}."] if in_turns else []),
            *other_moment(told, plain["plain loop"], in_turns is not None),
            verdict,
        ]
    )


def plain_told(rows: list[ResultRow]) -> float | None:
    """Milliseconds a token of plain decoding by the profile that a policy's rows were priced by, the mean over domains as measured
    ones are; None without a profile. Over the policy's it gives the speedup to compare with a measured one: ``speedup`` of the
    last row is another mean, that of the domains' speedups."""
    domains = [(row.speedup, row.ms_per_token) for row in rows[:-1]]
    return None if None in domains[0] else sum(speedup * ms for speedup, ms in domains) / len(domains)


def other_moment(told: float | None, measured: float, in_turns: bool = False) -> list[str]:
    """A line where plain decoding took another time than the profile says: then the machine is not as it was, and what each number
    of tokens costs beside a plain step may have moved as well. In turns it cannot have been: then too little was decoded."""
    if told is None or abs(measured / told - 1) <= SAME_MOMENT:
        return []
    if in_turns:
        return [
            f"By that profile plain decoding takes {told:.2f} ms a token, these texts took {measured:.2f}: they are too few to "
            "tell, give more with --texts or --rounds."
        ]
    return [
        f"The profile is of another machine, or of another moment of this one: by it plain decoding takes {told:.2f} ms a token, "
        f"here it took {measured:.2f}. What it predicts is of there and then: profile again, or with --in-turns."
    ]


def breakdown_table(broken_down: dict[str, Breakdown]) -> str:
    """Milliseconds of a mean cycle by part, and the share that is overhead: a line per policy."""
    from live.breakdown import PARTS
    from sim.table import number, text_table

    rows = []
    for name, found in broken_down.items():
        parts = found.per_cycle()
        rows.append([name, *(number(parts[part]) for part in PARTS), number(sum(parts.values())), f"{found.overhead:.1%}"])
    header = ["milliseconds per cycle", "draft", "verify", "policy", "cache\ncommit", "Python", "whole\ncycle", "overhead"]
    return f"{text_table(header, rows)}\n\nOverhead is all that is not the two networks' forward passes."


def mean_ms(entries: list[dict[str, Any]]) -> float:
    """Milliseconds per token: per domain the ratio of sums over texts and rounds, then the mean over domains. (Times are added
    up, as a profile's are: medians of them would not add up.)"""
    domains: dict[str, list[float]] = {}
    for entry in entries:
        sums = domains.setdefault(entry["domain"], [0.0, 0.0])
        sums[0] += entry["ms"]
        sums[1] += entry["tokens"]
    return sum(ms / tokens for ms, tokens in domains.values()) / len(domains)


if __name__ == "__main__":
    run_command(main)
