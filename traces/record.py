"""Record a target and its drafters: ``python -m traces.record --out FOLDER`` records the shipped reference pair.

What is recorded, and why one recording replays every policy: see traces/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command

if TYPE_CHECKING:
    from live.pair import Pair
    from traces.capture import CaptureSettings
    from traces.manifest import ShardPlan
    from traces.prompts import Prompt
    from traces.writer import RecordingWriter


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m traces.record", description=__doc__.split("\n")[0])
    parse.add_argument("--out", metavar="FOLDER", help="where the recording goes")
    parse.add_argument("--target", default="reference", help="hub id or folder of the target (default: the shipped one)")
    parse.add_argument("--draft", action="append", default=[], help="hub id or folder of a drafter; may be repeated")
    parse.add_argument("--prompts", nargs="+", metavar="DOMAIN=FILE", help="prompt files (default: the shipped held-out prompts)")
    parse.add_argument("--limit", type=int, default=8, help="prompts per domain (default 8)")
    parse.add_argument("--prompt-seed", type=int, help="draw the prompts at random by this seed instead of taking the first")
    parse.add_argument("--max-new-tokens", type=int, default=128, help="tokens per text (default 128)")
    parse.add_argument("--dtype", default="float32", help="float32, float64, bfloat16 or float16")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--batch", type=int, default=8, help="texts generated together, and per shard (default 8)")
    parse.add_argument("--positions", type=int, default=32, help="positions whose draft trees grow side by side (default 32)")
    parse.add_argument("--cover", action="append", help="policy whose expansions to record; may be repeated (default: see README)")
    parse.add_argument("--top-m", type=int, default=64, help="target log-probs kept per position (default 64)")
    parse.add_argument(
        "--cut-loops", action=argparse.BooleanOptionalAction, help="end texts at verbatim loops (default: for the reference)"
    )
    parse.add_argument("--revision", help="hub revision of the target")
    parse.add_argument("--trust-remote-code", action="store_true", help="run the model's own code (default: never)")
    parse.add_argument("--device-map", metavar="MAP", help="auto: spread the target over several GPUs (needs accelerate)")
    parse.add_argument("--resume", action="store_true", help="go on with an interrupted recording")
    parse.add_argument("--overwrite", action="store_true", help="replace the recording in the folder")
    parse.add_argument("--dry-run", action="store_true", help="say what it would take: time, disk, memory")
    parse.add_argument("--fill", metavar="TRACE", help="add to TRACE what --policy wants and the recording lacks")
    parse.add_argument("--policy", action="append", default=[], help="with --fill: the policy to cover; may be repeated")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    least = {"--limit": 1, "--max-new-tokens": 1, "--batch": 1, "--positions": 1, "--top-m": 2}  # the margin needs two
    for name, value in least.items():
        given = getattr(args, name[2:].replace("-", "_"))
        if given < value:
            raise UserError(f"{name} must be {value} or more, not {given}")
    if args.fill:
        from traces.fill import fill

        if not args.policy:
            raise UserError("--fill needs to know for whom: add --policy NAME")
        fill(Path(args.fill), args.policy, args.device, args.positions)
        return
    if not args.out and not args.dry_run:
        raise UserError("say where the recording goes: --out FOLDER")
    record(args)


def record(args: argparse.Namespace) -> None:
    """Load the pair and the prompts, fix the plan, record shard after shard."""
    from live.pair import load_pair
    from traces.prompts import load_prompts, sample_specs
    from traces.writer import RecordingWriter

    prompts = load_prompts(args.prompts or sample_specs(), limit=args.limit, seed=args.prompt_seed)
    if later := sum(bool(prompt.later_turns) for prompt in prompts):
        print(f"note: {later} prompts have later turns; only their first turns are recorded", file=sys.stderr)
    settings = capture_settings(args)  # before the models: loading them may take minutes
    hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code, "device_map": args.device_map}
    pair = load_pair(args.target, args.draft, args.dtype, args.device, **hub)
    encoded = encode(pair, prompts, settings)
    plan = shard_plan(prompts, args.batch)
    if args.dry_run:
        from traces.estimate import print_estimate

        print_estimate(pair, encoded, settings, plan)
        return
    writer = RecordingWriter.create(
        args.out, manifest(args, pair, settings), plan, resume=args.resume, overwrite=args.overwrite
    )
    record_shards(writer, pair, prompts, encoded, settings)
    writer.finish()
    print(f"recorded {args.out}; look into it with `python -m traces.inspect {args.out}`")


def capture_settings(args: argparse.Namespace) -> CaptureSettings:
    from policies.registry import load_policy
    from traces.capture import CaptureSettings
    from traces.cover import DEFAULT_COVER, TRUE_PATH_DEPTH

    cover = tuple(load_policy(spec) for spec in args.cover or DEFAULT_COVER)
    for policy in cover:
        policy.check_fitted()
    fanout = max([10, *(getattr(policy, "top_k", 0) for policy in cover)])
    cut_loops = args.target == "reference" if args.cut_loops is None else args.cut_loops
    return CaptureSettings(args.max_new_tokens, TRUE_PATH_DEPTH + 1, args.top_m, fanout, cover, cut_loops, args.positions)


def encode(pair: Pair, prompts: list[Prompt], settings: CaptureSettings) -> list[list[int]]:
    """Token ids of every prompt. Raises UserError when one does not fit into the context with what is to follow."""
    from live.pair import encode_prompt

    room = pair.context_limit - settings.max_new_tokens - 2 * settings.overrun
    encoded = [encode_prompt(pair.tokenizer, prompt.messages) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > room:
            raise UserError(
                f"prompt {prompt.id} of {prompt.domain} has {len(ids)} tokens, {max(room, 0)} fit beside "
                f"{settings.max_new_tokens} new ones in a context of {pair.context_limit}: shorten it or lower --max-new-tokens"
            )
    return encoded


def shard_plan(prompts: list[Prompt], size: int) -> list[ShardPlan]:
    """Shards of at most ``size`` sequences of one domain, in prompt order; sequence numbers are prompt numbers."""
    from traces.manifest import ShardPlan

    plan: list[ShardPlan] = []
    for domain in dict.fromkeys(prompt.domain for prompt in prompts):
        members = [number for number, prompt in enumerate(prompts) if prompt.domain == domain]
        for start in range(0, len(members), size):
            plan.append(ShardPlan(len(plan), tuple(members[start : start + size]), domain))
    return plan


def manifest(args: argparse.Namespace, pair: Pair, settings: CaptureSettings) -> dict[str, Any]:
    """Everything one needs to trust the recording, less what the writer adds (plan, checksums)."""
    import platform

    import numpy
    import pyarrow
    import torch
    import transformers

    from traces.loops import REPEATS, WINDOW

    return {
        **pair.description,
        "envelope": {
            "cover": [policy.to_json() for policy in settings.cover],
            "true_path_depth": settings.overrun - 1,
            "top_k": settings.fanout,
        },
        "sampling": [{"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": None}],
        "max_new_tokens": settings.max_new_tokens,
        "overrun": settings.overrun,
        "top_m": settings.top_m,
        "end_tokens": pair.end_tokens,
        "batch": args.batch,
        "positions_side_by_side": settings.positions,
        "loop_rule": {"window": WINDOW, "repeats": REPEATS} if settings.cut_loops else None,
        "libraries": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
            "pyarrow": pyarrow.__version__,
        },
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
    }


def processor() -> str:
    """The processor's name as Linux knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def record_shards(
    writer: RecordingWriter, pair: Pair, prompts: list[Prompt], encoded: list[list[int]], settings: CaptureSettings
) -> None:
    """Record what is pending, one shard at a time; an interrupt loses at most the shard in hand."""
    import torch
    from tqdm import tqdm

    from traces.selftest import warn_near_chance

    pending = writer.pending()
    total = sum(len(plan.sequences) for plan in pending)
    seconds = {"generate": 0.0, "target": 0.0, "forest": 0.0, "write": 0.0}
    with torch.inference_mode(), tqdm(total=total, desc="recording", unit="text", file=sys.stderr) as bar:
        for plan in pending:
            bar.set_postfix_str(plan.domain)
            tables = capture_shard(pair, prompts, encoded, plan, settings, seconds, bar.update)
            if plan.index == 0:
                warn_near_chance(*tables[1:], pair.description["drafters"])
            started = time.perf_counter()
            writer.write_shard(plan.index, *tables)
            seconds["write"] += time.perf_counter() - started
    if total:
        spent = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        print(f"time spent: {spent}", file=sys.stderr)


def capture_shard(pair, prompts, encoded, plan, settings, seconds, on_text):
    """The three tables of one shard; see :meth:`RecordingWriter.write_shard`."""
    import numpy as np

    from traces.capture import TargetCapture, capture_forest, generate_texts

    clock = time.perf_counter
    started = clock()
    texts = generate_texts(pair, [encoded[number] for number in plan.sequences], settings)
    seconds["generate"] += clock() - started
    target = pair.target()
    sequences, positions, nodes = [], [], []
    for number, text in zip(plan.sequences, texts, strict=True):
        started = clock()
        capture = TargetCapture(target, text)
        columns = capture.columns(settings.top_m)
        positions.append({"sequence": np.full(len(text.tokens), number), **columns})
        seconds["target"] += clock() - started
        started = clock()
        for index, network in enumerate(pair.networks.values()):
            columns = capture_forest(network, capture, text, settings, pair.context_limit)
            if columns:
                count = len(columns["node"])
                nodes.append({"sequence": np.full(count, number), "drafter": np.full(count, index, dtype=np.int8), **columns})
        seconds["forest"] += clock() - started
        sequences.append(
            {
                "sequence": number,
                "domain": plan.domain,
                "prompt_id": prompts[number].id,
                "prompt_text": prompts[number].text,
                "prompt_tokens": text.prompt,
                "tokens": text.tokens,
                "length": text.length,
                "finish": text.finish,
                "temperature": 0.0,
                "text": pair.tokenizer.decode(text.tokens[: text.length], skip_special_tokens=True),
            }
        )
        on_text(1)
    return sequences, _stacked(positions), _ordered(nodes)


def _stacked(parts: list[dict]) -> dict:
    import numpy as np

    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _ordered(parts: list[dict]) -> dict:
    from traces.writer import merge_nodes

    return merge_nodes(*parts)


if __name__ == "__main__":
    run_command(main, "What is finished is safe; go on with the same command and --resume.")
