"""Tables from result files: ``python -m benchmarks.gpu.report DIR``. Measures nothing and needs no GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from policies.errors import UserError, run_command

ORDER = (
    "check", "contest", "contest16", "passes", "profiles", "others", "fidelity", "sample", "recording", "cost", "sibling",
)  # fmt: skip
"""Of the sections: stages whose results there may be."""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__.split(";")[0])
    parse.add_argument("results", type=Path, metavar="DIR", help="folder that benchmarks.gpu.run wrote")
    parse.add_argument("--out", type=Path, metavar="FILE", help="write the report there instead of printing it (Markdown)")
    parse.add_argument(
        "--profiles", type=Path, metavar="FOLDER", help="write the measured profiles there, each as a file of its own"
    )
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    from benchmarks.gpu.results import read_results

    found = {path.stem: read_results(path) for path in sorted(args.results.glob("*.json"))}
    if not found:
        raise UserError(f"{args.results} holds no result files: run python -m benchmarks.gpu.run --out {args.results} first")
    text = render(found)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
        print(f"written to {args.out}")
    else:
        print(text)
    if args.profiles:
        for path in write_profiles(found, args.profiles):
            print(f"written to {path}")


def render(found: dict[str, dict[str, Any]]) -> str:
    """The report in Markdown: a section for each stage that has results."""
    from benchmarks.gpu import tables
    from benchmarks.gpu.contest_tables import contest_section

    sections = {"contest": contest_section, "contest16": contest_section} | tables.SECTIONS
    parts = [heading(found)]
    for stage in ORDER:
        if stage in found:
            done = {name: job for name, job in found[stage]["jobs"].items() if "error" not in job}
            parts += [f"## {stage.capitalize()}", *sections[stage](done)]
            parts += [f"- failed: {name}: {job['error']}" for name, job in found[stage]["jobs"].items() if "error" in job]
    return "\n\n".join(parts) + "\n"


def heading(found: dict[str, dict[str, Any]]) -> str:
    """Machine and libraries, a rehearsal named first. Raises UserError for results of several machines."""
    abouts = {json.dumps(results["about"], sort_keys=True) for results in found.values()}
    if len(abouts) > 1:
        raise UserError("these results come from different machines, libraries or rehearsals: keep each in a folder of its own")
    about = json.loads(abouts.pop())
    machine = ", ".join(f"{name} {value}" for name, value in about["machine"].items())
    libraries = ", ".join(f"{name} {version}" for name, version in about["libraries"].items())
    lines = ["# What was measured"]
    if about["rehearsal"]:
        lines.append("**A rehearsal at toy size: these numbers mean nothing.**")
    return "\n\n".join([*lines, f"Machine: {machine}. Libraries: {libraries}. TF32 {'on' if about['tf32'] else 'off'}."])


def write_profiles(found: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Every measured profile as a file that ``--profile`` takes.

    :raises UserError: when they come from a rehearsal, or the folder is not there.
    """
    from traces.costs import Profile

    if any(results["about"]["rehearsal"] for results in found.values()):
        raise UserError("these are a rehearsal's profiles, which mean nothing: measure on a GPU first")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: make it first")
    paths = []
    for stage in ("profiles", "others", "contest", "contest16"):
        for name, job in found.get(stage, {"jobs": {}})["jobs"].items():
            if "profile" in job:
                gpu = job["profile"]["machine"].get("gpu", job["profile"]["device"])
                words = f"measured {gpu} {stage} {name}".lower()
                path = folder / f"{'_'.join(''.join(c if c.isalnum() or c == '.' else ' ' for c in words).split())}.json"
                Profile(job["profile"], str(path)).save(path)
                paths.append(path)
    return paths


if __name__ == "__main__":
    run_command(main)
