"""A frozen vision tower computes each photo once: its tokens are kept while the language model behind it trains.

MAPLE trains adapters on the language model alone (section 3), so a photo's tokens are the same in every step; in RAR
they are the same for all answers of a group. The tower runs in eval mode, and on a CPU each photo by itself, so that
its tokens depend neither on the photos beside it nor on when it is met first: a resumed run gets the same bits. (A
network with batch statistics would, in training mode, also change them.) A GPU, whose sums differ in the last bits from
run to run anyway and which a single photo leaves idle, computes the new photos of a batch together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fieldmark.errors import FieldmarkError

AT_ONCE = 64  # photos a GPU computes together


class TowerTokens:
    """Tokens of the photos that one frozen tower has seen.

    Args:
        memory_mb: their size at most; photos beyond it are computed each time.
        at_once: photos computed together at most; None is one on a CPU, `AT_ONCE` on a GPU.
    """

    def __init__(self, memory_mb: int, at_once: int | None = None) -> None:
        self.room = memory_mb * 2**20
        self.at_once = at_once
        self.known: dict[tuple[Any, ...], list[Tensor]] = {}
        self.kind: Any = None  # of the tower's output


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
        sizes = 1 if image_grid_thw is None else image_grid_thw.prod(-1).tolist()
        photos = pixel_values.split(sizes)
        shapes = [[]] * len(photos) if image_grid_thw is None else image_grid_thw.tolist()
        fingerprints = sums_of_bits(photos) if pixel_values.is_cuda else digests(photos)
        keys = [(*print_, *shape) for print_, shape in zip(fingerprints, shapes, strict=True)]
        known = self.tokens.known
        found = {key: known[key] for key in keys if key in known}
        new = list({key: place for place, key in enumerate(keys) if key not in found}.values())
        at_once = self.tokens.at_once or (AT_ONCE if pixel_values.is_cuda else 1)
        for start in range(0, len(new), at_once):
            places = new[start : start + at_once]
            grids = {} if image_grid_thw is None else {"image_grid_thw": image_grid_thw[places]}
            computed = self._compute(torch.cat([photos[place] for place in places]), {**kwargs, **grids})
            for place, tensors in zip(places, computed, strict=True):
                found[keys[place]] = tensors
                size = sum(tensor.nbytes for tensor in tensors)
                if size <= self.tokens.room:
                    known[keys[place]] = tensors
                    self.tokens.room -= size
        tokens, *layers = zip(*(found[key] for key in keys), strict=True)
        fields: dict[str, Any] = {"pooler_output": list(tokens)}
        if layers:
            fields["deepstack_features"] = [list(layer) for layer in layers]
        return self.tokens.kind(**fields)

    def _compute(self, pixels: Tensor, arguments: dict[str, Any]) -> list[list[Tensor]]:
        """Of each photo its tokens, and its features for the language model's first layers where the tower has such."""
        modes = [child.training for child in self.eyes]
        for child in self.eyes:
            child.eval()
        with torch.no_grad():
            output = self.compute(pixels, **arguments)
        for child, mode in zip(self.eyes, modes, strict=True):
            child.train(mode)
        self.tokens.kind = type(output)
        layers = getattr(output, "deepstack_features", None) or ()
        return [[one.clone() for one in photo] for photo in zip(output.pooler_output, *layers, strict=True)]


def digests(photos: Sequence[Tensor]) -> list[tuple[bytes]]:
    """A digest of each photo's bytes."""
    return [(hashlib.blake2b(photo.detach().cpu().numpy().tobytes(), digest_size=16).digest(),) for photo in photos]


def sums_of_bits(photos: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Two 64-bit sums of each photo's float32 bits times fixed random odd numbers, on the device where it lies.

    Integers wrap around, so the sums do not depend on their order; photos that differ in one value have other sums, any
    others almost surely. Digests would need each photo copied from the GPU: 8 to 10 ms at 384 px.
    """
    found = []
    weights = torch.empty(2, 0, dtype=torch.int64)
    for photo in photos:
        bits = photo.detach().float().contiguous().view(torch.int32).flatten()
        if weights.shape[1] != len(bits):
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randint(-(2**63), 2**63 - 1, (2, len(bits)), generator=generator)
            weights = (drawn | 1).to(bits.device)
        found.append((weights * bits).sum(1))
    return [tuple(sums) for sums in torch.stack(found).tolist()]
