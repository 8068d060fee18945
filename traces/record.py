"""Record a target and its drafters: ``python -m traces.record --out FOLDER`` records the shipped reference pair.

What is recorded, and why one recording replays every policy: see traces/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from live.options import add_sampling_options
from policies.errors import UserError, run_command
from policies.plural import counted
from traces.machine import describe_machine
from traces.machine import processor as processor  # for traces.profile

if TYPE_CHECKING:
    from live.pair import Pair
    from policies.contract import Sampling
    from traces.capture import CaptureSettings
    from traces.plan import Turn
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
    parse.add_argument("--system", metavar="TEXT", help="system message in front of every prompt that has none")
    parse.add_argument("--no-chat-template", dest="chat_template", action="store_false", help="feed the bare contents of prompts")
    parse.add_argument("--no-text", dest="text", action="store_false", help="keep prompts and texts out; hash the prompts' tokens")
    add_sampling_options(parse, groups=True)
    parse.add_argument("--max-new-tokens", type=int, default=128, help="tokens per text (default 128)")
    parse.add_argument("--dtype", default="float32", help="float32, float64, bfloat16 or float16")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--batch", type=int, default=8, help="prompts generated together, and per shard (default 8)")
    parse.add_argument("--positions", type=int, default=64, help="positions whose draft trees grow side by side (default 64)")
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
    parse.add_argument("--shard", metavar="I/N", help="be recorder I of N on one recording (under torchrun this is known)")
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
    if args.overwrite and args.resume:
        raise UserError("--overwrite deletes what --resume goes on with: take --resume to keep what is recorded, or --overwrite")
    if args.policy and not args.fill:
        raise UserError("--policy belongs to --fill TRACE: what a new recording is to cover is named by --cover")
    if args.fill:
        from traces.fill import fill
        from traces.share import share_of

        if args.shard or not share_of(None).alone:  # two would write the same files at once
            raise UserError("--fill works alone: leave --shard and torchrun out")
        if not args.policy:
            raise UserError("--fill needs to know for whom: add --policy NAME")
        usual, read = vars(parser().parse_args([])), ("fill", "policy", "device", "positions")
        if ignored := [name for name, value in vars(args).items() if value != usual[name] and name not in read]:
            option = ignored[0].replace("_", "-")
            raise UserError(f"--fill adds to {args.fill} in place, as it was recorded: leave out --{option} (a copy can be filled)")
        fill(Path(args.fill), args.policy, args.device, args.positions)
        return
    if not args.out and not args.dry_run:
        raise UserError("say where the recording goes: --out FOLDER")
    record(args)


def record(args: argparse.Namespace) -> None:
    """Load the pair and the prompts, fix the plan, record shard after shard."""
    from live.options import sampling_of
    from live.pair import load_pair
    from traces.manifest import PROMPTS
    from traces.plan import shard_plan, turns_of
    from traces.prompts import load_prompts, prompts_sha256, sample_specs, with_system
    from traces.share import share_of
    from traces.writer import RecordingWriter

    share = share_of(args.shard)
    temperatures = args.temperature or [0.0]
    if twice := [t for t in temperatures if temperatures.count(t) > 1]:
        raise UserError(f"--temperature {twice[0]:g} was given twice: give each once")
    samplings = [sampling_of(args, temperature) for temperature in temperatures]
    prompts = load_prompts(args.prompts or sample_specs(), limit=args.limit, seed=args.prompt_seed)
    prompts = prompts if args.system is None else with_system(prompts, args.system)
    settings = capture_settings(args)  # before the models: loading them may take minutes
    hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code, "device_map": args.device_map}
    pair = load_pair(args.target, args.draft, args.dtype, share.device(args.device), **hub)
    encoded = encode(pair, prompts, settings, args.chat_template)
    turns = turns_of(prompts, len(samplings))
    plan = shard_plan(turns, args.batch)
    if args.dry_run:
        from traces.estimate import foreseen, print_estimate

        print_estimate(pair, foreseen(prompts, encoded, turns, settings), settings, plan, samplings[-1])
        return
    about = manifest(args, pair, settings, samplings) | {PROMPTS: prompts_sha256(prompts)}
    writer = RecordingWriter.create(args.out, about, plan, resume=args.resume, overwrite=args.overwrite, share=share)
    record_shards(writer, pair, turns, samplings, settings, args)
    skipped = writer.manifest.get("skipped", [])
    if len(skipped) == len(turns):
        reason = skipped[0]["reason"]
        raise UserError(f"none of the {len(turns)} texts could be recorded (first: {reason}): check the model and --dtype")
    if missing := writer.finish():
        print(f"share {share} of {args.out} is done; the recording is whole once the other recorders' {missing} shards are there")
        return
    left_out = f", {counted(len(skipped), 'text')} skipped" if skipped else ""
    print(f"recorded {args.out}{left_out}; look into it with `python -m traces.inspect {args.out}`")


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


def encode(pair: Pair, prompts: list[Prompt], settings: CaptureSettings, chat_template: bool) -> list[list[int]]:
    """Token ids of every prompt's first turn. Raises UserError when one does not fit into the context with what is to follow."""
    from live.pair import encode_prompt
    from traces.shard import room

    most = room(pair, settings)
    encoded = [encode_prompt(pair.tokenizer, prompt.messages, chat_template) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > most:
            raise UserError(
                f"prompt {prompt.id} of {prompt.domain} has {len(ids)} tokens, {max(most, 0)} fit beside {settings.max_new_tokens} "
                f"new ones, as {pair.context_holder} holds {pair.context_limit}: shorten it or lower --max-new-tokens"
            )
    return encoded


def manifest(args: argparse.Namespace, pair: Pair, settings: CaptureSettings, samplings: list[Sampling]) -> dict[str, Any]:
    """Everything one needs to trust the recording, less what the writer adds (plan, checksums)."""
    import dataclasses
    import platform

    import numpy
    import pyarrow
    import torch
    import transformers

    from live.distribution import DRAFT_STEP
    from traces.loops import REPEATS, WINDOW

    return {
        **pair.description,
        "envelope": {
            "cover": [policy.to_json() for policy in settings.cover],
            "true_path_depth": settings.overrun - 1,
            "top_k": settings.fanout,
        },
        "sampling": [
            dataclasses.asdict(sampling) | ({} if sampling.temperature > 0 else {"seed": None}) for sampling in samplings
        ],
        "max_new_tokens": settings.max_new_tokens,
        "overrun": settings.overrun,
        "top_m": settings.top_m,
        "draft_step": DRAFT_STEP,
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
        "machine": describe_machine(str(pair.model.device)),  # of a GPU its driver and CUDA version, too
        **conversation_settings(args),
    }


def conversation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """How prompts were written, where that was asked for: keys ``text``, ``chat_template``, ``system``."""
    import hashlib

    said = {} if args.text else {"text": False}
    if not args.chat_template:
        said["chat_template"] = False
    if args.system is not None:
        said["system"] = args.system if args.text else "sha256 " + hashlib.sha256(args.system.encode()).hexdigest()
    return said


def record_shards(
    writer: RecordingWriter,
    pair: Pair,
    turns: list[Turn],
    samplings: list[Sampling],
    settings: CaptureSettings,
    args: argparse.Namespace,
) -> None:
    """Record what is pending, one shard at a time; an interrupt lets the shard in hand be finished, a second one does not."""
    import torch
    from tqdm import tqdm

    from traces.interrupt import asked_to_stop
    from traces.selftest import warn_near_chance
    from traces.shard import ShardRecorder

    pending = writer.pending()
    total = sum(len(plan.sequences) for plan in pending)
    recorder = ShardRecorder(pair, turns, samplings, settings, args.chat_template, args.text)
    title = "recording" if writer.share.alone else f"recording {writer.share}"
    with torch.inference_mode(), tqdm(total=total, desc=title, unit="text", file=sys.stderr) as bar:

        def say(sentence: str = "finishing the shard in hand, then stopping; Ctrl-C once more stops at once") -> None:
            bar.write(sentence, file=sys.stderr)

        recorder.on_text, recorder.say = bar.update, say
        with asked_to_stop(say) as asked:
            for plan in pending:
                bar.set_postfix_str(plan.domain)
                tables = recorder.record(plan)
                if plan.index == 0:
                    warn_near_chance(tables.positions, tables.nodes, pair.description["drafters"])
                started = time.perf_counter()
                writer.write_shard(plan.index, *tables)
                recorder.seconds["write"] += time.perf_counter() - started
                if asked() and plan is not pending[-1]:
                    raise KeyboardInterrupt
    if total:
        print(split(recorder.seconds), file=sys.stderr)


def split(seconds: dict[str, float]) -> str:
    """Where the time of a recording went, as one line."""
    whole = sum(seconds.values()) or 1.0
    parts = ", ".join(f"{name} {value:.1f} s ({value / whole:.0%})" for name, value in seconds.items())
    return f"time spent: {parts}"


def how_to_go_on(arguments: list[str]) -> str:
    """What is said behind an interrupt, which leaves whole shards: the words of the command that goes on from there."""
    args = parser().parse_args(arguments)
    if args.fill:
        return "What is filled is safe; give the same command again."
    return f"What is finished is safe; go on with the same command and --resume{' in place of --overwrite' * args.overwrite}."


if __name__ == "__main__":
    run_command(main, how_to_go_on(sys.argv[1:]))
