"""What ``generate`` prepared, in our terms: sampling settings, prompts without padding, end tokens; the rest is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.logits_process import (
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria

from policies.contract import Sampling
from policies.errors import UserError

_ORDER = (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    LogitNormalization,  # changes no probability
)
_PREPARED = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache", "cache_position"}
"""What ``generate`` itself prepares for its own loop, and ours does without or makes itself."""


def sampling_of(processors: LogitsProcessorList, config: GenerationConfig, seed: int | None, padding: list[int]) -> Sampling:
    """Our settings for what ``generate`` prepared.

    :param padding: tokens on the left of each prompt that are hidden.
    :raises UserError: for a processor that we do not apply, or not with its options, or not in the order it comes in.
    """
    kinds = [type(one) for one in processors]
    for kind in kinds:
        if kind not in _ORDER:
            known = ", ".join(one.__name__ for one in _ORDER)
            raise UserError(f"speculative decoding does not apply {kind.__name__}: leave it out, or use one of {known}")
    if kinds != [kind for kind in _ORDER if kind in kinds]:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise UserError(f"the logits processors come twice or in an unusual order ({names}): set them as options of generate")
    for one in processors:
        _refuse_options(one, padding)
    by_kind = dict(zip(kinds, processors, strict=True))

    def setting(kind: type, name: str, default: float) -> float:
        return getattr(by_kind[kind], name) if kind in by_kind else default

    penalty = float(setting(RepetitionPenaltyLogitsProcessor, "penalty", 1.0))
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty)
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    top_p = float(setting(TopPLogitsWarper, "top_p", 1.0))
    top_k = int(setting(TopKLogitsWarper, "top_k", 0))
    return Sampling(float(setting(TemperatureLogitsWarper, "temperature", 1.0)), top_k, top_p, penalty, seed)


def _refuse_options(processor: LogitsProcessor, padding: list[int]) -> None:
    """Refuse what a processor of a known kind may have been told beyond its one number."""
    name = type(processor).__name__
    ignored = getattr(processor, "prompt_ignore_length", None)
    if ignored is not None and torch.as_tensor(ignored).expand(len(padding)).tolist() != padding:
        raise UserError(f"speculative decoding does not apply {name} with prompt_ignore_length: leave it out")
    if isinstance(processor, TopPLogitsWarper) and processor.min_tokens_to_keep > 1:
        raise UserError(f"speculative decoding does not apply {name} with min_tokens_to_keep: leave it out")
    if getattr(processor, "filter_value", -torch.inf) != -torch.inf:
        raise UserError(f"speculative decoding does not apply {name} with filter_value: leave it out")


def end_tokens(criteria: StoppingCriteriaList) -> list[int]:
    """Ids of all tokens that end a text: the generation config's, or those of a criterion that the caller gave instead."""
    ends = [one.eos_token_id for one in criteria if isinstance(one, EosTokenCriteria)]
    return sorted({int(token) for tokens in ends for token in tokens})


def unpadded(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> list[list[int]]:
    """The prompts without their padding on the left.

    Raises UserError when the mask hides anything else, or when the positions [R, L] do not count the tokens that it shows.
    """
    shown = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if positions is not None and bool(((positions != shown.cumsum(-1) - 1) & shown).any()):
        raise UserError("speculative decoding does not take position_ids of your own: leave it out")
    if shown.shape != input_ids.shape or bool((shown[:, :-1] & ~shown[:, 1:]).any()) or not bool(shown[:, -1].all()):
        raise UserError("the attention mask must hide padding on the left only: set padding_side='left' in the tokenizer")
    return [row[own].tolist() for row, own in zip(input_ids, shown, strict=True)]


def refuse(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise a UserError that names every option which would change the text or the result, and is not covered."""
    wants = {
        "num_beams": (config.num_beams or 1) > 1,
        "output_scores": config.output_scores,
        "output_logits": config.output_logits,
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
    }
    asked = [name for name, wanted in wants.items() if wanted]
    asked += [name for name, value in model_kwargs.items() if name not in _PREPARED and value is not None]
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        asked.append("past_key_values")
    if asked:
        raise UserError(f"speculative decoding does not take {', '.join(asked)}: leave it out")
