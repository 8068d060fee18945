"""Speculative decoding inside Hugging Face's own ``generate``, through its hook for callables.

    model.generate(**inputs, custom_generate=live.speculate(draft="org/head", policy="eagle3"), max_new_tokens=128)

https://huggingface.co/docs/transformers/generation_strategies#custom-generation-methods: ``generate`` prepares inputs, logits
processors and stopping criteria, then calls us with the model in place of its own sampling loop.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

from live.batcher import Batcher, Request
from live.decode import SpeculativeDecoder
from live.heads import kind_of, load_head
from live.hook_settings import end_tokens, refuse, sampling_of, unpadded
from live.hub import parse_source, resolve
from live.identity import check_same_tokenizer, tokenizer_hash
from live.lm_network import LanguageModelNetwork
from live.loading import load_model, load_tokenizer
from live.looking_up_first import Drafts, RuleFirst
from live.model import CachedModel
from live.network import DraftNetwork
from live.pair import SHIPPED_DRAFTS, asked_of
from policies.contract import Policy
from policies.errors import UserError
from policies.lookup.rule import load_rule
from policies.registry import load_policy

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


def speculate(
    draft: str,
    policy: str | Policy,
    seed: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | list[str] | None = None,
    streamer: BaseStreamer | None = None,
) -> Callable:
    """What ``model.generate(custom_generate=...)`` takes; keep it, since the draft is loaded once per model.

    ``generate`` takes ``stop_strings``, ``streamer`` and everything else as usual; the last three arguments here are for those
    who would rather set them once, and for a tokenizer that does not lie beside the model: ``generate`` keeps its own one from
    callables. What it does not take, it refuses by name. Beyond ``generate``: each row of a batch ends where a criterion says so,
    whether or not there is an end token.

    :param draft: folder or hub id of a draft head or a draft LM, with its options as in live/hub.py ("reference/eagle3",
        "reference/draft", "reference/medusa" and "reference/dflash" are the shipped ones), a training-free drafter,
        ``suffix(depth=8)``, or one that is asked first, ``suffix+reference/eagle3``.
    :param policy: name, name with parameters, JSON file, FILE.py:CLASS, or the object.
    :param seed: of sampled texts; drawn from torch's generator by default, so that ``torch.manual_seed`` rules.
    :param tokenizer: the target's, for stop strings and to compare with a draft LM's or a corpus's (default: the one beside the
        model).
    :raises UserError: when called, for whatever would change the text or is not covered, by name; for a text whose logits are not
        numbers or that finds no memory (in a batch the others go on: a warning names it, and it ends where it stood).
    """
    policy = load_policy(policy) if isinstance(policy, str) else policy
    policy.check_fitted()
    drafts: dict[int, tuple[PreTrainedModel, CachedModel, Drafts, int]] = {}
    own_stop_strings = stop_strings

    def custom_generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        stop_strings: str | list[str] | None = None,  # as generate got it: it hands a callable whatever its signature names
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        told = streamer or model_kwargs.pop("streamer", None) or _streamer_of_caller()
        model_kwargs.pop("synced_gpus", None)
        refuse(generation_config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        prompts = unpadded(input_ids, mask, model_kwargs.get("position_ids"))
        padding = [input_ids.shape[1] - len(prompt) for prompt in prompts]
        sampling = sampling_of(logits_processor, generation_config, seed, padding)
        if told is not None and len(prompts) > 1:
            raise UserError("a streamer follows one text: stream with one prompt at a time")
        criteria = [one for one in stopping_criteria if not isinstance(one, EosTokenCriteria | MaxLengthCriteria)]
        if wanted := stop_strings or own_stop_strings:
            criteria.append(StopStringCriteria(tokenizer or _tokenizer_of(model), wanted))
        if id(model) not in drafts:
            drafts[id(model)] = model, *attach(model, draft, tokenizer)
        _, target, drafting, limit = drafts[id(model)]
        decoder = SpeculativeDecoder(target, drafting, policy, end_tokens(stopping_criteria), context_limit=limit)
        batcher = Batcher(decoder, len(prompts), say=lambda sentence: warnings.warn(sentence, stacklevel=2))
        longest = min(one.max_length for one in stopping_criteria if isinstance(one, MaxLengthCriteria)) - input_ids.shape[1]
        texts = _Texts(batcher, input_ids, criteria, told)
        requests = [batcher.submit(prompt, max(longest, 1), sampling) for prompt in prompts]
        try:
            for request, tokens in batcher.stream():
                texts.put(request, tokens)
        finally:  # after an interrupt, too, the streamer shows what was generated
            if told is not None:
                told.end()
        errors = [request.error for request in requests if request.error]
        if len(errors) == len(requests):
            raise UserError(errors[0])
        for error in errors:
            warnings.warn(error, stacklevel=2)
        return texts.padded(generation_config)

    return custom_generate


class _Texts:
    """Collects the texts as they come, streams them, and ends those that a stopping criterion ends."""

    def __init__(self, batcher: Batcher, input_ids: Tensor, criteria: list, streamer: BaseStreamer | None):
        self.batcher, self.input_ids, self.criteria, self.streamer = batcher, input_ids, criteria, streamer
        self.new: list[list[int]] = [[] for _ in input_ids]
        self.stopped: set[int] = set()

    def put(self, request: Request, tokens: list[int]) -> None:
        row = request.number
        for token in tokens if row not in self.stopped else ():
            self.new[row].append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            if self.criteria:
                text = torch.cat([self.input_ids[row], self.input_ids.new_tensor(self.new[row])])[None]
                if any(bool(torch.as_tensor(criterion(text, None)).all()) for criterion in self.criteria):
                    self.batcher.stop(request)
                    self.stopped.add(row)
                    return  # inside a cycle: what it emitted behind is not part of the text

    def padded(self, config: GenerationConfig) -> Tensor | GenerateDecoderOnlyOutput:
        """Sequences int64 [R, prompt + longest text], shorter texts filled up with the padding token."""
        longest, pad = max(map(len, self.new)), config.pad_token_id
        if pad is None:
            ends = config.eos_token_id
            pad = ends[0] if isinstance(ends, list) else ends or 0
        rows = [text + [pad] * (longest - len(text)) for text in self.new]
        sequences = torch.cat([self.input_ids, self.input_ids.new_tensor(rows)], dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences


def attach(
    model: PreTrainedModel, draft: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[CachedModel, Drafts, int]:
    """The target with a cache, what drafts, and the context that both hold. Raises UserError when they do not fit."""
    asked = asked_of(draft)
    rule = None if asked.rule is None else load_rule(asked.rule)
    if rule is not None and rule.frozen is not None:
        rule.frozen.check_tokenizer(tokenizer_hash(tokenizer or _tokenizer_of(model)), "the target")
    if asked.network is None:
        target = CachedModel(model)
        return target, rule, target.context_limit
    target, network, limit = _attach_network(model, asked.network, tokenizer)
    return target, network if rule is None else RuleFirst(rule, network), limit


def _attach_network(
    model: PreTrainedModel, draft: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[CachedModel, DraftNetwork, int]:
    """:func:`attach` for a network."""
    source = parse_source(draft)
    shipped = source.name in SHIPPED_DRAFTS
    folder = resolve("reference", source.name.split("/")[1]) if shipped else resolve(source.name)
    if (kind := kind_of(folder, source.revision)) != "lm":
        network, layers, _ = load_head(kind, folder, source, CachedModel(model))
        target = CachedModel(model, layers_to_capture=layers)
        return target, network, target.context_limit
    target = CachedModel(model)
    tokenizer = tokenizer or _tokenizer_of(model)
    check_same_tokenizer(tokenizer, load_tokenizer(folder, source.revision))
    own = CachedModel(load_model(folder, model.dtype, target.device, source.revision, part="draft"))
    network = LanguageModelNetwork(own, source.name, model.get_input_embeddings().weight.shape[0])
    return target, network, min(target.context_limit, own.context_limit)


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model. Raises UserError when there is none."""
    try:
        return load_tokenizer(model.config._name_or_path)
    except UserError as error:
        raise UserError(f"{error}, or pass tokenizer=... to live.speculate") from error


def _streamer_of_caller() -> BaseStreamer | None:
    """The streamer that ``generate`` was given.

    As of transformers 5.23 it hands the prompt to the streamer, then forgets it on the way to a callable
    (``_extract_generation_mode_kwargs`` makes its dictionary anew), while it still stands in its frame.
    """
    frame = sys._getframe(2)
    return frame.f_locals.get("streamer") if frame.f_code.co_name == "generate" else None
