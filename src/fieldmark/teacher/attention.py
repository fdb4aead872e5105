"""Attention over one shared prefix and several completions behind it.

Both functions here are registered with transformers' attention interface and are in force only inside `attention_for`:
a language model then runs its own layers (projections, rotary positions, MLPs), and only softmax(q k) v is ours.

- `packed_attention` (replay): one sequence [prefix | completion 1 | ... | completion G]. The prefix attends to itself;
  a completion attends to the prefix and to itself. The completions are unpacked to a [G, T] grid, so no score between
  two completions is ever computed, and padding exists only inside the attention step, not in the layers around it.
- `shared_prefix_attention` (rollout): one new token for each of pairs * G completions, against the keys of its pair's
  prefix, stored once a pair, and its own. One softmax over both parts.

Both are the plain causal attention of [prefix | completion g] for every g: same keys, same queries, same softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from fieldmark.errors import FieldmarkError

PACKED = "fieldmark_packed_completions"
SHARED_PREFIX = "fieldmark_shared_prefix"
_CACHE_BLOCK = 64


@dataclass
class AttentionRecorder:
    """Queries and keys of one layer, kept while it runs: enough to give the attention of a few rows.

    Attributes:
        layer: 0-based decoder layer.
        query: [N, H, d] completion queries after rotary positions, N = real tokens of all completions.
        key: [Hkv, P + N, d] keys of prefix and completions.
        scaling: factor on the scores.
    """

    layer: int
    query: Tensor | None = None
    key: Tensor | None = None
    scaling: float = 1.0

    def record(self, query: Tensor, key: Tensor, prefix: int, scaling: float) -> None:
        """Keeps q and k of the packed sequence (batch of one), detached."""
        self.query = query.detach()[0, :, prefix:].transpose(0, 1)
        self.key = key.detach()[0]
        self.scaling = scaling


@dataclass
class PackedLayout:
    """Where the completions lie in a packed sequence.

    Attributes:
        prefix: P, length of the shared prefix.
        groups: G.
        visible: [T, P + T] bool, keys that row t of a completion may see.
        grid: [G * T] index of each cell's token among the N packed completion tokens (padding repeats a real one); None
            when there is no padding.
        cells: [N] index of each packed token's cell; None when there is no padding.
        recorder: where one layer leaves its queries and keys.
    """

    prefix: int
    groups: int
    visible: Tensor
    grid: Tensor | None
    cells: Tensor | None
    recorder: AttentionRecorder | None = None

    @classmethod
    def of(cls, mask: Tensor, prefix: int, recorder: AttentionRecorder | None = None) -> PackedLayout:
        """The layout of completions with `mask` [G, T] (padding on the right is False) behind `prefix` tokens."""
        groups, length = mask.shape
        own = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        visible = torch.cat([own.new_ones(length, prefix), own], dim=1)
        if bool(mask.all()):
            return cls(prefix, groups, visible, None, None, recorder)
        cells = mask.flatten().nonzero().flatten()
        grid = (mask.flatten().cumsum(0) - 1).clamp_min(0)
        return cls(prefix, groups, visible, grid, cells, recorder)

    def unpack(self, states: Tensor) -> Tensor:
        """[1, H, N, d] packed completion states -> [G, H, T, d]."""
        if self.grid is not None:
            states = states.index_select(2, self.grid)
        heads, width = states.shape[1], states.shape[3]
        return states.view(heads, self.groups, -1, width).transpose(0, 1)

    def pack(self, states: Tensor) -> Tensor:
        """[G, T, H, d] -> [1, N, H, d]."""
        flat = states.flatten(0, 1)
        return (flat if self.cells is None else flat.index_select(0, self.cells))[None]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: PackedLayout,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Packed attention: query [1, H, P + N, d], key and value [1, Hkv, P + N, d] -> [1, P + N, H, d]."""
    prefix = packed.prefix
    _refuse_variants(kwargs, prefix + packed.visible.shape[0])
    if packed.recorder is not None and module.layer_idx == packed.recorder.layer and packed.recorder.query is None:
        packed.recorder.record(query, key, prefix, scaling)
    heads, kv_heads = query.shape[1], key.shape[1]
    prefix_out = scaled_dot_product_attention(
        query[:, :, :prefix],
        key[:, :, :prefix],
        value[:, :, :prefix],
        is_causal=True,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )
    groups, shared = packed.groups, (packed.groups, -1, -1, -1)
    keys = torch.cat([key[:, :, :prefix].expand(shared), packed.unpack(key[:, :, prefix:])], dim=2)
    values = torch.cat([value[:, :, :prefix].expand(shared), packed.unpack(value[:, :, prefix:])], dim=2)
    # Query heads that share a key head become more rows of it: grouped attention without copies of the keys.
    rows = packed.unpack(query[:, :, prefix:])
    repeats, length, width = heads // kv_heads, rows.shape[2], rows.shape[3]
    out = scaled_dot_product_attention(
        rows.reshape(groups, kv_heads, repeats * length, width),
        keys,
        values,
        attn_mask=packed.visible.repeat(repeats, 1),
        scale=scaling,
    )
    out = out.reshape(groups, heads, length, -1).transpose(1, 2)
    return torch.cat([prefix_out.transpose(1, 2), packed.pack(out)], dim=1), None


@dataclass
class SharedPrefix:
    """Keys and values of each pair's prompt, one copy a pair.

    Attributes:
        keys: for each layer [pairs, Hkv, P, d].
        values: for each layer [pairs, Hkv, P, d].
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def select(self, pairs: Tensor) -> None:
        """Keeps only these pairs."""
        self.keys = [keys.index_select(0, pairs) for keys in self.keys]
        self.values = [values.index_select(0, pairs) for values in self.values]


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    shared: SharedPrefix,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One decoding step: query [B, H, 1, d], own key and value [B, Hkv, t, d], B = pairs * G, pair-major."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    prefix_key, prefix_value = shared.keys[layer], shared.values[layer]
    pairs, kv_heads, prefix, width = prefix_key.shape
    _refuse_variants(kwargs, prefix + key.shape[2])
    batch, groups, repeats = query.shape[0], query.shape[0] // pairs, query.shape[1] // kv_heads
    query = query * scaling
    # All G queries of a pair are rows of one product with the pair's prefix keys, which are read once for all of them.
    rows = query.view(pairs, groups, kv_heads, repeats, width).transpose(1, 2).reshape(pairs, kv_heads, -1, width)
    seen = (rows @ prefix_key.transpose(2, 3)).view(pairs, kv_heads, groups, repeats, prefix).transpose(1, 2)
    own = query.view(batch, kv_heads, repeats, width) @ key.transpose(2, 3)
    scores = torch.cat([seen.reshape(batch, kv_heads, repeats, prefix), own], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights_seen = weights[..., :prefix].view(pairs, groups, kv_heads, repeats, prefix).transpose(1, 2)
    from_prefix = weights_seen.reshape(pairs, kv_heads, -1, prefix) @ prefix_value
    from_prefix = (
        from_prefix.view(pairs, kv_heads, groups, repeats, -1).transpose(1, 2).reshape(batch, kv_heads, repeats, -1)
    )
    out = from_prefix + weights[..., prefix:] @ value
    return out.reshape(batch, 1, kv_heads * repeats, -1), None


class CompletionLayer(DynamicLayer):
    """Keys and values of completions in a buffer that grows by blocks (a stock layer copies all at each token)."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.buffer: Tensor | None = None  # [2, B, Hkv, capacity, d]: keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds one token; returns the keys and values [B, Hkv, length, d] so far, as views."""
        if self.buffer is None:
            self.buffer = torch.stack([key_states[:, :, :0], value_states[:, :, :0]])
            self.is_initialized = True
        if self.length == self.buffer.shape[3]:
            self.buffer = nn.functional.pad(self.buffer, (0, 0, 0, _CACHE_BLOCK))
        self.buffer[0, :, :, self.length] = key_states[:, :, 0]
        self.buffer[1, :, :, self.length] = value_states[:, :, 0]
        self.length += 1
        return self.buffer[0, :, :, : self.length], self.buffer[1, :, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def select(self, rows: Tensor) -> None:
        """Keeps only these completions."""
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(1, rows)


def recorded_attention(recorder: AttentionRecorder, layout: PackedLayout, rows: Tensor, slots: Tensor) -> Tensor:
    """Mean attention of some completion tokens to each image (SAGA Eq. 6).

    Args:
        recorder: queries and keys of the layer.
        layout: the packed sequence they come from.
        rows: [G, n_images, T] bool, tokens that describe each image.
        slots: [n_images, N] positions of each image in the prefix.

    Returns:
        [G, n_images, N] float32: head-averaged attention, renormalised over the image for each token, averaged over its
        tokens; zero where an image has no token.
    """
    if recorder.query is None or recorder.key is None:
        raise RuntimeError("the recorder saw no layer")
    prefix, kv_heads = layout.prefix, recorder.key.shape[0]
    keys = recorder.key[None]
    own_keys = layout.unpack(keys[:, :, prefix:]).float()
    prefix_key = recorder.key[:, :prefix].float()
    queries = layout.unpack(recorder.query.transpose(0, 1)[None])
    targets = prefix_key.new_zeros(rows.shape[0], *slots.shape)
    for group in range(rows.shape[0]):
        wanted = rows[group].any(0).nonzero().flatten()
        if len(wanted) == 0:
            continue
        query = queries[group].index_select(1, wanted).float() * recorder.scaling
        query = query.reshape(kv_heads, -1, query.shape[-1])
        seen = query @ prefix_key.transpose(1, 2)
        own = query @ own_keys[group].transpose(1, 2)
        hidden = ~layout.visible[wanted, prefix:].repeat(own.shape[1] // len(wanted), 1)
        total = torch.logsumexp(torch.cat([seen, own.masked_fill(hidden, -torch.inf)], dim=-1), dim=-1, keepdim=True)
        heads = (seen[..., slots.flatten()] - total).exp().view(-1, len(wanted), *slots.shape)
        mean = heads.mean(0)
        mean = mean / mean.sum(-1, keepdim=True)
        weight = rows[group][:, wanted].to(mean.dtype)
        count = weight.sum(1, keepdim=True).clamp_min(1)
        targets[group] = torch.einsum("it,tin->in", weight / count, mean)
    return targets


@contextmanager
def attention_for(language_model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The language model uses one of this file's functions inside, and what it used before outside."""
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def checkpointed(language_model: PreTrainedModel) -> Iterator[None]:
    """Decoder layers keep their input only; the backward pass computes the rest again, under packed attention."""

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), attention_for(language_model, PACKED)

    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    layers = [layer for layer in language_model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    names = ("gradient_checkpointing", "training", "_gradient_checkpointing_func")
    before = [{name: vars(layer)[name] for name in names if name in vars(layer)} for layer in layers]
    # transformers checkpoints a layer only in training mode; its submodules stay in eval mode.
    for layer in layers:
        vars(layer).update(gradient_checkpointing=True, training=True, _gradient_checkpointing_func=run)
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name in names:
                vars(layer).pop(name, None)
            vars(layer).update(values)


def _refuse_variants(kwargs: dict[str, Any], length: int) -> None:
    """Softmax variants that these functions do not compute."""
    window = kwargs.get("sliding_window")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or (window is not None and length > window):
        raise FieldmarkError(
            f"the teacher's attention uses a soft cap, sinks or a window of {window} for {length} tokens; "
            "expected plain causal attention; use a Qwen-VL, LLaVA or InternVL checkpoint"
        )


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
