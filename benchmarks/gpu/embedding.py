"""A small pair inside a large shape: the small pair's text at the large one's price.

What a forward costs depends on shapes, what a draft's tokens are worth depends on text. So the trained weights of a small
Llama (width h, heads of d) are planted into a large one (width H, heads of D) such that its function stays the same and
every matrix is multiplied in full. With X_h the first h numbers of the residual stream and all others zero:

    norms       mean over H of X^2 = h/H x mean over h, so eps x h/H and weights x sqrt(h/H)
    attention   scores are divided by sqrt(D) instead of sqrt(d), so queries x sqrt(D/d)
    rotary      pair i of d/2 turns by theta^(-2i/d), as pair D/d x i of D/2 does: dimensions (s i, D/2 + s i) with s = D/d
    heads       small key/value head g becomes large head g, and its query heads the first of those that share g
    residual    o_proj and down_proj write into 0 .. h-1 only, and read the planted heads and neurons only
    layers      extra ones in between compute everything and add nothing: their o_proj and down_proj are zero
    vocabulary  tokens beyond the small one's get -inf from a bias, so softmax and top-k run over all of them

Everything else is random. In bfloat16 the scalings are exact where sqrt(h/H) and sqrt(D/d) are powers of two (256 in 4096,
32 in 128): the weights are then the small ones with other exponents, each layer rounds as the small one does, and only the
order of sums differs. With other ratios weights are rounded once more: fine for a cost, but tau may move.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.gpu.shapes import Shape, random_head, random_target
from live.eagle3 import Eagle3Head, captured_layers
from live.eagle3_config import Eagle3Config
from live.eagle_network import EagleNetwork
from live.pair import Pair, device_name
from policies.errors import UserError


def embedded_pair(small: Pair, shape: Shape, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Pair:
    """A target of the shape that speaks as the small pair's does, with its EAGLE-3 head in the same shape.

    :param small: a Llama with one EAGLE-3 head (other drafters are left behind).
    :raises UserError: when the small pair has no such head, or does not fit.
    """
    heads = [network for network in small.networks.values() if isinstance(network, EagleNetwork)]
    if not heads:
        raise UserError("the small pair has no EAGLE-3 head: load it with one")
    network = heads[0]
    model = embed_target(small.model, shape, dtype, device, small.captured, seed)
    head = embed_head(network.head, shape, model.get_input_embeddings().weight, dtype, device, seed)
    about = small.description
    mine = next(drafter for drafter in about["drafters"] if drafter["name"] == network.name)
    layers = captured_layers(shape.layers)
    told = f"in the shape of {shape.name}"
    description = about | {
        "target": about["target"]
        | {
            "id": f"{about['target']['id']} {told}",
            "weights_sha256": _digest(about["target"]["weights_sha256"], shape, seed),
            "vocabulary": shape.vocabulary,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "drafters": [
            mine
            | {
                "id": f"{mine['id']} {told}",
                "weights_sha256": _digest(mine["weights_sha256"], shape, seed),
                "captured_layers": list(layers),
            }
        ],
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "context_limit": min(about["context_limit"], shape.context),
    }
    return Pair(model, small.tokenizer, {network.name: EagleNetwork(head, network.name)}, layers, description)


def exact_in_half(small: LlamaForCausalLM, shape: Shape) -> bool:
    """Whether planting scales by powers of two alone, so that bfloat16 weights keep every bit."""
    width, size = small.config.hidden_size, small.config.head_dim
    return all(math.log2(ratio) % 2 == 0 for ratio in (shape.hidden / width, shape.head_dim / size))


@torch.no_grad()
def embed_target(
    small: LlamaForCausalLM,
    shape: Shape,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    captured: tuple[int, ...] = (),
    seed: int = 0,
) -> LlamaForCausalLM:
    """The small target in a large shape.

    :param captured: boundaries that the small target's head reads; those the head reads in the large one
        (:func:`live.eagle3.captured_layers`) then carry the same streams.
    :raises UserError: when the small target is no plain Llama, or does not fit into the shape.
    """
    config = small.config
    if (
        config.model_type != "llama"
        or config.rope_parameters.get("rope_type") != "default"
        or config.attention_bias
        or config.mlp_bias
    ):
        raise UserError("only a Llama with default rotary embeddings and without biases can be planted into a larger shape")
    _check_fits(config.num_attention_heads, config.num_key_value_heads, config.head_dim, shape)
    needed = {"hidden": config.hidden_size, "intermediate": config.intermediate_size, "vocabulary": config.vocab_size}
    for name, least in needed.items():
        if getattr(shape, name) < least:
            raise UserError(f"a small target of {name} {least} does not fit into {shape.name}'s {getattr(shape, name)}")
    eps = config.rms_norm_eps * config.hidden_size / shape.hidden
    theta = config.rope_parameters["rope_theta"]
    large = random_target(replace(shape, rms_eps=eps, rope_theta=theta), dtype, device, seed)
    width, words = config.hidden_size, config.vocab_size
    embeddings = large.get_input_embeddings().weight
    embeddings[:words] = 0
    embeddings[:words, :width] = small.get_input_embeddings().weight.to(embeddings)
    columns = torch.arange(width)
    planted = layer_places(config.num_hidden_layers, captured, shape.layers)
    for place, layer in enumerate(large.model.layers):
        if place not in planted:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            continue
        own = small.model.layers[planted.index(place)]
        _plant_layer(layer, own, columns, config.num_key_value_heads, config.head_dim, shape)
        _plant_norm(layer.input_layernorm, own.input_layernorm)
    _plant_norm(large.model.norm, small.model.norm)
    large.set_output_embeddings(masked_output(large.get_output_embeddings(), small.get_output_embeddings().weight))
    large.generation_config = copy.deepcopy(small.generation_config)
    large.config.eos_token_id = config.eos_token_id
    return large


@torch.no_grad()
def embed_head(
    small: Eagle3Head,
    shape: Shape,
    embeddings: Tensor,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Eagle3Head:
    """The small EAGLE-3 head in a large shape, over the large target's embeddings [V, H].

    :raises UserError: for a variant of the official layout, or when it does not fit into the shape.
    """
    config = small.config
    plain = Eagle3Config(**{name: value for name, value in asdict(config).items() if name in _SIZES})
    if replace(config, eagle_aux_hidden_state_layer_ids=None, ids_name_outputs=False) != plain or small.d2t is None:
        raise UserError("only an EAGLE-3 head of the official layout, with a vocabulary of its own, can be planted")
    if shape.drafted >= shape.vocabulary:
        raise UserError(f"{shape.name}'s head drafts its whole vocabulary: choose a shape whose head has a smaller one")
    if config.draft_vocab_size > shape.drafted or config.intermediate_size > shape.intermediate:
        raise UserError(f"the small head does not fit into {shape.name}'s: it has a larger vocabulary or intermediate size")
    _check_fits(config.num_attention_heads, config.num_key_value_heads, config.head_dim, shape)
    width, wide = config.hidden_size, shape.hidden
    eps = config.rms_norm_eps * width / wide
    large = random_head(replace(shape, rms_eps=eps, rope_theta=config.rope_theta), embeddings, dtype, device, seed)
    large.fc.weight[width:] = 0
    for block in range(config.streams):
        part = small.fc.weight[:, block * width : (block + 1) * width]
        large.fc.weight[:width, block * wide : block * wide + width] = part.to(large.fc.weight)
    columns = torch.cat([torch.arange(width), wide + torch.arange(width)])  # the embedding's half, then the feature's
    _plant_layer(large.midlayer, small.midlayer, columns, config.num_key_value_heads, config.head_dim, shape)
    _plant_norm(large.midlayer.input_layernorm, small.midlayer.input_layernorm)
    _plant_norm(large.midlayer.hidden_norm, small.midlayer.hidden_norm)
    _plant_norm(large.norm, small.norm)
    large.lm_head = masked_output(large.lm_head, small.lm_head.weight)
    words, spare = config.draft_vocab_size, shape.drafted - config.draft_vocab_size
    beyond = (config.vocab_size + torch.arange(spare)).clamp(max=shape.vocabulary - 1)
    ids = torch.cat([small.d2t.cpu() + torch.arange(words), beyond])  # what cannot be drafted cannot be said either
    large.d2t.copy_(ids - torch.arange(shape.drafted))
    large.t2d.zero_()
    large.t2d[ids.to(large.t2d.device)] = True
    return large


_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "draft_vocab_size", "target_hidden_size", "rms_norm_eps", "rope_theta", "max_position_embeddings",
)  # fmt: skip


def rotary_places(small: int, large: int) -> Tensor:
    """Where the ``small`` dimensions of a head stand among ``large`` ones, int64 [small], so that each turns as before."""
    pair = torch.arange(small // 2) * (large // small)
    return torch.cat([pair, large // 2 + pair])


def layer_places(layers: int, captured: tuple[int, ...], wide: int) -> list[int]:
    """Which of ``wide`` layers the small ones become: spread evenly, and between the same captured boundaries as before.

    :raises UserError: when a stretch between two boundaries is too short.
    """
    inner = captured_layers(wide) if captured else ()
    own = [0, *captured, layers]
    theirs = [0, *inner, wide]
    places: list[int] = []
    for (begin, end), (first, last) in zip(zip(own, own[1:], strict=False), zip(theirs, theirs[1:], strict=False), strict=True):
        count, there = end - begin, last - first
        if count > there:
            raise UserError(f"{count} small layers do not fit between the boundaries {first} and {last} of the large target")
        places += [first + (index * there) // count for index in range(count)]
    return places


def masked_output(large: nn.Linear, small: Tensor) -> nn.Linear:
    """The output layer [V, H] that scores the small vocabulary [v, h] as before and gives -inf to all other tokens."""
    weight = large.weight
    words, width = small.shape
    weight[:words, :width] = small.to(weight)
    masked = nn.Linear(1, 1, bias=True, device="meta")
    masked.in_features, masked.out_features = weight.shape[1], weight.shape[0]
    bias = torch.zeros_like(weight[:, 0])
    bias[words:] = -torch.inf
    masked.weight, masked.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return masked


def _plant_layer(large: nn.Module, small: nn.Module, columns: Tensor, groups: int, size: int, shape: Shape) -> None:
    """Attention, its MLP and the norm between them. ``columns`` int64 [n]: where the small layer's inputs stand."""
    ours, own = large.self_attn, small.self_attn
    shared, wide_shared = own.q_proj.weight.shape[0] // size // groups, shape.heads // shape.groups
    heads = torch.arange(groups)[:, None] * wide_shared + torch.arange(shared)  # [groups, shared], large query heads
    turned, flat = rotary_places(size, shape.head_dim), torch.arange(size)
    query = _rows(heads.flatten(), turned, shape.head_dim)
    whole = _rows(heads.flatten(), torch.arange(shape.head_dim), shape.head_dim)
    ours.q_proj.weight[whole] = 0  # the dimensions that are not planted must not be scored
    _write(ours.q_proj.weight, own.q_proj.weight * (shape.head_dim / size) ** 0.5, query, columns)
    _write(ours.k_proj.weight, own.k_proj.weight, _rows(torch.arange(groups), turned, shape.head_dim), columns)
    _write(ours.v_proj.weight, own.v_proj.weight, _rows(torch.arange(groups), flat, shape.head_dim), columns)
    stream = torch.arange(own.o_proj.weight.shape[0])
    ours.o_proj.weight.zero_()
    _write(ours.o_proj.weight, own.o_proj.weight, stream, _rows(heads.flatten(), flat, shape.head_dim))
    neurons = torch.arange(small.mlp.gate_proj.weight.shape[0])
    _write(large.mlp.gate_proj.weight, small.mlp.gate_proj.weight, neurons, stream)
    _write(large.mlp.up_proj.weight, small.mlp.up_proj.weight, neurons, stream)
    large.mlp.down_proj.weight.zero_()
    _write(large.mlp.down_proj.weight, small.mlp.down_proj.weight, stream, neurons)
    _plant_norm(large.post_attention_layernorm, small.post_attention_layernorm)


def _plant_norm(large: nn.Module, small: nn.Module) -> None:
    width = len(small.weight)
    large.weight[:width] = (small.weight * (width / len(large.weight)) ** 0.5).to(large.weight)


def _rows(heads: Tensor, dimensions: Tensor, size: int) -> Tensor:
    """Rows of a projection that hold these dimensions of these heads, head after head."""
    return (heads[:, None] * size + dimensions).flatten()


def _write(large: Tensor, small: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Put a small matrix into the given rows and columns of a large one."""
    large[rows.to(large.device)[:, None], columns.to(large.device)] = small.to(large)


def _check_fits(heads: int, groups: int, size: int, shape: Shape) -> None:
    if groups > shape.groups or heads // groups > shape.heads // shape.groups or shape.head_dim % size:
        raise UserError(
            f"{heads} heads of {size} in {groups} groups do not fit into {shape.name}'s {shape.heads} of {shape.head_dim} "
            f"in {shape.groups}: the head size must divide the large one's, and each group have room"
        )


def _digest(weights: str, shape: Shape, seed: int) -> str:
    """What the planted weights follow from."""
    told = json.dumps([weights, asdict(shape), seed], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()
