"""A complete tiny Hugging Face pair on disk, so that every command can be run on it within seconds.

The target is a random Llama; the draft is the target with noise on its weights; the EAGLE-3 head is trained for a
moment on the target's own texts. So both drafters agree with the target often, and not always.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch

CONTEXT = 256
DOMAINS = {
    "story": ["the cat sat on the mat", "a dog ran home", "once upon a time there was a king"],
    "math": ["what is 2 plus 3", "add 14 and 27 then halve it", "count to 10"],
}
_SENTENCES = [
    "the quick brown fox jumps over the lazy dog\n",
    "what is 2 plus 3? add 14 and 27, then halve it. 5 6 8 9 0\n",
    "once upon a time there was a king who had a cat and a dog\n",
    "THE CAT SAT ON THE MAT; BY JOVE, PIXIES QUAFF WINE: GO HUM, VEX ZR!\n",
]
_NOISE = 0.04  # of a weight's standard deviation
_EMBEDDING = 3.0  # makes the last token weigh more than those before it, as it does in trained models
_STEPS = 100  # of the head's training
_DRAFTED = 96  # size of the head's vocabulary


@dataclass(frozen=True)
class TinyPair:
    """Folders of the parts, and one prompt file per domain."""

    folder: Path

    @property
    def target(self) -> str:
        return str(self.folder / "target")

    @property
    def draft(self) -> str:
        return str(self.folder / "draft")

    @property
    def eagle3(self) -> str:
        return str(self.folder / "eagle3")

    @property
    def prompts(self) -> list[str]:
        """As ``--prompts`` takes them."""
        return [f"{domain}={self.folder / domain}.jsonl" for domain in DOMAINS]

    def record(self, out: Path, *options: str) -> list[str]:
        """Arguments of ``traces.record``: 2 domains x 3 prompts, shards of two texts, 32 tokens."""
        models = ["--target", self.target, "--draft", self.eagle3, "--draft", self.draft]
        size = ["--batch", "2", "--max-new-tokens", "32", "--top-m", "8"]
        return [*models, "--prompts", *self.prompts, *size, "--out", str(out), *options]


def write_tiny_pair(folder: Path) -> TinyPair:
    """Write target, draft, eagle3 and prompts into ``folder``; the same numbers every time."""
    pair = TinyPair(folder)
    for domain, texts in DOMAINS.items():
        lines = [json.dumps({"prompt": text}) for text in texts]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = train_tokenizer()
    target = random_target(len(tokenizer))
    texts = said_texts(target, tokenizer)
    target.generation_config.eos_token_id = [tokenizer.eos_token_id, _end_token(texts)]
    draft = copy.deepcopy(target)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.dim() > 1:
                weight.add_(_NOISE * torch.randn_like(weight) * weight.std())
    for model, path in ((target, pair.target), (draft, pair.draft)):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    trained_head(target, texts).save_pretrained(pair.eagle3, dtype=torch.float32)
    return pair


def train_tokenizer(vocabulary: int = 160):
    """Byte-level BPE over the bytes that occur in the sentences; others are dropped."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from live.reference.tokenizer import CHAT_TEMPLATE, END, SPECIAL_TOKENS

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        _SENTENCES, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_target(vocabulary: int):
    """Six layers, because the head reads three streams in between."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=CONTEXT, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float().eval()
    model.get_input_embeddings().weight.data *= _EMBEDDING
    return model


@torch.no_grad()
def said_texts(target, tokenizer) -> list[torch.Tensor]:
    """Greedy texts of the prompts, each with its prompt in front, 40 tokens without any end: int64 [T] each."""
    from live.pair import encode_prompt

    said = []
    for text in [text for texts in DOMAINS.values() for text in texts]:
        ids = torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": text}])])
        settings = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0}
        said.append(target.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0])
    return said


def _end_token(texts: list[torch.Tensor]) -> int:
    """A token that ends one or two of the texts in the middle, so that all kinds of endings are recorded."""
    generated = [text[-40:].tolist() for text in texts]
    for place in range(6, 24):
        for row in generated:
            first = [other.index(row[place]) if row[place] in other else 99 for other in generated]
            if sum(place < 30 for place in first) <= 2 and min(first) == place:
                return row[place]
    raise AssertionError("no text of the tiny target can be ended in the middle: change its seed")


def trained_head(target, texts: list[torch.Tensor]):
    """A head over part of the vocabulary that has learned by heart some of what the target says in ``texts``."""
    from live.eagle3 import Eagle3Config, Eagle3Head, captured_layers
    from tests.live.dense import head_cells

    vocabulary = target.config.vocab_size
    torch.manual_seed(1)
    head = Eagle3Head(Eagle3Config(32, 64, 4, 2, 8, vocabulary, _DRAFTED, 32), target.get_input_embeddings().weight)
    said = torch.cat([*(text[-40:] for text in texts), torch.arange(vocabulary)]).tolist()
    drafted = torch.tensor(sorted(list(dict.fromkeys(said))[:_DRAFTED]))
    head.d2t.copy_(drafted - torch.arange(_DRAFTED))
    head.t2d[drafted] = True
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # on the right: causal passes do not see it
    generated = torch.zeros_like(padded, dtype=torch.bool)
    for row, text in enumerate(texts):
        generated[row, len(text) - 40 : len(text) - 1] = True
    generated = generated[:, 1:]
    with torch.no_grad():
        out = target(input_ids=padded, output_hidden_states=True)
        features = torch.cat([out.hidden_states[layer] for layer in captured_layers(6)], dim=-1)[:, :-1]
        wanted = torch.log_softmax(out.logits[:, 1:, drafted], dim=-1)[generated]
    step = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(_STEPS):
        guess = head.logits(head_cells(head, head.fuse(features), padded[:, 1:]))[generated]
        loss = torch.nn.functional.kl_div(torch.log_softmax(guess, dim=-1), wanted, log_target=True, reduction="batchmean")
        step.zero_grad()
        loss.backward()
        step.step()
    return head.eval()
