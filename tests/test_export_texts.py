"""Exports of dual encoders: both sides, the tokenizer, and a folder of stock modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import Siglip2Config, Siglip2ImageProcessor

from fieldmark import cli
from fieldmark.data.catalog import load_catalog
from fieldmark.export.check import TEXTS, texts_of
from fieldmark.export.exporting import ExportTask, export
from fieldmark.export.networks import one_grid, photo_side_of, text_side_of
from fieldmark.export.onnx_graph import OnnxRunner, write_onnx
from fieldmark.export.preprocessing import Preprocessing
from fieldmark.export.provenance import Provenance
from fieldmark.export.sentence_transformers_folder import write_folder
from fieldmark.export.texts import TextReader, write_tokenizer
from fieldmark.students.items import encode_items
from helpers_export import CONTEXT, SIZES, make_dual_encoder, make_photos, python_of

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = ["a wren", "A bird, with a long bill!", "é", "x" * 200, "b", "c d", "e"]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_are_embedded_as_by_the_student(tmp_path: Path, kind: str) -> None:
    student = make_dual_encoder(kind, tmp_path)
    side = text_side_of(student)
    assert side is not None
    assert list(side.inputs) == (["input_ids", "attention_mask"] if kind == "clip" else ["input_ids"])
    assert write_tokenizer(student, side, tmp_path / "tokenizer.json")
    write_onnx(side, tmp_path / "text_model.onnx")
    read, run = TextReader(tmp_path / "tokenizer.json", list(side.inputs)), OnnxRunner(tmp_path / "text_model.onnx")
    expected = student.encode([{"text": text} for text in ASKED])  # cuts the long one too
    for count in (1, 3, 7):
        assert np.abs(run(read(ASKED[:count])) - expected[:count]).max() < 1e-5


def test_both_sides_are_exported_and_the_card_s_code_scores_a_photo_against_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = make_dual_encoder("clip", tmp_path)
    student.save_pretrained(str(tmp_path / "student"), create_model_card=False)
    photos, out = make_photos(tmp_path / "photos"), tmp_path / "out"
    argv = ["export", str(tmp_path / "student"), "--to", "onnx", "--out", str(out), "--data", str(photos)]
    assert cli.main(argv) == 0
    assert "on 4 texts" in " ".join(capsys.readouterr().out.split())  # two are too long for its context
    about = json.loads((out / "export.json").read_text())
    assert about["texts"]["inputs"]["input_ids"] == {"dtype": "int64", "shape": ["batch", CONTEXT]}
    assert max(about["check"][side]["largest_difference"] for side in ("photos", "texts")) < 1e-5
    Image.open(next(photos.rglob("*.png"))).save(out / "photo.jpg")
    code = (
        f"{python_of(out / 'README.md')}\nassert 'torch' not in __import__('sys').modules\nnp.save('s.npy', scores)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = encode_items(student, images=[out / "photo.jpg"]) @ encode_items(student, texts=[TEXTS[0]]).T
    assert np.abs(np.load(out / "s.npy") - expected).max() < 1e-4


def test_siglip2_takes_pixels_and_resamples_its_positions_once(tmp_path: Path) -> None:
    student = make_dual_encoder("siglip", tmp_path)
    vision = {**SIZES, "num_patches": 9, "patch_size": 8}  # trained on 3 x 3 patches, shown 4 x 4
    text = student[0].config.text_config.to_dict()
    torch.manual_seed(0)
    from transformers import AutoModel

    student[0].model = AutoModel.from_config(Siglip2Config(text_config=text, vision_config=vision)).eval()
    student[0].processor.image_processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    student[0].processing_kwargs["image"] = {"patch_size": 8, "max_num_patches": 16}
    photos = sorted(make_photos(tmp_path / "photos").rglob("*.png"))[:3]
    side = photo_side_of(student)
    pixels = Preprocessing.of(student).pixels(photos)
    expected = encode_items(student, images=photos)
    with one_grid(side.network), torch.no_grad():
        found = side.network(torch.from_numpy(pixels)).numpy()
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(encode_items(student, images=photos) - expected).max() == 0, "the student is as it was"


def test_a_tokenizer_of_python_code_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_dual_encoder("siglip", tmp_path)
    monkeypatch.setattr(type(student[0].tokenizer), "is_fast", False)
    catalog = load_catalog(str(make_photos(tmp_path / "photos")))
    about = export(ExportTask(student, "onnx", catalog, "photos", Provenance()), tmp_path / "out")
    assert "tokenizer is Python code" in about["texts_left_out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "export.json", "model.onnx"}


def test_a_dual_encoder_needs_neither_fieldmark_nor_trust(tmp_path: Path) -> None:
    student = make_dual_encoder("clip", tmp_path)
    loading = write_folder(student, tmp_path / "out")
    assert not loading.needs_fieldmark
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert np.abs(again.encode(ASKED[:2]) - encode_items(student, texts=ASKED[:2])).max() < 1e-6


def test_titles_that_fit_are_what_texts_are_checked_with(tmp_path: Path) -> None:
    student = make_dual_encoder("clip", tmp_path)
    photos = sorted(make_photos(tmp_path / "photos").rglob("*.png"))
    titles = ["a red bird", "a red bird", "x" * 300, ""]
    rows = "".join(f"{photo},{title}\n" for photo, title in zip(photos, titles))
    (tmp_path / "table.csv").write_text(f"image,title\n{rows}", encoding="utf-8")
    assert texts_of(student, load_catalog(str(tmp_path / "table.csv"))) == ["a red bird"]
