"""From tokens to one vector: the last module of a student.

``AttentionPooling`` is SAGA's retrieval pooler (arXiv 2606.15134, appendix B): one learned query attends over the
tokens, without a value projection,

    beta = softmax((q W_k) X^T / sqrt(D)),    z = (beta X) W_o / ||(beta X) W_o||_2,

and ``beta``, what the attention loss supervises, is handed on as ``pooling_attention``. ``MeanPooling`` is its control.

Initial values are ours (the paper names none), chosen so that training starts from what the tower already knows:
``W_k`` is the identity and ``q`` is small (standard deviation 0.02, not zero: with q = 0 no gradient would reach
``W_k``), so beta starts nearly uniform; ``W_o`` is the identity, or has orthonormal columns where the dimension
changes. An untrained student thus has the geometry of the mean-pooled tower: exactly for ``MeanPooling`` without a
change of dimension, nearly for the others.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Self

import torch
from sentence_transformers.base.modules import Module
from torch import nn
from torch.nn.functional import normalize

QUERY_STD = 0.02


class TokenPooling(Module):
    """Common part of the poolers: dimensions, saving and loading.

    Args:
        token_dim: D, width of a token.
        embedding_dim: De, width of the embedding.
    """

    config_keys = ["token_dim", "embedding_dim"]  # noqa: RUF012

    def __init__(self, token_dim: int, embedding_dim: int | None = None) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.embedding_dim = embedding_dim

    def get_embedding_dimension(self) -> int:
        """De; the name is that of sentence-transformers."""
        return self.embedding_dim or self.token_dim

    @abstractmethod
    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` [B, De], float32, of length 1."""

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write ``config.json`` and, where there are weights, ``model.safetensors``."""
        self.save_config(output_path)
        if self.state_dict():
            self.save_torch_weights(output_path, safe_serialization=True)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a saved pooler; the interface that ``SentenceTransformer(path)`` uses."""
        where = {key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs}
        pooler = cls(**cls.load_config(model_name_or_path, subfolder=subfolder, **where))
        if pooler.state_dict():
            pooler = cls.load_torch_weights(model_name_or_path, subfolder=subfolder, model=pooler, **where)  # type: ignore[assignment]
        return pooler


class AttentionPooling(TokenPooling):
    """Single-query attention over the tokens, SAGA's pooler.

    Args:
        token_dim: D, width of a token.
        embedding_dim: De, width of the embedding; None means D.
    """

    def __init__(self, token_dim: int, embedding_dim: int | None = None) -> None:
        super().__init__(token_dim, embedding_dim or token_dim)
        self.query = nn.Parameter(torch.randn(token_dim) * QUERY_STD)
        self.key_weight = nn.Parameter(torch.eye(token_dim))
        self.output_weight = nn.Parameter(_isometry(token_dim, self.get_embedding_dimension()))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add the embedding and its attention.

        Args:
            features: ``token_embeddings`` [B, N, D] and, optionally, ``attention_mask`` [B, N] (1 = a token).
            **kwargs: Ignored; part of the sentence-transformers interface.

        Returns:
            The features with ``sentence_embedding`` [B, De] (float32, length 1; zero for a zero vector) and
            ``pooling_attention`` [B, N] (beta: float32, rows sum to 1, exactly 0 at masked tokens).
        """
        tokens = features["token_embeddings"]
        key = self.query @ self.key_weight
        # Exported, the key is a matrix: onnxruntime fuses transposed tokens times a vector into a wrong product.
        scores = (tokens @ key[:, None]).squeeze(-1) if torch.compiler.is_compiling() else tokens @ key
        scores = scores.float() / math.sqrt(self.token_dim)
        mask = features.get("attention_mask")
        if mask is not None:
            # The least finite number, not -inf: a photo without any token gets a uniform row, never NaN.
            scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)
        attention = scores.softmax(dim=-1)
        pooled = (attention.to(tokens.dtype).unsqueeze(1) @ tokens).squeeze(1)
        features["pooling_attention"] = attention
        features["sentence_embedding"] = normalize((pooled @ self.output_weight).float(), dim=-1)
        return features


class MeanPooling(TokenPooling):
    """Mean over the tokens, an optional linear map, length 1.

    Args:
        token_dim: D, width of a token.
        embedding_dim: De, width of a learned linear map after the mean; None for none (the embedding has width D).
    """

    def __init__(self, token_dim: int, embedding_dim: int | None = None) -> None:
        super().__init__(token_dim, embedding_dim)
        self.output_weight = None if embedding_dim is None else nn.Parameter(_isometry(token_dim, embedding_dim))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` [B, De] (float32, length 1; zero for a zero vector) of the unmasked tokens."""
        tokens = features["token_embeddings"]
        mask = features.get("attention_mask")
        if mask is None:
            pooled = tokens.mean(dim=1)
        else:
            weights = mask.to(tokens.dtype)
            pooled = (weights.unsqueeze(1) @ tokens).squeeze(1) / weights.sum(dim=1, keepdim=True).clamp(min=1)
        if self.output_weight is not None:
            pooled = pooled @ self.output_weight
        features["sentence_embedding"] = normalize(pooled.float(), dim=-1)
        return features


def _isometry(rows: int, columns: int) -> torch.Tensor:
    """The identity, or a random matrix with orthonormal columns (rows, where there are fewer of them)."""
    if rows == columns:
        return torch.eye(rows)
    return nn.init.orthogonal_(torch.empty(rows, columns))
