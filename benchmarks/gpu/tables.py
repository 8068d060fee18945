"""The report's sections but for the contest: each takes a stage's finished jobs and gives paragraphs."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, median
from typing import Any

Jobs = dict[str, dict[str, Any]]


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers get four digits that count, at least one behind the point."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows])


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_section(jobs: Jobs) -> list[str]:
    keys = ("shape", "places", "largest_difference_nats", "same_argmax", "mean_kl_nats", "head_same_argmax")
    rows = [[name, *(job.get(key) for key in keys)] for name, job in jobs.items() if "places" in job]
    header = [
        "embedded against small",
        "shape",
        "places",
        "largest difference, nats",
        "same argmax",
        "mean KL, nats",
        "head: same argmax",
    ]
    parts = [markdown(header, rows)]
    for job in jobs.values():
        if "compute_mode" in job:
            parts.append(f"Compute mode: {job['compute_mode']}.")
        if "identical" in job:
            how = "captured as graphs" if job["captured"] else "not captured as graphs"
            parts.append(
                f"Small pair in float32, fixed shapes {how}: {job['identical']} of {job['texts']} texts the same, cycle for cycle."
            )
        if "graph_same_argmax" in job:
            kind = "CUDA graphs" if job["graphs"] else "fixed shapes, no graphs"
            parts.append(
                f"{kind} against plain calls: same argmax {job['graph_same_argmax']:.3g}, largest difference "
                f"{cell(job['graph_largest_difference_nats'])} nats."
            )
    return parts


WAY = ("batch", "context", "fixed_shape", "graphs")
"""What tells a row of the timed passes from others."""


def passes_section(jobs: Jobs) -> list[str]:
    parts = []
    for name, job in jobs.items():
        counts = sorted({row["tokens"] for row in job["cells"]})
        rows = []
        for way in sorted({tuple(row[key] for key in WAY) for row in job["cells"]}):
            mine = {row["tokens"]: row for row in job["cells"] if tuple(row[key] for key in WAY) == way}
            told = [f"{mine[n]['ms']:.3f} ± {mine[n]['spread_ms']:.3f}" if n in mine else None for n in counts]
            rows.append([*way, *told])
        header = ["batch", "context", "fixed shape", "graphs", *(f"{n} tokens" for n in counts)]
        parts.append(f"{name}, {job['dtype']}: ms of a target's forward (median ± interquartile range)\n\n{markdown(header, rows)}")
        parts += [f"- left out: batch {cut['batch']}, context {cut['context']}: {cut['why']}" for cut in job["left_out"]]
    return parts + scaled(jobs)


def scaled(jobs: Jobs) -> list[str]:
    """A large model from two slices of it: what a layer costs, times its layers. A calculation, and labelled as one."""
    slices = sorted((job for name, job in jobs.items() if " of " in name), key=lambda job: job["layers"])
    if len(slices) < 2:
        return []
    few, many = slices[0], slices[-1]
    layers = int(many["shape"].split(" of ")[1].split()[0])
    rows = []
    for one in few["cells"]:
        key = (*WAY, "tokens")
        other = next((row for row in many["cells"] if all(row[k] == one[k] for k in key)), None)
        if other:
            per_layer = (other["ms"] - one["ms"]) / (many["layers"] - few["layers"])
            rows.append([*(one[k] for k in key), per_layer, one["ms"] + per_layer * (layers - few["layers"])])
    title = f"{many['shape'].split(' (')[0]}: SCALED from slices of {few['layers']} and {many['layers']} layers, not measured whole"
    header = ["batch", "context", "fixed shape", "graphs", "tokens", "ms a layer", f"ms of {layers} layers"]
    return [f"{title}\n\n{markdown(header, rows)}"]


def profiles_section(jobs: Jobs) -> list[str]:
    from traces.costs import Profile

    parts = []
    for name, job in jobs.items():
        profile = Profile(job["profile"])
        content, cost = profile.content, profile.cost("eagle3")
        counts, widths = content["verify"]["tokens"], content["draft"]["eagle3"]["width"]
        capacity, rows = content["method"].get("capacity", {}), []
        for context in content["verify"]["context"]:
            for batch in content["verify"]["batch"]:
                verify = [float(cost.verify_ms(n, context, batch)) for n in counts]
                draft = [float(cost.draft_ms(n, context, batch)) for n in widths]
                loops = [
                    float(cost.plain_ms(context, batch)),
                    float(cost.catch_up_ms(4, context, batch)),
                    float(cost.overhead_ms(8, batch)),
                ]
                rows.append([context, capacity.get(str(context)), batch, *loops, *verify, *draft])
        header = ["context", "slots of its cache", "batch"]
        header += ["plain step", "catch-up 4", "overhead, 8 levels", *(f"verify {n}" for n in counts)]
        header += [f"draft {n}" for n in widths]
        graphs = "CUDA graphs" if content["method"]["cuda_graphs"] else "no graphs"
        parts.append(f"{name} ({graphs}, {content['method']['rounds']} rounds), ms\n\n{markdown(header, rows)}")
        if job.get("left_out_batches"):
            parts.append(f"- left out for memory: batches {job['left_out_batches']}")
    return parts


def fidelity_section(jobs: Jobs) -> list[str]:
    rows, lines = [], []
    for name, job in jobs.items():
        for one in job["fidelity"]["policies"]:
            share = one["identical"] / max(one["cycles"], 1)
            counts = [one[count] for count in ("cycles", "identical", "explained", "unexplained", "lacking")]
            rows.append([name, one["drafter"], one["policy"], one["temperature"], *counts, f"{share:.2%}", float(one["largest"])])
        if job["fidelity"]["generate"]:
            lines.append(f"- {name}: {job['fidelity']['generate']['line']}")
        if name in ("float64", "float32"):
            lines.append(
                f"- {name}: {'fidelity holds' if job['holds'] else 'FIDELITY BROKEN'}; TF32 {'on' if job['tf32'] else 'off'}"
            )
    header = ["dtype", "drafter", "policy", "T", "cycles", "identical", "explained", "unexplained", "not recorded", "share"]
    header.append("largest, nats")
    parts = [markdown(header, rows), "\n".join(lines)]
    return parts + tau_by_precision({name: job["recording"] for name, job in jobs.items()})


def tau_by_precision(recordings: Jobs) -> list[str]:
    """The effect of a precision on tau, on the same prompts."""
    taus = {
        name: {
            (row["drafter"], row["temperature"], row["policy"]): row["tau"] for row in job["replayed"] if row["domain"] == "mean"
        }
        for name, job in recordings.items()
    }
    keys = sorted(set.intersection(*map(set, taus.values()))) if taus else []
    rows = [[*key, *(taus[name][key] for name in taus)] for key in keys]
    return [f"tau by precision\n\n{markdown(['drafter', 'T', 'policy', *taus], rows)}"] if len(taus) > 1 else []


def recording_section(jobs: Jobs) -> list[str]:
    rows = [
        [name, job["texts"], job["positions"], sum(job["nodes"].values()), job["bytes"] / 1e6, job["recording_seconds"]]
        for name, job in jobs.items()
        if "positions" in job
    ]
    parts = [markdown(["recording", "texts", "positions", "draft nodes", "MB", "seconds"], rows)]
    for name, job in jobs.items():
        for heat, places in job.get("first_difference", {}).items():
            parted = [place for place in places if place is not None]
            where = f", first difference at token {median(parted):g} (median)" if parted else ""
            parts.append(
                f"- {name}, T={heat}: {len(places) - len(parted)} of {len(places)} texts the same in both precisions{where}"
            )
    chunks = {dtype: [job for name, job in jobs.items() if name.startswith(dtype)] for dtype in ("float32", "bfloat16")}
    whole = {dtype: {"replayed": averaged(found)} for dtype, found in chunks.items() if found}
    return parts + tau_by_precision(whole)


def sample_section(jobs: Jobs) -> list[str]:
    parts = [f"- {job['packed']}: {job['packed_bytes'] / 1e6:.1f} MB" for job in jobs.values()]
    inside = {f"{name}, {drafter}": one for name, job in jobs.items() for drafter, one in job["recordings"].items()}
    return ["\n".join(parts), *recording_section(inside)]


def averaged(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chunks' rows, tau averaged over them."""
    groups: dict[tuple, list[float]] = {}
    for job in jobs:
        for row in job["replayed"]:
            groups.setdefault((row["drafter"], row["temperature"], row["policy"], row["domain"]), []).append(row["tau"])
    names = ("drafter", "temperature", "policy", "domain")
    return [dict(zip(names, key, strict=True)) | {"tau": round(mean(values), 4)} for key, values in groups.items()]


def cost_section(jobs: Jobs) -> list[str]:
    parts = list(dict.fromkeys(part for job in jobs.values() for part in job["parts_seconds"]))  # not all have both drafters
    rows = [
        [
            name,
            job["target"],
            job["new_tokens"],
            job["rounds"],
            *(job["parts_seconds"].get(part) for part in parts),
            job["ratio"],
            job["ratio"] <= 1.5,
        ]
        for name, job in jobs.items()
    ]
    header = ["", "target", "tokens", "rounds", *(f"{part}, s" for part in parts), "ratio", "at most 1.5"]
    return [markdown(header, rows)]


def sibling_section(jobs: Jobs) -> list[str]:
    header = ["", "parameters", "tokens", "seconds", "last loss, nats"]
    return [
        markdown(
            header, [[n, j["parameters"], j["tokens"], j["training_seconds"], str(j["history"][-1][1:])] for n, j in jobs.items()]
        )
    ]


SECTIONS: dict[str, Callable[[Jobs], list[str]]] = {
    "check": check_section,
    "passes": passes_section,
    "profiles": profiles_section,
    "others": profiles_section,
    "sample": sample_section,
    "fidelity": fidelity_section,
    "recording": recording_section,
    "cost": cost_section,
    "sibling": sibling_section,
}
