"""A folder for sentence-transformers, in its own modules where a student can be written in them.

What can: an image-text student (it is made of such modules), and a tower whose tokens are a plain network's own output
(a feature map, or patches without class token), with mean pooling. What cannot: the packed towers of Qwen-VL, networks
with leading tokens, a projector, and attention pooling; their folder names fieldmark's classes, for which
sentence-transformers 6 asks for `trust_remote_code=True`, and fieldmark must be installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import ViTImageProcessor

from fieldmark.data.photos import PhotoRef, load_square, open_photo
from fieldmark.errors import FieldmarkError
from fieldmark.export.preprocessing import Preprocessing
from fieldmark.students.composed import ComposedConfig
from fieldmark.students.encoders import PlainEncoder
from fieldmark.students.items import is_multimodal, photo_side
from fieldmark.students.pooling import MeanPooling

IMPORT = "import fieldmark.students.composed  # makes the model type known\n"
_ENCODE = """import sys
import numpy as np
{imports}from sentence_transformers import SentenceTransformer
folder, inputs, out = sys.argv[1:]
model = SentenceTransformer({arguments}, device="cpu")
items = np.load(inputs, allow_pickle=False)
parts = [model.encode(items[name].tolist()) for name in items.files]
np.savez(out, **dict(zip(items.files, parts)))
"""


@dataclass(frozen=True)
class Loading:
    """How a folder is loaded.

    Attributes:
        trust: whether it needs `trust_remote_code=True` and fieldmark.
        imports: a line that must come before, or nothing.
    """

    trust: bool = False
    imports: str = ""

    @property
    def needs_fieldmark(self) -> bool:
        return self.trust or bool(self.imports)

    def call(self, folder: str) -> str:
        """The Python expression that loads `folder` (itself an expression)."""
        return f"SentenceTransformer({folder}{', trust_remote_code=True' if self.trust else ''})"


def write_folder(student: SentenceTransformer, folder: Path) -> Loading:
    """Writes the student, in sentence-transformers' own modules where that is possible, without a card."""
    if is_multimodal(student):
        student.save_pretrained(str(folder), create_model_card=False)
        first: Any = student[0]
        return Loading(imports=IMPORT if first.config.model_type == ComposedConfig.model_type else "")
    with TemporaryDirectory() as scratch:
        stock = stock_student(student, Path(scratch))
        (stock or student).save_pretrained(str(folder), create_model_card=False)
    return Loading(trust=stock is None)


def stock_student(student: SentenceTransformer, scratch: Path) -> SentenceTransformer | None:
    """A student of photos in sentence-transformers' own modules, or None where it cannot be written in them.

    Args:
        student: a tower and a pooler.
        scratch: an empty folder, needed as long as the result is.
    """
    tower, pooler = student[0], student[1]
    encoder: Any = tower.encoder  # type: ignore[union-attr]
    if type(encoder) is not PlainEncoder or type(pooler) is not MeanPooling or tower.projector is not None:
        return None
    if "interpolate_pos_encoding" in encoder.options or not _all_tokens(encoder):
        return None
    encoder.model.save_pretrained(scratch)
    seen = Preprocessing.of(student)
    ViTImageProcessor(
        size={"height": seen.side, "width": seen.side},
        resample=3,  # bicubic
        image_mean=list(seen.mean),
        image_std=list(seen.std),
    ).save_pretrained(scratch)
    modules: list[nn.Module] = [Transformer(str(scratch)), Pooling(pooler.token_dim, "mean")]
    if pooler.output_weight is not None:
        dense = Dense(pooler.token_dim, pooler.get_embedding_dimension(), bias=False, activation_function=nn.Identity())
        dense.linear.weight.data.copy_(pooler.output_weight.detach().T)
        modules.append(dense)
    return SentenceTransformer(modules=[*modules, Normalize()], device="cpu")


@torch.no_grad()
def _all_tokens(encoder: Any) -> bool:
    """Whether the tokens are the network's whole output: none leads and is left out."""
    pixels = torch.zeros(1, 3, encoder.resolution, encoder.resolution)
    states = encoder.model(pixel_values=pixels, **encoder.options).last_hidden_state
    return states.ndim == 4 or states.shape[1] == encoder.tokens_per_image


def encode_elsewhere(
    folder: Path, loading: Loading, photos: Sequence[PhotoRef], side: int, texts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Embeddings by the folder in a fresh process, which loads it as its card says and cannot reach the hub.

    Returns:
        `squares` (photos as the student sees them), `photos` (as they are, resized by the folder's own modules) and,
        where there are texts, `texts`; each [N, D].

    Raises:
        FieldmarkError: the folder does not load or encode there.
    """
    script = _ENCODE.format(imports=loading.imports, arguments=loading.call("folder")[len("SentenceTransformer(") : -1])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with TemporaryDirectory() as scratch:
        inputs, out = Path(scratch) / "inputs.npz", Path(scratch) / "out.npz"
        paths: dict[str, list[str]] = {"squares": [], "photos": []}
        for number, photo in enumerate(photos):
            for kind, image in (("squares", load_square(photo, side)), ("photos", open_photo(photo))):
                path = Path(scratch) / f"{kind}-{number}.png"
                image.save(path)
                paths[kind].append(str(path))
        given = {name: np.asarray(items) for name, items in (paths | ({"texts": list(texts)} if texts else {})).items()}
        np.savez(inputs, **given)  # type: ignore[arg-type]
        command = [sys.executable, "-c", script, str(folder), str(inputs), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
            raise FieldmarkError(f"The exported folder does not load in a fresh process ({reason}); please report it.")
        with np.load(out) as found:
            return {name: found[name].astype(np.float32) for name in found.files}


def square_side(student: SentenceTransformer) -> int:
    """Side in pixels of the square that a student sees."""
    first: Any = student[0]
    return photo_side(student) if is_multimodal(student) else int(first.resolution)
