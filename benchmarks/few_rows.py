"""What few rows cost on a CPU: ``python -m benchmarks.few_rows`` times the target's forward pass with the linear layers of
`live.few_rows` and with PyTorch's own linear layers, interleaved, at 200 tokens of context; medians and quartiles in ms.
"""

from __future__ import annotations

import argparse
import statistics
import time

from policies.errors import run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(prog="python -m benchmarks.few_rows", description=__doc__.split(":")[0])
    parse.add_argument("--target", default="reference", help="model (default: the shipped one)")
    parse.add_argument("--context", type=int, default=200, help="tokens in the cache (default 200)")
    parse.add_argument("--rounds", type=int, default=40, help="timings of each (default 40)")
    return parse


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    import torch
    from transformers import DynamicCache

    from live.few_rows import FewRowsLinear
    from live.loading import load_model

    model = load_model(args.target)
    layers = [module for module in model.modules() if type(module) in (torch.nn.Linear, FewRowsLinear)]
    generator = torch.Generator().manual_seed(0)
    print(f"{'tokens':>6}  {'PyTorch linear':>22}  {'few rows':>22}")
    with torch.inference_mode():
        for count in (1, 2, 4, 8, 16, 32, 60):
            cache = DynamicCache(config=model.config)
            model(torch.randint(model.config.vocab_size, (1, args.context), generator=generator), past_key_values=cache)
            tokens = torch.randint(model.config.vocab_size, (1, count), generator=generator)
            times: dict[type, list[float]] = {torch.nn.Linear: [], FewRowsLinear: []}
            for _ in range(args.rounds):
                for kind, found in times.items():
                    for layer in layers:
                        layer.__class__ = kind
                    for _ in range(2):  # the first finds the other kind's caches
                        began = time.perf_counter()
                        model(tokens, past_key_values=cache)
                        spent = time.perf_counter() - began
                        cache.crop(-count)
                    found.append(spent * 1000)
            columns = ("{1:8.2f} ({0:.2f}-{2:.2f})".format(*statistics.quantiles(found, n=4)) for found in times.values())
            print(f"{count:6}  " + "  ".join(f"{column:>22}" for column in columns), flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
