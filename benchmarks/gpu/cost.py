"""What recording costs: its parts in seconds, and their sum over the time of ``model.generate`` for the same texts.

Both run the same batch of prompts to the same number of tokens, in turns, once before any is timed. ``generate`` is Hugging
Face's as people call it: a padded batch, no drafts. The bar is a ratio of 1.5.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch

from benchmarks.gpu.recording import TOY_COVER, covering
from benchmarks.gpu.results import Clock, Job, as_far_as_time_goes
from benchmarks.gpu.setting import Setting
from live.pair import Pair, encode_prompt
from policies.errors import UserError


def jobs(setting: Setting) -> list[Job]:
    batch = setting.pick(8, 2)
    found = [Job(f"true size, bfloat16, batch {batch}", lambda left: true_size(setting, left), 50, 80)]  # the most wanted one
    for dtype in setting.pick(("bfloat16", "float32"), ("float32",)):
        found.append(Job(f"shipped pair, {dtype}, batch {batch}", lambda left, d=dtype: shipped(setting, d, batch, left), 20, 40))
    return found


def shipped(setting: Setting, dtype: str, batch: int, seconds: float) -> dict[str, Any]:
    clock, pair = Clock(seconds), setting.small_pair(dtype)
    return measured(setting, pair, batch, setting.pick(128, 8), clock.left)


def true_size(setting: Setting, seconds: float) -> dict[str, Any]:
    """The same prompts at the price of LLaMA-3.1-8B, with its EAGLE-3 head."""
    clock, pair = Clock(seconds), setting.embedded()
    return measured(setting, pair, setting.pick(8, 2), setting.pick(256, 8), clock.left)


def measured(setting: Setting, pair: Pair, batch: int, new: int, seconds: float) -> dict[str, Any]:
    """Rounds of recording one shard, ``new`` tokens of each text, and of generating its texts; the medians of their seconds.

    :raises UserError: when no round but the first, which warms up, is done in time.
    """
    from traces.prompts import load_prompts, sample_specs
    from traces.record import capture_settings, parser

    clock = Clock(seconds)
    options = ["--max-new-tokens", str(new), "--positions", str(setting.pick(256, 16)), "--no-cut-loops", "--out", "unused"]
    options += covering(setting.pick((), TOY_COVER))
    asked = capture_settings(parser().parse_args(options))
    prompts = load_prompts(sample_specs()[:1], limit=batch)
    rounds: list[dict[str, float]] = []
    with as_far_as_time_goes():
        for number in range(setting.pick(6, 2)):
            begun = clock.left
            found = record_once(pair, prompts, asked)
            found["generate()"] = generate_once(pair, prompts, new + asked.overrun)
            if number:  # the first one warmed up
                rounds.append(found)
            if number and clock.left < 1.2 * (begun - clock.left) and not setting.rehearse:
                break
    if not rounds:
        raise UserError(f"no round was done within {seconds:.0f} s: give the stage more --budget")
    medians = {part: statistics.median(one[part] for one in rounds) for part in rounds[0]}
    total = sum(spent for part, spent in medians.items() if part != "generate()")
    return {
        "dtype": pair.description["dtype"],
        "target": pair.description["target"]["id"],
        "drafters": list(pair.networks),
        "batch": batch,
        "new_tokens": new + asked.overrun,
        "rounds": len(rounds),
        "parts_seconds": {part: round(spent, 4) for part, spent in medians.items()},
        "ratio": round(total / medians["generate()"], 4),
    }


def record_once(pair: Pair, prompts: list, asked: Any) -> dict[str, float]:
    """Record one shard of the prompts into a folder that is thrown away; seconds by part."""
    from live.sampling import GREEDY
    from traces.plan import shard_plan, turns_of
    from traces.shard import ShardRecorder
    from traces.writer import RecordingWriter

    turns = turns_of(prompts)
    plan = shard_plan(turns, len(prompts))
    recorder = ShardRecorder(pair, turns, [GREEDY], asked)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        tables = recorder.record(plan[0])
        about = {"drafters": pair.description["drafters"], "envelope": {"top_k": asked.fanout}, "top_m": asked.top_m}
        vocabulary = {"target": pair.description["target"], "overrun": asked.overrun, "max_new_tokens": asked.max_new_tokens}
        writer = RecordingWriter.create(folder, about | vocabulary, plan)
        started = time.perf_counter()
        writer.write_shard(plan[0].index, *tables)
        return dict(recorder.seconds) | {"write": time.perf_counter() - started}


@torch.inference_mode()
def generate_once(pair: Pair, prompts: list, new: int) -> float:
    """Seconds of ``model.generate`` for the prompts as one batch, to exactly ``new`` tokens."""
    device = pair.model.device
    ids = [encode_prompt(pair.tokenizer, prompt.messages) for prompt in prompts]
    width = max(map(len, ids))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    wait(device)
    started = time.perf_counter()
    pair.model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
