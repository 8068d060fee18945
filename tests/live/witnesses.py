"""EAGLE-1 and Medusa heads from their files and formulas alone, without anything of ours: what networks are compared with."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

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


def follows_its_formula(pair: Pair, name: str, folder: str, text: Tensor, features: Tensor, tokens: Tensor) -> None:
    """Assert that the trees of a network, over one text and over rows of their own, are the formula's; ``folder``: its files."""
    network, states = pair.networks[name], last_states(pair, text)
    with torch.inference_mode():
        together = grow(network, shared(network, text, features), CONTEXTS, tokens)
        alone = grow(network, rows(network, text, features, CONTEXTS), CONTEXTS, tokens)
    assert close(together, alone)
    witness = Witness(folder, pair) if network.kind == "eagle" else None
    for tree, context in enumerate(CONTEXTS.tolist()):
        for node, path in enumerate(together.paths[tree]):
            if witness is not None:
                dense = witness.logprob(states[:context], text[0, : context + 1], path)
            else:
                dense = medusa_logprob(folder, pair, states[:context], path)
            best = dense.float().sort(descending=True, stable=True)
            assert together.index[tree, node].tolist() == best.indices[:WIDTH].tolist()
            assert torch.allclose(together.logprob[tree, node], best.values[:WIDTH], atol=2e-5)
            assert torch.allclose(together.entropy[tree, node], -(dense.exp() * dense).sum().float(), atol=2e-5)
