"""Training text: read the corpus folder, tokenise it once, and lay it out as endless packed streams.

A corpus folder holds ``DOMAIN.train.jsonl.xz`` and ``DOMAIN.heldout.jsonl.xz``; each line is an object with the
strings ``prompt``, ``response`` and ``source``.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

DOMAINS = ("math", "code", "chat", "dialogue", "story")
#: Share of training tokens by domain. Math and chat are small; they get somewhat more than their share of the text.
MIXTURE = {"math": 0.13, "code": 0.27, "chat": 0.16, "dialogue": 0.20, "story": 0.24}
#: The target's second stretch: more of the domains that a small model finds hardest.
SECOND_MIXTURE = {"math": 0.07, "code": 0.29, "chat": 0.38, "dialogue": 0.10, "story": 0.16}
#: Tokens of a stream, and the share of each domain in them.
Stretch = tuple[int, dict[str, float]]


def read_rows(corpus: Path, domain: str, split: str, limit: int | None = None) -> list[dict[str, str]]:
    """Rows of one domain and split ("train" or "heldout"), in file order, at most `limit` of them."""
    path = corpus / f"{domain}.{split}.jsonl.xz"
    if not path.is_file():
        raise UserError(f"no file {path}: --corpus must name a folder with DOMAIN.train.jsonl.xz and DOMAIN.heldout.jsonl.xz")
    rows: list[dict[str, str]] = []
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(rows) >= limit:
                    break
                row = json.loads(line)
                if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "response")):
                    raise UserError(f"{path}:{number}: expected an object with the strings 'prompt' and 'response'")
                rows.append(row)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{len(rows) + 1}: not JSON: {error}") from None
        except (lzma.LZMAError, EOFError) as error:
            raise UserError(f"{path} is not a whole xz file ({error}); fetch it again") from None
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows


@dataclass(frozen=True)
class Documents:
    """The tokenised rows of one domain, end to end.

    tokens: uint16 [total]; starts: int64 [rows + 1], row r is tokens[starts[r]:starts[r + 1]];
    responses: int64 [rows], where the response of row r begins (an index into tokens).
    """

    tokens: np.ndarray
    starts: np.ndarray
    responses: np.ndarray

    def __len__(self) -> int:
        return len(self.responses)


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids in the chat template, response ids with the end token) of every row."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    encode: Any = tokenizer
    prompt_ids = encode(prompts, add_special_tokens=False)["input_ids"]
    response_ids = encode([row["response"] for row in rows], add_special_tokens=False)["input_ids"]
    return [(p, [*r, tokenizer.eos_token_id]) for p, r in zip(prompt_ids, response_ids, strict=True)]


def load_documents(corpus: Path, tokenizer: PreTrainedTokenizerFast, cache: Path) -> dict[str, Documents]:
    """Every domain's training rows as tokens; tokenised once, then read from `cache` (one .npz file per domain)."""
    cache.mkdir(parents=True, exist_ok=True)
    return {
        domain: kept(cache / f"{domain}.npz", lambda domain=domain: encode_rows(tokenizer, read_rows(corpus, domain, "train")))
        for domain in DOMAINS
    }


def kept(path: Path, make: Callable[[], list[tuple[list[int], list[int]]]]) -> Documents:
    """The (prompt, response) token ids that ``make`` gives, made once and then read from ``path`` (.npz, written whole)."""
    import numpy as np

    if not path.is_file():
        pairs = make()
        starts = np.concatenate([[0], np.cumsum([len(prompt) + len(response) for prompt, response in pairs])])
        responses = starts[:-1] + np.array([len(prompt) for prompt, _ in pairs])
        tokens = np.concatenate([np.array(prompt + response, dtype=np.uint16) for prompt, response in pairs])
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, tokens=tokens, starts=starts, responses=responses)
        partial.replace(path)
    with np.load(path) as arrays:
        return Documents(arrays["tokens"], arrays["starts"], arrays["responses"])


def packed_stream(
    documents: dict[str, Documents], stretches: list[Stretch], row: int, rows: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """One of `rows` parallel streams of whole documents, packed end to end.

    Each stream owns every `rows`-th document of a seeded shuffle and takes next from the domain that is furthest below
    its share, starting over when a domain is used up. Shares may change from stretch to stretch; a later stretch goes on
    with the documents that the earlier ones left. The first n tokens do not depend on what follows, so a training run can
    be continued for longer. Returns tokens uint16 [length] and, per token, whether it belongs to a response, bool
    [length], where length is the stretches' sum.
    """
    import numpy as np

    length = sum(stretch for stretch, _ in stretches)

    order = {
        domain: np.random.default_rng([seed, number]).permutation(len(documents[domain]))[row::rows]
        for number, domain in enumerate(documents)
    }
    taken = dict.fromkeys(documents, 0)
    tokens = np.empty(length, dtype=np.uint16)
    answer = np.zeros(length, dtype=bool)
    at = until = 0
    ahead = iter(stretches)
    while at < length:
        while at >= until:
            stretch, shares = next(ahead)
            until += stretch
            emitted = {domain: np.random.default_rng([seed, row, 77]).random() * 256.0 for domain in shares}
        domain = min(emitted, key=lambda name: (emitted[name] / shares[name], name))
        source = documents[domain]
        index = order[domain][taken[domain] % len(order[domain])]
        taken[domain] += 1
        begin, end, response = (int(v) for v in (source.starts[index], source.starts[index + 1], source.responses[index]))
        size = min(end - begin, length - at)
        tokens[at : at + size] = source.tokens[begin : begin + size]
        answer[at + response - begin : at + size] = True
        emitted[domain] += end - begin
        at += size
    return tokens, answer


def packed_streams(
    documents: dict[str, Documents], stretches: list[Stretch], rows: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`rows` streams side by side: tokens uint16 [rows, length] and response mask bool [rows, length]."""
    import numpy as np

    pairs = [packed_stream(documents, stretches, row, rows, seed) for row in range(rows)]
    return np.stack([t for t, _ in pairs]), np.stack([a for _, a in pairs])
