"""A Hugging Face causal LM with a cache that takes trees: the target, draft LMs, and the recorder's engine.

One forward sees, per query, the committed text of its row (or a prefix of it) and the tree slots named for it:
attention gets a 4D additive mask for the new queries only, [R, 1, T, S], in the model's dtype, and explicit positions.
What it is given may lie on the host (live/border.py), what it answers lies on the model's device.
"""

from __future__ import annotations

import inspect
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from live.border import sent
from live.cache import TreeCache
from live.grouped_heads import grouped_heads
from live.streams import Streams
from policies.errors import UserError

_FULL = {"full_attention"}
_WINDOWED = {"sliding_attention", "chunked_attention"}
_NO_ATTENTION = {"moe", "mlp", "dense", "sparse"}
_RECURRENT = {"rwkv", "xlstm", "recurrent_gemma"}


class Output(NamedTuple):
    """What one forward gives.

    ``logits`` [R, T, V] in the model's dtype ([R, 1, V] for "last", None for "none"); ``captured`` [R, T, k * H]: the
    residual stream entering the k captured layers, or None when none is captured.
    """

    logits: Tensor | None
    captured: Tensor | None


class CachedModel:
    """``model`` with a cache of ``rows`` texts, each with a tree of drafted tokens behind its committed part.

    :param model: a decoder-only Hugging Face LM with full attention, in eval mode.
    :param rows: R, texts side by side.   :param capacity: slots per row to begin with (grows by doubling).
    :param layers_to_capture: indices i as in ``hidden_states[i]``: the stream entering layer i of n (i = n: the stream leaving
        the last one, before the final norm; i = n + 1: behind that norm, what the output layer reads).
    :raises UserError: when tree attention cannot be exact for this architecture.
    """

    def __init__(
        self, model: PreTrainedModel, rows: int = 1, capacity: int = 256, layers_to_capture: tuple[int, ...] = ()
    ):
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.context_limit, self.limit_name = check_supported(model)
        self.dtype = model.dtype
        self.device = model.get_input_embeddings().weight.device
        self.layers_to_capture = tuple(layers_to_capture)
        if any(not 0 <= i <= self.config.num_hidden_layers + 1 for i in layers_to_capture):
            raise UserError(
                f"cannot capture layers {self.layers_to_capture}: the model has layers 0 to "
                f"{self.config.num_hidden_layers}; name layers within that range"
            )
        layers = decoder_layers(model) if layers_to_capture else None
        decoder = _decoder(model) if last_hidden(model) in layers_to_capture else None
        self.streams = Streams(layers, self.layers_to_capture, decoder)
        self._head = model.get_output_embeddings()
        self._hidden = torch.finfo(self.dtype).min
        self._mask = torch.zeros(0, 1, 0, 0, dtype=self.dtype, device=self.device)
        self._masked = (0, 0)  # first column and number of columns that the last tree wrote into it
        self._wants_cache_position = "cache_position" in inspect.signature(model.forward).parameters
        self.cache = TreeCache(rows, capacity, self.config.num_hidden_layers, self.device)

    @property
    def rows(self) -> int:
        """R."""
        return self.cache.rows

    @property
    def lengths(self) -> Tensor:
        """Committed tokens per row, int64 [R]."""
        return self.cache.lengths

    @property
    def tree_size(self) -> int:
        """Tree slots in use behind the committed part, the same number in every row."""
        return self.cache.tree_size

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, counts: Tensor | None = None, logits: Literal["all", "last", "none"] = "last"
    ) -> Output:
        """Append ``tokens[r, :counts[r]]`` to each row's committed text (a prompt, or tokens to catch up with).

        :param tokens: int64 [R, L], padded on the right with any valid id.
        :param counts: int64 [R], default L for all; 0 leaves a row as it is (its outputs then mean nothing).
        :param logits: at all L places, at each row's last valid place only ([R, 1, V]), or not at all.
        :raises UserError: when a row would exceed the model's context (nothing is changed then).
        """
        cache = self.cache
        if cache.tree_size:
            raise ValueError("prefill() needs an empty tree: commit() or drop_tree() first")
        length = tokens.shape[1]
        host = [length] * cache.rows if counts is None else counts.tolist()
        longest = max(a + b for a, b in zip(cache.host_lengths, host, strict=True))
        self._check_context(longest)
        steps = torch.arange(length, device=self.device)
        places = cache.lengths[:, None] + steps  # [R, L], slots and positions alike
        mask = None if cache.longest == 0 or (length == 1 and cache.uniform) else self._causal_mask(places)
        positions = places if min(host) == length else places.clamp(max=max(longest - 1, 0))
        select = None
        if logits == "none":
            select = _nothing
        elif logits == "last" and length > 1:
            select = _last if min(host) == length else _at((counts - 1).clamp(min=0))
        output = self._forward(sent(tokens, self.device), positions, mask, select)
        cache.extend(host)
        return output if logits != "none" else output._replace(logits=None)

    @torch.no_grad()
    def forward_tree(self, tokens: Tensor, prefix: Tensor | None, positions: Tensor, ancestors: Tensor) -> Output:
        """Run T new tree tokens per row and append them to the tree as T slots.

        :param tokens: int64 [R, T]; padding may be any valid id (it then takes a slot that nobody names).
        :param prefix: int64 [R, T], query (r, j) sees committed slots s < prefix[r, j]; None: all of its row.
        :param positions: int64 [R, T], each token's position in its text.
        :param ancestors: bool [R, T, tree_size + T], tree slots that each query sees, itself included.
        :raises UserError: when a position lies beyond the model's context.
        """
        cache = self.cache
        new = tokens.shape[1]
        if ancestors.shape[2] != cache.tree_size + new:
            raise ValueError(f"ancestors has {ancestors.shape[2]} columns, not {cache.tree_size} + {new}")
        if cache.longest + cache.tree_size + new > self.context_limit:
            self._check_context(int(positions.max()) + 1)
        mask = None
        if not (prefix is None and new == 1 and cache.uniform and self._sees_all(ancestors)):
            mask = self._tree_mask(None if prefix is None else sent(prefix, self.device), sent(ancestors, self.device))
        output = self._forward(sent(tokens, self.device), sent(positions, self.device), mask, None)
        cache.tree_size += new
        return output

    def commit(self, slots: Tensor, counts: Tensor) -> None:
        """Tree slots ``slots[r, :counts[r]]`` (int64 [R, A], -1 padded) become committed, in order; the rest is dropped.

        :raises ValueError: when a slot lies outside the tree.
        """
        self.cache.commit(slots, counts)

    def drop_tree(self) -> None:
        """Forget the tree; the committed text stays."""
        self.cache.drop_tree()

    def reset(self, rows: int | None = None) -> None:
        """Forget all texts; go on with ``rows`` empty rows (default: as many as before)."""
        self.cache.clear(self.cache.rows if rows is None else rows)

    def gather_rows(self, rows: Tensor) -> None:
        """Keep these rows, int64 [R'], in this order (-1: a new, empty row); drops the tree."""
        self.cache.gather(rows)

    def beside(self) -> CachedModel:
        """The same model with an empty cache of its own."""
        return CachedModel(self.model, layers_to_capture=self.layers_to_capture)

    def join(self, other: CachedModel) -> None:
        """The rows of ``other``, the same model beside us, behind our own; drops both trees."""
        self.cache.join(other.cache)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _sees_all(self, ancestors: Tensor) -> bool:
        return ancestors.shape[2] == 1 or (ancestors.is_cpu and bool(ancestors.all()))

    def _causal_mask(self, places: Tensor) -> Tensor:
        """Additive mask [R, 1, T, S] under which place p sees slots 0 .. p; ``places`` int64 [R, T]."""
        total = self.cache.longest + places.shape[1]
        slots = torch.arange(total, device=self.device)
        mask = torch.zeros(*places.shape, total, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(slots > places[..., None], self._hidden)[:, None]

    def _tree_mask(self, prefix: Tensor | None, ancestors: Tensor) -> Tensor:
        """Additive mask [R, 1, T, S] of the committed prefix and the named tree slots."""
        cache = self.cache
        rows, new, width = ancestors.shape
        total = cache.longest + width
        if prefix is None and cache.uniform:
            return self._standing_mask(ancestors, total)
        mask = torch.zeros(rows, new, total, dtype=self.dtype, device=self.device)
        if cache.uniform:
            if prefix is not None:
                slots = torch.arange(cache.longest, device=self.device)
                mask[..., : cache.longest].masked_fill_(slots >= prefix[..., None], self._hidden)
            mask[..., cache.longest :].masked_fill_(~ancestors, self._hidden)
            return mask[:, None]
        bound = cache.lengths[:, None] if prefix is None else prefix
        hidden = torch.arange(total, device=self.device) >= bound[..., None]  # [R, T, S], or [R, 1, S]
        hidden = hidden.expand(rows, new, total).clone()
        columns = cache.lengths[:, None] + torch.arange(width, device=self.device)
        hidden.scatter_(2, columns[:, None].expand(rows, new, width), ~ancestors)
        return mask.masked_fill_(hidden, self._hidden)[:, None]

    def _standing_mask(self, ancestors: Tensor, total: int) -> Tensor:
        """The same where all rows are equally long and queries see all of theirs: one mask stands from cycle to cycle, and only
        the columns of the last tree and of this one are written. Work grows with the tree, not with the context."""
        rows, new, width = ancestors.shape
        held = self._mask.shape
        if held[0] < rows or held[2] < new or held[3] < total:
            capacity = max(held[3], total, self.cache.capacity)
            self._mask = torch.zeros(max(held[0], rows), 1, max(held[2], new), capacity, dtype=self.dtype, device=self.device)
        else:
            self._mask.narrow(3, *self._masked).zero_()
        self._masked = total - width, width
        mask = self._mask[:rows, :, :new, :total]
        mask[:, 0, :, total - width :].masked_fill_(~ancestors, self._hidden)
        return mask

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, select) -> Output:
        """One call of the HF model; ``select`` thins the hidden states before the output head."""
        cache = self.cache
        cache.open(tokens.shape[1])
        thinned, extra = None, {}
        if select is not None and self._head is not None:
            thinned = self._head.register_forward_pre_hook(lambda _, args: (select(args[0]), *args[1:]))
        if self._wants_cache_position:
            extra["cache_position"] = torch.arange(cache.end - cache.new, cache.end, device=self.device)
        try:
            with self.streams:
                logits = self.run(tokens, positions, mask, extra)
        finally:
            if thinned is not None:
                thinned.remove()
        if select is not None and self._head is None:
            logits = select(logits)
        return Output(logits.to(self.device), self.streams.take(self.device))  # of a model on several devices, all on the first

    def run(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, extra: dict[str, Tensor]) -> Tensor:
        """The network's forward pass itself, and nothing else: logits [R, T, V]."""
        with grouped_heads(mask is not None and self.device.type == "cpu"):
            return self.model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True, **extra
            ).logits

    def _check_context(self, needed: int) -> None:
        if needed > self.context_limit:
            raise UserError(
                f"the text would reach {needed} tokens but {self.limit_name} is {self.context_limit}; "
                "shorten the prompt or lower the token limit"
            )


def _nothing(hidden: Tensor) -> Tensor:
    return hidden[:, :0]


def _last(hidden: Tensor) -> Tensor:
    return hidden[:, -1:]


def _at(places: Tensor):
    """Chooser of one place per row, int64 [R]."""
    return lambda hidden: hidden.gather(1, places.to(hidden.device)[:, None, None].expand(-1, 1, hidden.shape[2]))


def last_hidden(model: PreTrainedModel) -> int:
    """The boundary behind the final norm: what the output layer reads, the last hidden state of ``model``."""
    return model.config.get_text_config(decoder=True).num_hidden_layers + 1


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The model without its output layer. Raises UserError when it is not known."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is model:
        raise UserError(f"{type(model).__name__} keeps its decoder in an unknown place: use a drafter that does not read behind it")
    return decoder


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of decoder layers.

    :raises UserError: when no such list is found.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # not an image encoder of the same depth
    for module in (decoder or model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__} keeps its decoder layers in an unknown place; capture no layers with it")


def check_supported(model: PreTrainedModel) -> tuple[int, str]:
    """Largest context at which tree attention is exact, in tokens, and what sets that limit.

    :raises UserError: naming the model and what it has that trees cannot follow.
    """
    if str(model.config.get_text_config(decoder=True)._attn_implementation).startswith(("flash", "kernels", "paged", "flex")):
        raise UserError(
            f"{type(model).__name__} runs {model.config._attn_implementation}, which takes no tree mask; "
            "load it with attn_implementation='sdpa'"
        )
    return check_architecture(type(model), model.config)


def check_architecture(architecture: type[PreTrainedModel], whole: PreTrainedConfig) -> tuple[int, str]:
    """The same as :func:`check_supported` from class and configuration alone, before any weight is loaded."""
    name, config = architecture.__name__, whole.get_text_config(decoder=True)
    cure = "use a decoder with full attention (Llama, Qwen3, Mistral, Gemma, GPT-NeoX, GPT-2, Mixtral, ...)"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if odd := sorted(kinds - _FULL - _WINDOWED - _NO_ATTENTION):
        raise UserError(f"{name} has layers of type {', '.join(odd)}, where tree attention cannot be exact; {cure}")
    if getattr(architecture, "_is_stateful", False) or config.model_type in _RECURRENT:
        raise UserError(f"{name} has a recurrent state, where tree attention cannot be exact; {cure}")
    if whole.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder model, which tree decoding does not cover; {cure}")
    if getattr(config, "alibi", False) or config.model_type in {"bloom", "mpt"}:
        raise UserError(f"{name} derives ALiBi biases from a flat mask, so it takes no tree mask; {cure}")
    if "local" in getattr(config, "attention_layers", ()):
        raise UserError(f"{name} counts its local attention by cache slots, so it takes no tree mask; {cure}")
    if "position_ids" not in inspect.signature(architecture.forward).parameters:
        raise UserError(f"{name} takes no explicit positions, which trees need; {cure}")
    limits = [(getattr(config, "max_position_embeddings", None) or 1 << 40, "the model's context")]
    window = getattr(config, "sliding_window", None)
    if window and ("sliding_attention" in kinds or not getattr(config, "layer_types", None)):
        limits.append((window, "the model's sliding window, within which trees are exact,"))
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and "chunked_attention" in kinds:
        limits.append((chunk, "the model's attention chunk, within which trees are exact,"))
    rotary = getattr(config, "rope_parameters", None) or {}
    for told in (rotary, *(part for part in rotary.values() if isinstance(part, dict))):
        if told.get("rope_type") in ("dynamic", "longrope"):  # further on all frequencies depend on the longest row
            original = told.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
            limits.append((original or limits[0][0], "the context up to which the rotary embedding keeps its frequencies"))
    return min(limits, key=lambda pair: pair[0])
