"""EAGLE-3 checkpoints on disk in the layouts people have, and the head's formula written down from the tensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY, DRAFTED, HIDDEN, INNER, HEADS, GROUPS, SIZE = 50, 30, 32, 48, 4, 2, 8
LAYERS = 12  # of the target: official boundaries 2, 6, 9
SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip


def official_tensors(seed: int = 0, streams: int = 3) -> dict[str, Tensor]:
    """Random float32 tensors under the official names; d2t is not sorted, as in ModelOpt's exports."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * 0.3

    def norm(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=draw)

    ids = torch.randperm(VOCABULARY, generator=draw)[:DRAFTED]
    return {
        "fc.weight": some(HIDDEN, streams * HIDDEN),
        "midlayer.input_layernorm.weight": norm(HIDDEN),
        "midlayer.hidden_norm.weight": norm(HIDDEN),
        "midlayer.post_attention_layernorm.weight": norm(HIDDEN),
        "midlayer.self_attn.q_proj.weight": some(HEADS * SIZE, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": some(GROUPS * SIZE, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": some(GROUPS * SIZE, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": some(HIDDEN, HEADS * SIZE),
        "midlayer.mlp.gate_proj.weight": some(INNER, HIDDEN),
        "midlayer.mlp.up_proj.weight": some(INNER, HIDDEN),
        "midlayer.mlp.down_proj.weight": some(HIDDEN, INNER),
        "norm.weight": norm(HIDDEN),
        "lm_head.weight": some(DRAFTED, HIDDEN),
        "d2t": ids - torch.arange(DRAFTED),
        "t2d": torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True),
    }


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], pickled: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def renamed(tensors: dict[str, Tensor], **names: str) -> dict[str, Tensor]:
    """With every dotted part that ``names`` lists replaced."""
    return {".".join(names.get(part, part) for part in name.split(".")): tensor for name, tensor in tensors.items()}


def write_official(folder: Path, tensors: dict[str, Tensor]) -> Path:
    config = SIZES | {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": DRAFTED, "num_hidden_layers": 40}
    return write(folder, config, tensors, pickled=True)


def write_specforge(folder: Path, tensors: dict[str, Tensor]) -> Path:
    ids = {"eagle_aux_hidden_state_layer_ids": [1, LAYERS // 2 - 1, LAYERS - 4], "use_aux_hidden_state": True}
    more = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFTED, "head_dim": SIZE, "norm_output": True}
    rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return write(folder, SIZES | more | rotary | {"eagle_config": ids}, tensors)


def write_speculators(folder: Path, tensors: dict[str, Tensor], embeddings: Tensor) -> Path:
    layer = SIZES | {"model_type": "llama", "head_dim": SIZE, "rope_theta": 10000.0, "num_hidden_layers": 1}
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": DRAFTED,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [2, LAYERS // 2, LAYERS - 3],
        "transformer_layer_config": layer,
    }
    tensors = renamed(tensors, midlayer="layers.0") | {"embed_tokens.weight": embeddings.clone()}
    return write(folder, config, tensors | {"verifier_norm.weight": torch.ones(HIDDEN)})


def write_modelopt(folder: Path, tensors: dict[str, Tensor]) -> Path:
    flags = {
        "eagle_aux_hidden_state_layer_ids": [1, LAYERS // 2 - 1, LAYERS - 4], "use_aux_hidden_state": True,
        "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False,
        "next_layer_regular": True, "parallel_draft_step": 1,
    }  # fmt: skip
    config = SIZES | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFTED, "rope_theta": 10000.0}
    return write(folder, config | {"eagle_config": flags}, {name: t for name, t in tensors.items() if name != "t2d"})


def textbook(
    tensors: dict[str, Tensor],
    features: Tensor,
    tokens: Tensor,
    embeddings: Tensor,
    drafted: int = 0,
    frequencies: Tensor | None = None,
    norm_before_residual: bool = False,
    post_norm: bool = False,
) -> Tensor:
    """Logits [n, Vd] of cells 0 .. n-1 in float64, one cell after the other; the last ``drafted`` feed on their parent's output.

    ``features`` [n - drafted, F], ``tokens`` int64 [n] (each cell's token). Optional tensors count where they are there.
    """
    get = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
    base = 10000.0 ** -(torch.arange(SIZE // 2, dtype=torch.float64) / (SIZE // 2)) if frequencies is None else frequencies.double()

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * get[name] if name in get else x

    def linear(x: Tensor, name: str) -> Tensor:
        return get[f"{name}.weight"] @ x + get.get(f"{name}.bias", 0.0)

    def turned(x: Tensor, place: int) -> Tensor:
        as_complex = torch.complex(x[:, : SIZE // 2], x[:, SIZE // 2 :]) * torch.polar(torch.ones_like(base), place * base)
        return torch.cat([as_complex.real, as_complex.imag], -1)

    keys, values, logits, output = [], [], [], None
    for place, token in enumerate(tokens.tolist()):
        hidden = output
        if place < len(tokens) - drafted:
            streams = [norm(part, f"fc_norm.{i}.weight") for i, part in enumerate(features[place].double().split(HIDDEN))]
            hidden = linear(norm(torch.cat(streams), "input_norm.weight"), "fc")
        both = torch.cat([
            norm(embeddings[token].double(), "midlayer.input_layernorm.weight"), norm(hidden, "midlayer.hidden_norm.weight")
        ])  # fmt: skip
        query, key, value = (linear(both, f"midlayer.self_attn.{part}_proj").view(-1, SIZE) for part in "qkv")
        keys.append(turned(norm(key, "midlayer.self_attn.k_norm.weight"), place))
        values.append(value)
        query = turned(norm(query, "midlayer.self_attn.q_norm.weight"), place)
        mixed = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            weight = torch.stack([query[head] @ k[group] / SIZE**0.5 for k in keys]).softmax(0)
            mixed.append(sum(w * v[group] for w, v in zip(weight, values, strict=True)))
        residual = norm(hidden, "midlayer.hidden_norm.weight") if norm_before_residual else hidden
        middle = residual + linear(torch.cat(mixed), "midlayer.self_attn.o_proj")
        inner = norm(middle, "midlayer.post_attention_layernorm.weight")
        gate = linear(inner, "midlayer.mlp.gate_proj")
        output = middle + linear(gate * torch.sigmoid(gate) * linear(inner, "midlayer.mlp.up_proj"), "midlayer.mlp.down_proj")
        normed = norm(output, "norm.weight")
        logits.append(linear(normed, "lm_head"))
        output = normed if post_norm else output
    return torch.stack(logits)
