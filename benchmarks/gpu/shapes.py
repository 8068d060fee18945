"""Shapes of targets and EAGLE-3 heads that are timed at full size, and models of those shapes with random weights.

A pass costs what its shapes cost, whatever the weights say: no weights need to be at hand. They are never zeros, which a
GPU multiplies faster (less power, higher clocks).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from live.eagle3 import Eagle3Head
from live.eagle3_config import Eagle3Config
from live.precision import exact
from policies.errors import UserError

MODELS = Path(__file__).parents[2] / "traces" / "profiles" / "sources" / "models.json"
SPREAD = 0.02
"""Standard deviation of random weights (Hugging Face's ``initializer_range``)."""


@dataclass(frozen=True)
class Shape:
    """A Llama and its EAGLE-3 head.

    vocabulary, drafted  tokens of the target and of the head
    context              tokens that fit
    rms_eps              of every norm
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    drafted: int
    context: int
    rms_eps: float = 1e-5
    rope_theta: float = 10000.0

    def sliced(self, layers: int) -> Shape:
        """The same with fewer layers, for models that do not fit."""
        return replace(self, name=f"{self.name} ({layers} of {self.layers} layers)", layers=layers)

    def config(self) -> LlamaConfig:
        """The target's configuration: default rotary embedding, embeddings of its own on both ends."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            rms_norm_eps=self.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation="sdpa",
        )

    def head_config(self) -> Eagle3Config:
        """The head's configuration, as the official releases have it: the target's own sizes."""
        return Eagle3Config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            draft_vocab_size=self.drafted,
            target_hidden_size=self.hidden,
            rms_norm_eps=self.rms_eps,
            rope_theta=self.rope_theta,
            max_position_embeddings=self.context,
        )


def named_shape(name: str) -> Shape:
    """A published model's shape: llama-3.1-8b, vicuna-13b, llama-3.3-70b.

    :raises UserError: when there is none of that name.
    """
    models = json.loads(MODELS.read_text(encoding="utf-8"))
    if name not in models:
        raise UserError(f"there is no shape '{name}': choose one of {', '.join(models)}")
    config = models[name]["config"]
    heads = config["num_attention_heads"]
    return Shape(
        name=name,
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        groups=config["num_key_value_heads"],
        head_dim=config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        drafted=models[name]["draft_vocab_size"],
        context=config["max_position_embeddings"],
    )


TOY = Shape(
    "toy", hidden=320, intermediate=1024, layers=13, heads=8, groups=4, head_dim=64, vocabulary=6400, drafted=4352, context=2048
)
"""Large enough to hold the shipped pair, and small enough to rehearse with on a CPU."""


def random_target(shape: Shape, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> LlamaForCausalLM:
    """A target of the shape with random weights, made where it is to be: eval mode, no gradients, SDPA attention."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype)
    model = model.to_empty(device=device).to(dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)  # its table is no weight: compute it again
    scatter(model, seed)
    return exact(model.eval().requires_grad_(False))


def random_head(
    shape: Shape, embeddings: Tensor, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Eagle3Head:
    """An EAGLE-3 head of the shape for a target with these embeddings [V, H]; it drafts the first ``drafted`` tokens."""
    with torch.device(device):
        head = Eagle3Head(shape.head_config(), embeddings)
    head = head.to(device, dtype).eval().requires_grad_(False)
    scatter(head, seed)
    if head.t2d is not None:
        head.t2d[: shape.drafted] = True  # d2t is zero: offsets
    return head


@torch.no_grad()
def scatter(module: torch.nn.Module, seed: int) -> None:
    """Random matrices, norms of one."""
    draw: dict[torch.device, torch.Generator] = {}
    for weight in module.parameters():
        if weight.ndim < 2:
            weight.fill_(1.0)
            continue
        own = draw.setdefault(weight.device, torch.Generator(weight.device).manual_seed(seed))
        weight.normal_(0.0, SPREAD, generator=own)
