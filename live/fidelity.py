"""Prove that replay equals decoding: ``python -m live.fidelity TRACE`` decodes a recording's prompts live and compares cycles.

Compared are, for every cycle: where it starts, the kept nodes (tokens and parents, in order) and the accepted path. In
float64 every cycle must be identical. In float32 every difference must be explained (live/explain.py); the live run then
goes on from the replay's position and state. Greedy texts are compared with ``model.generate`` as well, sampled ones, whose
uniform numbers nobody else draws, with our own plain decoding.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, check_counts, run_command

if TYPE_CHECKING:
    from live.pair import Pair
    from policies.contract import Policy
    from policies.cost import Cost
    from traces.recording import Recording

FOUNDATION = ("autoregressive", "chain(k=5)", "static", "eagle3", "eagle3(total_tokens=16, depth=5, top_k=8)", "heterospec")


@dataclass
class Report:
    """Counts for one policy with one drafter at one temperature.

    cycles       replayed
    identical    the same start, kept nodes and accepted path
    explained    different for a stated reason
    unexplained  different without one: a bug
    lacking      not compared: the policy wanted draft nodes that the recording does not hold, so its replay is another policy's
    largest      largest gap (nats) between a live and a recorded draft log-probability that was looked at
    notes        one line per differing cycle
    """

    policy: str
    drafter: str
    temperature: float = 0.0
    cycles: int = 0
    identical: int = 0
    explained: int = 0
    unexplained: int = 0
    lacking: int = 0
    largest: float = 0.0
    notes: list[str] = field(default_factory=list)


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m live.fidelity", description=__doc__.split("\n")[0])
    parse.add_argument("trace", metavar="TRACE")
    parse.add_argument("--policy", action="append", default=[], help="policy to check; may be repeated (default: the foundation's)")
    parse.add_argument("--drafter", action="append", default=[], help="or suffix, suffix+eagle3; repeat it (default: all recorded)")
    parse.add_argument("--cycles", type=int, default=2000, help="cycles to compare per policy, drafter, temperature (default 2000)")
    parse.add_argument("--profile", metavar="FILE", help="what time costs, for policies that weigh it; told to both sides")
    parse.add_argument("--device", default="cpu")
    parse.add_argument(
        "--jobs", type=int, default=1, help="processes that check side by side, one thread each (default 1)"
    )
    parse.add_argument("--skip-generate", action="store_true", help="do not compare the texts with plain decoding")
    parse.add_argument("--witness", type=int, default=4, help="prompts for the comparison with assisted generation (default 4)")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    return parse


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    from sim.outputs import check_writable, write_text

    check_writable(args.json)
    from policies.registry import load_policy
    from sim.looked_up import check_drafter
    from traces.costs import load_profile
    from traces.recording import open_recording

    check_counts(("--jobs", args.jobs), ("--cycles", args.cycles))
    if args.witness < 0:
        raise UserError(f"--witness must be 0 (none) or more, not {args.witness}")
    if args.profile:
        load_profile(args.profile)
    specs = args.policy or shipped(FOUNDATION)
    for spec in specs:  # before the models: loading them may take minutes
        load_policy(spec).check_fitted()
    for drafter in args.drafter:
        check_drafter(open_recording(args.trace), drafter)
    recording, pair = opened(args.trace, args.device)
    about = recording.manifest
    exact = about["dtype"] == "float64"
    failures = 0
    reports, texts, witness = [], None, None
    temperatures = sorted({recording.sampling(sequence)["temperature"] for sequence in range(len(recording.length))})
    checks = list(product(args.drafter or recording.drafters, specs, temperatures))
    for report in side_by_side(args, checks):
        reports.append(report)
        print(line(report, exact), flush=True)
        failures += report.unexplained + (report.explained if exact else 0)
    if not args.skip_generate:
        texts = check_texts(recording, pair, exact)
        print(texts["line"])
        failures += texts["unexplained"]
    if args.witness and (models := [drafter for drafter in about["drafters"] if drafter["kind"] == "lm"]):
        from live.witness import check_witness, why_not

        able = [model["name"] for model in models if not why_not(pair, model["name"])]
        if able:
            witness = check_witness(recording, pair, able[0], args.witness)
            if witness["texts"]:
                print(witness["line"])
            failures += witness["unexplained"]
        else:
            print(why_not(pair, models[0]["name"]))
    if args.json:
        content = {"recording": str(args.trace), "dtype": about["dtype"], "policies": [asdict(report) for report in reports]}
        write_text(args.json, json.dumps(content | {"generate": texts, "witness": witness}, indent=1) + "\n")
    if about["dtype"] in ("bfloat16", "float16"):
        print(f"{about['dtype']}: {failures} differences measured; half precision proves nothing, record in float64 for that")
        return 0
    lacking = {report.policy: spec for report, (_, spec, _) in zip(reports, checks, strict=True) if report.lacking}
    if failures:
        print(f"FIDELITY BROKEN: {failures} unexplained")
    elif lacking:
        print(
            f"fidelity holds where it could be compared; the recording lacks draft nodes of {', '.join(lacking)}: draft them with "
            f"python -m traces.record --fill {args.trace} {' '.join(f'--policy {shlex.quote(spec)}' for spec in lacking.values())}"
        )
    else:
        print("fidelity holds")
    return 1 if failures or lacking else 0


@lru_cache(maxsize=1)
def opened(trace: str, device: str) -> tuple[Recording, Pair]:
    """The recording and the models that it was made with (the same weights, or an error)."""
    from live.pair import load_pair
    from traces.recording import open_recording

    recording = open_recording(trace)
    about = recording.manifest
    pair = load_pair(about["target"]["id"], [drafter["id"] for drafter in about["drafters"]], about["dtype"], device)
    check_same_models(pair, about)
    return recording, pair


def side_by_side(args: argparse.Namespace, checks: list[tuple[str, str, float]]) -> Iterator[Report]:
    """The reports of all (drafter, policy, temperature), in order, from ``--jobs`` processes."""
    from joblib import Parallel, delayed

    alone = args.jobs == 1
    tasks = (delayed(check_alone)(args.trace, args.device, *check, args.cycles, args.profile, alone) for check in checks)
    yield from Parallel(n_jobs=args.jobs, return_as="generator")(tasks)


def check_alone(
    trace: str, device: str, drafter: str, spec: str, temperature: float, cycles: int, profile: str | None, alone: bool
) -> Report:
    """One check in a process that may be fresh: opens what it needs; one thread when others run beside it."""
    import torch

    from policies.registry import load_policy
    from traces.costs import load_profile

    if not alone:
        torch.set_num_threads(1)
    recording, pair = opened(trace, device)
    policy = load_policy(spec)
    cost = load_profile(profile).cost(drafter, policy.name) if profile else None
    return check_policy(recording, pair, policy, drafter, cycles, temperature, cost)


def shipped(specs: Sequence[str]) -> list[str]:
    """The given policies, with the fitted file that comes with the package in place of the bare name of a fitted policy."""
    folder = Path(__file__).parent.parent / "policies" / "fitted"
    return [str(folder / f"{spec}.json") if (folder / f"{spec}.json").is_file() else spec for spec in specs]


def check_same_models(pair: Pair, about: dict[str, Any]) -> None:
    """Refuse to compare with other weights than those that were recorded, or with numbers rounded otherwise."""
    from live.distribution import DRAFT_STEP

    if about["drafters"] and about.get("draft_step") != DRAFT_STEP:
        raise UserError("the recording holds a draft's numbers as an earlier version rounded them: record it again")
    pairs = [(pair.description["target"], about["target"]), *zip(pair.description["drafters"], about["drafters"], strict=True)]
    for ours, recorded in pairs:
        if ours["weights_sha256"] != recorded["weights_sha256"]:
            raise UserError(f"the weights of '{recorded['id']}' are not those that were recorded: fetch those, or record again")
        for name in ("config_sha256", "captured_layers"):  # earlier versions did not write the first
            if name in recorded and ours.get(name) != recorded[name]:
                raise UserError(
                    f"'{recorded['id']}' is read otherwise than when it was recorded: give it the config.json and the options that "
                    "it had, or record again"
                )


def line(report: Report, exact: bool) -> str:
    """One line for the terminal."""
    verdict = f"{report.lacking} not recorded" if report.lacking else "ok"
    if report.unexplained or (exact and report.explained):
        verdict = f"BROKEN\n    first at {report.notes[0]}"
    heat = f" T={report.temperature:g}" if report.temperature else ""
    return (
        f"{report.drafter:10} {report.policy + heat:48} {report.cycles:6} cycles, {report.identical} identical, "
        f"{report.explained} explained, {report.unexplained} unexplained, largest difference {report.largest:.1e}  {verdict}"
    )


def check_policy(
    recording: Recording,
    pair: Pair,
    policy: Policy,
    drafter: str,
    cycles: int,
    temperature: float = 0.0,
    cost: Cost | None = None,
) -> Report:
    """Compare at least ``cycles`` cycles of the texts at a temperature (whole texts, in recorded order), or all there are.

    :param cost: what the policy may know about time, live and replayed.
    """
    import torch
    from tqdm import tqdm

    from live.decode import SpeculativeDecoder
    from live.tandem import Tandem

    limit = recording.manifest["context_limit"]
    decoder = SpeculativeDecoder(pair.target(), pair.draft(drafter), policy, pair.end_tokens, cost, limit)
    report = Report(policy.spec(), drafter, temperature)
    tandem = Tandem(recording, drafter, decoder, report)
    progress = tqdm(total=cycles, desc=f"{drafter} {policy.name}", unit="cycle", file=sys.stderr, leave=False)
    with torch.inference_mode(), progress as bar:
        for sequence in (recording.length > 1).nonzero()[0].tolist():
            if recording.sampling(sequence)["temperature"] != temperature:
                continue
            if report.cycles >= cycles:
                break
            before = report.cycles
            tandem.text(sequence)
            bar.update(report.cycles - before)
    return report


def check_texts(recording: Recording, pair: Pair, exact: bool) -> dict[str, Any]:
    """Compare the recorded texts with plain decoding, token for token: greedy ones with ``model.generate(do_sample=False)``,
    sampled ones with our own loop.

    In float32 a first difference is explained when the target's margin there is below the tolerance.
    """
    from tqdm import tqdm

    from live.explain import TOLERANCE

    counts = {"texts": 0, "identical": 0, "explained": 0, "unexplained": 0}
    sampled = 0
    for sequence in tqdm(range(len(recording.length)), desc="plain decoding", unit="text", file=sys.stderr, leave=False):
        first, length = int(recording.offset[sequence]), int(recording.length[sequence])
        recorded = recording.token[first : first + length].tolist()
        generated = plain_text(recording, pair, sequence)
        sampled += int(recording.temperature[sequence] > 0)
        counts["texts"] += 1
        if generated == recorded:
            counts["identical"] += 1
            continue
        differs = (i for i, (a, b) in enumerate(zip(generated, recorded, strict=False)) if a != b)
        place = next(differs, min(len(generated), len(recorded)))
        margin = float(recording.margin[first + place]) if place < length else 1.0
        counts["explained" if margin < TOLERANCE and not exact else "unexplained"] += 1
    judges = ["model.generate"] * (sampled < counts["texts"]) + ["our plain decoding"] * (sampled > 0)
    counts["line"] = (
        f"texts against {' and '.join(judges)}: {counts['texts']} texts, {counts['identical']} identical, "
        f"{counts['explained']} explained by a margin below {TOLERANCE}, {counts['unexplained']} unexplained"
    )
    return counts


def plain_text(recording: Recording, pair: Pair, sequence: int) -> list[int]:
    """A recorded text decoded again without drafts, alone: by ``model.generate`` when greedy, else by our own loop."""
    import torch

    from live.decoding_plain import plain_decode
    from policies.contract import Sampling

    sampling = Sampling(**recording.sampling(sequence))
    prompt, length = recording.prompt_tokens(sequence).tolist(), int(recording.length[sequence])
    if sampling.temperature > 0:
        number = int(recording.uniform_keys[sequence])
        return plain_decode(pair.target(), [prompt], length, pair.end_tokens, sampling=sampling, text=[number])[0]
    ids = torch.tensor([prompt], device=pair.model.device)
    settings = {"do_sample": False, "max_new_tokens": length, "repetition_penalty": sampling.repetition_penalty}
    return pair.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)[0, len(prompt) :].tolist()


if __name__ == "__main__":
    from live.fidelity import main  # under the module's own name, by which other processes find what they are sent

    run_command(main)
