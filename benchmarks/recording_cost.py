"""What recording costs beside plain generation: ``python -m benchmarks.recording_cost``.

Each round records the same prompts anew (text, the target's distributions, the draft forest of the default cover list, files on
disk) and has ``model.generate`` write the same tokens at the same batch size, in turns and in one process. Several batch sizes may
be asked for: generation gets cheaper per token with the batch, the forest does not. The recorder draws some tokens beyond the
limit, and so does ``model.generate`` here. Besides the wall clock it counts processor time, which other programs on the machine
disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from policies.errors import UserError, run_command

if TYPE_CHECKING:
    from live.pair import Pair


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.recording_cost", description=__doc__.split("\n")[0])
    parse.add_argument("--target", default="reference", help="default: the shipped pair")
    parse.add_argument("--draft", help="the one drafter to record (default: the shipped EAGLE-3 head)")
    parse.add_argument("--prompts", nargs="+", metavar="DOMAIN=FILE", help="default: the shipped held-out prompts")
    parse.add_argument("--limit", type=int, default=8, help="prompts per domain (default 8)")
    parse.add_argument("--batch", type=int, nargs="+", default=[8], help="prompts generated together, one line each (default 8)")
    parse.add_argument("--max-new-tokens", type=int, default=128)
    parse.add_argument("--dtype", default="float32")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--threads", type=int, help="default: what torch uses in this process")
    parse.add_argument("--rounds", type=int, default=5)
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if wrong := [size for size in args.batch if size < 1]:
        raise UserError(f"--batch must be 1 or more, not {wrong[0]}")
    import torch

    from live.pair import load_pair

    torch.set_num_threads(args.threads or torch.get_num_threads())
    pair = load_pair(args.target, [args.draft or "reference/eagle3"], args.dtype, args.device)
    print(f"{pair.description['device']}, {args.dtype}; median of {args.rounds} rounds (lowest, highest)")
    print(f"{'batch':>5}{'tokens':>8}{'record, s':>24}{'generate, s':>24}{'ratio':>22}{'of processor time':>22}  recording")
    for batch in args.batch:
        found = measured(pair, args, batch)
        whole = sum(found.split.values())
        split = ", ".join(f"{name} {value / whole:.0%}" for name, value in found.split.items())
        print(
            f"{batch:>5}{found.tokens:>8,}{spread(found.record):>24}{spread(found.generate):>24}{spread(found.ratio):>22}"
            f"{spread(found.busy):>22}  {split}"
        )


class Found(NamedTuple):
    """What the rounds at one batch size took: wall seconds of recording and generating, their ratio, that of processor time; tokens
    in all, and what the recorder spent on what (seconds)."""

    record: list[float]
    generate: list[float]
    ratio: list[float]
    busy: list[float]
    tokens: int
    split: dict[str, float]


def measured(pair: Pair, args: argparse.Namespace, batch: int) -> Found:
    """Record and generate the same texts in turns, ``batch`` of them side by side."""
    record, texts = recorder(pair, args, batch)
    split: dict[str, float] = {}
    tokens = record(split)  # warms up, and says how long each text is
    split.clear()
    found = Found([], [], [], [], sum(map(sum, tokens)), split)
    for number in range(args.rounds):
        works: list[tuple[str, Callable[[], Any]]] = [
            ("record", lambda: record(split)),
            ("generate", lambda: [generate(pair, some, count) for some, count in zip(texts, tokens, strict=True)]),
        ]
        spent = {name: timed(work) for name, work in (works if number % 2 else works[::-1])}
        (recorded, record_busy), (generated, generate_busy) = spent["record"], spent["generate"]
        found.record.append(recorded)
        found.generate.append(generated)
        found.ratio.append(recorded / generated)
        found.busy.append(record_busy / generate_busy)
    return found


def spread(values: Sequence[float]) -> str:
    """The median, and the lowest and highest in brackets."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}, {max(values):.2f})"


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of some work that ends on the host."""
    wall, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - worked


def recorder(
    pair: Pair, args: argparse.Namespace, batch: int
) -> tuple[Callable[[dict[str, float]], list[list[int]]], list[list[list[int]]]]:
    """(a function that records everything into a folder of its own, adds what it spent on what to a dictionary, and returns how
    many tokens each text of each shard has; the token ids of the prompts of each shard)."""
    import torch

    from live.sampling import GREEDY
    from traces import record as command
    from traces.plan import shard_plan, turns_of
    from traces.prompts import load_prompts, sample_specs
    from traces.shard import ShardRecorder
    from traces.writer import RecordingWriter

    size = ["--max-new-tokens", str(args.max_new_tokens), "--batch", str(batch), "--no-cut-loops"]
    options = command.parser().parse_args(["--target", args.target, "--device", args.device, *size])
    settings = command.capture_settings(options)
    prompts = load_prompts(args.prompts or sample_specs(), limit=args.limit)
    encoded = command.encode(pair, prompts, settings, True)
    turns = [turn for turn in turns_of(prompts) if turn.turn == 0]
    ids = {turn.number: encoded[prompts.index(turn.prompt)] for turn in turns}
    plan = shard_plan(turns, batch)
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
