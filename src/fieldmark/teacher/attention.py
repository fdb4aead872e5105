"""Attention over one shared prefix and several completions behind it.

The functions here are registered with transformers' attention interface and are in force only inside `attention_for`:
a language model then runs its own layers (projections, rotary positions, MLPs), and only softmax(q k) v is ours.

- `packed_attention` (replay): one sequence [prefix | completion 1 | ... | completion G]. The prefix attends to itself;
  a completion attends to the prefix and to itself. The completions are unpacked to a [G, T] grid, so no score between
  two completions is ever computed, and padding exists only inside the attention step, not in the layers around it.
- `shared_prefix_attention` (rollout): one new token for each of pairs * G completions, against the keys of its pair's
  prefix, stored once a pair, and its own. One softmax over both parts.
- `shared_suffix_attention` (alignment scores): K whole texts behind each photo's prefix, stored once a photo.

All are the plain causal attention of [prefix | completion g] for every g: same keys, same queries, same softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from fieldmark.errors import FieldmarkError

PACKED = "fieldmark_packed_completions"
SHARED_PREFIX = "fieldmark_shared_prefix"
SHARED_SUFFIX = "fieldmark_shared_suffix"
_CACHE_BLOCK = 64
# What scaled_dot_product_attention runs on, by device and precision.
_KEPT = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


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
    # One split instead of two slices: the backward pass joins both gradients, it does not add two padded ones.
    (prefix_query, query), (prefix_key, key), (prefix_value, value) = (
        states.split([prefix, states.shape[2] - prefix], dim=2) for states in (query, key, value)
    )
    prefix_out = scaled_dot_product_attention(
        prefix_query, prefix_key, prefix_value, is_causal=True, scale=scaling, enable_gqa=heads != kv_heads
    )
    groups, shared = packed.groups, (packed.groups, -1, -1, -1)
    keys = torch.cat([prefix_key.expand(shared), packed.unpack(key)], dim=2)
    values = torch.cat([prefix_value.expand(shared), packed.unpack(value)], dim=2)
    # Query heads that share a key head become more rows of it: grouped attention without copies of the keys.
    rows = packed.unpack(query)
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
    query = (query * scaling).view(pairs, groups, kv_heads, repeats, width)
    # All G queries of a pair are rows of one product with the pair's prefix keys, which are read once for all of them.
    seen = _by_pair(query) @ prefix_key.transpose(2, 3)
    own = query.view(batch, kv_heads, repeats, width) @ key.transpose(2, 3)
    own = _by_pair(own.view(pairs, groups, kv_heads, repeats, -1))
    weights = torch.softmax(torch.cat([seen, own], dim=-1), dim=-1, dtype=torch.float32).to(value.dtype)
    from_prefix = _by_completion(weights[..., :prefix] @ prefix_value, groups)
    out = from_prefix + _by_completion(weights[..., prefix:], groups) @ value
    return out.reshape(batch, 1, kv_heads * repeats, -1), None


def shared_suffix_attention(
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
    """Whole suffixes at once: query [B, H, T, d], own key and value [B, Hkv, T, d], B = prefixes * K, prefix-major.

    Padding stands on the right, where no real token sees it.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    prefix_key, prefix_value = shared.keys[layer], shared.values[layer]
    batch, heads, length, width = query.shape
    count, kv_heads, prefix, _ = prefix_key.shape
    _refuse_variants(kwargs, prefix + length)
    keys = torch.cat([prefix_key.repeat_interleave(batch // count, 0), key], dim=2)
    values = torch.cat([prefix_value.repeat_interleave(batch // count, 0), value], dim=2)
    own = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    visible = torch.cat([own.new_ones(length, prefix), own], dim=1)
    repeats = heads // kv_heads
    # As in `packed_attention`: query heads that share a key head become more rows of it.
    rows = query.reshape(batch, kv_heads, repeats * length, width)
    out = scaled_dot_product_attention(rows, keys, values, attn_mask=visible.repeat(repeats, 1), scale=scaling)
    return out.reshape(batch, heads, length, -1).transpose(1, 2), None


def _by_pair(rows: Tensor) -> Tensor:
    """[pairs, G, Hkv, repeats, n] -> [pairs, Hkv, G * repeats, n]."""
    return rows.transpose(1, 2).flatten(2, 3)


def _by_completion(rows: Tensor, groups: int) -> Tensor:
    """[pairs, Hkv, G * repeats, n] -> [pairs * G, Hkv, repeats, n]."""
    return rows.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)


class CompletionLayer(DynamicLayer):
    """Keys and values of completions in buffers that grow by blocks (a stock layer copies all at each token).

    Keys lie transposed, [B, Hkv, d, capacity]: the product with a single query then reads them in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.key_buffer: Tensor | None = None  # [B, Hkv, d, capacity]
        self.value_buffer: Tensor | None = None  # [B, Hkv, capacity, d]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds one token; returns the keys and values [B, Hkv, length, d] so far, as views."""
        keys, values = self.key_buffer, self.value_buffer
        if keys is None or values is None:
            keys, values = key_states.transpose(2, 3)[..., :0], value_states[:, :, :0]
            self.is_initialized = True
        if self.length == keys.shape[3]:
            keys = nn.functional.pad(keys, (0, _CACHE_BLOCK))
            values = nn.functional.pad(values, (0, 0, 0, _CACHE_BLOCK))
        keys[..., self.length] = key_states[:, :, 0]
        values[:, :, self.length] = value_states[:, :, 0]
        self.key_buffer, self.value_buffer = keys, values
        self.length += 1
        return keys[..., : self.length].transpose(2, 3), values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def select(self, rows: Tensor) -> None:
        """Keeps only these completions."""
        if self.key_buffer is not None and self.value_buffer is not None:
            self.key_buffer = self.key_buffer.index_select(0, rows)
            self.value_buffer = self.value_buffer.index_select(0, rows)


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
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


@contextmanager
def checkpointed(language_model: PreTrainedModel) -> Iterator[None]:
    """Decoder layers keep their input and the attention's output; the backward pass computes the rest again.

    The output is as small as the input, and attention is the costliest step to compute again for what it takes to keep.
    """

    def contexts() -> tuple[Any, Any]:
        keep, again = create_selective_checkpoint_contexts(_KEPT)
        return keep, _both(again, attention_for(language_model, PACKED))

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
AttentionInterface.register(SHARED_SUFFIX, shared_suffix_attention)
