"""A student as a model of mteb 2, so that `mteb.evaluate(model, tasks)` measures it.

mteb is imported when a model is made, never before: fieldmark does not depend on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim, pairwise_cos_sim

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.student import embed_photos
from fieldmark.students.build import load_student
from fieldmark.students.items import encode_items, is_multimodal


class MtebStudent:
    """mteb's encoder protocol around a student of photos, or of photos and texts.

    Args:
        student: the student, or the folder or hub id of one.
        name: `OWNER/NAME` under which mteb files its results; None makes one of the folder.
        revision: of the weights; None takes a digest of them, so that mteb's cache never mistakes one student for
            another.
        device: where to put a student that is loaded here.

    Attributes:
        mteb_model_meta: what mteb asks of a model; what is not known of this one is None.

    Raises:
        FieldmarkError: mteb is not installed, or the student cannot be loaded.
    """

    def __init__(
        self,
        student: SentenceTransformer | str | Path,
        name: str | None = None,
        revision: str | None = None,
        *,
        device: str | None = None,
    ) -> None:
        try:
            from mteb.models import ModelMeta
        except ModuleNotFoundError as error:
            raise FieldmarkError(
                "mteb is not installed; run `pip install mteb` to evaluate a student by it."
            ) from error
        self.student = student if isinstance(student, SentenceTransformer) else load_student(student, device)
        self.student.eval()
        folder = "student" if isinstance(student, SentenceTransformer) else _folder_name(Path(student))
        texts = is_multimodal(self.student)
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=name or f"fieldmark/{folder}",
            revision=revision or weights_digest(self.student),
            release_date=None,
            languages=None,
            n_parameters=sum(parameter.numel() for parameter in self.student.parameters()),
            memory_usage_mb=None,
            max_tokens=None,
            embed_dim=self.student.get_embedding_dimension(),
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["Sentence Transformers", "PyTorch"],
            similarity_fn_name="cosine",  # type: ignore[arg-type]
            use_instructions=False,
            training_datasets=None,
            modalities=["image", "text"] if texts else ["image"],
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Vectors of what a task asks for, in its order.

        Args:
            inputs: batches with the key `image` (Pillow images), `text`, or both; both are embedded together.
            task_metadata: the task; its name stands in errors.
            hf_split: ignored, part of the protocol.
            hf_subset: likewise.
            prompt_type: likewise: a student's prompts are a part of it.
            **kwargs: likewise (mteb has made the batches already).

        Returns:
            [N, D] float32, of unit length.

        Raises:
            FieldmarkError: the task asks for something that the student does not embed.
        """
        parts = [self._batch(batch, str(task_metadata.name)) for batch in inputs]
        if not parts:
            raise FieldmarkError(f"The task {task_metadata.name} gave nothing to embed.")
        return np.concatenate(parts)

    def _batch(self, batch: Mapping[str, Any], task: str) -> np.ndarray:
        images, texts = batch.get("image"), batch.get("text")
        if images is None and texts is None:
            raise FieldmarkError(
                f"The task {task} gives {', '.join(batch) or 'nothing'}; a student embeds photos and texts only."
            )
        if texts is None:
            return embed_photos(self.student, list(images or ()), batch_size=len(images or ()))
        if not is_multimodal(self.student):
            raise FieldmarkError(f"The task {task} has texts, and this student embeds photos only.")
        photos = None if images is None else list(images)
        return encode_items(self.student, images=photos, texts=list(texts), batch_size=len(texts))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """[N, M] cosines of two lists of vectors."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """[N] cosines of the vectors at the same places."""
        return pairwise_cos_sim(embeddings1, embeddings2)


def weights_digest(student: SentenceTransformer) -> str:
    """The first 16 hex digits of a SHA-256 over the student's weights, their names and types."""
    digest = hashlib.sha256()
    for name, weight in sorted(student.state_dict().items()):
        value = weight.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _folder_name(folder: Path) -> str:
    """The last part of a path; of `RUN/model` the run's."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name
