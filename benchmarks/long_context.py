"""What a cycle costs as the text grows: ``python -m benchmarks.long_context``.

A small random Llama with long positions, an EAGLE-3 head of random weights on it, and one chain and one tree policy. Behind a
random text of each length a few cycles are decoded; contexts take turns, and a cell is the median. A cycle that rebuilt a mask
over the whole text, or copied its caches, would grow faster than attention itself, which reads every key and value once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

from policies.errors import UserError, run_command

if TYPE_CHECKING:
    from live.decode import SpeculativeDecoder

CONTEXTS = (512, 1024, 2048, 4096, 8192)
POLICIES = ("autoregressive", "chain(k=3)", "eagle3(total_tokens=16, depth=4, top_k=4)")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.long_context", description=__doc__.split("\n")[0])
    parse.add_argument("--context", type=int, action="append", default=[], help="tokens; may be repeated (default 0.5k to 8k)")
    parse.add_argument("--policy", action="append", default=[], help="may be repeated")
    parse.add_argument("--cycles", type=int, default=12, help="cycles timed per policy and context (default 12)")
    parse.add_argument("--layers", type=int, default=4)
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    contexts, specs = sorted(args.context or CONTEXTS), args.policy or list(POLICIES)
    if contexts[0] < 2 or args.cycles < 1 or args.layers < 3:
        raise UserError("--context must be 2 or more, --cycles 1 or more, --layers 3 or more")
    import torch

    from sim.table import number, text_table

    made = {(spec, context): decoder(spec, context, args.layers) for spec in specs for context in contexts}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in made}
    for cycle in range(args.cycles + 2):  # two warm up
        for key, decoding in made.items():
            started = time.perf_counter()
            decoding.step()
            if cycle > 1:
                times[key].append(1e3 * (time.perf_counter() - started))
    rows = [[spec, *(number(statistics.median(times[spec, context])) for context in contexts)] for spec in specs]
    print(text_table(["milliseconds per cycle", *(f"{context}\ntokens" for context in contexts)], rows))
    print(f"\nA random Llama of {args.layers} layers, float32, {torch.get_num_threads()} threads; median of {args.cycles} cycles.")


def decoder(spec: str, context: int, layers: int) -> SpeculativeDecoder:
    """A decoder that stands behind a random text of ``context`` tokens and does not end by itself."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from live.decode import SpeculativeDecoder
    from live.eagle3 import Eagle3Config, Eagle3Head
    from live.eagle_network import EagleNetwork
    from live.model import CachedModel
    from policies.registry import load_policy

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 2048}
    room = 2 * max(context, 4096)
    config = LlamaConfig(**shape, num_hidden_layers=layers, intermediate_size=704, max_position_embeddings=room)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    of_head = Eagle3Config(
        **shape,
        draft_vocab_size=2048,
        intermediate_size=704,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=room,
        target_hidden_size=256,
    )
    head = Eagle3Head(of_head, model.get_input_embeddings().weight).eval().requires_grad_(False)
    target = CachedModel(model, layers_to_capture=(0, layers // 2, layers - 1))
    decoding = SpeculativeDecoder(target, EagleNetwork(head), load_policy(spec))
    decoding.prefill([torch.randint(0, 2048, (context,)).tolist()], room - context)
    return decoding


if __name__ == "__main__":
    run_command(main)
