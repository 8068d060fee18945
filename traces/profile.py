"""Measure what decoding costs on this machine: ``python -m traces.profile --out profile.json`` for the shipped pair.

What is measured, and how a profile is read: see traces/profiles/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command
from policies.plural import counted
from traces.machine import describe_machine

if TYPE_CHECKING:
    from torch import Tensor

    from live.pair import Pair
    from traces.campaign import Campaign, Shapes
    from traces.costs import Profile

FULL = {"tokens": [1, 2, 4, 8, 16, 24, 32, 48, 60, 80], "widths": [1, 2, 4, 8, 10, 16], "contexts": [64, 200, 400]}
QUICK = {"tokens": [1, 4, 8, 16, 32, 60], "widths": [1, 4, 10], "contexts": [64, 300]}
LEAST_CONTEXT = 16
QUICK_SECONDS = 40.0
ROUNDS = 20


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m traces.profile", description=__doc__.split("\n")[0])
    parse.add_argument("--out", metavar="FILE", required=True, help="where the profile goes (JSON)")
    parse.add_argument("--target", default="reference", help="hub id or folder of the target (default: shipped)")
    parse.add_argument("--draft", action="append", default=[], help="hub id or folder of a drafter; may be repeated")
    parse.add_argument("--dtype", default="float32", help="float32, float64, bfloat16 or float16")
    parse.add_argument("--device", default="cpu")
    grids = {"tokens": "verified tokens", "widths": "draft frontier widths", "contexts": "context lengths"}
    for name, what in grids.items():
        points = " ".join(map(str, FULL[name]))
        parse.add_argument(f"--{name}", type=int, nargs="+", metavar="N", help=f"{what} to measure (default: {points})")
    parse.add_argument("--batches", type=int, nargs="+", default=[1], metavar="N", help="requests side by side (default 1)")
    parse.add_argument(
        "--policy", action="append", default=[], metavar="SPEC",
        help="measure what this policy's decisions take, too; may be repeated (default: one of each kind)",
    )  # fmt: skip
    parse.add_argument("--repeats", type=int, default=ROUNDS, help=f"interleaved rounds over all shapes (default {ROUNDS})")
    parse.add_argument("--seconds", type=float, help="time to keep to; at least 3 rounds are made")
    parse.add_argument("--quick", action="store_true", help=f"a coarser grid, in {QUICK_SECONDS:.0f} seconds")
    parse.add_argument("--revision", help="hub revision of the target")
    parse.add_argument("--trust-remote-code", action="store_true", help="run the model's own code (default: never)")
    parse.add_argument("--device-map", metavar="MAP", help="auto: spread the target over several GPUs (needs accelerate)")
    parse.add_argument("--overwrite", action="store_true", help="replace the file")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    out = Path(args.out)
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file with --out")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} already exists: replace it by --overwrite, or name another file with --out")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent}: make it, or name another file with --out")
    grid = {name: _points(name, getattr(args, name) or (QUICK if args.quick else FULL)[name]) for name in FULL}
    batches = _points("batches", args.batches)
    if args.repeats < 1:
        raise UserError(f"--repeats must be 1 or more, not {args.repeats}")
    if args.seconds is not None and not args.seconds > 0:
        raise UserError(f"--seconds must be above 0, not {args.seconds:g}")

    from live.pair import load_pair
    from traces.campaign import Shapes
    from traces.overhead import measured_policies

    policies = measured_policies(args.policy)
    hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code, "device_map": args.device_map}
    pair = load_pair(args.target, args.draft, args.dtype, args.device, **hub)
    shapes = Shapes(**{name: tuple(points) for name, points in grid.items()}, batches=tuple(batches))
    text = running_text(pair, max(batches), shapes.text_length)
    seconds = args.seconds or (QUICK_SECONDS if args.quick else None)
    profile = measure_pair(pair, text, shapes, args.repeats, seconds, policies)
    profile.save(out)
    print(render(profile))
    print(f"\nwritten to {out}")


def _points(name: str, points: list[int]) -> list[int]:
    """Sorted grid points, each once."""
    least = {"contexts": LEAST_CONTEXT}.get(name, 1)
    if min(points) < least:
        raise UserError(f"--{name} must be {least} or more, not {min(points)}")
    points = sorted(set(points))
    if name in ("tokens", "widths") and len(points) < 2:
        raise UserError(f"--{name} needs two different numbers or more: a cost between them is interpolated")
    return points


def running_text(pair: Pair, rows: int, length: int) -> Tensor:
    """Token ids int64 [rows, length] of the shipped prompts, as the pair's tokenizer and template write them."""
    import torch

    from live.pair import encode_prompt
    from traces.prompts import load_prompts, sample_specs

    ids: list[int] = []
    for prompt in load_prompts(sample_specs()):
        ids += encode_prompt(pair.tokenizer, prompt.messages)
        if len(ids) >= rows * length:
            break
    ids = ids * (-(-rows * length // len(ids)))
    return torch.tensor(ids[: rows * length]).reshape(rows, length)


def measure_pair(
    pair: Pair,
    text: Tensor,
    shapes: Shapes,
    repeats: int = ROUNDS,
    seconds: float | None = None,
    policies: Mapping[str, tuple[str, ...]] | None = None,
) -> Profile:
    """Measure a pair.

    :param text: token ids int64 [rows, shapes.text_length] to decode behind, a row for each of the largest batch.
    :param repeats: interleaved rounds at most.   :param seconds: time to keep to (3 rounds are made in any case).
    :param policies: whose loops are measured, specs by name (default: those of `traces.overhead`).
    :raises UserError: when a context does not fit into the models.
    """
    from traces.campaign import Campaign
    from traces.overhead import measured_policies

    campaign = Campaign(pair, text, shapes, policies=measured_policies() if policies is None else policies)
    campaign.run(repeats, seconds)
    return profile_of(campaign)


def profile_of(campaign: Campaign) -> Profile:
    """What a campaign has measured so far, and a description of the measurement."""
    import platform

    import torch
    import transformers

    from policies.registry import load_policy
    from traces.campaign import CAP
    from traces.costs import FORMAT, VERSION, Profile
    from traces.record import processor

    pair = campaign.pair
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "measured",
        "interpolation": "linear",
        "machine": {"processor": processor(), "system": platform.system()} | describe_machine(str(pair.model.device)),
        "device": pair.description["device"],
        "dtype": pair.description["dtype"],
        "libraries": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "target": pair.description["target"],
        "drafters": pair.description["drafters"],
        "method": {
            "rounds": campaign.rounds,
            "rounds_of_loops": campaign.rounds_of_loops,
            "statistic": f"mean, times beyond {CAP:g} medians counted as that",
            "spread": "interquartile range",
            "text": "shipped prompts",
            "policies": [load_policy(spec).spec() for specs in campaign.policies.values() for spec in specs],
        },
        **campaign.tables(),
    }
    return Profile(content)


def render(profile: Profile) -> str:
    """The profile at a glance, at its middle context."""
    content = profile.content
    contexts = content["verify"]["context"]
    context, batch = contexts[len(contexts) // 2], content["verify"]["batch"][0]
    tokens, widths, caught = (1, 8, 16, 32, 60), (1, 4, 10), (1, 2, 4, 9)

    def line(name: str, values: list[float], points: tuple[int, ...] = ()) -> str:
        cells = "".join(f"{value:>8.2f}" for value in values)
        return f"  {name:<26}{cells}   ms" + (f" at {'/'.join(map(str, points))}" if points else "")

    lines = [
        f"{content['machine']['processor']}, {content['device']}, {content['dtype']}, {context} tokens of context, "
        f"batch {batch}, {counted(content['method']['rounds'], 'round')}"
    ]
    for drafter in profile.drafters:
        cost = profile.cost(drafter)
        if drafter == profile.drafters[0]:
            lines.append(line("plain decoding, a token", [float(cost.plain_ms(context, batch))]))
            lines.append(line("verify", [float(cost.verify_ms(n, context, batch)) for n in tokens], tokens))
            lines.append(line("commit", [float(cost.commit_ms(n, batch)) for n in caught], caught))
        lines.append(line(f"{drafter}: draft level", [float(cost.draft_ms(n, context, batch)) for n in widths], widths))
        lines.append(line(f"{drafter}: catch-up", [float(cost.catch_up_ms(n, context, batch)) for n in caught], caught))
    for policy in content["overhead"]:
        cost = profile.cost(profile.drafters[0], policy)
        base, eight = (float(cost.overhead_ms(levels, batch)) for levels in (0, 8))  # the nearest number that it drafted
        lines.append(line(f"overhead: {policy}", [base] if policy == "autoregressive" else [base, eight]))
    lines[-1] += " a cycle of 0/8 levels"
    for policy in content["looked_up"]:
        cost = profile.cost("prompt_lookup", policy)
        lines.append(line(f"looking up: {policy}", [float(cost.overhead_ms(levels, batch)) for levels in (1, 8)]))
    lines[-1] += " a cycle of 1/8 levels" if content["looked_up"] else ""
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, "Nothing was written.")
