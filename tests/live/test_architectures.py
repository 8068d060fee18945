"""Record, replay, live decoding and fidelity, end to end, over architectures and both kinds of drafters, in float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from live.eagle3 import Eagle3Config, Eagle3Head
from live.fidelity import check_policy, check_texts
from live.pair import load_pair
from policies.registry import load_policy
from tests.live.tiny import build
from tests.tiny_pair import train_tokenizer
from traces.record import main as record
from traces.recording import open_recording

POLICIES = ("chain(k=4)", "eagle3(total_tokens=12, depth=4, top_k=4)")
QUICK = ("gemma2", "mixtral")
SLOW = ("llama", "qwen3", "mistral", "gemma3_text", "gpt_neox", "gpt2", "qwen3_moe")
OWN = {
    "gpt2": {"n_layer": 6, "n_inner": 48},
    "mistral": {"sliding_window": 100},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
}
"""Windows of 100 tokens cover these texts; with the context of 128 tokens they set the limit."""


def write_pair(family: str, folder: Path) -> tuple[str, str, str]:
    """A random target, an EAGLE-3 head trained on nothing, and the target with noise on its weights as draft."""
    tokenizer = train_tokenizer()
    size = {"vocab_size": len(tokenizer), "num_hidden_layers": 6} | OWN.get(family, {})
    target = build(family, torch.float32, **size)
    draft = copy.deepcopy(target)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.dim() > 1:
                weight.add_(0.03 * torch.randn_like(weight) * weight.std())
    torch.manual_seed(3)
    embeddings = target.get_input_embeddings().weight
    head = Eagle3Head(Eagle3Config(32, 48, 4, 2, 8, len(tokenizer), len(tokenizer), 32), embeddings)
    for weight in (parameter for parameter in head.parameters() if parameter.ndim == 2):
        torch.nn.init.normal_(weight, std=0.3)
    paths = tuple(str(folder / name) for name in ("target", "eagle3", "draft"))
    head.save_pretrained(paths[1], torch.float32)
    for model, path in ((target, paths[0]), (draft, paths[2])):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(family, marks=pytest.mark.long) for family in SLOW)])
def test_fidelity_of_every_architecture(family, tmp_path):
    target, eagle3, draft = write_pair(family, tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the cat sat", "once upon a time a dog ran home")))
    trace = str(tmp_path / "trace")
    models = ["--target", target, "--draft", eagle3, "--draft", draft, "--dtype", "float64"]
    size = ["--max-new-tokens", "24", "--batch", "2", "--top-m", "8", "--positions", "16"]
    cover = [word for spec in POLICIES for word in ("--cover", spec)]
    record([*models, "--prompts", f"story={prompts}", *size, *cover, "--out", trace])
    recording = open_recording(trace, verify=True)
    pair = load_pair(target, [eagle3, draft], "float64")
    assert check_texts(recording, pair, exact=True)["identical"] == 2
    cycles = {"eagle3": 0, "draft": 0}
    for drafter in cycles:
        for spec in POLICIES:
            report = check_policy(recording, pair, load_policy(spec), drafter, 1000)
            assert report.identical == report.cycles > 0 and not report.notes
            cycles[drafter] += report.cycles
    plain = len(POLICIES) * 46  # cycles of plain decoding: 2 texts of 23 tokens behind prefill
    assert plain >= cycles["eagle3"] > cycles["draft"]  # trained on nothing, it is mostly wrong
    assert cycles["draft"] < 0.75 * plain  # right often enough to prove something
