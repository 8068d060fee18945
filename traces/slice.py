"""Make a recording out of part of another: ``python -m traces.slice A --domain math --temperature 0 --out B``.

What is asked for of one kind adds up (two domains: texts of either), what is asked for of different kinds narrows down. Texts
keep their numbers.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command
from policies.plural import counted

if TYPE_CHECKING:
    from traces.assemble import Piece
    from traces.manifest import Manifest


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m traces.slice", description=__doc__.split("\n")[0])
    parse.add_argument("recording", metavar="RECORDING", type=Path)
    parse.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="where the new recording goes")
    parse.add_argument("--domain", nargs="+", default=[], metavar="NAME", help="texts of these domains")
    parse.add_argument("--sequence", nargs="+", default=[], metavar="N", help="these texts by number; 10-19 names ten")
    parse.add_argument("--temperature", nargs="+", default=[], type=float, metavar="T", help="texts of these temperatures")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if not (args.domain or args.sequence or args.temperature):
        raise UserError("say what to take: --domain, --sequence or --temperature")
    texts = cut(args.recording, args.out, args.domain, _numbers(args.sequence), args.temperature)
    print(f"took {counted(texts, 'text')} of {args.recording}; look into them with `python -m traces.inspect {args.out}`")


def _numbers(words: Sequence[str]) -> list[range]:
    """Ranges of text numbers, each given as ``7`` or ``10-19`` (both ends count)."""
    found = []
    for word in words:
        told = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if not told:
            raise UserError(f"--sequence {word} is neither a number nor a range: write 7 or 10-19")
        found.append(range(int(told[1]), int(told[2] or told[1]) + 1))
    return found


def cut(
    folder: Path, out: Path, domains: Sequence[str] = (), numbers: Sequence[range] = (), temperatures: Sequence[float] = ()
) -> int:
    """Write the texts that are asked for to ``out``; how many there are. Nothing asked for of a kind means all.

    Raises UserError when no text is left, when a domain or temperature is not in the recording, when that is damaged or
    unfinished, and when there is something at ``out``.
    """
    import numpy as np

    from traces.assemble import Piece, assemble, texts_of, whole_recording
    from traces.manifest import plan_of

    about = whole_recording(folder)
    heats = {np.float32(temperature) for temperature in temperatures}
    pieces: list[Piece] = []
    known_domains: list[str] = []
    known_heats: list[float] = []
    kept = 0
    for plan in plan_of(about):
        texts = texts_of(folder, plan)
        heat = np.float32(texts[0]["temperature"]) if texts else None  # a shard is of one group
        known_domains.append(plan.domain)
        known_heats += [float(heat)] if texts else []
        if (domains and plan.domain not in domains) or (heats and heat not in heats):
            continue
        wanted = tuple(n for n in plan.sequences if not numbers or any(n in some for some in numbers))
        if wanted:
            pieces.append(Piece(folder, about, plan, wanted))
            kept += sum(text["sequence"] in wanted for text in texts)
    held = {number for plan in plan_of(about) for number in plan.sequences}
    if lacking := next((some for some in numbers if held.isdisjoint(some)), None):
        told = f"{lacking.start}" if len(lacking) == 1 else f"{lacking.start}-{lacking.stop - 1}"
        raise UserError(f"{folder} holds no text {told}: see `python -m traces.inspect {folder}`")
    _check_held(folder, "domain", domains, known_domains, str)
    _check_held(folder, "temperature", heats, known_heats, lambda heat: f"{heat:g}")
    if not kept:
        raise UserError(f"{folder} holds no such texts: see `python -m traces.inspect {folder}`")
    assemble(out, sliced_fields(about, pieces), pieces)
    return kept


def _check_held(folder: Path, kind: str, asked: Collection[Any], held: Sequence[Any], name: Callable[[Any], str]) -> None:
    """Refuse what the recording has nothing of: a misspelt name would silently make the slice smaller."""
    if lacking := [one for one in asked if one not in held]:
        known = ", ".join(name(one) for one in dict.fromkeys(held))
        raise UserError(f"{folder} holds no {kind} {name(lacking[0])}: it has {known}")


def sliced_fields(about: Manifest, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The manifest's configuration, less domains and sampling groups that nothing is left of."""
    import numpy as np

    from traces.assemble import texts_of
    from traces.manifest import PROMPTS, configuration

    fields = {key: value for key, value in configuration(about).items() if key not in ("format", "version", "plan", PROMPTS)}
    heats = {np.float32(text["temperature"]) for piece in pieces for text in texts_of(piece.folder, piece.plan)}
    if "sampling" in fields:
        fields["sampling"] = [entry for entry in fields["sampling"] if np.float32(entry["temperature"]) in heats]
    if "domains" in fields:
        left = {piece.plan.domain for piece in pieces}
        fields["domains"] = [name for name in fields["domains"] if name in left]
    return fields


if __name__ == "__main__":
    run_command(main, "Nothing was written.")
