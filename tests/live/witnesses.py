"""EAGLE-1, Medusa and DFlash heads from their files and formulas alone, without anything of ours."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from live.pair import Pair
from tests.live.test_networks import CONTEXTS, WIDTH, close, grow, rows, shared


def random_material(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """A random text int64 [1, 14], all captured features of it, and tokens for the trees of test_networks [4, 7]."""
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(4, 150, (1, 14), generator=draw)
    return text, pair.target().prefill(text, logits="none").captured, torch.randint(4, 150, (4, 7), generator=draw)


@torch.no_grad()
def last_states(pair: Pair, text: Tensor) -> Tensor:
    """The target's last hidden states [T, H] as Hugging Face gives them."""
    return pair.model(input_ids=text, output_hidden_states=True).hidden_states[-1][0]


class Witness:
    """The EAGLE-1 head from Hugging Face's own Llama layer without its first norm; every cell in every pass, no cache."""

    def __init__(self, folder: str, pair: Pair):
        tensors = {name: tensor.double() for name, tensor in load_file(f"{folder}/model.safetensors").items()}
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6,
            max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        biased = config.attention_bias = "layers.0.self_attn.q_proj.bias" in tensors
        self.layer = LlamaDecoderLayer(config, 0).double().eval()
        self.layer.input_layernorm = nn.Identity()
        if biased:  # Qwen2's layer, and heads for it, have none behind the attention
            self.layer.self_attn.o_proj.bias = None
        own = {name.removeprefix("layers.0."): tensor for name, tensor in tensors.items() if name.startswith("layers.0.")}
        assert set(own) == set(self.layer.state_dict())
        self.layer.load_state_dict(own)
        self.rotary = LlamaRotaryEmbedding(config)
        self.weight, self.bias = tensors["fc.weight"], tensors["fc.bias"]
        self.embeddings = tensors.get("embed_tokens.weight", pair.model.get_input_embeddings().weight)
        self.output = tensors.get("lm_head.weight", pair.model.lm_head.weight)

    def cells(self, features: Tensor, tokens: Tensor) -> Tensor:
        stream = torch.cat([self.embeddings[tokens], features], -1) @ self.weight.T + self.bias
        turn = self.rotary(stream[None], torch.arange(len(tokens))[None])
        found = self.layer(stream[None], position_embeddings=tuple(part.double() for part in turn))
        return (found[0] if isinstance(found, tuple) else found).reshape(len(tokens), -1)

    @torch.no_grad()
    def logprob(self, features: Tensor, text: Tensor, path: list[int]) -> Tensor:
        """log q [V] behind a path; ``text`` int64 [c + 1] ends with the root, ``features`` [c, H] stand before its tokens."""
        tokens = text[1:]
        for token in path:
            features = torch.cat([features, self.cells(features, tokens)[-1:]])
            tokens = torch.cat([tokens, torch.tensor([token])])
        return torch.log_softmax(self.cells(features, tokens)[-1] @ self.output.T, -1)


def medusa_logprob(folder: str, pair: Pair, features: Tensor, path: list[int]) -> Tensor:
    """log q [V] behind any path of that length, by the formula, from vLLM's names."""
    tensors = {name: tensor.double() for name, tensor in load_file(f"{folder}/model.safetensors").items()}
    hidden, block = features[-1], 0
    while (stem := f"blocks.{len(path)}.layers.{block}") + ".weight" in tensors:
        inner = tensors[f"{stem}.weight"] @ hidden + tensors[f"{stem}.bias"]
        hidden, block = hidden + inner * torch.sigmoid(inner), block + 1
    matrix = tensors.get(f"lm_heads.{len(path)}.weight", pair.model.lm_head.weight)
    return torch.log_softmax(hidden @ matrix.detach().T, -1)


class DFlashWitness:
    """A DFlash drafter from Hugging Face's own Qwen3 layers; text and block in every pass, no cache."""

    def __init__(self, folder: str, pair: Pair):
        tensors = {name: tensor.double() for name, tensor in load_file(f"{folder}/model.safetensors").items()}
        told = json.loads(Path(folder, "config.json").read_text())
        own = told["dflash_config"]
        self.size, self.mask, self.from_anchor = own["block_size"], own["mask_token_id"], told.get("sample_from_anchor", False)
        self.scale, self.times = (own.get(name) or 1.0 for name in ("input_embedding_scale", "output_multiplier"))
        self.cap = own.get("final_logit_softcapping")
        eps = told["rms_norm_eps"]
        config = Qwen3Config(
            hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=eps,
            max_position_embeddings=2048, rope_parameters=told["rope_parameters"],
            attention_bias="layers.0.self_attn.q_proj.bias" in tensors,
        )  # fmt: skip
        kinds = told.get("layer_types") or ["full_attention"] * told["num_hidden_layers"]
        self.windows = [told["sliding_window"] if kind == "sliding_attention" else None for kind in kinds]
        causal = own.get("causal", told.get("is_causal"))
        self.causal = [window is not None if causal is None else causal for window in self.windows]
        self.layers = []
        for number in range(len(kinds)):
            layer, stem = Qwen3DecoderLayer(config, 0).double().eval(), f"layers.{number}."
            layer.load_state_dict({name.removeprefix(stem): t for name, t in tensors.items() if name.startswith(stem)})
            self.layers.append(layer)
        self.rotary, self.fc = Qwen3RotaryEmbedding(config), tensors["fc.weight"]
        self.norms = {}
        for name in ("hidden_norm", "norm"):
            self.norms[name] = Qwen3RMSNorm(32, eps).double()
            self.norms[name].load_state_dict({"weight": tensors[f"{name}.weight"]})
        self.embeddings = tensors.get("embed_tokens.weight", pair.model.get_input_embeddings().weight)
        self.masked = tensors.get("mask_embedding", self.embeddings[self.mask])
        self.output = tensors.get("lm_head.weight", pair.model.lm_head.weight)

    @torch.no_grad()
    def logprob(self, features: Tensor, text: Tensor, path: list[int]) -> Tensor:
        """log q [V'] behind any path of that length; ``text`` int64 [c + 1], ``features`` [c, F] of all but its last."""
        known, size = len(features), self.size
        heard = self.norms["hidden_norm"](features @ self.fc.T)
        hidden = torch.cat([self.embeddings[text[-1:]], self.masked.expand(size - 1, -1)]) * self.scale
        place = torch.arange(known + size)
        turn = tuple(part.double() for part in self.rotary(hidden[None], place[None]))
        own = tuple(part[:, known:] for part in turn)
        for layer, window, causal in zip(self.layers, self.windows, self.causal, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            both = torch.cat([heard, normed])
            query = attention.q_norm(attention.q_proj(normed).view(1, size, 4, 8)).transpose(1, 2)
            key = attention.k_norm(attention.k_proj(both).view(1, -1, 2, 8)).transpose(1, 2)
            value = attention.v_proj(both).view(1, -1, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
            query, _ = apply_rotary_pos_emb(query, query, *own)
            key = apply_rotary_pos_emb(key, key, *turn)[0].repeat_interleave(2, 1)
            back = place[known:, None] - place
            hide = (back < 0 if causal else torch.zeros_like(back, dtype=torch.bool)) | (back.abs() >= (window or 1 << 20))
            weight = (query @ key.mT / 8**0.5).masked_fill(hide, -torch.inf).softmax(-1)
            hidden = hidden + attention.o_proj((weight @ value).transpose(1, 2).reshape(size, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        scores = self.times * (self.norms["norm"](hidden)[len(path) + (not self.from_anchor)] @ self.output.T)
        return torch.log_softmax(self.cap * torch.tanh(scores / self.cap) if self.cap else scores, -1)


def follows_its_formula(pair: Pair, name: str, folder: str, text: Tensor, features: Tensor, tokens: Tensor) -> None:
    """Assert that the trees of a network, over one text and over rows of their own, are the formula's; ``folder``: its files."""
    network = pair.networks[name]
    states = features[0, :, network.features] if network.kind == "dflash" else last_states(pair, text)
    with torch.inference_mode():
        together = grow(network, shared(network, text, features), CONTEXTS, tokens)
        alone = grow(network, rows(network, text, features, CONTEXTS), CONTEXTS, tokens)
    assert close(together, alone)
    makers = {"eagle": Witness, "dflash": DFlashWitness}
    witness = makers[network.kind](folder, pair) if network.kind in makers else None
    ids = None if network.kind == "medusa" else getattr(network.head, "d2t", None)
    for tree, context in enumerate(CONTEXTS.tolist()):
        for node, path in enumerate(together.paths[tree]):
            if witness is not None:
                dense = witness.logprob(states[:context], text[0, : context + 1], path)
            else:
                dense = medusa_logprob(folder, pair, states[:context], path)
            best = dense.float().sort(descending=True, stable=True)
            found = best.indices[:WIDTH]
            found = found if ids is None else found + ids[found]
            assert together.index[tree, node].tolist() == found.tolist()
            assert torch.allclose(together.logprob[tree, node], best.values[:WIDTH], atol=2e-5)
            assert torch.allclose(together.entropy[tree, node], -(dense.exp() * dense).sum().float(), atol=2e-5)
