"""What recording costs beside plain generation: ``python -m benchmarks.recording_cost``.

Each round records the same prompts anew (text, the target's distributions, the draft forest of the default cover list, files on
disk) and has ``model.generate`` write the same tokens at the same batch size, in turns and in one process. The recorder draws
some tokens beyond the limit, and so does ``model.generate`` here. Besides the wall clock it counts processor time, which other
programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import run_command

if TYPE_CHECKING:
    from live.pair import Pair


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.recording_cost", description=__doc__.split("\n")[0])
    parse.add_argument("--target", default="reference", help="default: the shipped pair")
    parse.add_argument("--draft", help="the one drafter to record (default: the shipped EAGLE-3 head)")
    parse.add_argument("--prompts", nargs="+", metavar="DOMAIN=FILE", help="default: the shipped held-out prompts")
    parse.add_argument("--limit", type=int, default=8, help="prompts per domain (default 8)")
    parse.add_argument("--batch", type=int, default=8, help="prompts generated together (default 8)")
    parse.add_argument("--max-new-tokens", type=int, default=128)
    parse.add_argument("--dtype", default="float32")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--threads", type=int, help="default: what torch uses in this process")
    parse.add_argument("--rounds", type=int, default=5)
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    import torch

    from live.pair import load_pair

    torch.set_num_threads(args.threads or torch.get_num_threads())
    pair = load_pair(args.target, [args.draft or "reference/eagle3"], args.dtype, args.device)
    record, texts = recorder(pair, args)
    split: dict[str, float] = {}
    tokens = record(split)  # warms up, and says how long each text is
    split.clear()
    ratios, busy, took = [], [], {"record": [], "generate": []}
    for number in range(args.rounds):
        works: list[tuple[str, Callable[[], Any]]] = [
            ("record", lambda: record(split)),
            ("generate", lambda: [generate(pair, batch, count) for batch, count in zip(texts, tokens, strict=True)]),
        ]
        spent = {name: timed(work) for name, work in (works if number % 2 else works[::-1])}
        ratios.append(spent["record"][0] / spent["generate"][0])
        busy.append(spent["record"][1] / spent["generate"][1])
        for name, (wall, _) in spent.items():
            took[name].append(wall)
    total = sum(sum(counts) for counts in tokens)
    print(
        f"{sum(map(len, texts))} texts, {total:,} tokens, batch {args.batch}, {pair.description['device']}, {args.dtype}; "
        f"median of {args.rounds} rounds (lowest, highest)"
    )
    for name, values in took.items():
        print(f"  {name:<10}{statistics.median(values):8.2f} s ({min(values):.2f}, {max(values):.2f})")
    for name, values in (("ratio", ratios), ("of processor time", busy)):
        print(f"  {name:<18}{statistics.median(values):6.2f} ({min(values):.2f}, {max(values):.2f})")
    whole = sum(split.values())
    print("  recording: " + ", ".join(f"{name} {value / whole:.0%}" for name, value in split.items()))


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of some work that ends on the host."""
    wall, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - worked


def recorder(pair: Pair, args: argparse.Namespace) -> tuple[Callable[[dict[str, float]], list[list[int]]], list[list[list[int]]]]:
    """(a function that records everything into a folder of its own, adds what it spent on what to a dictionary, and returns how
    many tokens each text of each shard has; the token ids of the prompts of each shard)."""
    import torch

    from live.sampling import GREEDY
    from traces import record as command
    from traces.plan import shard_plan, turns_of
    from traces.prompts import load_prompts, sample_specs
    from traces.shard import ShardRecorder
    from traces.writer import RecordingWriter

    size = ["--max-new-tokens", str(args.max_new_tokens), "--batch", str(args.batch), "--no-cut-loops"]
    options = command.parser().parse_args(["--target", args.target, "--device", args.device, *size])
    settings = command.capture_settings(options)
    prompts = load_prompts(args.prompts or sample_specs(), limit=args.limit)
    encoded = command.encode(pair, prompts, settings, True)
    turns = [turn for turn in turns_of(prompts) if turn.turn == 0]
    ids = {turn.number: encoded[prompts.index(turn.prompt)] for turn in turns}
    plan = shard_plan(turns, args.batch)
    about = command.manifest(options, pair, settings, [GREEDY])
    by_number = turns_of(prompts)

    def record(spent: dict[str, float]) -> list[list[int]]:
        worker = ShardRecorder(pair, by_number, [GREEDY], settings)
        counts = []
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            writer = RecordingWriter.create(Path(folder) / "trace", about, plan)
            for shard in plan:
                tables = worker.record(shard)
                started = time.perf_counter()
                writer.write_shard(shard.index, *tables)
                worker.seconds["write"] += time.perf_counter() - started
                counts.append([len(row["tokens"]) for row in tables.sequences])
        for name, seconds in worker.seconds.items():
            spent[name] = spent.get(name, 0.0) + seconds
        return counts

    return record, [[ids[number] for number in shard.sequences] for shard in plan]


def generate(pair: Pair, prompts: Sequence[list[int]], counts: Sequence[int]) -> int:
    """One batch by ``model.generate``, as many tokens as the longest text has; how many it wrote."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=pair.model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=pair.model.device)
    told = pair.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max(counts), pad_token_id=0)
    return int(told[:, longest:].numel())


if __name__ == "__main__":
    run_command(main)
