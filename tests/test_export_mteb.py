"""Students as models of mteb: the same numbers as fieldmark's own evaluation, and mistakes in a sentence."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation import mteb_model
from fieldmark.evaluation.mteb_model import MtebStudent, weights_digest
from fieldmark.evaluation.retrieval import retrieval_metrics
from fieldmark.students.items import encode_items
from helpers_export import CLASSES, PHOTOS, make_dual_encoder, make_photos, make_student

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = {"task_metadata": SimpleNamespace(name="Birds"), "hf_split": "test", "hf_subset": "default"}


def local_task(photos: list[Path]) -> Any:
    """Each photo searches the others of its class, without any network."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Birds(AbsTaskRetrieval):
        ignore_identical_ids = True
        metadata = TaskMetadata(
            name="Birds", description="birds", reference=None, dataset={"path": "none", "revision": "1"},
            type="Any2AnyRetrieval", category="i2i", modalities=["image"], eval_splits=["test"],
            eval_langs=["eng-Latn"], main_score="hit_rate_at_1", date=("2020-01-01", "2020-01-02"), domains=[],
            task_subtypes=[], license="not specified", annotations_creators="derived", dialect=[],
            sample_creation="created", bibtex_citation="",
        )  # fmt: skip

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            ids = [str(photo) for photo in photos]
            rows = {"id": ids, "image": [Image.open(photo) for photo in photos], "modality": ["image"] * len(ids)}
            relevant = {
                one: {other: 1 for other in ids if other != one and Path(other).parent == Path(one).parent}
                for one in ids
            }
            table = Dataset.from_dict(rows)
            split = {"queries": table, "corpus": table, "relevant_docs": relevant, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Birds()


def test_mteb_measures_what_fieldmark_measures(tmp_path: Path) -> None:
    mteb = pytest.importorskip("mteb")
    student = make_student("timm", tmp_path)
    photos = sorted(make_photos(tmp_path / "photos").rglob("*.png"))
    model = MtebStudent(student, "someone/birds")
    assert isinstance(model, mteb.EncoderProtocol)
    found = mteb.evaluate(
        model,
        local_task(photos),
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
        encode_kwargs={"batch_size": 3},
    )
    (result,) = found.task_results
    own = retrieval_metrics(student.encode([str(p) for p in photos]), [p.parent.name for p in photos], ks=(1, 3))
    scores = result.scores["test"][0]
    assert scores["hit_rate_at_1"] == pytest.approx(own["recall@1"], abs=1e-5)
    assert scores["hit_rate_at_3"] == pytest.approx(own["recall@3"], abs=1e-5)
    assert 0 < own["recall@1"] < 1, "all right or all wrong would show little"
    assert len(photos) == CLASSES * PHOTOS


def test_photos_and_texts_are_embedded_by_their_side(tmp_path: Path) -> None:
    pytest.importorskip("mteb")
    student = make_dual_encoder("clip", tmp_path)
    model = MtebStudent(student)
    images = [Image.open(path) for path in sorted(make_photos(tmp_path / "photos").rglob("*.png"))[:3]]
    texts = ["a wren", "a much longer text", "b"]
    of_photos = model.encode([{"image": images[:2]}, {"image": images[2:]}], **TASK)
    of_texts = model.encode([{"text": texts}], **TASK)
    assert np.abs(of_photos - encode_items(student, images=images)).max() < 1e-6
    assert np.abs(of_texts - encode_items(student, texts=texts)).max() < 1e-6
    np.testing.assert_allclose(model.similarity(of_photos, of_texts), of_photos @ of_texts.T, atol=1e-6)
    np.testing.assert_allclose(
        model.similarity_pairwise(of_photos, of_texts), (of_photos * of_texts).sum(axis=1), atol=1e-6
    )
    assert model.mteb_model_meta.modalities == ["image", "text"]
    assert (model.mteb_model_meta.embed_dim, model.mteb_model_meta.license) == (24, None)
    with pytest.raises(FieldmarkError, match="one or the other"):
        model.encode([{"image": images, "text": texts}], **TASK)


def test_a_mistake_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mteb")
    student = make_student("timm", tmp_path)
    model = MtebStudent(student)
    for batches, words in (
        ([{"text": ["a"]}], "The task Birds has texts, and this student embeds photos only"),
        ([{"audio": [1]}], "gives audio; a student embeds photos and texts only"),
        ([], "gave nothing to embed"),
    ):
        with pytest.raises(FieldmarkError, match=words):
            model.encode(batches, **TASK)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    with pytest.raises(FieldmarkError, match="mteb is not installed; run `pip install mteb`"):
        MtebStudent(student)


def test_the_revision_is_that_of_the_weights(tmp_path: Path) -> None:
    student = make_student("timm", tmp_path)
    first = weights_digest(student)
    assert first == weights_digest(make_student("timm", tmp_path))
    student[1].query.data[0] += 1e-6
    assert weights_digest(student) != first


def test_mteb_is_imported_only_when_a_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    assert importlib.reload(mteb_model).MtebStudent
