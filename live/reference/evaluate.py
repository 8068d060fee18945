"""Held-out loss of a causal LM per domain, and a cheap look at a head's acceptance."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from live.reference.corpus import DOMAINS, encode_rows, read_rows
from policies.errors import UserError, run_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from live.reference.head_training import Batch, Score

WINDOW, STRIDE = 512, 256


def response_nats(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> float:
    """Nats of a whole response given its prompt; longer texts in windows of 512 tokens, 256 apart."""
    import torch
    import torch.nn.functional as F

    tokens = torch.tensor([prompt + response], device=model.device)
    total, done = 0.0, len(prompt)
    for begin in range(0, tokens.shape[1], STRIDE):
        end = min(begin + WINDOW, tokens.shape[1])
        if end > done:
            hidden = model.model(input_ids=tokens[:, begin : end - 1], use_cache=False).last_hidden_state[0, done - begin - 1 :]
            total += float(F.cross_entropy(model.lm_head(hidden).float(), tokens[0, done:end], reduction="sum"))
            done = end
        if end == tokens.shape[1]:
            break
    return total


def held_out_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Path, rows: int
) -> dict[str, dict[str, float]]:
    """Per domain: nats per response token and bits per response byte (the end token's nats count, it has no byte)."""
    import torch
    from tqdm import tqdm

    found = {}
    with torch.no_grad():
        for domain in DOMAINS:
            texts = read_rows(corpus, domain, "heldout", rows)
            pairs = encode_rows(tokenizer, texts)
            nats = sum(response_nats(model, *pair) for pair in tqdm(pairs, desc=f"held-out {domain}", leave=False))
            count, size = sum(len(r) for _, r in pairs), sum(len(t["response"].encode()) for t in texts)
            found[domain] = {
                "nats_per_token": round(nats / count, 4),
                "bits_per_byte": round(nats / math.log(2) / size, 4),
                "tokens": count,
                "bytes": size,
            }
    return found


def scorer(folder: Path, target: LlamaForCausalLM, steps: int = 6) -> Callable[[Batch], Score]:
    """How a head in a folder is scored: an EAGLE-3 head over so many self-fed steps, Medusa heads, a DFlash drafter's places."""
    from live.dflash import DFlashHead
    from live.eagle3 import Eagle3Head
    from live.heads import kind_of
    from live.medusa import MedusaHeads
    from live.reference import dflash_training, eagle3_training, medusa_training

    embeddings = target.get_input_embeddings().weight
    if kind_of(str(folder)) == "medusa":
        heads = MedusaHeads.from_pretrained(folder, embeddings, target.lm_head)
        return lambda batch: medusa_training.score(heads, target, batch, batch.tokens.numel(), count=True)
    if kind_of(str(folder)) == "dflash":
        drafter = DFlashHead.from_pretrained(folder, embeddings, target.lm_head)
        return lambda batch: dflash_training.score(drafter, target, batch, batch.tokens.numel(), count=True)
    head = Eagle3Head.from_pretrained(folder, embeddings)
    return lambda batch: eagle3_training.score(head, target, batch, steps, count=True)


def acceptance_proxy(
    score: Callable[[Batch], Score],
    target: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Path,
    prompts: int,
    new_tokens: int = 128,
) -> dict[str, Any]:
    """On the target's own greedy text to held-out prompts, per domain and self-fed step or head:

    top1: the share of cells whose best draft is the target's token; top10: whose ten best hold it;
    chain: 1 + the expected number of drafts accepted in a row when each step's shares were independent of the others'.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from live.reference.head_training import Batch
    from live.reference.own_text import answer, loop_onset

    result: dict[str, Any] = {}
    with torch.no_grad():
        for domain in DOMAINS:
            pairs = encode_rows(tokenizer, read_rows(corpus, domain, "heldout", prompts))
            asked = [p for p, _ in pairs]
            answers = [a for at in range(0, len(asked), 20) for a in answer(target, asked[at : at + 20], new_tokens)]
            cut = [loop_onset(a) for a in answers]
            texts = [(p, a[:c]) for p, a, c in zip(asked, answers, cut, strict=True)]
            tokens = pad_sequence([torch.tensor(p + a) for p, a in texts], batch_first=True)
            scored = torch.zeros(tokens.shape, dtype=torch.bool)
            for row, (prompt, text) in enumerate(texts):
                scored[row, len(prompt) : len(prompt) + len(text)] = True
            parts = [score(Batch(t, s)) for t, s in zip(tokens.split(10), scored.split(10), strict=True)]
            steps = len(parts[0].top1)
            top1, top10 = (
                [round(sum(getattr(p, name)[i] for p in parts) / len(parts), 3) for i in range(steps)] for name in ("top1", "top10")
            )
            chain = 1 + sum(math.prod(top1[: i + 1]) for i in range(steps))
            tree = 1 + sum(math.prod(top10[: i + 1]) for i in range(steps))
            result[domain] = {
                "top1": top1,
                "top10": top10,
                "chain": round(chain, 2),
                "all_top10": round(tree, 2),
                "loops": sum(c is not None for c in cut),
            }
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(prog="python -m live.reference.evaluate", description=__doc__)
    line.add_argument("--corpus", type=Path, required=True, help="folder with DOMAIN.heldout.jsonl.xz")
    line.add_argument("--models", type=Path, default=Path(__file__).parent, help="folder that holds target, eagle3 and draft")
    line.add_argument("--rows", type=int, default=100, help="held-out rows per domain (default 100)")
    line.add_argument("--draft", action="store_true", help="evaluate the draft LM instead of the target")
    line.add_argument("--head", choices=("eagle3", "medusa", "dflash"), help="look at this head's acceptance instead")
    line.add_argument("--prompts", type=int, default=40, help="held-out prompts per domain for --head (default 40)")
    line.add_argument("--json", type=Path, help="also write the result here")
    return line


def main(arguments: list[str] | None = None) -> int:
    """Evaluate and print."""
    options = parser().parse_args(arguments)
    folder = options.models / ("draft" if options.draft else "target")
    if not (folder / "config.json").is_file():
        raise UserError(f"no model in {folder}: give --models the folder that training wrote")
    import torch
    from transformers import AutoModelForCausalLM

    from live.reference.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if options.head:
        result: dict[str, Any] = acceptance_proxy(
            scorer(options.models / options.head, model), model, tokenizer, options.corpus, options.prompts
        )
    else:
        result = held_out_loss(model, tokenizer, options.corpus, options.rows)
    for domain, numbers in result.items():
        print(f"{domain:9s}", "  ".join(f"{name} {value}" for name, value in numbers.items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    run_command(main)
