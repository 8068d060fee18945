"""``model.generate(custom_generate=live.speculate(...))`` is ``model.generate``, only in fewer target calls."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import live
from live.model import CachedModel
from live.pair import encode_prompt
from policies.errors import UserError
from tests.tiny_pair import DOMAINS

TREE = "eagle3(total_tokens=9, depth=3, top_k=4)"


class Kept(BaseStreamer):
    """Keeps what it is told."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.fixture(scope="module")
def inputs(pair64) -> dict[str, torch.Tensor]:
    """Six prompts of different lengths, padded on the left."""
    texts = [text for texts in DOMAINS.values() for text in texts]
    prompts = [encode_prompt(pair64.tokenizer, [{"role": "user", "content": text}]) for text in texts]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])}


@pytest.fixture(scope="module")
def hooks(tiny_pair):
    drafts = {"eagle3": tiny_pair.eagle3, "draft": tiny_pair.draft, "both": f"prompt_lookup(ngram=2)+{tiny_pair.eagle3}"}
    return {name: live.speculate(draft, TREE, seed=3) for name, draft in drafts.items()}


def alone(inputs, row: int) -> dict[str, torch.Tensor]:
    own = inputs["attention_mask"][row].bool()
    return {name: value[row : row + 1, own] for name, value in inputs.items()}


def greedy(pair, inputs, **options):
    return pair.model.generate(**inputs, do_sample=False, pad_token_id=0, **{"max_new_tokens": 24} | options)


@pytest.mark.parametrize("name", ["eagle3", "draft", "both"])
def test_a_left_padded_batch_says_the_same(pair64, inputs, hooks, name):
    """End tokens, padding behind them, repetition penalty."""
    for options in ({}, {"repetition_penalty": 1.2}, {"renormalize_logits": True}):
        told = greedy(pair64, inputs, **options)
        assert greedy(pair64, inputs, custom_generate=hooks[name], **options).tolist() == told.tolist()
    assert bool((told[:, -1] == 0).any())  # some texts ended early


def test_return_dict_and_max_length(pair64, inputs, hooks):
    one = alone(inputs, 0)
    options = {"max_new_tokens": None, "max_length": one["input_ids"].shape[1] + 7, "return_dict_in_generate": True}
    told = greedy(pair64, one, **options)
    found = greedy(pair64, one, custom_generate=hooks["eagle3"], **options)
    assert type(found) is type(told) and found.sequences.tolist() == told.sequences.tolist()
    assert found.sequences.shape[1] <= options["max_length"]


def test_streamer_hears_prompt_and_every_token(pair64, inputs, hooks):
    one, ours, theirs = alone(inputs, 1), Kept(), Kept()
    told = greedy(pair64, one, streamer=theirs)
    greedy(pair64, one, custom_generate=hooks["eagle3"], streamer=ours)
    assert ours.tokens == theirs.tokens == told[0].tolist() and ours.ended == 1


def test_stop_strings_and_stopping_criteria(pair64, tiny_pair, inputs, hooks, tmp_path, monkeypatch):
    one = alone(inputs, 1)
    whole = greedy(pair64, one)[0, one["input_ids"].shape[1] :]
    stop = pair64.tokenizer.decode(whole[5:7])
    told = greedy(pair64, one, stop_strings=[stop], tokenizer=pair64.tokenizer)
    assert told.shape[1] < one["input_ids"].shape[1] + len(whole)
    criteria = StoppingCriteriaList([StopStringCriteria(pair64.tokenizer, [stop])])
    assert greedy(pair64, one, custom_generate=hooks["eagle3"], stopping_criteria=criteria).tolist() == told.tolist()
    own = live.speculate(tiny_pair.eagle3, TREE, tokenizer=pair64.tokenizer, stop_strings=[stop])
    assert greedy(pair64, one, custom_generate=own).tolist() == told.tolist()
    monkeypatch.setattr(pair64.model.config, "_name_or_path", str(tmp_path))
    with pytest.raises(UserError, match="pass tokenizer=... to live.speculate"):
        greedy(pair64, one, custom_generate=hooks["eagle3"], stop_strings=[stop])


def test_stop_strings_as_generate_takes_them(pair64, inputs, hooks):
    """In a batch of which rows stop at different places, some at their end tokens."""
    whole = greedy(pair64, inputs)[:, inputs["input_ids"].shape[1] :]
    stops = [pair64.tokenizer.decode(whole[1, 5:7]), pair64.tokenizer.decode(whole[3, 9:11])]
    told = greedy(pair64, inputs, stop_strings=stops, tokenizer=pair64.tokenizer)
    found = greedy(pair64, inputs, custom_generate=hooks["draft"], stop_strings=stops, tokenizer=pair64.tokenizer)
    assert found.tolist() == told.tolist()
    stopped = (told != greedy(pair64, inputs)[:, : told.shape[1]]).any(1)
    assert bool(stopped[1]) and bool(stopped[3]) and bool((told[:, -1] == 0).any())
    # of a tokenizer that lies beside the model nobody need speak
    assert greedy(pair64, inputs, custom_generate=hooks["draft"], stop_strings=stops).tolist() == told.tolist()


def test_criteria_of_ones_own_take_the_place_of_those_that_generate_makes(pair64, inputs, hooks):
    one = alone(inputs, 1)
    begin = one["input_ids"].shape[1]
    end = int(greedy(pair64, one)[0, begin + 4])
    at_once = StopStringCriteria(pair64.tokenizer, [pair64.tokenizer.decode(greedy(pair64, one)[0, begin])])
    for criterion in (MaxLengthCriteria(begin + 5), EosTokenCriteria(end), MaxTimeCriteria(0.0), at_once):
        options = {"stopping_criteria": StoppingCriteriaList([criterion])}
        told = greedy(pair64, one, **options)
        assert told.shape[1] < begin + 24
        assert greedy(pair64, one, custom_generate=hooks["eagle3"], **options).tolist() == told.tolist()


def test_a_row_that_fails_is_named_and_the_others_go_on(pair64, inputs, hooks, monkeypatch):
    told, real, used = greedy(pair64, inputs), CachedModel.run, [0]

    def poisoned(model, *args):
        logits, used[0] = real(model, *args), used[0] + 1
        if used[0] == 3:
            logits[1] = torch.nan
        return logits

    monkeypatch.setattr(CachedModel, "run", poisoned)
    with pytest.warns(UserWarning, match="prompt 1 are not numbers"):
        found = greedy(pair64, inputs, custom_generate=hooks["eagle3"])
    begin = inputs["input_ids"].shape[1]
    assert [row == other for row, other in zip(found.tolist(), told.tolist(), strict=True)] == [True, False, *[True] * 4]
    count = int((found[1, begin:] != 0).sum())
    assert 0 < count and found[1, : begin + count].tolist() == told[1, : begin + count].tolist()


def test_a_text_alone_that_fails_is_an_error(pair64, inputs, hooks, monkeypatch):
    real = CachedModel.run
    monkeypatch.setattr(CachedModel, "run", lambda model, *args: torch.full_like(real(model, *args), torch.nan))
    with pytest.raises(UserError, match="not numbers"):
        greedy(pair64, alone(inputs, 0), custom_generate=hooks["eagle3"])


def test_too_little_memory_makes_the_batch_smaller(pair64, inputs, hooks, monkeypatch):
    told, real = greedy(pair64, inputs), CachedModel.run

    def small(model, tokens, *rest):
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, tokens, *rest)

    monkeypatch.setattr(CachedModel, "run", small)
    with pytest.warns(UserWarning, match="memory ran out: going on with a batch of 3"):
        assert greedy(pair64, inputs, custom_generate=hooks["eagle3"]).tolist() == told.tolist()


def test_after_an_interrupt_the_streamer_shows_what_there_is(pair64, inputs, hooks, monkeypatch):
    one, heard, real, used = alone(inputs, 1), Kept(), CachedModel.run, [0]
    told = greedy(pair64, one)[0].tolist()

    def interrupted(model, *args):
        used[0] += 1
        if used[0] == 4:
            raise KeyboardInterrupt
        return real(model, *args)

    monkeypatch.setattr(CachedModel, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        greedy(pair64, one, custom_generate=hooks["eagle3"], streamer=heard)
    assert one["input_ids"].shape[1] < len(heard.tokens) < len(told)
    assert heard.tokens == told[: len(heard.tokens)] and heard.ended == 1


def test_sampled_text_depends_on_the_seed_and_not_on_the_policy(pair64, tiny_pair, inputs, hooks):
    one = alone(inputs, 2)
    options = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.9, "max_new_tokens": 24, "pad_token_id": 0}

    def sample(hook):
        return pair64.model.generate(**one, **options, custom_generate=hook).tolist()

    told = sample(hooks["eagle3"])
    assert told == sample(hooks["draft"]) == sample(live.speculate(tiny_pair.eagle3, "autoregressive", seed=3))
    assert told != sample(live.speculate(tiny_pair.eagle3, TREE, seed=4))
    free = live.speculate(tiny_pair.eagle3, TREE)
    torch.manual_seed(0)
    first, second = sample(free), sample(free)
    torch.manual_seed(0)
    assert first == sample(free) and first != second


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
        ({"min_new_tokens": 5}, "MinLengthLogitsProcessor"),
        ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper"),
        ({"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2, 3)])}, "prompt_ignore_length"),
        (
            {"do_sample": True, "top_k": 0, "logits_processor": LogitsProcessorList([TopPLogitsWarper(0.9, min_tokens_to_keep=4)])},
            "min_tokens",
        ),
        (
            {"do_sample": True, "top_k": 0, "logits_processor": LogitsProcessorList([TopKLogitsWarper(9, filter_value=-9.0)])},
            "filter_value",
        ),
        ({"position_ids": torch.arange(3, 500)[None]}, "position_ids"),
        ({"num_beams": 2}, "num_beams"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    ],
)
def test_what_would_change_the_text_is_refused_by_name(pair64, inputs, hooks, options, named):
    one = alone(inputs, 0)
    if "position_ids" in options:
        options = {"position_ids": options["position_ids"][:, : one["input_ids"].shape[1]]}
    with pytest.raises(UserError, match=named):
        pair64.model.generate(
            **one, custom_generate=hooks["eagle3"], **{"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24} | options
        )


def test_inputs_that_do_not_fit(pair64, inputs, hooks):
    hidden = dict(inputs, attention_mask=inputs["attention_mask"].flip(1))
    with pytest.raises(UserError, match="left only"):
        greedy(pair64, hidden, custom_generate=hooks["eagle3"])
    long = {"input_ids": torch.full((1, 300), 5), "attention_mask": torch.ones(1, 300, dtype=torch.int64)}
    with pytest.raises(UserError, match="shorten it"):
        greedy(pair64, long, custom_generate=hooks["eagle3"])
    with pytest.raises(UserError, match="one prompt at a time"):
        greedy(pair64, inputs, custom_generate=hooks["eagle3"], streamer=Kept())
