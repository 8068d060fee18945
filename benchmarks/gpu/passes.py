"""A target's forward at true size, by tokens, context and batch, in fixed shapes: with CUDA graphs and kernel by kernel.

Beside them a single token in any shape, which needs no mask and looks at its text alone: how plain decoding runs without them.

What is timed is the network alone (no walk, no policy): the floor of what verification can cost. Inputs are random tokens,
the cache holds random numbers; weights are random. Every shape runs before any is timed, then come rounds in shuffled order;
medians and interquartile ranges are kept. Cells whose cache does not fit into the memory are named and left out.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import torch

from benchmarks.gpu.results import Clock, Job, as_far_as_time_goes
from benchmarks.gpu.setting import Setting, free_memory
from benchmarks.gpu.shapes import Shape, random_target
from live.graphed import GraphedModel
from live.model import CachedModel
from policies.errors import UserError

TOKENS = (1, 8, 16, 32, 64, 128)
CELLS = ((1, 512), (1, 2048), (1, 8192), (1, 16384), (4, 512), (4, 2048), (16, 512), (16, 2048), (64, 512))
"""(batch, context) to measure; others are read between them."""
ROUNDS = 7
SPARE = 0.85
"""Share of the device's memory that weights and cache may take; the rest is for logits and masks."""

Cell = tuple[int, int, int]


def jobs(setting: Setting) -> list[Job]:
    shapes = [setting.shape(name) for name in ("llama-3.1-8b", "vicuna-13b")]
    large = setting.shape("llama-3.3-70b")
    slices = [large.sliced(layers) for layers in setting.pick((4, 8), (4, 6))]
    whole = [Job(shape.name, lambda left, shape=shape: measure(setting, shape, left), 45, 150) for shape in shapes]
    return whole + [Job(part.name, lambda left, part=part: measure(setting, part, left), 30, 60) for part in slices]


def cells_of(setting: Setting) -> list[tuple[int, int]]:
    return list(setting.pick(CELLS, ((1, 32), (2, 48))))


def measure(setting: Setting, shape: Shape, seconds: float) -> dict[str, Any]:
    """Milliseconds by cell, with graphs and without, as lists that stand side by side; cells for which there is no time are named.

    :raises UserError: when there is none for a single one.
    """
    clock = Clock(seconds)
    dtype = torch.bfloat16
    model = random_target(shape, dtype, setting.device)
    free = memory_for_cache(setting.device, model)
    left_out: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    waiting, longest = cells_of(setting), 0.0
    with as_far_as_time_goes():
        while waiting:
            batch, context = waiting[0]
            needed, begun = batch * (context + 256) * shape.layers * 2 * shape.groups * shape.head_dim * 2, clock.left
            if context + max(TOKENS) > shape.context:
                why = f"beyond the model's context of {shape.context}"
            elif needed > free:
                why = f"its cache takes {needed >> 30} GiB, {free >> 30} are free"
            elif rows and begun < 1.2 * longest and not setting.rehearse:
                break
            else:
                sizes = setting.pick(TOKENS, (1, 8)), setting.pick(ROUNDS, 2)
                rows += timed_cell(model, batch, context, *sizes, clock, setting.graphs)
                free_memory()
                why, longest = "", max(longest, begun - clock.left)
            waiting.pop(0)
            if why:
                left_out.append({"batch": batch, "context": context, "why": why})
    if not rows:
        raise UserError(f"no cell was timed within {seconds:.0f} s: give the stage more --budget")
    left_out += [{"batch": batch, "context": context, "why": "no time left"} for batch, context in waiting]
    return {"shape": shape.name, "layers": shape.layers, "dtype": "bfloat16", "cells": rows, "left_out": left_out}


def timed_cell(
    model: torch.nn.Module, batch: int, context: int, tokens: tuple[int, ...], rounds: int, clock: Clock, graphs: bool
) -> list[dict[str, Any]]:
    """One row per number of new tokens and way of running, behind ``context`` tokens in ``batch`` rows."""
    replayed = GraphedModel(model, batch, context + 256, graphs=graphs)
    models: dict[str, CachedModel] = {
        "replayed": replayed,
        "fixed": GraphedModel(model, batch, 1, graphs=False),
        "any shape": CachedModel(model, batch, 1),
    }
    for other in models.values():
        other.cache = replayed.cache  # one for all: they never run at the same time, and more might not fit
    replayed.cache._pools[batch].normal_()  # never zeros: they are multiplied faster
    ways = [("replayed", count) for count in tokens] + [("any shape", 1)]
    if replayed.graphs:  # elsewhere both are the same
        ways += [("fixed", count) for count in tokens if count in (1, 16, 64)]
    samples: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    draw = random.Random(0)
    for number in range(rounds + 1):
        draw.shuffle(ways)
        for name, count in ways:
            ms = timed_forward(models[name], batch, context, count)
            if number:
                samples[name, count].append(ms)
        if number >= 3 and clock.left < 2:
            break
    return [
        {
            "batch": batch,
            "context": context,
            "tokens": count,
            "graphs": name == "replayed" and replayed.graphs,
            "fixed_shape": name != "any shape",
            "ms": round(statistics.median(values), 5),
            "spread_ms": round(spread(values), 5),
            "rounds": len(values),
        }
        for (name, count), values in sorted(samples.items())
    ]


@torch.inference_mode()
def timed_forward(model: CachedModel, batch: int, context: int, count: int) -> float:
    """ms of one forward over ``count`` new tokens per row (a chain each), with the sending of its inputs and its mask."""
    cache, device = model.cache, model.device
    cache._set_lengths([context] * batch)
    tokens = torch.randint(0, 1000, (batch, count))
    positions = context + torch.arange(count).expand(batch, -1)
    sees = torch.ones(count, count, dtype=torch.bool).tril().expand(batch, -1, -1)
    wait(device)
    started = time.perf_counter()
    model.forward_tree(tokens, None, positions, sees)
    wait(device)
    return 1e3 * (time.perf_counter() - started)


def memory_for_cache(device: str, model: torch.nn.Module) -> int:
    """Bytes that a cache may take beside the weights."""
    if torch.device(device).type != "cuda":
        return 1 << 30
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return int(SPARE * torch.cuda.get_device_properties(device).total_memory) - weights


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> float:
    """Interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low
