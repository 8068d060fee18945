"""Memory and disk that a recording takes: ``python -m benchmarks.recording_memory``.

Records some prompts of all domains, then each of them ten times, in a process of its own, and compares the peak memory of the two:
longer prompts would take more of themselves. Then says what an expanded node and a position take in a recording, before and after
compression.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from policies.errors import UserError, run_command

SAMPLE = Path(__file__).parents[1] / "traces" / "samples" / "reference"


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.recording_memory", description=__doc__.split("\n")[0])
    parse.add_argument(
        "trace", metavar="TRACE", nargs="?", type=Path, default=SAMPLE, help="whose size to state (default: shipped)"
    )
    parse.add_argument("--texts", type=int, default=16, help="prompts of the smaller recording (default 16)")
    parse.add_argument("--max-new-tokens", type=int, default=16)
    parse.add_argument("--batch", type=int, default=8, help="texts per shard (default 8)")
    parse.add_argument("--size-only", action="store_true", help="record nothing")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if not args.size_only:
        peaks = [peak_bytes(times, args) for times in (1, 10)]
        for times, peak in zip((1, 10), peaks, strict=True):
            count = times * args.texts
            print(f"{count:6,} texts of {args.max_new_tokens} tokens, {args.batch} per shard: peak memory {peak / 1e6:,.0f} MB")
        print(f"  ten times as many texts: {(peaks[1] - peaks[0]) / 1e6:+,.0f} MB ({peaks[1] / peaks[0] - 1:+.1%})")
    print(sizes(args.trace))


def peak_bytes(times: int, args: argparse.Namespace) -> int:
    """Peak resident memory of a process that records the same ``args.texts`` prompts so many times, of the shipped pair with one
    drafter."""
    from traces.prompts import load_prompts, sample_specs

    shipped = [prompt.text for prompt in load_prompts(sample_specs())]
    asked = [shipped[i * len(shipped) // args.texts] for i in range(args.texts)] * times
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
        size = ["--limit", str(len(asked)), "--batch", str(args.batch), "--max-new-tokens", str(args.max_new_tokens)]
        pair = ["--draft", "reference/eagle3", "--prompts", f"all={prompts}", "--out", str(Path(folder) / "trace")]
        command = [sys.executable, "-m", "traces.record", *pair, *size, "--no-cut-loops"]
        with open(Path(folder) / "log", "w") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise UserError(f"the recording failed: {(Path(folder) / 'log').read_text().strip().splitlines()[-1]}")
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sizes(folder: Path) -> str:
    """Bytes of a recording's nodes and positions: encoded, and as they lie on disk."""
    import pyarrow.parquet as pq

    from traces import manifest as mf

    about = mf.read_manifest(folder)
    names = mf.drafter_names(about)
    rows, raw, disk = ({table: 0 for table in mf.TABLES} for _ in range(3))
    nodes, trees = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for plan in mf.finished(about):
        for table in mf.TABLES:
            path = folder / mf.shard_file(table, plan.index)
            groups = pq.ParquetFile(path).metadata
            rows[table] += groups.num_rows
            disk[table] += path.stat().st_size
            raw[table] += sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
        shard = pq.read_table(folder / mf.shard_file("nodes", plan.index), columns=["drafter", "node"])
        drafter, is_root = shard["drafter"].to_numpy(), shard["node"].to_numpy() == 0
        for name in names:
            nodes[name] += int((drafter == name).sum())
            trees[name] += int((is_root & (drafter == name)).sum())
    node = {"raw": raw["nodes"] / rows["nodes"], "on disk": disk["nodes"] / rows["nodes"]}
    bare = {"raw": raw["positions"] / rows["positions"], "on disk": disk["positions"] / rows["positions"]}
    lines = [f"{folder.resolve().name}: {rows['nodes']:,} expanded nodes, {about['envelope']['top_k']} children kept of each"]
    lines.append("  an expanded node         " + _told(node))
    lines.append("  a position, without tree " + _told(bare))
    for name in names:
        per_tree = nodes[name] / max(trees[name], 1)
        lines.append(
            f"  its tree by {name:<13}" + _told({kind: each * per_tree for kind, each in node.items()}) + f" ({per_tree:.0f} nodes)"
        )
    return "\n".join(lines)


def _told(sizes: dict[str, float]) -> str:
    return ", ".join(f"{size:8,.0f} bytes {kind}" for kind, size in sizes.items())


if __name__ == "__main__":
    run_command(main)
