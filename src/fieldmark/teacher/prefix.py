"""Rollouts and their replay, with the prompt computed once for all completions of a pair (SAGA Eq. 2, 5, 6).

Why this is exact. In a causal language model the states of the prompt do not depend on what follows it, so the G
sequences [prompt | completion g] have the same prompt states in every layer, and computing them once changes nothing.
A completion's token sees the prompt and the earlier tokens of its own completion, at positions that restart behind the
prompt for every completion; `teacher.attention` gives it exactly these keys. Everything else in a decoder layer acts on
one token alone. The gradient of the prompt's states is then the sum over completions, which is what G separate passes
would add up. Tokens: P + G * R instead of G * (P + R).

The language model is frozen: no parameter requires a gradient, so the backward pass computes gradients of activations
only, on their way to the visual tokens (and to the DeepStack features that enter the first layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.cache_utils import Cache, DynamicCache

from fieldmark.errors import FieldmarkError
from fieldmark.teacher.attention import (
    PACKED,
    SHARED_PREFIX,
    SHARED_SUFFIX,
    AttentionRecorder,
    CompletionLayer,
    PackedLayout,
    SharedPrefix,
    attention_for,
    checkpointed,
    recorded_attention,
)
from fieldmark.teacher.model import Prompt, Teacher, VisualTokens

# Logits held at once by the head: 2^25 float32 values are 128 MB; more rows than these make no product faster.
_LOGITS_AT_ONCE = 2**25
_ROWS_AT_ONCE = 1024
_CANDIDATES = 64


@dataclass(frozen=True)
class Rollouts:
    """Sampled completions.

    Attributes:
        ids: [pairs, G, T] token ids, padded on the right.
        mask: [pairs, G, T] bool, True up to and including the end token.
        texts: for each pair G texts, without special tokens.
        logprobs: [pairs, G, T] float32 log-probabilities of the sampled tokens at the sampling temperature, before
            top-p; at temperature 0 those of temperature 1; zero at padding.
    """

    ids: Tensor
    mask: Tensor
    texts: list[list[str]]
    logprobs: Tensor


@dataclass(frozen=True)
class Replay:
    """What a replay gives.

    Attributes:
        logprobs: [G, T] float32 log-probabilities with gradient into the visual tokens; zero at padding.
        attention: [G, n_images, N] float32 attention targets without gradient, or None when none were asked for.
    """

    logprobs: Tensor
    attention: Tensor | None


def replay(
    teacher: Teacher,
    prompt: Prompt,
    visual: VisualTokens,
    ids: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    attention_layer: int | None = None,
    attention_rows: Tensor | None = None,
    checkpoint: bool = True,
) -> Replay:
    """Teacher-forced log-probabilities of one pair's completions, with gradient into the visual tokens.

    Args:
        teacher: the frozen teacher.
        prompt: the prompt that was rolled out.
        visual: tokens of the pair's images, B = n_images.
        ids: [G, T] completions.
        mask: [G, T] bool, True up to and including the end token.
        temperature: logits are divided by it, as in sampling; top-p is not applied (papers.md 1.10).
        attention_layer: 0-based decoder layer (negative counts from the last) that attention targets are read from.
        attention_rows: [G, n_images, T] bool, tokens that describe each image.
        checkpoint: keep only the input of each decoder layer and compute the rest again in the backward pass.

    Raises:
        FieldmarkError: on shapes that do not fit together, a mask with holes, or a temperature that is not positive.
    """
    recorder = _recorder(teacher, prompt, ids, attention_layer, attention_rows)
    _check_replay(teacher, prompt, visual, ids, mask, temperature)
    layout = PackedLayout.of(mask, len(prompt.input_ids), recorder)
    completion_ids = ids[mask]
    step = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)[mask]
    positions = (prompt.next_position + step).expand(len(prompt.position_ids), -1)
    embeds = torch.cat([_prompt_embeds(teacher, prompt, visual)[0], _embed(teacher, completion_ids)])
    hidden = _run(
        teacher,
        embeds[None],
        torch.cat([prompt.position_ids, positions], dim=1)[:, None],
        _deepstack(teacher, prompt, visual, len(embeds)),
        checkpoint=checkpoint and torch.is_grad_enabled(),
        packed=layout,
    )[0]
    # A token is predicted by the state before it: the last of the prompt for the first token of every completion.
    before = torch.arange(len(step), device=ids.device) + len(prompt.input_ids) - 1
    sources = torch.where(step == 0, len(prompt.input_ids) - 1, before)
    head = teacher.lm_head
    flat = token_logprobs(hidden.index_select(0, sources), head.weight, head.bias, completion_ids, temperature)
    logprobs = flat.new_zeros(ids.shape).masked_scatter(mask, flat)
    attention = None
    if recorder is not None and attention_rows is not None:
        attention = recorded_attention(recorder, layout, attention_rows & mask[:, None], prompt.image_slots)
    return Replay(logprobs, attention)


@torch.no_grad()
def rollout(
    teacher: Teacher,
    prompt: Prompt,
    visual: VisualTokens,
    *,
    group_size: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Rollouts:
    """Sample `group_size` completions for each pair; each pair's prompt runs once, its keys and values are kept once.

    Args:
        teacher: the frozen teacher.
        prompt: the prompt, the same for all pairs.
        visual: tokens of all images, B = pairs * n_images, pair-major.
        group_size: G.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens with at least this probability, (0, 1].
        max_new_tokens: completions end there at the latest.
        generator: draws one number for each completion and step, whatever has already ended.

    Raises:
        FieldmarkError: on settings or shapes out of range.
    """
    _check_sampling(group_size, temperature, top_p, max_new_tokens)
    pairs = _check_visual(teacher, prompt, visual)
    logits, shared = _prefill(teacher, prompt, visual)
    logits = logits.repeat_interleave(group_size, 0)
    total = pairs * group_size
    streams = _streams(generator, pairs, group_size)
    device = logits.device
    eos = torch.tensor(teacher.eos_token_ids, device=device)
    fill = teacher.tokenizer.pad_token_id
    ids = torch.full((total, max_new_tokens), int(eos[0]) if fill is None else fill, device=device)
    mask = torch.zeros(total, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(total, max_new_tokens, device=device)
    own = [CompletionLayer() for _ in range(teacher.layers)]
    cache = Cache(layers=list(own))
    # Completions still computed; whole pairs leave when all their G have ended.
    rows = torch.arange(total, device=device)
    ended = torch.zeros(total, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        uniform = torch.cat([torch.rand(n, generator=g, device=g.device) for g, n in streams]).to(device)[rows]
        tokens, chosen = sample_tokens(logits, uniform, temperature, top_p)
        going = (~ended).nonzero().flatten()
        at = rows[going]
        ids[at, step], logprobs[at, step], mask[at, step] = tokens[going], chosen[going], True
        ended = ended | torch.isin(tokens, eos)
        if step + 1 == max_new_tokens or bool(ended.all()):
            break
        done = ended.view(-1, group_size).all(1)
        if 4 * int(done.sum()) >= len(done):
            keep = (~done).nonzero().flatten()
            kept = (~done).repeat_interleave(group_size).nonzero().flatten()
            rows, tokens, ended = rows[kept], tokens[kept], ended[kept]
            shared.select(keep)
            for layer in own:
                layer.select(kept)
        logits = _decode(teacher, prompt, tokens, step, cache, shared)
    length = int(mask.sum(1).max())
    shape = (pairs, group_size, length)
    return Rollouts(
        ids=ids[:, :length].reshape(shape),
        mask=mask[:, :length].reshape(shape),
        texts=_texts(teacher, ids, mask, group_size),
        logprobs=logprobs[:, :length].reshape(shape),
    )


def _streams(
    generator: torch.Generator | Sequence[torch.Generator], pairs: int, group_size: int
) -> list[tuple[torch.Generator, int]]:
    """Generators and how many completions each draws for."""
    if isinstance(generator, torch.Generator):
        return [(generator, pairs * group_size)]
    if len(generator) != pairs:
        raise FieldmarkError(f"rollout got {len(generator)} generators for {pairs} pairs; expected one, or one a pair")
    return [(one, group_size) for one in generator]


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Next tokens by inverse sampling.

    Args:
        logits: [B, V].
        uniform: [B] numbers in [0, 1).
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: probability mass to sample from.

    Returns:
        [B] token ids and [B] float32 log-probabilities at that temperature (1 for temperature 0), before top-p.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1, keepdim=True)
    else:
        probs, order = _most_likely(logprobs.exp(), top_p)
        cumulative = probs.cumsum(-1)
        # Descending, so the tokens kept come first and the running sum over all of them serves as that over the kept.
        last = ((cumulative - probs < top_p) & (probs > 0)).sum(-1, keepdim=True) - 1
        target = uniform[:, None] * cumulative.gather(1, last)
        tokens = order.gather(1, torch.minimum(torch.searchsorted(cumulative, target, right=True), last))
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def _most_likely(probs: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Probabilities [B, k], descending, and their ids: enough of them to hold `mass` in every row."""
    # A trained teacher is sure of most tokens: a few candidates nearly always do, and a full sort costs a layer's time.
    few = probs.topk(min(_CANDIDATES, probs.shape[1]), dim=-1)
    if bool((few.values.sum(-1) >= mass).all()):
        return few.values, few.indices
    if probs.device.type != "cpu":
        return probs.sort(dim=-1, descending=True)
    # On the CPU numpy sorts with vector instructions, several times faster than torch.
    order = torch.from_numpy(np.argsort(-probs.detach().numpy(), axis=-1))
    return probs.gather(1, order), order


def prompt_logits(teacher: Teacher, prompt: Prompt, visual: VisualTokens) -> Tensor:
    """[pairs, V] logits behind the prompt, for visual tokens B = pairs * n_images, pair-major."""
    _check_visual(teacher, prompt, visual)
    return _prefill(teacher, prompt, visual)[0]


def token_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token under softmax(head(hidden) / temperature), [N] float32, by blocks of rows.

    Args:
        hidden: [N, D] states.
        weight: [V, D] frozen head.
        bias: [V] or None.
        ids: [N] tokens.
        temperature: divides the logits.
    """
    result: Tensor = _TokenLogprobs.apply(hidden, weight, bias, ids, temperature)
    return result


class _TokenLogprobs(torch.autograd.Function):
    """Keeps [N, D], never [N, V], for the backward pass: by row d logp / d h = (W[y] - softmax @ W) / temperature."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float
    ) -> Tensor:
        block = min(_ROWS_AT_ONCE, max(1, _LOGITS_AT_ONCE // len(weight)))
        slopes = []
        logprobs = []
        for states, tokens in zip(hidden.split(block), ids.split(block), strict=True):
            logits = torch.log_softmax(linear(states, weight, bias).float().div_(temperature), dim=-1)
            logprobs.append(logits.gather(1, tokens[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                expected = logits.exp_().to(weight.dtype) @ weight
                slopes.append((weight[tokens] - expected) / temperature)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(slopes.dtype), None, None, None, None


def _embed(teacher: Teacher, ids: Tensor) -> Tensor:
    return teacher.language_model.get_input_embeddings()(ids)


def _prompt_embeds(teacher: Teacher, prompt: Prompt, visual: VisualTokens) -> Tensor:
    """[pairs, P, D] text embeddings with the visual tokens in their slots."""
    tokens = visual.tokens.to(teacher.dtype)
    pairs = len(tokens) // len(prompt.image_slots)
    text = _embed(teacher, prompt.input_ids).expand(pairs, -1, -1)
    return text.index_copy(1, prompt.image_slots.flatten(), tokens.reshape(pairs, -1, tokens.shape[-1]))


def _deepstack(teacher: Teacher, prompt: Prompt, visual: VisualTokens, length: int) -> dict[str, Any]:
    """Arguments of a language model that receives visual features again in its first layers."""
    if not visual.deepstack:
        return {}
    pairs = len(visual.tokens) // len(prompt.image_slots)
    slots = torch.zeros(pairs, length, dtype=torch.bool, device=teacher.device)
    slots[:, prompt.image_slots.flatten()] = True
    return {
        "visual_pos_masks": slots,
        "deepstack_visual_embeds": [feature.flatten(0, 1) for feature in visual.deepstack],
    }


def _run(
    teacher: Teacher,
    embeds: Tensor,
    positions: Tensor,
    deepstack: dict[str, Any],
    *,
    checkpoint: bool,
    packed: PackedLayout,
) -> Tensor:
    """Last hidden states [1, S, D] of one packed sequence."""
    language_model = teacher.language_model
    with attention_for(language_model, PACKED), checkpointed(language_model) if checkpoint else nullcontext():
        return language_model(
            inputs_embeds=embeds,
            position_ids=positions if teacher.uses_mrope else positions[0],
            use_cache=False,
            packed=packed,
            **deepstack,
        ).last_hidden_state


def _prefill(teacher: Teacher, prompt: Prompt, visual: VisualTokens) -> tuple[Tensor, SharedPrefix]:
    """Logits [pairs, V] behind the prompt, and its keys and values."""
    embeds = _prompt_embeds(teacher, prompt, visual)
    pairs, length, _ = embeds.shape
    cache = DynamicCache(config=teacher.language_model.config)
    positions = prompt.position_ids[:, None].expand(-1, pairs, -1)
    hidden = teacher.language_model(
        inputs_embeds=embeds,
        position_ids=positions if teacher.uses_mrope else positions[0],
        past_key_values=cache,
        use_cache=True,
        **_deepstack(teacher, prompt, visual, length),
    ).last_hidden_state
    shared = SharedPrefix([keys for keys, _, _ in cache], [values for _, values, _ in cache])
    return teacher.lm_head(hidden[:, -1]), shared


def _decode(teacher: Teacher, prompt: Prompt, tokens: Tensor, step: int, cache: Cache, shared: SharedPrefix) -> Tensor:
    """Logits [B, V] behind one more token of each completion."""
    shape = (len(prompt.position_ids), len(tokens), 1)
    positions = torch.full(shape, prompt.next_position + step, device=tokens.device)
    with attention_for(teacher.language_model, SHARED_PREFIX):
        hidden = teacher.language_model(
            inputs_embeds=_embed(teacher, tokens[:, None]),
            position_ids=positions if teacher.uses_mrope else positions[0],
            past_key_values=cache,
            use_cache=True,
            shared=shared,
        ).last_hidden_state
    return teacher.lm_head(hidden[:, 0])


def suffix_states(teacher: Teacher, prompt: Prompt, visual: VisualTokens, ids: Tensor) -> tuple[Tensor, ...]:
    """Hidden states of K texts behind the same prompt, which is computed once for all of them.

    Args:
        teacher: the teacher; its parameters may require gradients.
        prompt: what the texts have in common, images included.
        visual: tokens of the images, B = prompts * n_images, prompt-major.
        ids: [prompts, K, T] token ids, right-padded.

    Returns:
        For each layer [prompts, K, T, D], the last one normalised for the head; those behind a text's last token are
        of no use.
    """
    prompts = _check_visual(teacher, prompt, visual)
    count, length = ids.shape[1:]
    _, shared = _prefill(teacher, prompt, visual)
    positions = prompt.next_position + torch.arange(length, device=ids.device)
    shaped = positions.expand(len(prompt.position_ids), prompts * count, -1)
    with attention_for(teacher.language_model, SHARED_SUFFIX):
        hidden = teacher.language_model(
            inputs_embeds=_embed(teacher, ids.flatten(0, 1)),
            position_ids=shaped if teacher.uses_mrope else shaped[0],
            use_cache=False,
            output_hidden_states=True,
            shared=shared,
        ).hidden_states
    return tuple(states.unflatten(0, (prompts, count)) for states in hidden[1:])


def _texts(teacher: Teacher, ids: Tensor, mask: Tensor, group_size: int) -> list[list[str]]:
    real = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    texts = teacher.tokenizer.batch_decode(real, skip_special_tokens=True)
    return [texts[start : start + group_size] for start in range(0, len(texts), group_size)]


def _check_visual(teacher: Teacher, prompt: Prompt, visual: VisualTokens) -> int:
    """Number of pairs."""
    images, tokens = prompt.image_slots.shape
    shape = tuple(visual.tokens.shape)
    if len(shape) != 3 or shape[1:] != (tokens, teacher.hidden_size) or shape[0] == 0 or shape[0] % images:
        raise FieldmarkError(
            f"visual tokens of shape {shape} were given; expected [pairs x {images}, {tokens}, {teacher.hidden_size}]; "
            "use a student tower that starts as this teacher's own and the prompt made for its token count"
        )
    if len(visual.deepstack) != teacher.deepstack_layers or any(
        f.shape != visual.tokens.shape for f in visual.deepstack
    ):
        raise FieldmarkError(
            f"{len(visual.deepstack)} DeepStack features were given; this teacher expects {teacher.deepstack_layers} "
            f"of shape {shape}; use a student tower that starts as this teacher's own"
        )
    return shape[0] // images


def _check_replay(
    teacher: Teacher, prompt: Prompt, visual: VisualTokens, ids: Tensor, mask: Tensor, temperature: float
) -> None:
    if _check_visual(teacher, prompt, visual) != 1:
        raise FieldmarkError(
            f"replay got visual tokens of {len(visual.tokens)} images; expected one pair's "
            f"{len(prompt.image_slots)}; call it once a pair"
        )
    if ids.ndim != 2 or mask.shape != ids.shape or mask.dtype != torch.bool:
        raise FieldmarkError(
            f"replay got ids {tuple(ids.shape)} and a {mask.dtype} mask {tuple(mask.shape)}; expected ids [G, T] and a "
            "bool mask of the same shape"
        )
    if not bool(mask[:, :1].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise FieldmarkError("a replay mask is empty or has holes; expected True from the first token to the end token")
    if not temperature > 0:
        raise FieldmarkError(
            f"replay got temperature {temperature}; expected a positive number, the sampling temperature"
        )


def _check_sampling(group_size: int, temperature: float, top_p: float, max_new_tokens: int) -> None:
    if group_size < 1 or max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1:
        raise FieldmarkError(
            f"rollout got group_size {group_size}, temperature {temperature}, top_p {top_p}, max_new_tokens "
            f"{max_new_tokens}; expected counts of at least 1, a temperature of at least 0 and top_p in (0, 1]"
        )


def _recorder(
    teacher: Teacher, prompt: Prompt, ids: Tensor, layer: int | None, rows: Tensor | None
) -> AttentionRecorder | None:
    if layer is None and rows is None:
        return None
    expected = (len(ids), len(prompt.image_slots), ids.shape[-1])
    if layer is None or rows is None or tuple(rows.shape) != expected or rows.dtype != torch.bool:
        given = None if rows is None else f"{rows.dtype} {tuple(rows.shape)}"
        raise FieldmarkError(
            f"replay got attention_layer {layer} and attention_rows {given}; expected both, the rows as bool {expected}"
        )
    if not -teacher.layers <= layer < teacher.layers:
        raise FieldmarkError(
            f"attention_layer {layer} was given; this teacher has layers 0 to {teacher.layers - 1}; choose one of these"
        )
    return AttentionRecorder(layer % teacher.layers)
