"""Model cards: README.md of target, heads and draft LM, written from what training and evaluation measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from live.reference.corpus import DOMAINS
from policies.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

DATA = """\
## Data

English text of five domains, 46 MB, about 14 million tokens. None of the text is in this repository.

| domain | sources | licences |
|---|---|---|
| math | GSM8K, training split (held out: its test split) | MIT |
| code | MBPP; GPTeacher code; Python 3.11 standard library; TheAlgorithms/Python | CC BY 4.0; MIT; PSF-2.0; MIT |
| chat | Arena-Hard questions with model answers; GPTeacher role-play | Apache-2.0; MIT |
| dialogue | Schema-Guided Dialogue | CC BY-SA 4.0 |
| story | TinyStories, validation split; novels of the 19th and early 20th century | CDLA-Sharing-1.0; public domain |

The weights are released under this project's licence, Apache-2.0.
"""
TITLES = {
    "target": (
        "Reference target",
        "A small Llama with a byte-level BPE tokenizer. It exists so that speculative decoding can be recorded, "
        "replayed and run on a machine without a GPU; it is no assistant, and much of what it says is wrong.",
    ),
    "eagle3": (
        "Reference EAGLE-3 head",
        "An EAGLE-3 draft head for the reference target, in the official tensor layout "
        "(embeddings come from the target; captured are the residuals entering layers 2, L // 2 and L - 3).",
    ),
    "draft": (
        "Reference draft LM",
        "A very small Llama with the reference target's tokenizer, for decoding with a separate draft model.",
    ),
    "medusa": (
        "Reference Medusa heads",
        "Medusa heads for the reference target, under vLLM's tensor names: residual blocks alone, behind which the target's own "
        "output layer follows (vLLM itself wants a matrix in the file).",
    ),
    "dflash": (
        "Reference DFlash drafter",
        "A block-diffusion drafter for the reference target, in its authors' tensor layout: it fills a block of masked places in "
        "one pass; embeddings and output layer are the target's (read are the residuals entering layers 2, L // 2 and L - 3; the "
        "mask is a token that no text holds).",
    ),
}


_COLUMNS = {
    "eagle3": "by self-fed step (the first column is fed true features)",
    "medusa": "by head, the nearest first",
    "dflash": "by place of a block, the nearest first",
}
"""What follows one another in the table of a head's agreement."""


def write_cards(out: Path, tau: dict[str, Any] | None = None) -> None:
    """README.md into the folder of each model in `out`; `tau` is {domain: acceptance length} or None."""
    for name in TITLES:
        folder = out / name
        if not (folder / "training.json").is_file():
            raise UserError(f"no training.json in {folder}: train {name} first")
        training = json.loads((folder / "training.json").read_text())
        measured = out / f"{name}.heldout.json"
        held_out = json.loads(measured.read_text()) if measured.is_file() else None
        (folder / "README.md").write_text(card(name, training, held_out, tau))


def card(name: str, training: dict[str, Any], held_out: dict[str, Any] | None, tau: dict[str, Any] | None) -> str:
    """One card as Markdown."""
    title, purpose = TITLES[name]
    parts = [f"---\nlicense: apache-2.0\nlanguage: en\n---\n# {title}\n\n{purpose}\n", DATA, training_section(training)]
    if held_out and name in _COLUMNS:
        parts.append(proxy_section(held_out, _COLUMNS[name]))
    elif held_out:
        parts.append(loss_section(held_out))
    if name == "eagle3":
        parts.append(tau_section(tau))
    if "note" in training:
        parts.append(training["note"] + "\n")
    return "\n".join(parts)


def training_section(training: dict[str, Any]) -> str:
    """Steps, tokens, seeds, the recipe."""
    recipe = training["recipe"]
    settings = ", ".join(f"{key} {value}" for key, value in recipe.items() if key not in ("name", "seed", "snapshot_every"))
    last = training["history"][-1] if training["history"] else None
    lines = [
        "## Training\n",
        f"- parameters: {training['parameters']:,}",
        f"- steps: {training['steps']:,}, tokens seen: {training['tokens']:,}, seed: {recipe['seed']}",
        f"- wall time: {training['seconds'] / 60:.0f} minutes on {training['device']}, PyTorch {training['torch']}",
        f"- recipe: {settings}",
    ]
    if last:
        lines.append(f"- training loss at the end, nats per token: {', '.join(map(str, last[1:]))}")
    return "\n".join([*lines, "- Muon on hidden matrices, AdamW on the rest; shipped in bfloat16\n"])


def loss_section(held_out: dict[str, Any]) -> str:
    """The table of held-out losses."""
    rows = [
        f"| {domain} | {found['nats_per_token']:.3f} | {found['bits_per_byte']:.3f} | {found['tokens']:,} |"
        for domain, found in held_out.items()
    ]
    return "\n".join(
        [
            "## Held-out loss\n",
            "Of the responses (end token included) to the first held-out prompts, with the shipped weights; "
            "texts over 512 tokens in windows of 512, 256 apart.\n",
            "| domain | nats per token | bits per byte | tokens |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def proxy_section(found: dict[str, Any], columns: str) -> str:
    """Acceptance per self-fed step or head; ``columns`` says what follows one another."""
    rows = [
        f"| {domain} | {' '.join(f'{v:.2f}' for v in part['top1'])} | {' '.join(f'{v:.2f}' for v in part['top10'])} |"
        for domain, part in found.items()
    ]
    return "\n".join(
        [
            "## Agreement with the target\n",
            f"On the target's own greedy answers to held-out prompts, {columns}: how often the best draft is the target's token; "
            "how often the ten best hold it.\n",
            "| domain | best draft | ten best |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def tau_section(tau: dict[str, Any] | None) -> str:
    """Acceptance length per domain, when it was measured."""
    if not tau:
        return "## Acceptance length\n\nNot measured yet: record the pair with `python -m traces.record`.\n"
    rows = [
        f"| {d} | {tau[d]['tau'] if isinstance(tau[d], dict) else tau[d]:.2f} |"
        + (f" {100 * tau[d]['loop_share']:.0f}% |" if isinstance(tau[d], dict) else " |")
        for d in DOMAINS
        if d in tau
    ]
    return "\n".join(
        [
            "## Acceptance length\n",
            "tau at temperature 0, EAGLE-3 tree of 60 tokens, depth 8, top-k 10, first 40 held-out prompts of "
            "each domain (of at most 600 characters), 128 tokens; and the share of texts ended at the onset of a verbatim loop. "
            "Measured by `python -m traces.record --draft reference/eagle3 --cover eagle3 --limit 40 --batch 40 --out build/tau` "
            "and `python -m traces.inspect build/tau`.\n",
            "| domain | tau | ended in a loop |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
