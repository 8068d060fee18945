"""Analytic milliseconds of a transformer's forward pass, from shapes and datasheets.

The roofline (Williams et al. 2009): a pass takes as long as the slower of reading weights and cache and of multiplying; a
GPU that waits for its host takes as long as the launches. Tensor parallelism divides both and adds two all-reduces a layer.

    memory   = (weights + cache) / (bandwidth x 0.8)
    compute  = (2 x parameters x tokens + attention) / (FLOP/s x 0.7)
    pass     = max(memory, compute, launches) + all-reduces

The two efficiencies agree with the fit of Llama-3.1-8B on an H100 in arXiv 2601.11580: 5.9 ms for 15 GB of weights are 76%
of the bandwidth, 21 microseconds per token of 15 GFLOP are 72% of the peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from policies.errors import UserError

BYTES = 2
"""Of a bfloat16 number."""
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Shape:
    """What a pass reads and multiplies.

    layers      transformer layers
    parameters  of all matrices that a pass multiplies by: layers and output head, not the token embedding
    cache       numbers that attention reads per layer and token of context: keys and values
    attention   multiplications per layer, token and token of context: scores and weighted values
    stored      parameters in memory, embeddings too
    """

    layers: int
    parameters: int
    cache: int
    attention: int
    stored: int


def target_shape(config: dict[str, Any]) -> Shape:
    """Shape of a dense Llama-like target from its Hugging Face configuration (config.json).

    :raises UserError: when the configuration lacks a number or describes a mixture of experts.
    """
    lacking = [name for name in _NEEDED if not isinstance(config.get(name), int)]
    if lacking:
        raise UserError(f"the configuration lacks {', '.join(lacking)}: give a dense model's config.json")
    if any("experts" in name and config[name] for name in config):
        raise UserError("the configuration is a mixture of experts, whose passes read what the router picks: measure it instead")
    hidden, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    queries, keys = _widths(config)
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * config["intermediate_size"]
    head = hidden * vocabulary
    embedding = 0 if config.get("tie_word_embeddings") else head
    return Shape(layers, layers * layer + head, 2 * keys, 2 * queries, layers * layer + head + embedding)


def eagle3_shape(config: dict[str, Any], draft_vocabulary: int) -> Shape:
    """Shape of an EAGLE-3 head for the target (arXiv 2503.01840): one layer whose attention reads token and feature side
    by side, and an output head over its own vocabulary. The fusion of target features belongs to the catch-up."""
    hidden = config["hidden_size"]
    queries, keys = _widths(config)
    layer = 2 * hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * config["intermediate_size"]
    return Shape(1, layer + hidden * draft_vocabulary, 2 * keys, 2 * queries, layer + hidden * draft_vocabulary)


def eagle1_shape(config: dict[str, Any]) -> Shape:
    """Shape of an EAGLE-1 head for the target (arXiv 2401.15077): a matrix over token and feature, one layer, the target's output
    head."""
    hidden = config["hidden_size"]
    queries, keys = _widths(config)
    layer = 2 * hidden**2 + 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * config["intermediate_size"]
    return Shape(1, layer + hidden * config["vocab_size"], 2 * keys, 2 * queries, layer)


def medusa_shape(config: dict[str, Any]) -> Shape:
    """Shape of one Medusa head for the target (arXiv 2401.10774): one residual block and a matrix over the vocabulary. It attends
    to nothing."""
    head = config["hidden_size"] ** 2 + config["hidden_size"] * config["vocab_size"]
    return Shape(0, head, 0, 0, head)


def dflash_shape(config: dict[str, Any], layers: int = 5) -> Shape:
    """Shape of a DFlash drafter for the target (arXiv 2602.06036): layers of the target's widths that fill a block, and the
    target's output head."""
    hidden = config["hidden_size"]
    queries, keys = _widths(config)
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * config["intermediate_size"]
    return Shape(layers, layers * layer + hidden * config["vocab_size"], 2 * keys, 2 * queries, layers * layer)


def dflash_context_shape(config: dict[str, Any], layers: int = 5, streams: int = 5) -> Shape:
    """What a DFlash drafter remembers of a committed token: ``fc`` over the target's streams, and each layer's key and value. It is
    the only work that grows with the tokens; nothing attends."""
    hidden = config["hidden_size"]
    remembering = streams * hidden**2 + layers * 2 * hidden * _widths(config)[1]
    return Shape(0, remembering, 0, 0, streams * hidden**2)


def _widths(config: dict[str, Any]) -> tuple[int, int]:
    """Widths of queries and of keys."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    return heads * size, (config.get("num_key_value_heads") or heads) * size


@dataclass(frozen=True)
class Machine:
    """Devices that share a model.

    bandwidth_gb_s, bf16_tflop_s  per device, as datasheets give them (dense)
    devices        that divide every matrix among them
    all_reduce_us  latency of one all-reduce between them
    launch_us      host time per layer: about 12 kernels of 1 us each when CUDA graphs replay them
    """

    bandwidth_gb_s: float
    bf16_tflop_s: float
    devices: int = 1
    all_reduce_us: float = 0.0
    launch_us: float = 12.0
    bandwidth_share: float = 0.8
    compute_share: float = 0.7

    def pass_ms(self, shape: Shape, tokens: int, context: int, batch: int = 1) -> float:
        """One forward pass over ``tokens`` per request behind ``context`` tokens each, ``batch`` requests."""
        numbers = shape.parameters + shape.layers * shape.cache * (context + tokens) * batch
        memory = numbers * BYTES / (self.bandwidth_gb_s * 1e9 * self.bandwidth_share * self.devices)
        work = 2 * shape.parameters * tokens * batch
        work += 2 * shape.layers * shape.attention * tokens * (context + tokens) * batch
        compute = work / (self.bf16_tflop_s * 1e12 * self.compute_share * self.devices)
        launches = shape.layers * self.launch_us * 1e-6
        reduces = 2 * shape.layers * self.all_reduce_us * 1e-6 if self.devices > 1 else 0.0
        return 1e3 * (max(memory, compute, launches) + reduces)
