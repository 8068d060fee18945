"""Plain decoding, one token per forward: the reference every speculative text must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from live.border import fetched
from live.model import CachedModel
from live.sampling import GREEDY, Sampler
from policies.contract import Sampling
from policies.errors import UserError


@torch.inference_mode()
def plain_decode(
    model: CachedModel,
    prompts: list[list[int]],
    max_new_tokens: int | Sequence[int],
    eos_ids: Sequence[int],
    on_token: Callable[[int, int], None] | None = None,
    sampling: Sampling = GREEDY,
    text: Sequence[int] | None = None,
    on_nan: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continuations of several prompts, decoded as one batch: greedy (of equals, the lowest id), or sampled.

    :param model: its cache is reset to one row per prompt.
    :param prompts: token ids; none may be empty.
    :param max_new_tokens: at most so many per prompt, or a limit for each.
    :param eos_ids: a row stops after one of these, which is part of its text.
    :param on_token: called with (prompt index, token) as tokens come.
    :param sampling: how tokens are chosen.
    :param text: numbers of the texts, which key their uniform numbers; 0, 1, 2, ... by default.
    :param on_nan: called with (prompt index, position) where a row's logits are not numbers; the row stops there.
    :raises UserError: when a text would exceed the model's context, and for logits that are not numbers without ``on_nan``.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if not prompts or min(limits) < 1:
        return texts
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt has no tokens")
    stop = frozenset(eos_ids)
    model.reset(len(prompts))
    longest = max(map(len, prompts))
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    counts = torch.tensor([len(prompt) for prompt in prompts])
    numbers = torch.tensor(list(range(len(prompts)) if text is None else text))
    active = list(range(len(prompts)))  # prompt index of each row
    logits = model.prefill(padded, counts, logits="last").logits
    sampler = Sampler(sampling, numbers, padded, counts, logits)
    for position in range(max(limits)):
        choice = sampler.choose(logits, torch.full_like(numbers, position)[:, None])[:, 0]
        chosen, spoilt = fetched(torch.stack([choice, _broken(logits)]))
        sampler.commit(chosen[:, None], torch.ones_like(chosen))
        staying = []
        for row, (token, broken) in enumerate(zip(chosen.tolist(), spoilt.tolist(), strict=True)):
            prompt = active[row]
            if broken:
                _tell_nan(on_nan, prompt, position)
                continue
            texts[prompt].append(token)
            if on_token is not None:
                on_token(prompt, token)
            if token not in stop and position + 1 < limits[prompt]:
                staying.append(row)
        if not staying:
            break
        if len(staying) < len(active):
            kept = torch.tensor(staying)
            model.gather_rows(kept)
            sampler.gather_rows(kept)
            numbers, chosen, active = numbers[kept], chosen[kept], [active[row] for row in staying]
        logits = model.prefill(chosen[:, None], logits="last").logits
    return texts


def _broken(logits: Tensor) -> Tensor:
    """1 where a row's logits [R, 1, V] hold something that is not a number (a maximum passes NaN on), else 0: int64 [R]."""
    return logits[:, 0].amax(-1).isnan().long()


def _tell_nan(on_nan: Callable[[int, int], None] | None, prompt: int, position: int) -> None:
    if on_nan is None:
        raise UserError(
            f"the target's logits for token {position} behind prompt {prompt} are not numbers (NaN): "
            "use another --dtype, or check the model's weights"
        )
    on_nan(prompt, position)
