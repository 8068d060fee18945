"""Make one recording out of several of the same pair: ``python -m traces.merge A B --out C``.

Texts keep their numbers where those do not collide; else the later recording's are shifted, and the plan says by how much,
since a sampled text's uniform numbers belong to the number it was recorded under. Replaying the result is replaying the parts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command
from policies.plural import counted

if TYPE_CHECKING:
    from traces.manifest import Manifest

SAME = ("dtype", "context_limit", "end_tokens", "max_new_tokens", "overrun", "top_m", "draft_step")
"""Settings that replay takes to hold for a whole recording. Others may differ, and are kept part by part under ``merged``."""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m traces.merge", description=__doc__.split("\n")[0])
    parse.add_argument("parts", metavar="RECORDING", type=Path, nargs="+", help="recordings of one pair, under one envelope")
    parse.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="where the new recording goes")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if len(args.parts) < 2:
        raise UserError("there is nothing to merge: name two recordings or more")
    texts = counted(merge(args.parts, args.out), "text")
    print(f"merged {texts} of {len(args.parts)} recordings; look into them with `python -m traces.inspect {args.out}`")


def merge(parts: Sequence[Path], out: Path) -> int:
    """Merge recordings, in the order given; the number of texts.

    Raises UserError when they do not fit together (another pair, envelope or setting, a text that two of them hold), when one
    is damaged or unfinished, and when there is something at ``out``.
    """
    from traces.assemble import Piece, assemble, texts_of, whole_recording
    from traces.manifest import plan_of

    manifests = [whole_recording(folder) for folder in parts]
    for place, (folder, about) in enumerate(zip(parts, manifests, strict=True)):
        for first, one in zip(parts[:place], manifests[:place], strict=True):  # two may share a temperature that the first lacks
            check_fit(first, one, folder, about)
    pieces: list[Piece] = []
    holders: dict[tuple[str, str, float], Path] = {}
    taken: set[int] = set()
    for folder, about in zip(parts, manifests, strict=True):
        numbers = {number for plan in plan_of(about) for number in plan.sequences}
        shift = max(taken) + 1 if taken & numbers else 0
        taken |= {number + shift for number in numbers}
        for plan in plan_of(about):
            pieces.append(Piece(folder, about, plan, plan.sequences, shift))
            for text in texts_of(folder, plan):
                key = text["domain"], text["prompt_id"], text["temperature"]
                if key in holders:
                    raise UserError(
                        f"{holders[key]} and {folder} both hold prompt {key[1]} of {key[0]} at temperature {key[2]:g}: "
                        "take one of the two out with traces.slice"
                    )
                holders[key] = folder
    assemble(out, merged_fields(parts, manifests), pieces)
    return len(holders)


def check_fit(first: Path, one: Manifest, second: Path, other: Manifest) -> None:
    """Raise UserError when two recordings cannot be parts of one."""
    from traces.manifest import first_difference, keeps_prompts

    if difference := first_difference(_pair(one), _pair(other)):
        raise UserError(f"{first} and {second} are of different pairs ({difference[0]}): merge recordings of the same models")
    configs = [[drafter.get("config_sha256") for drafter in about["drafters"]] for about in (one, other)]
    for drafter, *told in zip(one["drafters"], *configs, strict=True):
        if None not in told and told[0] != told[1]:  # earlier versions did not write them
            raise UserError(
                f"{first} and {second} read the drafter '{drafter['name']}' under different settings (its config.json, or the "
                "options behind its name): merge recordings of one"
            )
    if difference := first_difference(_envelope(one), _envelope(other)):
        raise UserError(
            f"{first} and {second} have different envelopes ({difference[0]}): give both the same with traces.record --fill"
        )
    settings = [{name: about.get(name) for name in SAME} | {"text": keeps_prompts(about)} for about in (one, other)]
    if difference := first_difference(*settings):
        name, ours, theirs = difference
        raise UserError(f"{first} was recorded with {name} = {ours}, {second} with {theirs}: record them with the same settings")
    groups = _groups(one)
    for temperature, entry in _groups(other).items():
        if difference := first_difference(groups.get(temperature, entry), entry):
            raise UserError(
                f"{first} and {second} sampled temperature {temperature:g} with different settings ({difference[0]}): "
                "keep them apart, or slice that temperature out of one"
            )


def _pair(about: Manifest) -> dict[str, Any]:
    """What makes two recordings comparable, whatever folders the models lay in."""
    names = ("name", "kind", "weights_sha256", "captured_layers")
    target = {name: about.get("target", {}).get(name) for name in ("weights_sha256", "tokenizer_sha256")}
    return {"target": target, "drafters": [{name: drafter.get(name) for name in names} for drafter in about["drafters"]]}


def _envelope(about: Manifest) -> dict[str, Any]:
    """The envelope with its policies in one order, since a fill adds them in any."""
    envelope = about.get("envelope", {})
    return envelope | {"cover": sorted(envelope.get("cover", []), key=lambda policy: json.dumps(policy, sort_keys=True))}


def _groups(about: Manifest) -> dict[float, dict[str, Any]]:
    """Sampling settings by temperature."""
    return {float(entry["temperature"]): entry for entry in about.get("sampling", [])}


def merged_fields(parts: Sequence[Path], manifests: Sequence[Manifest]) -> dict[str, Any]:
    """The new manifest's configuration: the first recording's, all sampling groups, and under ``merged`` what differed."""
    from traces.manifest import PROMPTS, configuration

    written = ("format", "version", "plan", "sampling", "domains")
    told = [{key: value for key, value in configuration(about).items() if key not in written} for about in manifests]
    differing = sorted({key for about in told for key in about if any(about.get(key) != other.get(key) for other in told)})
    groups: dict[float, dict[str, Any]] = {}
    for about in manifests:
        groups = _groups(about) | groups
    fields = {key: value for key, value in told[0].items() if key not in (PROMPTS, "merged")}
    sources = [
        {"recording": folder.resolve().name} | {key: about[key] for key in differing if key in about}
        for folder, about in zip(parts, told, strict=True)
    ]
    domains = list(dict.fromkeys(name for about in manifests for name in about.get("domains", [])))
    return fields | {"sampling": [groups[t] for t in sorted(groups)], "merged": sources} | ({"domains": domains} if domains else {})


if __name__ == "__main__":
    run_command(main, "Nothing was written.")
