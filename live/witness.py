"""An outside witness: a fixed chain with the draft LM must equal Hugging Face's assisted generation, cycle for cycle.

Replay and live decoding share code and could share bugs; this decoder shares none with either.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from live.decode import SpeculativeDecoder
from live.lm_network import LanguageModelNetwork
from policies.registry import load_policy

if TYPE_CHECKING:
    from live.pair import Pair
    from traces.recording import Recording

CHAIN = 5


def check_witness(recording: Recording, pair: Pair, drafter: str, texts: int) -> dict[str, Any]:
    """Tokens gained per cycle by both decoders, over the prompts of the first ``texts`` texts that are plainly greedy."""
    network = pair.networks[drafter]
    counts = {"texts": 0, "cycles": 0, "unexplained": 0}
    settings = [recording.sampling(sequence) for sequence in range(len(recording.length))]
    greedy = [i for i, one in enumerate(settings) if one["temperature"] == 0 and one["repetition_penalty"] == 1]
    sequences = greedy[:texts]
    for sequence in tqdm(sequences, desc="assisted generation", unit="text", file=sys.stderr, leave=False):
        prompt, length = recording.prompt_tokens(sequence).tolist(), int(recording.length[sequence])
        theirs = assisted_gains(pair.model, network.model.model, prompt, length)
        ours = chain_gains(pair, network, prompt, length)
        counts["texts"] += 1
        counts["cycles"] += len(theirs)
        counts["unexplained"] += int(ours != theirs)
    counts["line"] = (
        f"chain(k={CHAIN}) with {drafter} against assisted generation: {counts['cycles']} cycles of {counts['texts']} texts, "
        f"{counts['unexplained']} texts differ"
    )
    return counts


def why_not(pair: Pair, drafter: str) -> str:
    """Why assisted generation cannot run this draft: it takes two models of one vocabulary size. Empty where it can."""
    ours, theirs = (
        model.config.get_text_config(decoder=True).vocab_size for model in (pair.model, pair.networks[drafter].model.model)
    )
    if ours == theirs:
        return ""
    return (
        f"{drafter} pads its vocabulary to {theirs} tokens and the target to {ours}, which assisted generation does not take: "
        "no outside witness for it"
    )


def chain_gains(pair: Pair, network: LanguageModelNetwork, prompt: list[int], length: int) -> list[int]:
    """Tokens gained per cycle by our loop. Assisted generation drafts from the last prompt token on, so ours does here."""
    decoder = SpeculativeDecoder(pair.target(), network, load_policy(f"chain(k={CHAIN})"), pair.end_tokens)
    decoder.prefill([prompt[:-1]], length + 1, root=torch.tensor(prompt[-1:]))
    gains = []
    while (step := decoder.step()) is not None:
        gains.append(int(step.gained[0]))
    return gains


def assisted_gains(target: PreTrainedModel, draft: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """Tokens gained per cycle by ``generate(assistant_model=...)`` with a constant schedule and no confidence stop."""
    tokens = torch.tensor([prompt], device=target.device)
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = CHAIN, "constant"
    settings.assistant_confidence_threshold = 0.0
    with _listening() as gains:
        target.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=length,
            assistant_model=draft,
            pad_token_id=0,
        )
    return gains


@contextlib.contextmanager
def _listening() -> Iterator[list[int]]:
    """Collect the gains that assisted generation reports to its candidate generator behind each cycle."""
    gains: list[int] = []
    original = AssistedCandidateGenerator.update_candidate_strategy

    def listen(self, input_ids, scores, num_matches):
        gains.append(int(num_matches) + 1)
        return original(self, input_ids, scores, num_matches)

    AssistedCandidateGenerator.update_candidate_strategy = listen
    try:
        yield gains
    finally:
        AssistedCandidateGenerator.update_candidate_strategy = original
