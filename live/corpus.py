"""Freeze earlier texts for training-free drafters: ``python -m live.corpus build/earlier notes.txt --out earlier.safetensors``.

A source is a recording (a folder: its texts behind their prompts) or a file. Files are JSON lines, each with ``text``,
``prompt`` and ``response``, ``turns`` or ``messages``, or else plain text (``.txt``: one text); all may be compressed (.xz, .gz).
Drafters look into it when told to: ``--drafter "suffix(corpus='earlier.safetensors')"``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command
from policies.plural import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m live.corpus", description=__doc__.split("\n")[0])
    parse.add_argument("source", nargs="+", metavar="SOURCE", help="a recording, JSON lines or plain text; several may be given")
    parse.add_argument("--target", default="reference", help="whose tokenizer reads the files (default: the shipped target's)")
    parse.add_argument("--revision", help="hub revision of the target")
    parse.add_argument("--trust-remote-code", action="store_true", help="run the tokenizer's own code (default: never)")
    parse.add_argument("--out", required=True, metavar="FILE", help="the corpus to write, such as earlier.safetensors")
    parse.add_argument("--overwrite", action="store_true", help="replace the file")
    return parse


@dataclass
class Sources:
    """What was gathered: texts and the prompts that they answer as token ids, the tokenizer's sha256, and where from."""

    texts: list[list[int]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    tokenizer_sha256: str | None = None
    about: list[dict[str, Any]] = field(default_factory=list)

    def add(self, source: str, texts: list[list[int]], tokenizer_sha256: str, **about: Any) -> None:
        """Put texts behind those before. Raises UserError when they are of another tokenizer."""
        if self.tokenizer_sha256 not in (None, tokenizer_sha256):
            raise UserError(f"{source} is of another tokenizer than the sources before it: freeze them in separate files")
        self.tokenizer_sha256 = tokenizer_sha256
        texts = [text for text in texts if text]
        self.texts += texts
        self.about.append({"name": Path(source).name, "texts": len(texts), **about})


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    from policies.lookup.corpus import write_corpus
    from traces.manifest import file_sha256

    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"cannot write {out}: name a file in a folder that is there with --out")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} already exists: replace it by --overwrite, or name another file with --out")
    sources, tokenizer = Sources(), None
    for source in args.source:
        if Path(source).is_dir():
            add_recording(sources, source)
            continue
        texts = read_texts(Path(source))
        if tokenizer is None:
            from live.hub import parse_source
            from live.identity import tokenizer_hash
            from live.loading import load_tokenizer

            target = parse_source(args.target, revision=args.revision)
            tokenizer = load_tokenizer(target.name, target.revision, args.trust_remote_code)
            own = tokenizer_hash(tokenizer)
        sources.add(source, encoded(tokenizer, texts), own, kind="file", sha256=file_sha256(Path(source)))
    about = write_corpus(args.out, sources.texts, sources.tokenizer_sha256, sources.about, sources.prompts)
    tokens = sum(map(len, sources.texts))
    print(f"{args.out}: {counted(len(sources.texts), 'text')}, {tokens:,} tokens, sha256 {about['sha256'][:12]}")
    if sources.prompts:
        print(f"it answers {counted(len(sources.prompts), 'recorded prompt')}, and no recording of these will be scored with it")


def add_recording(sources: Sources, folder: str) -> None:
    """The counted tokens of a recording's texts, each behind its prompt."""
    from traces.manifest import NAME, file_sha256
    from traces.recording import open_recording

    recording = open_recording(folder)
    if not recording.complete:
        raise UserError(f"the recording {folder} is unfinished or damaged: go on with traces.record --resume first")
    tokenizer = recording.manifest.get("target", {}).get("tokenizer_sha256")
    if tokenizer is None:
        raise UserError(f"{folder} does not say which tokenizer its tokens are of: record it again")
    prompts = [recording.prompt_tokens(sequence).tolist() for sequence in range(len(recording.length))]
    texts = []
    for sequence, prompt in enumerate(prompts):
        first = int(recording.offset[sequence])
        texts.append(prompt + recording.token[first : first + int(recording.length[sequence])].tolist())
    sources.add(folder, texts, tokenizer, kind="recording", manifest_sha256=file_sha256(Path(folder) / NAME))
    sources.prompts += prompts


def read_texts(path: Path) -> list[str]:
    """The texts of a file, in its order. Raises UserError when it cannot be read, holds none, or a line has no text."""
    from traces.prompts import text_lines

    lines = list(text_lines(path, "text file"))
    if not any(line.strip() for _, line in lines):
        raise UserError(f"the text file {path} is empty: give one with text in it")
    if path.name.removesuffix(".xz").removesuffix(".gz").endswith(".txt"):
        return ["\n".join(line for _, line in lines)]
    return [text_of(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def text_of(line: str, place: str) -> str:
    """The text of one JSON line; of several parts, one below the other. Raises UserError when there is none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error}): write one object per line, or name a plain text file .txt") from None
    row = row if isinstance(row, dict) else {}
    said = row.get("messages", [])
    contents = [message.get("content") if isinstance(message, dict) else None for message in said] if isinstance(said, list) else []
    parts = [row["text"]] if "text" in row else row.get("turns") or contents or [row[k] for k in ("prompt", "response") if k in row]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        raise UserError(f"{place}: no text found: give 'text', 'prompt' and 'response', 'turns' or 'messages'")
    return "\n".join(parts)


def encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, no special tokens added."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    run_command(main)
