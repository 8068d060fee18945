"""Answer one prompt with speculative decoding: ``python -m live.generate "Once upon a time"``.

The text is what the target would write on its own, token for token, whatever the policy; a sampled text depends on the
prompt, the settings and the seed alone.
"""

from __future__ import annotations

import argparse
import sys

from live.options import add_sampling_options, sampling_of
from policies.errors import UserError, run_command


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m live.generate", description=__doc__.split("\n")[0])
    parse.add_argument("prompt", help="what to say to the target ('-' reads standard input)")
    parse.add_argument("--target", default="reference", help="hub id or folder of the target (default: the shipped one)")
    parse.add_argument("--draft", help="hub id or folder of the drafter (default: the shipped EAGLE-3 head)")
    parse.add_argument("--policy", default="eagle3(total_tokens=16, depth=5, top_k=8)", help="name, JSON file or file.py:Class")
    parse.add_argument("--max-new-tokens", type=int, default=128)
    add_sampling_options(parse)
    parse.add_argument("--dtype", default="float32", help="float32, float64, bfloat16 or float16")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--profile", metavar="FILE", help="what traces.profile measured, for policies that weigh costs")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise UserError("the prompt is empty: say something")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be 1 or more, not {args.max_new_tokens}")
    sampling = sampling_of(args, args.temperature)
    from policies.registry import load_policy

    policy = load_policy(args.policy)
    policy.check_fitted()
    from live.decode import SpeculativeDecoder
    from live.pair import encode_prompt, load_pair

    draft = args.draft or ("reference/eagle3" if args.target == "reference" else None)
    pair = load_pair(args.target, [draft] if draft else [], args.dtype, args.device)
    ((name, network),) = pair.networks.items()
    cost = None
    if args.profile:
        from traces.costs import load_profile

        cost = load_profile(args.profile).cost(name)
    decoder = SpeculativeDecoder(pair.target(), network, policy, pair.end_tokens, cost, pair.context_limit)
    ids = encode_prompt(pair.tokenizer, [{"role": "user", "content": prompt}])
    printer = _Printer(pair.tokenizer)
    done = decoder.generate(
        [ids],
        args.max_new_tokens,
        on_first=lambda first: printer.put(first.tolist()),
        on_step=lambda step: printer.put(step.tokens[0, : int(step.gained[0])].tolist()),
        sampling=sampling,
    )
    print()
    count = len(done.tokens[0]) - 1
    if count:
        print(
            f"\n{count + 1} tokens, {done.cycles[0]} cycles, {count / done.cycles[0]:.2f} tokens per cycle, "
            f"{done.decode_ms / count:.2f} ms per token behind {done.prefill_ms:.0f} ms of prefill",
            file=sys.stderr,
        )


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
