"""What is in this recording, and is it intact? `python -m traces.inspect FOLDER [--verify] [--json]`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from policies.errors import UserError, run_command
from policies.plural import counted


def summarise(folder: Path, verify: bool) -> dict[str, Any]:
    """Everything the command prints, as JSON-like data. Reads no log-probabilities, builds no cache.

    :param verify: compare every shard with its checksum instead of its size only.
    """
    from traces import manifest as mf

    manifest = mf.settle(folder, mf.read_manifest(folder))
    damages = mf.find_damage(folder, manifest, by_content=verify)
    finished = mf.finished(manifest)
    broken = {damage.index for damage in damages}
    entries = manifest["shards"]
    whole = [plan for plan in finished if plan.index not in broken]
    sizes = {table: sum(entries[mf.shard_file(table, plan.index)]["bytes"] for plan in whole) for table in mf.TABLES}
    domains = _domains(folder, manifest, whole)
    known = ("target", "drafters", "device", "dtype", "envelope", "sampling", "max_new_tokens", "overrun", "top_m")
    return {
        "folder": str(folder),
        "format_version": manifest["version"],
        "status": manifest["status"],
        "shards": {"planned": len(manifest["plan"]), "finished": len(finished)},
        "verified": verify,
        "damaged": [{"file": damage.file, "reason": f"is {damage.reason}"} for damage in damages],
        "bytes": sizes,
        "domains": domains,
        "temperatures": _temperatures(folder, whole),
        "skipped": manifest.get(mf.SKIPPED, []),
        "text": mf.keeps_prompts(manifest),
        "configuration": {key: manifest[key] for key in known if key in manifest},
    }


def _domains(folder: Path, manifest: dict[str, Any], plans: list[Any]) -> dict[str, dict[str, Any]]:
    """Per domain: sequences, counted tokens, positions, nodes by drafter, texts by finish."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from traces.flatten import domain_names
    from traces.manifest import drafter_names, shard_file

    domains: dict[str, dict[str, Any]] = {}
    for name in domain_names(manifest):
        counts = dict.fromkeys(("sequences", "tokens", "positions", "eos", "length", "loop"), 0)
        domains[name] = counts | {"nodes": dict.fromkeys(drafter_names(manifest), 0)}
    for plan in plans:
        here = domains[plan.domain]
        texts = pq.read_table(folder / shard_file("sequences", plan.index), columns=["length", "finish"])
        here["sequences"] += texts.num_rows
        here["tokens"] += pc.sum(texts["length"]).as_py() or 0
        here["positions"] += manifest["shards"][shard_file("positions", plan.index)]["rows"]
        for finish in texts["finish"].to_pylist():
            here[finish] += 1
        drafters = pq.read_table(folder / shard_file("nodes", plan.index), columns=["drafter"])["drafter"]
        for item in drafters.value_counts().to_pylist():
            here["nodes"][item["values"]] += item["counts"]
    return domains


def _temperatures(folder: Path, plans: list[Any]) -> list[dict[str, Any]]:
    """Per temperature (float32, as stored): texts and counted tokens."""
    import pyarrow.parquet as pq

    from traces.manifest import shard_file

    groups: dict[float, dict[str, Any]] = {}
    for plan in plans:
        texts = pq.read_table(folder / shard_file("sequences", plan.index), columns=["temperature", "length"])
        for temperature, length in zip(texts["temperature"].to_pylist(), texts["length"].to_pylist(), strict=True):
            group = groups.setdefault(temperature, {"temperature": round(temperature, 6), "texts": 0, "tokens": 0})
            group["texts"] += 1
            group["tokens"] += length
    return [groups[temperature] for temperature in sorted(groups)]


def tau_at_a_glance(folder: Path) -> dict[str, float]:
    """Tau of EAGLE-3's published tree by domain, where the simulator is installed; else nothing.

    Raises UserError when the recording does not cover the tree: what is missing lies off the true path, so that the tree would
    keep more of the truth than it does, and its tau come out too high.
    """
    try:
        from sim.metrics import replay_rows
    except ModuleNotFoundError as error:
        if error.name not in ("sim", "sim.metrics"):
            raise
        return {}
    from policies.registry import load_policy
    from traces.recording import open_recording

    rows = replay_rows(open_recording(folder), load_policy("eagle3"))
    if rows[-1].coverage < 1:
        raise UserError(
            f"the recording does not cover EAGLE-3's published tree in all cycles (in {rows[-1].coverage:.2%}): draft what "
            f"is missing with python -m traces.record --fill {folder} --policy eagle3"
        )
    return {row.domain: row.tau for row in rows}


def render(summary: dict[str, Any]) -> str:
    """The summary as text that fits one screen."""
    configuration = summary["configuration"]
    shards, damaged = summary["shards"], summary["damaged"]
    intact = "checksums agree" if summary["verified"] else "sizes agree (--verify compares checksums)"
    state = f"{len(damaged)} DAMAGED FILES" if damaged else intact
    lines = [
        f"{summary['folder']}: {summary['status']}, format version {summary['format_version']}",
        f"  shards    {shards['finished']} of {shards['planned']} finished, {state}",
    ]
    lines += [f"  DAMAGED   {item['file']} {item['reason']}" for item in damaged]
    target = configuration.get("target", {})
    lines.append(f"  target    {_describe(target)}")
    lines += [f"  drafter   {drafter['name']}: {_describe(drafter)}" for drafter in configuration.get("drafters", [])]
    lines.append(f"  hardware  {configuration.get('device', '?')}, {configuration.get('dtype', '?')}")
    keys = ("envelope", "sampling", "max_new_tokens", "overrun", "top_m")
    lines += [f"  {key:<9} {_value(configuration[key])}" for key in keys if key in configuration]
    lines += _groups(summary)
    lines += ["", *_table(summary), "", *_sizes(summary)]
    return "\n".join(lines)


def _table(summary: dict[str, Any]) -> list[str]:
    tau = summary.get("tau", {})
    head = f"  {'domain':<14}{'texts':>7}{'tokens':>9}{'positions':>11}{'nodes':>11}{'loops':>8}{'eos':>7}"
    lines = [head + (f"{'tau':>7}" if tau else "")]
    for name, row in summary["domains"].items():
        texts = max(row["sequences"], 1)
        line = f"  {name:<14}{row['sequences']:>7,}{row['tokens']:>9,}{row['positions']:>11,}"
        line += f"{sum(row['nodes'].values()):>11,}{row['loop'] / texts:>8.0%}{row['eos'] / texts:>7.0%}"
        lines.append(line + (f"{tau[name]:>7.2f}" if name in tau else ""))
    if tau:
        lines.append("  tau: EAGLE-3's published tree (60 tokens, depth 8, top-k 10)")
    if "tau_missing" in summary:
        lines.append(f"  no tau: {summary['tau_missing']}")
    return lines


def _groups(summary: dict[str, Any]) -> list[str]:
    """Temperature groups where there are several, texts that were skipped, and whether text was kept out."""
    groups, skipped = summary["temperatures"], summary["skipped"]
    lines = []
    if len(groups) > 1:
        parts = [f"T = {group['temperature']:g}: {counted(group['texts'], 'text')}, {group['tokens']:,} tokens" for group in groups]
        lines.append(f"  groups    {'; '.join(parts)}")
    if skipped:
        first, texts = skipped[0], counted(len(skipped), "text")
        lines.append(f"  skipped   {texts} (first: {first['prompt_id']} of {first['domain']}, {first['reason']})")
    return lines if summary["text"] else [*lines, "  text      kept out (--no-text): prompt tokens are hashes"]


def _sizes(summary: dict[str, Any]) -> list[str]:
    sizes, rows = summary["bytes"], summary["domains"].values()
    positions = max(sum(row["positions"] for row in rows), 1)
    nodes = max(sum(sum(row["nodes"].values()) for row in rows), 1)
    total = sum(sizes.values())
    line = (
        f"  size      {total / 1e6:.2f} MB: {total / positions:,.0f} bytes per position "
        f"({nodes / positions:.0f} nodes of {sizes['nodes'] / nodes:.1f} bytes each)"
    )
    return [line + (" in shards that are whole" if summary["damaged"] else "")]


def _describe(model: dict[str, Any]) -> str:
    parts = [str(model[key]) for key in ("kind", "id") if model.get(key)]
    parts += [f"{model['levels']} levels"] if model.get("levels") else []
    parts += [f"weights {model['weights_sha256'][:12]}"] if model.get("weights_sha256") else []
    return ", ".join(parts) or "not described"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_value(item) for item in value)
    return str(value)


def main(arguments: list[str] | None = None) -> int:
    """The command; exit status 1 when something is damaged."""
    parser = argparse.ArgumentParser(prog="python -m traces.inspect", description="What a recording holds.")
    parser.add_argument("folder", type=Path, help="a folder that traces.record wrote")
    parser.add_argument("--verify", action="store_true", help="compare every shard with its checksum")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-tau", action="store_true", help="skip the replay that gives tau at a glance")
    options = parser.parse_args(arguments)
    summary = summarise(options.folder, options.verify)
    if not (options.no_tau or summary["damaged"] or summary["shards"]["finished"] == 0):
        try:
            summary["tau"] = tau_at_a_glance(options.folder)
        except UserError as error:
            summary["tau"] = {}
            summary["tau_missing"] = str(error)
    print(json.dumps(summary, indent=1, ensure_ascii=False) if options.json else render(summary))
    return 1 if summary["damaged"] else 0


if __name__ == "__main__":
    run_command(main)
