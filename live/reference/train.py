"""Train the reference pair: tokenizer, target, EAGLE-3 head, draft LM, Medusa heads and DFlash drafter, one command, resumable.

Stages, each needing the ones before: tokenizer; target; own (the target answers training prompts); eagle3; draft;
medusa; dflash; evaluate (held-out losses); card (README.md of each model). `all` runs them in this order.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from live.reference.corpus import DOMAINS, MIXTURE, load_documents, read_rows
from policies.errors import UserError, run_command

if TYPE_CHECKING:
    from live.reference.corpus import Documents

STAGES = ("tokenizer", "target", "own", "eagle3", "draft", "medusa", "dflash", "evaluate", "card")
#: Share of the draft LM's training tokens that the target wrote itself.
DRAFT_OWN_SHARE = 0.4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(
        prog="python -m live.reference.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    line.add_argument("--corpus", type=Path, required=True, help="folder with DOMAIN.train.jsonl.xz and DOMAIN.heldout.jsonl.xz")
    line.add_argument("--out", type=Path, required=True, help="folder for the models and the states to resume from")
    line.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="what to run (default all)")
    line.add_argument("--resume", action="store_true", help="go on where an earlier run in --out stopped")
    line.add_argument("--overwrite", action="store_true", help="start over in a folder that holds an earlier run")
    line.add_argument("--target-tokens", type=int, help="training tokens of the target, in one stretch")
    line.add_argument("--head-tokens", type=int, help="training tokens of the EAGLE-3 head")
    line.add_argument("--draft-tokens", type=int, help="training tokens of the draft LM")
    line.add_argument("--medusa-tokens", type=int, help="training tokens of the Medusa heads")
    line.add_argument("--dflash-tokens", type=int, help="training tokens of the DFlash drafter")
    line.add_argument(
        "--own-prompts", type=int, default=500, help="training prompts per domain that the target answers (default 500)"
    )
    line.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    line.add_argument("--compile", action="store_true", help="torch.compile the two language models (needs a C++ compiler)")
    line.add_argument("--tau", type=Path, help="JSON file {domain: tau} for the card")
    return line


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for."""
    options = parser().parse_args(arguments)
    stages = STAGES if options.stage == "all" else (options.stage,)
    for name in ("target_tokens", "head_tokens", "draft_tokens", "medusa_tokens", "dflash_tokens", "own_prompts", "threads"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give a positive number")
    for domain in DOMAINS:
        read_rows(options.corpus, domain, "heldout", 1)
    held = [stage for stage in stages if (options.out / f"{stage}.state.pt").exists()]
    if held and not (options.resume or options.overwrite):
        raise UserError(f"{options.out} holds a training of {', '.join(held)}: give --resume to go on or --overwrite to start over")
    # Before torch is imported: threads that share one core with a busy neighbour stall a step tenfold.
    os.environ.setdefault("OMP_PROC_BIND", "true")
    if options.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    try:
        for stage in stages:
            STAGE_COMMANDS[stage](options)
    finally:
        torch.set_flush_denormal(False)  # a state of the processor, which would outlive the training
    return 0


def run_tokenizer(options: argparse.Namespace) -> None:
    """Train the tokenizer, unless a run to resume has one."""
    from live.reference.tokenizer import train_tokenizer

    folder = options.out / "tokenizer"
    if not (options.resume and (folder / "tokenizer.json").is_file()):
        train_tokenizer(options.corpus, folder)


def run_target(options: argparse.Namespace) -> None:
    """Train the target."""
    from live.reference.causal_lm import TARGET, train

    recipe = replace(TARGET, tokens=options.target_tokens, second=None) if options.target_tokens else TARGET
    train(recipe, corpus_documents(options), MIXTURE, tokenizer_of(options), options.out, options.resume, options.compile)


def run_own(options: argparse.Namespace) -> None:
    """Let the target answer training prompts (kept in --out/own)."""
    own_documents(options)


def run_eagle3(options: argparse.Namespace) -> None:
    """Train the EAGLE-3 head on the target's own answers and on the corpus."""
    from live.reference.eagle3_training import HeadRecipe, train_head

    recipe = HeadRecipe(tokens=options.head_tokens or HeadRecipe.tokens)
    sources = [(recipe.own_share, own_documents(options)), (1 - recipe.own_share, corpus_documents(options))]
    train_head(target_of(options), recipe, sources, options.out, options.resume)


def run_draft(options: argparse.Namespace) -> None:
    """Train the draft LM on the corpus and on the target's own answers."""
    from live.reference.causal_lm import DRAFT, train

    recipe = replace(DRAFT, tokens=options.draft_tokens or DRAFT.tokens)
    documents = dict(corpus_documents(options))
    shares = {domain: share * (1 - DRAFT_OWN_SHARE) for domain, share in MIXTURE.items()}
    for domain, own in own_documents(options).items():
        documents[f"own {domain}"], shares[f"own {domain}"] = own, DRAFT_OWN_SHARE / len(DOMAINS)
    train(recipe, documents, shares, tokenizer_of(options), options.out, options.resume, options.compile)


def run_medusa(options: argparse.Namespace) -> None:
    """Train the Medusa heads on the target's own answers and on the corpus."""
    from live.reference.medusa_training import MedusaRecipe, train_medusa

    recipe = MedusaRecipe(tokens=options.medusa_tokens or MedusaRecipe.tokens)
    sources = [(recipe.own_share, own_documents(options)), (1 - recipe.own_share, corpus_documents(options))]
    train_medusa(target_of(options), recipe, sources, options.out, options.resume)


def run_dflash(options: argparse.Namespace) -> None:
    """Train the DFlash drafter on the target's own answers and on the corpus."""
    from live.reference.dflash_training import DFlashRecipe, train_dflash

    recipe = DFlashRecipe(tokens=options.dflash_tokens or DFlashRecipe.tokens)
    sources = [(recipe.own_share, own_documents(options)), (1 - recipe.own_share, corpus_documents(options))]
    train_dflash(target_of(options), recipe, sources, options.out, options.resume)


def run_evaluate(options: argparse.Namespace) -> None:
    """Held-out losses of target and draft LM, and the heads' acceptance at a glance, as JSON beside the models."""
    from live.reference import evaluate

    shared = ["--corpus", str(options.corpus), "--models", str(options.out)]
    heads = [(["--head", name], name) for name in ("eagle3", "medusa", "dflash")]
    for flags, name in (([], "target"), (["--draft"], "draft"), *heads):
        print(f"{name}:")
        evaluate.main([*shared, *flags, "--json", str(options.out / f"{name}.heldout.json")])


def run_card(options: argparse.Namespace) -> None:
    """Write the model cards."""
    from live.reference.card import write_cards

    tau: dict[str, Any] | None = None
    if options.tau:
        if not options.tau.is_file():
            raise UserError(f"no file {options.tau}: --tau takes a JSON file with one number per domain")
        tau = json.loads(options.tau.read_text())
    write_cards(options.out, tau)


def tokenizer_of(options: argparse.Namespace) -> Any:
    """The trained tokenizer."""
    from live.reference.tokenizer import load_tokenizer

    folder = options.out / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"no tokenizer in {folder}: run --stage tokenizer first")
    return load_tokenizer(folder)


def target_of(options: argparse.Namespace) -> Any:
    """The trained target with its shipped (bfloat16-rounded) weights, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = options.out / "target"
    if not (folder / "config.json").is_file():
        raise UserError(f"no target in {folder}: run --stage target first")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def corpus_documents(options: argparse.Namespace) -> dict[str, Documents]:
    """The corpus's training rows as tokens."""
    return load_documents(options.corpus, tokenizer_of(options), options.out / "tokens")


def own_documents(options: argparse.Namespace) -> dict[str, Documents]:
    """The target's own answers, generated on first use."""
    from live.reference.own_text import generate_documents

    return generate_documents(target_of(options), tokenizer_of(options), options.corpus, options.out / "own", options.own_prompts)


STAGE_COMMANDS = {
    "tokenizer": run_tokenizer,
    "target": run_target,
    "own": run_own,
    "eagle3": run_eagle3,
    "draft": run_draft,
    "medusa": run_medusa,
    "dflash": run_dflash,
    "evaluate": run_evaluate,
    "card": run_card,
}

if __name__ == "__main__":
    run_command(main, on_interrupt="Run the same command with --resume to go on.")
