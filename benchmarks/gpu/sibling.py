"""A larger sibling of the shipped pair, trained where there is a GPU: a target of 80 million parameters and its EAGLE-3 head.

The recipe is the shipped pair's (live/reference), wider and with larger steps; the number of tokens follows from a short trial
run, so that training fits into its time. It stays on the machine: only losses and sizes are brought home.
"""

from __future__ import annotations

import json
import lzma
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Clock, Job
from benchmarks.gpu.setting import Setting
from policies.errors import UserError

MOST_TOKENS = 40_000_000
TRIAL_STEPS = 20


def jobs(setting: Setting) -> list[Job]:
    if setting.corpus is None and not setting.rehearse:
        return []
    return [
        Job("target", lambda left: target(setting, left), 200, 340),
        Job("eagle3", lambda left: head(setting, left), 120, 250),
    ]


def target(setting: Setting, seconds: float) -> dict[str, Any]:
    """Tokenise, try for speed, train the target."""
    from live.reference.causal_lm import TARGET, train
    from live.reference.corpus import MIXTURE, load_documents
    from live.reference.tokenizer import load_tokenizer, train_tokenizer

    clock, corpus = Clock(seconds), corpus_of(setting)
    out = setting.work / "sibling"
    if setting.rehearse:
        train_tokenizer(corpus, out / "tokenizer")
        tokenizer = load_tokenizer(out / "tokenizer")
    else:
        tokenizer = setting.small_pair("float32").tokenizer  # so that recordings of both pairs share their tokens
    documents = load_documents(corpus, tokenizer, out / "tokens")
    wide = replace(
        TARGET, hidden=768, intermediate=2048, heads=12, kv_heads=4, rows=64, micro_tokens=32_768, short=0.7, second=None,
        muon_lr=0.01, adam_lr=1e-3, snapshot_every=1e9,
    )  # fmt: skip
    if setting.rehearse:
        wide = replace(wide, hidden=32, layers=6, intermediate=48, heads=4, kv_heads=2, rows=4, length=32, tokens=4 * 32 * 4)
    per_step = wide.rows * wide.length
    trial = replace(wide, tokens=setting.pick(TRIAL_STEPS, 2) * per_step)
    train(trial, documents, MIXTURE, tokenizer, out / "trial", resume=False)
    started = time.monotonic()
    train(replace(trial, seed=2), documents, MIXTURE, tokenizer, out / "trial", resume=False)  # the first one warmed up
    rate = trial.tokens / (time.monotonic() - started)
    tokens = wide.tokens if setting.rehearse else min(int(0.7 * clock.left * rate), MOST_TOKENS)
    folder = train(replace(wide, tokens=max(tokens, per_step)), documents, MIXTURE, tokenizer, out, resume=False)
    return {"tokens_per_second": round(rate), **training(folder)}


def head(setting: Setting, seconds: float) -> dict[str, Any]:
    """The target answers prompts, the head learns from the answers and from the corpus; then held-out acceptance by depth."""
    import torch
    from transformers import AutoModelForCausalLM

    from live.reference.corpus import load_documents
    from live.reference.eagle3_training import HeadRecipe, train_head
    from live.reference.own_text import generate_documents
    from live.reference.tokenizer import load_tokenizer

    clock, corpus, out = Clock(seconds), corpus_of(setting), setting.work / "sibling"
    if not (out / "target" / "config.json").is_file():
        raise UserError("the sibling's target is not on this machine: remove sibling.json and run --stage sibling again")
    model = (
        AutoModelForCausalLM.from_pretrained(out / "target", dtype=torch.float32).eval().requires_grad_(False).to(setting.device)
    )
    tokenizer = load_tokenizer(out / "target")
    own = generate_documents(model, tokenizer, corpus, out / "own", setting.pick(400, 2), setting.pick(144, 16), batch=200)
    if clock.left < 0.3 * seconds and not setting.rehearse:
        raise UserError("answering took the time that was meant for training: give the stage more --budget")
    recipe = HeadRecipe(intermediate=2048, tokens=6_000_000, batch_tokens=16_384, own_share=0.75)
    if setting.rehearse:
        recipe = HeadRecipe(intermediate=48, draft_vocab=64, tokens=512, batch_tokens=128, test_steps=2)
    sources = [(recipe.own_share, own), (1 - recipe.own_share, load_documents(corpus, tokenizer, out / "tokens"))]
    return training(train_head(model, recipe, sources, out, resume=False))


def training(folder: Path) -> dict[str, Any]:
    """What training left beside the model; the losses thinned out."""
    found = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    history = found["history"]
    return {key: found[key] for key in ("recipe", "steps", "tokens", "parameters", "device")} | {
        "training_seconds": found["seconds"],
        "history": history[:: max(len(history) // 40, 1)] + history[-1:],
    }


def corpus_of(setting: Setting) -> Path:
    """The folder of training text; in a rehearsal a toy one."""
    if not setting.rehearse:
        return setting.corpus
    from live.reference.corpus import DOMAINS

    folder = setting.work / "corpus"
    folder.mkdir(exist_ok=True)
    for number, domain in enumerate(DOMAINS):
        for part in ("train", "heldout"):
            rows = [
                {"prompt": f"Count to {i}", "response": " ".join(map(str, range(i + number))), "source": "toy"}
                for i in range(9, 40)
            ]
            with lzma.open(folder / f"{domain}.{part}.jsonl.xz", "wt") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in rows)
    return folder
