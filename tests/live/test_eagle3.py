"""The EAGLE-3 head: layout, strict loading, float64, and training-time test against cell-by-cell drafting."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from live.eagle3 import Eagle3Config, Eagle3Head, captured_layers
from live.reference.eagle3_training import unroll
from policies.errors import UserError

CONFIG = Eagle3Config(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=50,
    draft_vocab_size=30,
    target_hidden_size=32,
)


@pytest.fixture
def head() -> Eagle3Head:
    torch.manual_seed(0)
    head = Eagle3Head(CONFIG, torch.randn(50, 32))
    for weight in (p for p in head.parameters() if p.ndim == 2):
        torch.nn.init.normal_(weight, std=0.3)
    ids = torch.arange(0, 60, 2)[:30].clamp(max=49)
    head.d2t.copy_(ids - torch.arange(30))
    head.t2d[ids] = True
    return head


def test_captured_layers_are_the_official_ones():
    assert captured_layers(32) == (2, 16, 29)
    assert captured_layers(12) == (2, 6, 9)


def test_saved_tensors_are_the_official_ones(head, tmp_path):
    head.save_pretrained(tmp_path)
    found = {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert found == {
        "fc.weight": [32, 96],
        "midlayer.input_layernorm.weight": [32],
        "midlayer.hidden_norm.weight": [32],
        "midlayer.post_attention_layernorm.weight": [32],
        "midlayer.self_attn.q_proj.weight": [32, 64],
        "midlayer.self_attn.k_proj.weight": [16, 64],
        "midlayer.self_attn.v_proj.weight": [16, 64],
        "midlayer.self_attn.o_proj.weight": [32, 32],
        "midlayer.mlp.gate_proj.weight": [48, 32],
        "midlayer.mlp.up_proj.weight": [48, 32],
        "midlayer.mlp.down_proj.weight": [32, 48],
        "norm.weight": [32],
        "lm_head.weight": [30, 32],
        "d2t": [30],
        "t2d": [50],
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert "target_hidden_size" not in config


def test_round_trip(head, tmp_path):
    head.save_pretrained(tmp_path, torch.float32)
    again = Eagle3Head.from_pretrained(tmp_path, head.embed_tokens)
    assert again.config == head.config
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("change, word", [("drop", "missing fc.weight"), ("add", "unexpected extra"), ("shape", "norm.weight")])
def test_loading_is_strict(head, tmp_path, change, word):
    head.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "drop":
        del tensors["fc.weight"]
    elif change == "add":
        tensors["extra"] = torch.zeros(1)
    else:
        tensors["norm.weight"] = torch.ones(31)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=word):
        Eagle3Head.from_pretrained(tmp_path, head.embed_tokens)


def test_no_float32_inside_float64(head):
    """The float64 result is the textbook formula's to float64 rounding."""
    wide = head.double()
    hidden, tokens = torch.randn(1, 3, 32, dtype=torch.float64), torch.tensor([[1, 2, 3]])
    found = wide.project(hidden, tokens, torch.tensor([[0, 5, 9]]))
    assert {part.dtype for part in found} == {torch.float64}
    scaled = wide.midlayer.hidden_norm(hidden)
    exact = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(scaled, exact, rtol=1e-14, atol=1e-15)


def test_rotary_positions_are_relative(head):
    wide = head.double()
    hidden, tokens = torch.randn(1, 4, 32, dtype=torch.float64), torch.tensor([[1, 2, 3, 4]])
    scores = []
    for shift in (0, 37):
        _, query, key, _ = wide.project(hidden, tokens, torch.arange(4)[None] + shift)
        scores.append(torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(2, 2)))
    assert torch.allclose(*scores, rtol=1e-9, atol=1e-10)


def test_training_time_test_is_what_drafting_computes(head):
    """Every step of `unroll` equals drafting cell by cell along the true text, from every root."""
    wide, steps, length = head.double(), 4, 9
    features = torch.randn(1, length, 96, dtype=torch.float64)
    tokens = torch.randint(0, 50, (1, length))
    outputs = unroll(wide, features, tokens, steps)
    fused = wide.fuse(features)[0]

    def last_output(cells: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
        hidden, positions = torch.stack([h for h, _ in cells])[None], torch.arange(len(cells))[None]
        residual, query, key, value = wide.project(hidden, torch.tensor([[t for _, t in cells]]), positions)
        key, value = key.repeat_interleave(2, 2), value.repeat_interleave(2, 2)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True)
        return wide.finish(residual, attended.transpose(1, 2).flatten(2))[0, -1]

    for root in range(length - 1):
        cells = [(fused[i], int(tokens[0, i + 1])) for i in range(root + 1)]
        output = fused[root]
        for step in range(steps):
            if root + step >= length - 1:
                break
            if step:
                cells.append((output, int(tokens[0, root + step + 1])))
            output = last_output(cells)
            assert torch.allclose(output, outputs[step][0, root + step], atol=1e-5)
