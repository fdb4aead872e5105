"""The networks of a student that become graphs: normalised pixels or token ids in, unit vectors out, for any batch.

A photo is a square of the student's own resolution. The packed towers of Qwen-VL take it too: their grid of patches is
fixed then, and cutting the square into patches is a part of the graph. A dual encoder's texts are padded to the length
of its context, and so is every row of token ids; those of a student made of a multimodal LLM, whose context is long, to
the longest of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from fieldmark.export.mllm import PhotoNetwork
from fieldmark.export.preprocessing import Preprocessing
from fieldmark.students.encoders import flat_patches
from fieldmark.students.items import embeds_both, is_multimodal, tokenize_items

EMBEDDING = "embedding"
BATCH, LENGTH = "batch", "length"


@dataclass(frozen=True)
class Side:
    """One side of a student: photos or texts.

    Attributes:
        network: takes the inputs in their order, gives [B, D] float32 of length 1.
        inputs: name -> an example [2, ...].
        axes: names of the first dimensions, which may be others in use; the rest is as in the example.
    """

    network: nn.Module
    inputs: dict[str, Tensor]
    axes: tuple[str, ...] = (BATCH,)

    def shape(self, name: str) -> list[int | str]:
        """Dimensions of an input: numbers, and names where they may be others."""
        return [*self.axes, *self.inputs[name].shape[len(self.axes) :]]


def photo_side_of(student: SentenceTransformer) -> Side:
    """Photos: `pixel_values` [B, 3, R, R] float32, see `Preprocessing`.

    Raises:
        FieldmarkError: as `PhotoNetwork`, for a student made of a multimodal LLM.
    """
    side = Preprocessing.of(student).side
    network = PhotoNetwork(student, side) if embeds_both(student) else _Network(student, "image", ("pixel_values",))
    return Side(network, {"pixel_values": torch.zeros(2, 3, side, side)})


def text_side_of(student: SentenceTransformer) -> Side | None:
    """Texts: `input_ids` [B, T] int64 and, but for SigLIP, `attention_mask` [B, T] int64; None for a student of photos.

    T is the context of a dual encoder, and any length for a student made of a multimodal LLM.
    """
    if not is_multimodal(student):
        return None
    both = embeds_both(student)
    encoded = tokenize_items(student, texts=["a", "a b"]) if both else _padded(student, ["a", "b"])
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
    network = _Network(student, "message" if both else "text", tuple(inputs))
    return Side(network, inputs, (BATCH, LENGTH) if both else (BATCH,))


def _padded(student: SentenceTransformer, texts: list[str]) -> Any:
    """Rows of one length, as a dual encoder itself would tokenize texts but for the padding of CLIP."""
    first: Any = student[0]
    options = dict(first.processing_kwargs.get("text", {}))
    length = options.pop("max_length", first.config.text_config.max_position_embeddings)
    options |= {"padding": "max_length", "max_length": length, "truncation": True}
    return first.tokenizer(texts, **options, return_tensors="pt")


@contextmanager
def one_grid(network: nn.Module) -> Iterator[None]:
    """Inside the block SigLIP 2 resamples its positions once for all photos, which have one grid here; it would do so
    photo by photo, which no graph for any batch can."""
    found: list[Any] = [module for module in network.modules() if isinstance(module, Siglip2VisionEmbeddings)]
    for module in found:
        module.resize_positional_embeddings = _resampled_once(module.resize_positional_embeddings)
    try:
        yield
    finally:
        for module in found:
            del module.resize_positional_embeddings


def _resampled_once(resample: Any) -> Any:
    def once(table: Tensor, shapes: Tensor, max_length: int) -> Tensor:
        side = int(max_length**0.5)
        return resample(table, torch.tensor([[side, side]]), max_length)

    return once


class _Network(nn.Module):
    """A student's modules for one kind of input."""

    def __init__(self, student: SentenceTransformer, modality: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(student)
        self.modality, self.names = modality, names
        self.patch: int | None = None
        if modality == "image" and is_multimodal(student):
            first: Any = student[0]
            images = first.processor.image_processor
            self.patch = images.patch_size if "spatial_shapes" in images.model_input_names else None

    def forward(self, *inputs: Tensor) -> Tensor:
        features: dict[str, Any] = dict(zip(self.names, inputs, strict=True)) | {"modality": self.modality}
        if self.patch is not None:
            names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
            features |= zip(names, flat_patches(features["pixel_values"], self.patch), strict=True)
        for part in self.parts:
            features = part(features)
        return features["sentence_embedding"]
