"""A frozen vision tower computes each photo once: its tokens are kept while the language model behind it trains.

MAPLE trains adapters on the language model alone (section 3), so a photo's tokens are the same in every step; in RAR
they are the same for all answers of a group. Each photo runs by itself and in eval mode, so that its tokens depend
neither on the photos beside it nor on when it is met first: a resumed run gets the same bits. (A network with batch
statistics would, in training mode, also change them.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fieldmark.errors import FieldmarkError


class TowerTokens:
    """Tokens of the photos that one frozen tower has seen.

    Args:
        memory_mb: their size at most; photos beyond it are computed each time.
    """

    def __init__(self, memory_mb: int) -> None:
        self.room = memory_mb * 2**20
        self.known: dict[bytes, Any] = {}


@contextmanager
def remembered_tower(model: Any, tokens: TowerTokens) -> Iterator[None]:
    """Inside the block a multimodal LLM looks up the tokens of photos that its tower has seen.

    Args:
        model: the LLM without its head (a student's `transformers_model`, a teacher's `model.model`); its vision tower
            and what joins it to the language model are frozen.
        tokens: where they are kept; of this tower alone.

    Raises:
        FieldmarkError: a parameter outside the language model is trained.
    """
    eyes = [child for name, child in model.named_children() if name != "language_model"]
    if any(parameter.requires_grad for child in eyes for parameter in child.parameters()):
        raise FieldmarkError("The vision tower is trained here, so its tokens change; leave tower_memory_mb at 0.")
    model.get_image_features = _Memory(model.get_image_features, eyes, tokens)
    try:
        yield
    finally:
        del model.get_image_features


class _Memory:
    """Stands in for `get_image_features`; every model type returns one tensor a photo."""

    def __init__(self, compute: Any, eyes: list[torch.nn.Module], tokens: TowerTokens) -> None:
        self.compute, self.eyes, self.tokens = compute, eyes, tokens

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any) -> Any:
        if image_grid_thw is None:
            photos = list(pixel_values.split(1))
        else:
            photos = list(pixel_values.split(image_grid_thw.prod(-1).tolist()))
        found = []
        for place, pixels in enumerate(photos):
            key = hashlib.blake2b(pixels.detach().cpu().numpy().tobytes(), digest_size=16).digest()
            output = self.tokens.known.get(key)
            if output is None:
                grid = {} if image_grid_thw is None else {"image_grid_thw": image_grid_thw[place : place + 1]}
                output = self._one(pixels, {**kwargs, **grid})
                size = sum(tensor.nbytes for tensor in (output.pooler_output[0], *_deepstack(output)))
                if size <= self.tokens.room:
                    self.tokens.known[key] = output
                    self.tokens.room -= size
            found.append(output)
        fields: dict[str, Any] = {"pooler_output": [output.pooler_output[0] for output in found]}
        if _deepstack(found[0]):
            fields["deepstack_features"] = [list(layer) for layer in zip(*map(_deepstack, found), strict=True)]
        return type(found[0])(**fields)

    def _one(self, pixels: Tensor, arguments: dict[str, Any]) -> Any:
        modes = [child.training for child in self.eyes]
        for child in self.eyes:
            child.eval()
        with torch.no_grad():
            output = self.compute(pixels, **arguments)
        for child, mode in zip(self.eyes, modes, strict=True):
            child.train(mode)
        output.last_hidden_state = None  # of no use behind the tower, and large
        return output


def _deepstack(output: Any) -> list[Tensor]:
    """The photo's features for the language model's first layers, where the tower has such."""
    return [layer[0] for layer in getattr(output, "deepstack_features", None) or ()]
