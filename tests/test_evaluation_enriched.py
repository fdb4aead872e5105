"""Photos with titles and attributes where products are not known: what is measured, what is left out and said."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from fieldmark.data.catalog import load_catalog
from fieldmark.evaluation.enriched import evaluate_enriched
from fieldmark.students.multimodal import build_multimodal_student
from helpers_cli import draw
from helpers_tiny import make_tiny_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = {
    "unlabelled": [""] * 4,
    "some": ["a", "a", "b", ""],
    "single": ["a", "b", "c", "d"],
    "products": ["a", "a", "b", "b"],
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Four photos with titles, under several labels."""
    root = tmp_path_factory.mktemp("shop")
    for number in range(4):
        draw(number).save(root / f"{number}.png")
    for name, labels in LABELS.items():
        with open(root / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["image", "label", "title", "split"])
            table.writerows([f"{n}.png", label, f"item {n}", "test"] for n, label in enumerate(labels))
    return root


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> SentenceTransformer:
    made = make_tiny_teacher("qwen3_vl", tmp_path_factory.mktemp("made") / "teacher")
    return build_multimodal_student(made, resolution=64, lora_rank=0)


@pytest.mark.parametrize("name", list(LABELS))
def test_products_that_are_not_known_are_left_out_with_a_sentence(shop, student, caplog, name):
    rows = load_catalog(str(shop / f"{name}.csv"))
    with caplog.at_level(logging.WARNING, logger="fieldmark.evaluation.enriched"):
        found = evaluate_enriched(student, rows, [{"colour": "red"}] * 4)
    known = name == "products"
    told = "Test items without a label, or no two of one product: products and categories are not measured"
    assert (told in caplog.messages) == (not known)
    assert {"i2t_recall@1", "t2i_recall@1"} <= set(found.metrics)
    assert ("instance_recall@1" in found.metrics) == ("enriched_instance_recall@1" in found.metrics) == known
    assert (found.per_query is not None) == (found.enriched is not None) == known
    assert found.embeddings.shape[0] == 4
