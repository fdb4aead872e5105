"""The poolers against their formulas, written as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sentence_transformers.base.modules import Module

from fieldmark.students.pooling import AttentionPooling, MeanPooling


def tokens_and_mask(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(3, 5, 8, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0]])
    return {"token_embeddings": tokens, "attention_mask": mask}


def slow_attention(pooler: AttentionPooling, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """papers: beta = softmax(q W_k X^T / sqrt(D)), z = beta X W_o / |.|, one image, one token, one number at a time."""
    q, key, out = (w.detach().double().numpy() for w in (pooler.query, pooler.key_weight, pooler.output_weight))
    projected = [sum(q[i] * key[i, j] for i in range(len(q))) for j in range(len(q))]
    scores = [sum(p * x for p, x in zip(projected, token)) / math.sqrt(len(q)) for token in tokens]
    powers = [math.exp(s) if m else 0.0 for s, m in zip(scores, mask)]
    beta = np.array(powers) / sum(powers)
    mixed = sum(b * token for b, token in zip(beta, tokens))
    z = np.array([sum(mixed[i] * out[i, j] for i in range(len(q))) for j in range(out.shape[1])])
    return beta, z / np.linalg.norm(z)


@pytest.mark.parametrize("width", [None, 4, 8, 11])
def test_attention_pooling_is_the_formula(width):
    torch.manual_seed(1)
    pooler = AttentionPooling(8, width)
    with torch.no_grad():
        for parameter in pooler.parameters():
            parameter.copy_(torch.randn_like(parameter))
    features = pooler(tokens_and_mask())
    assert features["sentence_embedding"].shape == (3, width or 8)
    assert pooler.get_embedding_dimension() == (width or 8)
    for row in range(3):
        tokens = features["token_embeddings"][row].double().numpy()
        beta, z = slow_attention(pooler, tokens, features["attention_mask"][row].numpy())
        np.testing.assert_allclose(features["pooling_attention"][row].detach(), beta, atol=1e-6)
        np.testing.assert_allclose(features["sentence_embedding"][row].detach(), z, atol=1e-5)
    assert (features["pooling_attention"][features["attention_mask"] == 0] == 0).all()


@pytest.mark.parametrize("width", [None, 4, 8])
def test_mean_pooling_is_the_mean_of_the_unmasked(width):
    torch.manual_seed(1)
    pooler = MeanPooling(8, width)
    features = pooler(tokens_and_mask())
    for row in range(3):
        kept = [t for t, m in zip(features["token_embeddings"][row], features["attention_mask"][row]) if m]
        mean = torch.stack(kept).mean(0)
        z = mean if width is None else mean @ pooler.output_weight
        torch.testing.assert_close(features["sentence_embedding"][row], z / z.norm(), rtol=0, atol=1e-6)


def test_without_a_mask_all_tokens_count():
    features = tokens_and_mask()
    full = features | {"attention_mask": torch.ones(3, 5, dtype=torch.long)}
    for pooler in (AttentionPooling(8, 4), MeanPooling(8, 4)):
        bare = pooler({"token_embeddings": features["token_embeddings"]})["sentence_embedding"]
        torch.testing.assert_close(bare, pooler(dict(full))["sentence_embedding"], rtol=0, atol=1e-6)


def test_untrained_attention_pooling_keeps_the_geometry_of_the_mean():
    torch.manual_seed(0)
    tokens = {"token_embeddings": torch.randn(20, 49, 64) + torch.randn(20, 1, 64)}
    mean = MeanPooling(64)(dict(tokens))["sentence_embedding"]
    attention = AttentionPooling(64)(dict(tokens))
    torch.testing.assert_close(
        attention["sentence_embedding"] @ attention["sentence_embedding"].T, mean @ mean.T, rtol=0, atol=0.02
    )
    torch.testing.assert_close(attention["pooling_attention"], torch.full((20, 49), 1 / 49), rtol=0.5, atol=0)
    same = MeanPooling(64, 64)(dict(tokens))["sentence_embedding"]
    torch.testing.assert_close(same, mean, rtol=0, atol=1e-6)
    narrow, wide = MeanPooling(64, 16).output_weight, MeanPooling(64, 96).output_weight
    torch.testing.assert_close(narrow.T @ narrow, torch.eye(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(wide @ wide.T, torch.eye(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooler", [AttentionPooling(8, 4), MeanPooling(8, 4), MeanPooling(8)])
def test_zero_vectors_and_empty_masks_give_numbers(pooler):
    tokens = torch.zeros(2, 5, 8, requires_grad=True)
    features = {"token_embeddings": tokens, "attention_mask": torch.tensor([[1] * 5, [0] * 5])}
    output = pooler(features)
    assert torch.equal(output["sentence_embedding"], torch.zeros(2, pooler.get_embedding_dimension()))
    if "pooling_attention" in output:
        torch.testing.assert_close(output["pooling_attention"], torch.full((2, 5), 0.2))
    output["sentence_embedding"].sum().backward()
    assert torch.isfinite(tokens.grad).all()


def test_every_parameter_of_the_attention_pooler_learns_from_the_first_step():
    pooler = AttentionPooling(8, 4)
    features = pooler(tokens_and_mask())
    target = torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1]])
    (target * (target / features["pooling_attention"][:1]).log()).sum().backward(retain_graph=True)
    assert pooler.query.grad.abs().sum() > 0
    assert pooler.key_weight.grad.abs().sum() > 0
    assert pooler.output_weight.grad is None  # the attention loss cannot reach W_o
    features["sentence_embedding"][:, 0].sum().backward()
    assert pooler.output_weight.grad.abs().sum() > 0


def test_half_precision_tokens_are_normalised_in_float32():
    for pooler in (AttentionPooling(64, 32), MeanPooling(64, 32)):
        features = {"token_embeddings": 300 * torch.randn(4, 7, 64).to(torch.bfloat16)}
        output = pooler.to(torch.bfloat16)(features)["sentence_embedding"]
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooler", [AttentionPooling(8, 4), MeanPooling(8, 4), MeanPooling(8)])
def test_saved_pooler_loads_as_it_was(pooler, tmp_path):
    assert isinstance(pooler, Module)
    pooler.save(str(tmp_path))
    again = type(pooler).load(str(tmp_path))
    expected = pooler(tokens_and_mask())["sentence_embedding"]
    torch.testing.assert_close(again(tokens_and_mask())["sentence_embedding"], expected, rtol=0, atol=0)
    assert again.get_embedding_dimension() == pooler.get_embedding_dimension()
