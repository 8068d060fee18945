"""Files of EAGLE-1 and Medusa heads: the layouts people have, and what does not fit, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from live.heads import kind_of, load_head
from live.hub import parse_source
from live.medusa_network import MedusaNetwork
from live.model import CachedModel
from live.pair import load_pair
from policies.errors import UserError
from tests.tiny_heads import HEADS, NAMES
from tests.tiny_pair import TinyPair


def written(folder: Path, config: dict, tensors: dict[str, Tensor], file: str = "model.safetensors") -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith("safetensors"):
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / file)
    else:
        torch.save(tensors, folder / file)
    return str(folder)


def first_answers(tiny_pair: TinyPair, folder: str, target: str | None = None) -> Tensor:
    """Log-probabilities of a few children behind a text."""
    pair = load_pair(target or tiny_pair.target, [folder], "float32")
    (network,) = pair.networks.values()
    network.reset(1)
    text = torch.arange(20, 29)[None]
    features = pair.target().prefill(text, logits="none").captured
    with torch.inference_mode():
        source = network.advance(text[:, 1:], features[:, :-1], torch.tensor([8]))
        first = network.open(source, torch.tensor([8]), 6)
        second = network.grow(torch.zeros(1, 6, dtype=torch.int64), first.index, 6)
    return torch.cat([first.index, first.logprob, second.index[0], second.logprob[0]])


def test_kinds(tiny_pair, tiny_heads, tmp_path):
    kinds = {tiny_pair.target: "lm", tiny_pair.draft: "lm", tiny_pair.eagle3: "eagle3"} | dict(
        zip(tiny_heads.values(), ("eagle", "medusa", "dflash"), strict=True)
    )
    assert {folder: kind_of(folder) for folder in kinds} == kinds
    from transformers import LlamaForCausalLM

    one_layer = tmp_path / "one"
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(one_layer)
    assert kind_of(str(one_layer)) == "lm"


def test_layouts_of_medusa(tiny_pair, tiny_heads, tmp_path):
    """The authors' file with its prefix and without, whose configuration miscounts; vLLM's; a shortened vocabulary."""
    own = load_file(f"{tiny_heads['medusa']}/model.safetensors")
    matrix = load_file(f"{tiny_pair.target}/model.safetensors")["lm_head.weight"]
    ours = first_answers(tiny_pair, tiny_heads["medusa"])
    for prefix in ("", "medusa_head."):
        official = {f"{prefix}{head}.1.weight": matrix for head in range(HEADS)}
        for head in range(HEADS):
            for kind in ("weight", "bias"):
                official[f"{prefix}{head}.0.linear.{kind}"] = own[f"blocks.{head}.layers.0.{kind}"]
        told = {"medusa_num_heads": 2, "medusa_num_layers": 1}
        folder = written(tmp_path / f"official{len(prefix)}", told, official, "medusa_lm_head.pt")
        assert kind_of(folder) == "medusa" and torch.equal(first_answers(tiny_pair, folder), ours)
    inside = {name: tensor for name, tensor in official.items()} | load_file(f"{tiny_pair.target}/model.safetensors")
    assert torch.equal(first_answers(tiny_pair, written(tmp_path / "inside", told, inside)), ours)
    vllm = own | {f"lm_heads.{head}.weight": matrix for head in range(HEADS)}
    assert torch.equal(first_answers(tiny_pair, written(tmp_path / "vllm", {"model_type": "medusa"}, vllm)), ours)
    shared_one = own | {"lm_head.weight": matrix}
    told = {"model_type": "medusa", "original_lm_head": True}
    assert torch.equal(first_answers(tiny_pair, written(tmp_path / "one", told, shared_one)), ours)
    kept = torch.arange(len(matrix) - 1, 9, -1)
    short = {name: tensor[kept] if name.startswith("lm_heads") else tensor for name, tensor in vllm.items()}
    whole = first_answers(tiny_pair, written(tmp_path / "short", told, vllm | {"token_map": kept}))
    assert torch.equal(first_answers(tiny_pair, written(tmp_path / "shorter", told, short | {"token_map": kept})), whole)
    assert int(whole[0].min()) >= 10 and whole[1].exp().sum() <= 1.0001


def test_layouts_of_eagle1(tiny_pair, tiny_heads, tmp_path):
    """With the target's embeddings beside, fused and pickled; an output layer of its own counts."""
    own = load_file(f"{tiny_heads['eagle1']}/model.safetensors")
    told = json.loads(Path(tiny_heads["eagle1"], "config.json").read_text())
    target = load_file(f"{tiny_pair.target}/model.safetensors")
    ours = first_answers(tiny_pair, tiny_heads["eagle1"])
    stem = "layers.0.self_attn."
    fused = {name: tensor for name, tensor in own.items() if not name.startswith((f"{stem}q", f"{stem}k", f"{stem}v"))}
    fused[f"{stem}qkv_proj.weight"] = torch.cat([own[f"{stem}{part}_proj.weight"] for part in "qkv"])
    fused["embed_tokens.weight"] = target["model.embed_tokens.weight"]
    folder = written(tmp_path / "fused", told, fused, "pytorch_model.bin")
    assert kind_of(folder) == "eagle" and torch.equal(first_answers(tiny_pair, folder), ours)
    sglang = told | {"architectures": ["LlamaForCausalLMEagle"]}
    prefixed = {f"model.{name}": tensor for name, tensor in own.items()}
    assert torch.equal(first_answers(tiny_pair, written(tmp_path / "sglang", sglang, prefixed)), ours)
    other = written(tmp_path / "output", told, own | {"lm_head.weight": 2 * target["lm_head.weight"]})
    assert not torch.equal(first_answers(tiny_pair, other), ours)
    biased = own | {f"{stem}{part}_proj.bias": torch.zeros(len(own[f"{stem}{part}_proj.weight"])) for part in "qkv"}
    assert torch.equal(first_answers(tiny_pair, written(tmp_path / "biased", told, biased)), ours)


def test_files_that_do_not_fit_are_one_sentence(tiny_pair, tiny_heads, tmp_path):
    eagle = load_file(f"{tiny_heads['eagle1']}/model.safetensors")
    told = json.loads(Path(tiny_heads["eagle1"], "config.json").read_text())
    medusa = load_file(f"{tiny_heads['medusa']}/model.safetensors")
    kind = {"model_type": "medusa"}
    less = {name: tensor for name, tensor in eagle.items() if "down_proj" not in name}
    cases = {
        "missing layers.0.mlp.down_proj.weight": (told, less),
        "embeds 99 tokens": (told | {"vocab_size": 99}, eagle),
        "2 layers": (told | {"num_hidden_layers": 2, "architectures": ["LlamaForCausalLMEagle"]}, eagle),
        "speculators' layout": ({"speculators_model_type": "eagle", "transformer_layer_config": told}, eagle),
        "activation is 'gelu'": (told | {"hidden_act": "gelu"}, eagle),
        "hold no residual blocks": (kind, {"token_map": torch.arange(3)}),
        "missing blocks.1.layers.0.bias": (kind, {name: t for name, t in medusa.items() if name != "blocks.1.layers.0.bias"}),
        "hidden states of 16 numbers": (kind, {name: t[:16, :16] if t.dim() == 2 else t[:16] for name, t in medusa.items()}),
        "no token_map says which": (kind, medusa | {f"lm_heads.{head}.weight": torch.zeros(20, 32) for head in range(HEADS)}),
        "4 heads and 3 matrices": (kind, medusa | {f"lm_heads.{head}.weight": torch.zeros(160, 32) for head in range(3)}),
        "points outside": (kind, medusa | {"lm_heads.0.weight": torch.zeros(3, 32), "token_map": torch.tensor([1, 2, 999])}),
        "scales its logits": (kind | {"logit_scale": 2.0}, medusa),
    }
    for number, (said, (config, tensors)) in enumerate(cases.items()):
        folder = written(tmp_path / str(number), config, tensors)
        with pytest.raises(UserError, match=said):
            load_pair(tiny_pair.target, [folder])
    for name in NAMES:
        with pytest.raises(UserError, match="has no layers: leave it out"):
            load_pair(tiny_pair.target, [f"{tiny_heads[name]}(layers=[1])"])


def test_a_target_that_changes_its_logits_is_refused(tiny_heads, tmp_path):
    """Its output layer does not give what it says; heads with matrices of their own do not care."""
    from tests.live.tiny import build

    target = CachedModel(build("gemma2", torch.float32, vocab_size=160))
    for name, kind in zip(NAMES[:2], ("eagle", "medusa"), strict=True):
        with pytest.raises(UserError, match="output layer"):
            load_head(kind, tiny_heads[name], parse_source(tiny_heads[name]), target)
    own = load_file(f"{tiny_heads['medusa']}/model.safetensors")
    own |= {f"lm_heads.{head}.weight": torch.zeros(160, 32) for head in range(HEADS)}
    folder = written(tmp_path / "own", {"model_type": "medusa"}, own)
    assert isinstance(load_head("medusa", folder, parse_source(folder), target).network, MedusaNetwork)
