"""Load prompts from the files people have: benchmark questions, chats, prompt/response rows, plain text.

JSON lines (`.jsonl` or any other ending, also `.xz` and `.gz`), one of these shapes per line:

- ``{"turns": ["...", ...]}``: user turns, as EAGLE's and Spec-Bench's question files; `category` is ignored, since a domain
  is a set of prompts that was named on the command line;
- ``{"messages": [{"role": "user", "content": "..."}, ...]}``: a chat, which must end with the user;
- ``{"prompt": "..."}``: one user turn; other keys, such as `response` and `source`, are ignored. A row without `prompt` may have
  `question` (GSM8K) or `problem` (MATH) in its place.

Plain text (`.txt`, also compressed): one prompt per line, empty lines skipped; write JSON lines for prompts that span lines.
No chat template is applied here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from policies.errors import UserError

SAMPLES = Path(__file__).parent / "samples" / "prompts"
"""Held-out prompts of the reference pair, one file per domain."""

MEAN = "mean"
"""No domain's name: results have a row of that name, the mean over domains."""

_SAMPLE_DOMAINS = ("math", "code", "chat", "dialogue", "story")
_NAMED = re.compile(r"^([\w.+-]+)=(.+)$", re.DOTALL)
_OPENERS = {".xz": lzma.open, ".gz": gzip.open}
_PROMPT_KEYS = ("prompt", "question", "problem")
_ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, str]
"""{"role": ..., "content": ...}"""


@dataclass(frozen=True)
class Prompt:
    """One thing to say to a target.

    `messages` open the conversation (for a chat: all of it; otherwise the first user turn); `later_turns` are what the
    user says next, each after the target's own answer. `id` is unique within the domain and stable over runs.
    """

    domain: str
    id: str
    messages: tuple[Message, ...]
    later_turns: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The contents without roles: what is fed when no chat template is used."""
        return joined(self.messages)

    @property
    def turns(self) -> int:
        """How often the target answers."""
        return 1 + len(self.later_turns)

    def turn_id(self, turn: int) -> str:
        """Id of one turn, counted from 0: the prompt's own, with "/1", "/2", ... where there are several."""
        return f"{self.id}/{turn + 1}" if self.later_turns else self.id

    def conversation(self, answers: Sequence[str] = ()) -> tuple[Message, ...]:
        """What the target reads next, once it has given these answers to the turns before."""
        messages = list(self.messages)
        for answer, turn in zip(answers, self.later_turns, strict=False):
            messages += [{"role": "assistant", "content": answer}, _user(turn)]
        return tuple(messages)


def joined(messages: Sequence[Message]) -> str:
    """The contents of messages without roles, one below the other."""
    return "\n".join(message["content"] for message in messages)


def with_system(prompts: Sequence[Prompt], text: str) -> list[Prompt]:
    """The prompts with a system message in front; a chat that brings its own keeps that."""
    system = {"role": "system", "content": text}
    return [
        prompt if prompt.messages[0]["role"] == "system" else replace(prompt, messages=(system, *prompt.messages))
        for prompt in prompts
    ]


def load_prompts(specs: Sequence[str], limit: int | None = None, seed: int | None = None) -> list[Prompt]:
    """Load prompt sets, in the order given.

    :param specs: ``DOMAIN=FILE`` or ``FILE`` (the domain is then the file's name up to the first dot); several files may
        share a domain.
    :param limit: at most so many prompts of each domain.
    :param seed: draw those at random by this seed (kept in file order) instead of taking the first ones.
    Raises UserError for a missing, unreadable or empty file and for a malformed line, which it names.
    """
    if not specs:
        raise UserError("no prompts given: name a file with --prompts DOMAIN=FILE")
    if limit is not None and limit < 1:
        raise UserError(f"the limit of prompts per domain is {limit}: give at least 1")
    domains: dict[str, list[Prompt]] = {}
    for spec in specs:
        named = _NAMED.match(spec)
        path = Path(named[2] if named else spec)
        domain = named[1] if named else path.name.split(".")[0]
        if domain == MEAN:
            raise UserError(f"no domain can be called '{MEAN}', the name of the mean over domains: put another in front of {path}")
        domains.setdefault(domain, []).extend(_load_file(path, domain))
    return [prompt for prompts in domains.values() for prompt in _draw(_unique(prompts), limit, seed)]


def prompts_sha256(prompts: Sequence[Prompt]) -> dict[str, str]:
    """One checksum per domain of what is asked in it: ids, messages and later turns, in order."""
    digests: dict[str, Any] = {}
    for prompt in prompts:
        line = json.dumps([prompt.id, prompt.messages, prompt.later_turns], ensure_ascii=False)
        digests.setdefault(prompt.domain, hashlib.sha256()).update(line.encode())
    return {domain: digest.hexdigest() for domain, digest in digests.items()}


def sample_specs() -> list[str]:
    """The shipped held-out prompts, as `load_prompts` takes them."""
    return [f"{domain}={SAMPLES / domain}.jsonl" for domain in _SAMPLE_DOMAINS]


def _draw(prompts: list[Prompt], limit: int | None, seed: int | None) -> list[Prompt]:
    if limit is None or limit >= len(prompts):
        return prompts
    if seed is None:
        return prompts[:limit]
    return [prompts[i] for i in sorted(random.Random(seed).sample(range(len(prompts)), limit))]


def _unique(prompts: list[Prompt]) -> list[Prompt]:
    """Refuse ids that occur twice: they pair prompts between recordings."""
    seen = set()
    for prompt in prompts:
        ids = {prompt.turn_id(turn) for turn in range(prompt.turns)}
        if ids & seen:
            raise UserError(f"prompt id {prompt.id!r} occurs twice in domain {prompt.domain!r}: give each its own id")
        seen |= ids
    return prompts


def _load_file(path: Path, domain: str) -> list[Prompt]:
    parse = _parse_text if path.name.removesuffix(".xz").removesuffix(".gz").endswith(".txt") else _parse_json
    stem = re.sub(r"(\.(jsonl|json|txt))?(\.(xz|gz))?$", "", path.name)
    prompts = []
    for number, line in text_lines(path):
        if not line.strip():
            continue
        row_id, messages, later = parse(line, f"{path}, line {number}")
        prompts.append(Prompt(domain, f"{stem}:{number if row_id is None else row_id}", messages, later))
    if not prompts:
        raise UserError(f"the prompt file {path} is empty: give one with at least one prompt")
    return prompts


def text_lines(path: Path, what: str = "prompt file") -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file, compressed or not, with their numbers, counted from 1.

    Raises UserError when it cannot be read; the message calls it ``what``.
    """
    opener = _OPENERS.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.rstrip("\r\n")
    except FileNotFoundError as error:
        raise UserError(f"the {what} {path} does not exist: check its name") from error
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"the {what} {path} cannot be decompressed ({error}): fetch it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} {path} is not UTF-8 text: convert it") from error
    except OSError as error:
        raise UserError(f"the {what} {path} cannot be read ({error.strerror}): check it") from error


Parsed = tuple[Any, tuple[Message, ...], tuple[str, ...]]


def _parse_text(line: str, place: str) -> Parsed:
    return None, (_user(line),), ()


def _parse_json(line: str, place: str) -> Parsed:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error}): write one JSON object per line") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object: write one per line, with 'turns', 'messages' or 'prompt'")
    row_id = row.get("question_id", row.get("id"))
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not all(_is_text(turn) for turn in turns):
            raise UserError(f"{place}: 'turns' must be a list of texts that are not empty")
        return row_id, (_user(turns[0]),), tuple(turns[1:])
    if "messages" in row:
        return row_id, _chat(row["messages"], place), ()
    if name := next((name for name in _PROMPT_KEYS if name in row), None):
        if not _is_text(row[name]):
            raise UserError(f"{place}: '{name}' must be a text that is not empty")
        return row_id, (_user(row[name]),), ()
    raise UserError(f"{place}: no prompt found: give 'turns', 'messages', 'prompt', 'question' or 'problem'")


def _chat(messages: Any, place: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: 'messages' must be a list that is not empty")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES or not _is_text(message.get("content")):
            raise UserError(f"{place}: each message needs a 'role' out of {', '.join(_ROLES)} and a 'content' text")
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{place}: the chat ends with the assistant: end it with what the target shall answer")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
