"""What `sim.export` says to transformers is what transformers then does."""

from __future__ import annotations

import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from live.pair import load_pair
from policies.registry import load_policy
from sim.export import exported, shape_of


def test_an_exported_chain_is_drafted(monkeypatch):
    pair = load_pair("reference", ["reference/draft"])
    (export,) = [
        one
        for one in exported(shape_of(load_policy("chain(k=3)")), {"kind": "lm", "id": "x"}, {"id": "y"}, [0.5], {})
        if one.engine == "transformers"
    ]
    drafted, original = [], AssistedCandidateGenerator.get_candidates

    def listen(self, input_ids, *rest, **named):
        found = original(self, input_ids, *rest, **named)
        drafted.append(found[0].shape[1] - input_ids.shape[1])
        return found

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", listen)
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "max_new_tokens": 24, "do_sample": False}
    exec(export.command, {"model": pair.model, "assistant": pair.networks["draft"].model.model, "inputs": inputs})
    assert len(drafted) > 5 and set(drafted[:-2]) == {3}  # at the end there is no room for three
