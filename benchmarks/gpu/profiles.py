"""Profiles of the live classes at true size, by the same campaign as ``python -m traces.profile``, in the profile format.

Random weights cost what trained ones cost. Other grids and shapes: benchmarks/gpu/others.py.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.capacities import measure_parts, one_by_one, slots
from benchmarks.gpu.passes import memory_for_cache
from benchmarks.gpu.results import Job
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import Shape, random_head, random_target
from live.eagle3 import captured_layers
from live.eagle_network import EagleNetwork
from live.pair import Pair, device_name
from traces.campaign import Shapes

WIDE = Shapes((1, 8, 16, 32, 64, 128), (1, 4, 8, 10, 16), (128, 512, 2048), (1, 4), (0, 1, 4, 9), (1, 4, 9))
TOY = Shapes((1, 8), (1, 4), (32, 48), (1,), (0, 2), (1, 2))


def jobs(setting: Setting) -> list[Job]:
    return [job_of(setting, "llama-3.1-8b", "", WIDE, True, 50)]


def job_of(setting: Setting, name: str, told: str, grid: Shapes, graphs: bool, least: float) -> Job:
    shape, points = setting.shape(name), setting.pick(grid, TOY)
    return Job(shape.name + told, lambda left: profiled(setting, shape, points, graphs, left), least, 100)


def profiled(setting: Setting, shape: Shape, grid: Shapes, graphs: bool, seconds: float) -> dict[str, Any]:
    """A profile, as its JSON document. Batches whose cache does not fit are left out and named.

    :param graphs: in fixed shapes, each context in a cache of its own size; else in caches that grow, kernel by kernel.
    """
    started = time.monotonic()
    pair = random_pair(setting, shape)
    free = memory_for_cache(setting.device, pair.model)
    per_token = shape.layers * 2 * shape.groups * shape.head_dim * 2
    # side by side, for each context: caches of target, plain decoding and loop, those of smaller batches, and the text's features
    length = sum(slots(replace(grid, contexts=(context,)).text_length) for context in grid.contexts)
    fits = [batch for batch in grid.batches if batch * length * (4 * per_token + 8 * shape.hidden) < free]
    left_out = sorted(set(grid.batches) - set(fits))
    grid = replace(grid, batches=tuple(fits))
    rows = running_tokens(setting, max(grid.batches), grid.text_length)
    parts = one_by_one(pair, grid, setting.graphs) if graphs else [(pair, grid)]
    profile = measure_parts(parts, rows, grid, setting.pick(7, 1), 0.75 * (seconds - (time.monotonic() - started)))
    profile.content["method"]["text"] = "shipped prompts, repeated; random weights"
    profile.content["method"]["cuda_graphs"] = graphs and setting.graphs
    return {"profile": profile.content, "left_out_batches": left_out}


def random_pair(setting: Setting, shape: Shape) -> Pair:
    """A target of the shape with an EAGLE-3 head, in bfloat16, with random weights."""
    dtype = torch.bfloat16
    model = random_target(shape, dtype, setting.device)
    head = random_head(shape, model.get_input_embeddings().weight, dtype, setting.device, seed=1)
    layers = captured_layers(shape.layers)
    description = {
        "target": {
            "id": f"random weights in the shape of {shape.name}",
            "architecture": type(model).__name__,
            "vocabulary": shape.vocabulary,
            "parameters": sum(weight.numel() for weight in model.parameters()),
        },
        "drafters": [{"name": "eagle3", "kind": "eagle3", "id": f"EAGLE-3 head of {shape.name}", "captured_layers": list(layers)}],
        "dtype": "bfloat16",
        "device": device_name(model.device),
        "context_limit": shape.context,
    }
    tokenizer = setting.small_pair("float32").tokenizer
    return Pair(model, tokenizer, {"eagle3": EagleNetwork(head)}, layers, description)


def running_tokens(setting: Setting, rows: int, length: int) -> Tensor:
    """Token ids int64 [rows, length] of the shipped prompts: real text, though not of this vocabulary."""
    from traces.profile import running_text

    return running_text(setting.small_pair("float32"), rows, length)
