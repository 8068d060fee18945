"""Live decoding against all baselines, domain by domain: ``python -m benchmarks.live_speed [TRACE] --profile profile.json``.

One process, the same prompts, the same models: our plain loop and ``model.generate``, Hugging Face's assisted generation with
the draft LM and its prompt lookup, and our policies with every drafter. Contenders take turns prompt by prompt, in an order
that is shuffled each time. A cell is the mean over the rounds, as a prediction is; prefill is excluded. With a profile, policies
that weigh time decide by its prices, live as in the prediction; with ``--in-turns`` the prediction is priced by a profile taken
between the texts. Needs a recording of a pair that has a draft language model, as the shipped one does, since that is what
assisted generation takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, check_counts, run_command

if TYPE_CHECKING:
    from live.in_turns import ProfileInTurns
    from live.pair import Pair
    from traces.costs import Profile
    from traces.recording import Recording

SAMPLE = Path(__file__).parents[1] / "traces" / "samples" / "reference"
FITTED = Path(__file__).parents[1] / "policies" / "fitted"
HEAD, LM = "eagle3", "draft"
BOTH = f"prompt_lookup(ngram=5, least=2, latest=True)+{HEAD}"
CONTENDERS = (
    f"{HEAD}: autoregressive",
    f"{HEAD}: chain(k=2)",
    f"{HEAD}: chain(k=3)",
    f"{HEAD}: eagle3(total_tokens=8, depth=4, top_k=4)",
    f"{HEAD}: eagle3",
    f"{HEAD}: {FITTED / 'goodput.json'}",
    f"{LM}: chain(k=3)",
    "prompt_lookup: chain(k=4)",
    "prompt_lookup: chain(k=10)",
    "suffix: chain(k=4)",
    f"suffix+{HEAD}: chain(k=4)",
    f"{BOTH}: chain(k=4)",
    f"{BOTH}: {FITTED / 'goodput.json'}",
)
PLAIN = ("plain loop", "model.generate")
ASSISTED = {
    "HF assisted (default)": {},
    "HF assisted (3, constant)": {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"},
}
LOOKED_UP = {"HF prompt lookup (10)": 10, "HF prompt lookup (4)": 4}
Timed = tuple[int, float]
"""Tokens, and milliseconds for them; prefill and what it gave are excluded."""
Prices = dict[str, Any]
"""A cost model (`policies.cost.Cost`) by drafter; None where there is no profile."""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.live_speed", description=__doc__.split("\n")[0])
    parse.add_argument("trace", metavar="TRACE", nargs="?", default=str(SAMPLE), help="default: the shipped sample recording")
    parse.add_argument("--profile", metavar="FILE", help="what traces.profile measured on this machine: adds predicted speedups")
    parse.add_argument("--in-turns", type=Path, metavar="FILE", help="profile again in turns with decoding, and predict by that")
    parse.add_argument("--contender", action="append", default=[], metavar="DRAFTER: POLICY", help="may be repeated")
    parse.add_argument("--texts", type=int, default=2, help="texts per domain (default 2)")
    parse.add_argument("--rounds", type=int, default=5, help="times that each text is decoded by each contender (default 5)")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    from live.bench import at_temperature, check_apart, chosen_texts
    from sim.opening import open_profile
    from sim.outputs import check_writable, write_text

    check_writable(args.json, args.in_turns)
    check_apart(args.profile, args.in_turns, args.json)
    check_counts(("--texts", args.texts), ("--rounds", args.rounds))
    from transformers.utils import logging

    from live.fidelity import check_same_models
    from live.in_turns import ProfileInTurns
    from live.pair import load_pair
    from traces.recording import open_recording

    logging.set_verbosity_error()  # assisted generation warns of its own settings at every text
    recording = open_recording(args.trace)
    about = recording.manifest
    asked = [split_contender(text) for text in args.contender or CONTENDERS]
    ours = [(drafter, fitted(policy)) for drafter, policy in asked]
    pair = load_pair(about["target"]["id"], [entry["id"] for entry in about["drafters"]], about["dtype"])
    check_same_models(pair, about)
    texts = chosen_texts(recording, args.texts, at_temperature(recording, 0.0))
    profile = open_profile(args.profile, recording, asked[0][0]) if args.profile else None
    costs = prices(ours, profile)
    in_turns = ProfileInTurns(pair, profile, [policy for _, policy in asked]) if args.in_turns else None
    figures = race(recording, everyone(recording, pair, ours, costs), texts, args.rounds, in_turns)
    overhead = overheads(recording, pair, ours, texts, costs)
    if in_turns:
        profile = in_turns.profile()
    predicted = predictions(recording, ours, costs, prices(ours, profile), texts)
    print(report(recording, figures, overhead, predicted, len(texts), args.rounds))
    if args.json:
        content = {"device": about["device"], "profile": args.profile, "in_turns": args.in_turns and str(args.in_turns)}
        content |= {"figures": figures, "overhead": overhead, "predicted": predicted}
        write_text(args.json, json.dumps(content, indent=1) + "\n")
    if in_turns:
        write_text(args.in_turns, profile.text())


def split_contender(text: str) -> tuple[str, str]:
    """Drafter and policy of "DRAFTER: POLICY"."""
    drafter, colon, policy = text.partition(": ")
    if not colon:
        raise UserError(f"'{text}' is no contender: write DRAFTER: POLICY, such as '{HEAD}: chain(k=3)'")
    return drafter, policy


def fitted(spec: str) -> Any:
    """The policy of a spec, which must be one that can decide."""
    from policies.registry import load_policy

    policy = load_policy(spec)
    policy.check_fitted()
    return policy


def called(drafter: str, policy: Any) -> str:
    return f"{drafter}: {policy.spec()}"


def prices(ours: list[tuple[str, Any]], profile: Profile | None) -> Prices:
    """What a profile says that each drafter costs; without one nobody knows."""
    return {drafter: profile and profile.cost(drafter) for drafter, _ in ours}


def everyone(
    recording: Recording, pair: Pair, ours: list[tuple[str, Any]], costs: Prices
) -> dict[str, Callable[[int], Timed]]:
    """All contenders by name; each decodes a recorded prompt up to its recorded length."""
    from live.contenders import contenders, decode_text, decoder_of

    def speculative(drafter: str, policy: Any) -> Callable[[int], Timed]:
        decoder = decoder_of(recording, pair, policy, drafter, costs[drafter])

        def decode(text: int) -> Timed:
            done = decode_text(decoder, recording, text)
            return len(done.tokens[0]) - 1, done.decode_ms

        return decode

    def plain(name: str) -> Callable[[int], Timed]:
        decode = baselines[name]
        return lambda text: (lambda tokens, _, ms: (tokens, ms))(*decode(text))

    baselines = contenders(recording, pair, [], HEAD, None)
    found = {name: plain(name) for name in PLAIN}
    if LM in pair.networks:
        draft = pair.networks[LM].model.model
        fresh = draft.generation_config.to_dict()
        for name, settings in ASSISTED.items():
            found[name] = hugging_face(recording, pair, {"assistant_model": draft}, fresh | settings)
    for name, count in LOOKED_UP.items():
        found[name] = hugging_face(recording, pair, {"prompt_lookup_num_tokens": count})
    return found | {called(drafter, policy): speculative(drafter, policy) for drafter, policy in ours}


def hugging_face(
    recording: Recording, pair: Pair, options: dict[str, Any], of_draft: dict[str, Any] | None = None
) -> Callable[[int], Timed]:
    """Hugging Face's own speculative decoding, in inference mode as ours is.

    :param of_draft: the draft's generation settings, which assisted generation changes while it runs: set before each text.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Notes when ``generate`` hands over tokens, and how many: the prompt, then what each cycle emits."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.counts: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())
            self.counts.append(value.numel())

        def end(self) -> None:
            pass

    @torch.inference_mode()
    def decode(text: int) -> Timed:
        ids = torch.tensor([recording.prompt_tokens(text).tolist()], device=pair.model.device)
        if of_draft is not None:
            options["assistant_model"].generation_config = GenerationConfig.from_dict(dict(of_draft))
        clock = Clock()
        length = int(recording.length[text])
        told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        pair.model.generate(ids, streamer=clock, **told, **options)
        return sum(clock.counts[2:]), 1e3 * (clock.times[-1] - clock.times[1])  # the first cycle holds the prefill

    return decode


def race(
    recording: Recording,
    everyone: dict[str, Callable[[int], Timed]],
    texts: list[int],
    rounds: int,
    in_turns: ProfileInTurns | None = None,
) -> dict[str, Any]:
    """Per contender and domain, the milliseconds per token of each round. ``in_turns`` has its turn before every run."""
    import torch
    from tqdm import tqdm

    sums = {name: [{} for _ in range(rounds)] for name in everyone}
    shortest = min(texts, key=lambda text: int(recording.length[text]))
    order, names = torch.Generator().manual_seed(0), list(everyone)
    with tqdm(total=(rounds * len(texts) + 1) * len(names), desc="decoding live", unit="run", file=sys.stderr) as bar:
        for name in names:  # warm every shape before timing any
            everyone[name](shortest)
            bar.update()
        if in_turns:
            in_turns.begin(rounds * len(texts) * len(names))
        for number in range(rounds):
            for text in texts:
                domain = recording.domains[recording.domain_index[text]]
                for index in torch.randperm(len(names), generator=order).tolist():
                    if in_turns:
                        in_turns.turn()
                    tokens, ms = everyone[names[index]](text)
                    before = sums[names[index]][number].get(domain, (0, 0.0))
                    sums[names[index]][number][domain] = before[0] + tokens, before[1] + ms
                    bar.update()
    return {
        name: {domain: [one[domain][1] / max(one[domain][0], 1) for one in of_round] for domain in recording.domains}
        for name, of_round in sums.items()
    }


def overheads(
    recording: Recording, pair: Pair, ours: list[tuple[str, Any]], texts: list[int], costs: Prices
) -> dict[str, float]:
    """The share of a cycle that is neither draft nor target, decoding once more under timers."""
    from live.contenders import break_down

    found: dict[str, float] = {}
    for drafter in dict.fromkeys(drafter for drafter, _ in ours):
        mine = [policy for name, policy in ours if name == drafter]
        parts = break_down(recording, pair, mine, drafter, costs[drafter], texts)
        found |= {f"{drafter}: {spec}": part.overhead for spec, part in parts.items()}
    return found


def predictions(
    recording: Recording, ours: list[tuple[str, Any]], costs: Prices, priced: Prices, texts: list[int]
) -> dict[str, dict[str, float | None]]:
    """Per contender, on the texts that were decoded: tau, and the predicted speedup (None without a profile).

    :param costs: what the policies decided by.   :param priced: what their cycles are priced by.
    """
    from live.bench import plain_told, predict

    found = {}
    for drafter, policy in ours:
        rows = predict(recording, policy, drafter, costs[drafter], texts, priced[drafter])
        told = plain_told(rows)
        found[called(drafter, policy)] = {"tau": rows[-1].tau, "speedup": told and told / rows[-1].ms_per_token}
    return found


def report(
    recording: Recording,
    figures: dict[str, dict[str, list[float]]],
    overhead: dict[str, float],
    predicted: dict[str, dict[str, float | None]],
    texts: int,
    rounds: int,
) -> str:
    """The table, speedups over the faster plain loop of each domain, and what it says of the project's bars."""
    from sim.table import number, text_table

    domains = list(recording.domains)
    ms = {name: {domain: statistics.fmean(cells[domain]) for domain in domains} for name, cells in figures.items()}
    mean = {name: statistics.fmean(cells.values()) for name, cells in ms.items()}
    base = {domain: min(ms[name][domain] for name in PLAIN) for domain in domains}
    whole = min(mean[name] for name in PLAIN)

    def spread(name: str) -> str:
        of_round = [statistics.fmean(cells) for cells in zip(*figures[name].values(), strict=True)]
        return f"{min(of_round):.1f}-{max(of_round):.1f}"

    rows = []
    for name in figures:
        told = predicted.get(name, {})
        cells = [number(base[domain] / ms[name][domain], 2, "x") for domain in domains]
        share = f"{overhead[name]:.0%}" if name in overhead else "-"
        rest = [number(whole / mean[name], 2, "x"), number(told.get("speedup"), 2, "x"), number(mean[name]), spread(name)]
        rows.append([name, number(told.get("tau")), *cells, *rest, share])
    header = ["decoding", "tau", *domains, "mean", "predicted\nmean", "ms/token", "of all rounds\nlowest-highest", "overhead"]
    title = (
        f"Speedup over the faster of {' and '.join(PLAIN)}, per domain and on the mean of their ms per token; "
        f"{texts} texts, mean of {rounds} rounds."
    )
    return "\n".join(["", text_table(header, rows), "", title, *verdicts(ms, mean, base, whole, overhead, domains)])


def verdicts(ms: dict, mean: dict, base: dict, whole: float, overhead: dict, domains: list[str]) -> list[str]:
    """One line per bar, for the fastest of our policies."""
    best = min((name for name in overhead if not name.endswith("autoregressive")), key=mean.get)
    speed = {domain: base[domain] / ms[best][domain] for domain in domains}
    top = max(domains, key=speed.get)
    theirs = [name for name in ms if name.startswith("HF ")]
    beaten = all(ms[best][domain] < ms[name][domain] for name in theirs for domain in domains)
    lines = {
        f"{whole / mean[best]:.2f}x on the mean (bar 1.3x)": whole / mean[best] >= 1.3,
        f"{speed[top]:.2f}x on {top}, its best domain (bar 1.8x)": speed[top] >= 1.8,
        f"{min(speed.values()):.2f}x where it is slowest (bar 1x)": min(speed.values()) >= 1,
        "faster than Hugging Face's assisted generation and prompt lookup in every domain": beaten,
        f"overhead {overhead[best]:.0%} of a cycle (bar 15%)": overhead[best] <= 0.15,
    }
    return [f"Fastest: {best}", *(f"  {'yes' if met else 'NO '}  {line}" for line, met in lines.items())]


if __name__ == "__main__":
    run_command(main)
