"""Answer a prompt, or chat, with speculative decoding: ``python -m live.generate "Once upon a time"``, or ``--chat``.

The text is what the target would write on its own, token for token, whatever the policy; a sampled text depends on the
prompt, the settings and the seed alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from live.options import add_sampling_options, sampling_of
from policies.errors import UserError, run_command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from live.decode import LiveStep, SpeculativeDecoder
    from policies.contract import Sampling


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m live.generate", description=__doc__.split("\n")[0])
    parse.add_argument("prompt", nargs="?", help="what to say to the target ('-' reads standard input)")
    parse.add_argument("--chat", action="store_true", help="go on with turns read line by line from standard input")
    parse.add_argument("--show", action="store_true", help="per cycle, what was drafted and which nodes were accepted")
    parse.add_argument("--target", default="reference", help="hub id or folder of the target (default: the shipped one)")
    parse.add_argument(
        "--draft", action="append", help="hub id or folder, training-free: suffix, or suffix+ID (default: the shipped EAGLE-3 head)"
    )
    parse.add_argument("--policy", default="eagle3(total_tokens=16, depth=5, top_k=8)", help="name, JSON file or file.py:Class")
    parse.add_argument("--max-new-tokens", type=int, default=128)
    add_sampling_options(parse)
    parse.add_argument("--dtype", default="float32", help="float32, float64, bfloat16 or float16")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--profile", metavar="FILE", help="what traces.profile measured, for policies that weigh costs")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.prompt is None and not args.chat:
        raise UserError("nothing to answer: give a prompt, or --chat")
    if args.prompt == "-" and args.chat:
        raise UserError("--chat reads its turns from standard input: give the first one as a prompt, or leave '-' out")
    prompt = as_text(sys.stdin.read) if args.prompt == "-" else as_text(lambda: args.prompt)
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty: say something")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be 1 or more, not {args.max_new_tokens}")
    if len(args.draft or []) > 1:
        raise UserError("one drafter drafts an answer: give --draft once")
    sampling = sampling_of(args, args.temperature)
    from policies.registry import load_policy

    policy = load_policy(args.policy)
    policy.check_fitted()
    from live.decode import SpeculativeDecoder
    from live.pair import asked_of, encode_prompt, load_pair
    from policies.lookup.name import DrafterName
    from policies.lookup.rule import load_rule

    draft = args.draft[0] if args.draft else "reference/eagle3" if args.target == "reference" else None
    asked = DrafterName(None, None) if draft is None else asked_of(draft)
    if asked.rule is not None:
        load_rule(asked.rule)  # before the target: loading it may take minutes
    alone = asked.rule is not None and asked.network is None
    profile = None
    if args.profile:
        from traces.costs import check_profile, load_profile

        profile = load_profile(args.profile)
    pair = load_pair(args.target, None if alone else [asked.network] if asked.network else [], args.dtype, args.device)
    name = str(asked._replace(network=next(iter(pair.networks), None)))
    drafts = pair.draft(name)
    if profile:
        check_profile(profile, pair.description, "the one to run is")
    cost = profile and profile.cost(name)
    decoder = SpeculativeDecoder(pair.target(drafter=drafts), drafts, policy, pair.end_tokens, cost, pair.context_limit)
    messages: list[dict[str, str]] = []
    for said in turns(prompt, args.chat):
        messages.append({"role": "user", "content": said})
        ids = encode_prompt(pair.tokenizer, messages)
        text = answer(decoder, pair.tokenizer, ids, args.max_new_tokens, sampling, args.show)
        messages.append({"role": "assistant", "content": text})


def as_text(read: Callable[[], str]) -> str:
    """What ``read`` gives. Raises UserError when that is no text: Python lets bytes that are none pass as lone surrogates where
    the locale is C, which no tokenizer takes."""
    try:
        text = read()
        if text is not None:
            text.encode()
    except UnicodeError:
        raise UserError("the prompt is not UTF-8 text: convert it") from None
    return text


def turns(first: str | None, chat: bool) -> Iterator[str]:
    """What the user says: the prompt, then in a chat every line of standard input that is not empty."""
    if first is not None:
        yield first
    while chat:
        if sys.stdin.isatty():
            print("> ", end="", flush=True, file=sys.stderr)
        line = as_text(sys.stdin.readline)
        if not line:
            return
        if line.strip():
            yield line.strip()


def answer(
    decoder: SpeculativeDecoder,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    show: bool = False,
) -> str:
    """Decode and print one answer as it comes, figures on stderr; its text. Raises UserError when logits or memory fail."""
    from live.faults import naming_lack_of_memory

    printer = _Printer(tokenizer)
    first: list[int] = []  # held back until a cycle has shown that the policy lacks nothing
    view: list[str] = []

    def step(step: LiveStep) -> None:
        printer.put(first + step.tokens[0, : int(step.gained[0])].tolist())
        first.clear()
        if show:
            view.append(drawn(step, tokenizer))

    try:
        with naming_lack_of_memory(len(ids)):
            done = decoder.generate(
                [ids], max_new_tokens, on_first=lambda token: first.extend(token.tolist()), on_step=step, sampling=sampling
            )
        printer.put(first)
    finally:  # after an interrupt, too, what was generated stands on its own lines
        if printer.tokens:
            print()
    if view:
        print("\n" + "\n".join(view), file=sys.stderr)
    if done.failed:
        raise UserError(done.failed[0])
    count = len(done.tokens[0]) - 1
    if count:
        print(
            f"\n{count + 1} tokens, {done.cycles[0]} cycles, {count / done.cycles[0]:.2f} tokens per cycle, "
            f"{done.decode_ms / count:.2f} ms per token behind {done.prefill_ms:.0f} ms of prefill",
            file=sys.stderr,
        )
    if count + 1 < max_new_tokens and len(ids) + count >= decoder.context_limit:
        print(f"the context of {decoder.context_limit:,} tokens is full: the text stops there", file=sys.stderr)
    if done.draft_error:
        print(f"the draft crashed ({done.draft_error}): {done.plain} cycles were decoded plainly", file=sys.stderr)
    return printer.shown


def drawn(step: LiveStep, tokenizer: PreTrainedTokenizerBase) -> str:
    """One cycle as a tree: every kept node under its parent, ``+`` accepted, ``-`` not, and the target's own token at the end."""
    kept, walk = step.done.kept, step.done.walk
    count, path = int(kept.count[0]) + 1, set(walk.path[0].tolist())
    parents, depths = kept.parent[0, :count].tolist(), kept.depth[0, :count].tolist()
    words = [repr(tokenizer.decode([token])) for token in kept.token[0, :count].tolist()]
    logprobs = step.done.draft.tree.logprob[0, kept.node[0, :count]].tolist()
    children: dict[int, list[int]] = {}
    for node in range(1, count):
        children.setdefault(parents[node], []).append(node)
    place, accepted = int(step.cycle.position[0]), int(walk.accepted[0])
    lines = [f"cycle {int(step.cycle.number[0]) + 1}, token {place}, behind {words[0]}: {accepted} of {count - 1} accepted"]
    waiting = children.get(0, [])[::-1]
    while waiting:  # depth first
        node = waiting.pop()
        mark = "+" if node in path else "-"
        lines.append(f"  {mark} {'  ' * (depths[node] - 1)}{words[node]}  node {node}, log q {logprobs[node]:.2f}")
        waiting += children.get(node, [])[::-1]
    bonus = int(walk.bonus[0])
    return "\n".join([*lines, "  = the end" if bonus < 0 else f"  = {tokenizer.decode([bonus])!r}, the target's own"])


class _Printer:
    """Streams text: prints what is decodable so far, holding back bytes of an unfinished character."""

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens, self.shown = tokenizer, [], ""

    def put(self, tokens: list[int]) -> None:
        self.tokens += tokens
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


if __name__ == "__main__":
    run_command(main)
