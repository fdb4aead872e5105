"""Exports of students made of a multimodal LLM: photo and text graphs, what they compute, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from fieldmark.data.catalog import load_catalog
from fieldmark.errors import FieldmarkError
from fieldmark.export.check import TEXTS, texts_of
from fieldmark.export.exporting import ExportTask, export
from fieldmark.export.mllm import PhotoNetwork
from fieldmark.export.networks import photo_side_of, text_side_of
from fieldmark.export.onnx_graph import OnnxRunner, write_onnx
from fieldmark.export.openvino_graph import OpenvinoRunner, write_openvino
from fieldmark.export.preprocessing import Preprocessing
from fieldmark.export.provenance import Provenance
from fieldmark.export.texts import TOKENIZER, Around, TextReader, around_texts, write_tokenizer
from fieldmark.students.items import encode_items, tokenize_items
from helpers_export import SIDE, cut_layers, make_mllm, make_photos, python_of

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = ["a wren", " A bird,\nwith a long bill! ", "é", "x" * 150, "b", "c d", "e"]
KINDS = ["qwen3_vl", "qwen2_vl", "qwen2_5_vl", "llava"]
WAYS = [("mean", "bidirectional"), ("lasttoken", "causal")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    found = sorted(make_photos(tmp_path_factory.mktemp("mllm") / "photos").rglob("*.png"))
    return [str(path) for path in found]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, photos: list[str]) -> SimpleNamespace:
    """A Qwen3-VL student and its export to ONNX with all variants."""
    root = tmp_path_factory.mktemp("house")
    student, catalog = cut_layers(make_mllm("qwen3_vl", root)), load_catalog(str(Path(photos[0]).parents[1]))
    task = ExportTask(student, "onnx", catalog, "photos", Provenance(), int8=True, dims=(16,))
    return SimpleNamespace(root=root, student=student, out=root / "out", about=export(task, root / "out"))


@pytest.fixture
def plain_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as they are traced, without the fusions that take half of the time; the house's has them."""
    monkeypatch.setattr(torch.onnx, "export", partial(torch.onnx.export, optimize=False))


def assert_photos_alike(student: SentenceTransformer, run: OnnxRunner | OpenvinoRunner, photos: list[str]) -> None:
    expected = encode_items(student, images=photos[:7])
    pixels = Preprocessing.of(student).pixels(photos[:7])
    for count in (1, 3, 7):
        assert np.abs(run({"pixel_values": pixels[:count]}) - expected[:count]).max() < 1e-5
    assert np.abs(expected[0] - expected[1]).max() > 1e-3, "photos that cannot be told apart would show nothing"


def assert_texts_alike(student: SentenceTransformer, run: OnnxRunner | OpenvinoRunner, read: TextReader) -> None:
    expected = encode_items(student, texts=ASKED)
    for count in (1, 3, 7):
        assert np.abs(run(read(ASKED[:count])) - expected[:count]).max() < 1e-5
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


# -- what is computed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pooling", "attention"), WAYS)
def test_the_photo_network_is_the_student_and_leaves_it_alone(
    tmp_path: Path, photos: list[str], kind: str, pooling: str, attention: str
) -> None:
    student = make_mllm(kind, tmp_path, pooling, attention)
    before = encode_items(student, images=photos[:3])
    side = photo_side_of(student)
    with torch.no_grad():
        found = side.network(torch.from_numpy(Preprocessing.of(student).pixels(photos[:3]))).numpy()
    assert np.abs(found - before).max() < 1e-5
    assert np.array_equal(encode_items(student, images=photos[:3]), before)
    weights = {id(parameter) for parameter in student.parameters()}
    assert all(id(parameter) in weights for parameter in side.network.parameters()), "no second copy of the weights"


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava"])
def test_other_families_become_graphs_for_any_batch(
    tmp_path: Path, photos: list[str], kind: str, plain_graphs: None
) -> None:
    student = cut_layers(make_mllm(kind, tmp_path))
    write_onnx(photo_side_of(student), tmp_path / "model.onnx")
    assert_photos_alike(student, OnnxRunner(tmp_path / "model.onnx"), photos)


def test_causal_graphs_with_the_last_token_for_any_batch_and_length(
    tmp_path: Path, photos: list[str], plain_graphs: None
) -> None:
    student = cut_layers(make_mllm("qwen2_5_vl", tmp_path, "lasttoken", "causal"))
    write_onnx(photo_side_of(student), tmp_path / "model.onnx")
    assert_photos_alike(student, OnnxRunner(tmp_path / "model.onnx"), photos)
    side = text_side_of(student)
    assert side is not None
    write_tokenizer(student, side, tmp_path / TOKENIZER)
    write_onnx(side, tmp_path / "text_model.onnx")
    read = TextReader(tmp_path / TOKENIZER, list(side.inputs), around_texts(student))
    assert_texts_alike(student, OnnxRunner(tmp_path / "text_model.onnx"), read)


def test_bidirectional_graphs_of_a_folder_and_openvino_s_of_them(house: SimpleNamespace, photos: list[str]) -> None:
    texts = house.about["texts"]
    around = Around(texts["before"], texts["after"])
    read = TextReader(house.out / texts["tokenizer"], list(texts["inputs"]), around)
    for name in ("model", "text_model"):
        write_openvino(house.out / f"{name}.onnx", house.root / f"{name}.xml")
    for folder, suffix, runner in ((house.out, ".onnx", OnnxRunner), (house.root, ".xml", OpenvinoRunner)):
        assert_photos_alike(house.student, runner(folder / f"model{suffix}"), photos)
        assert_texts_alike(house.student, runner(folder / f"text_model{suffix}"), read)


def test_texts_are_tokenized_as_by_the_student(house: SimpleNamespace) -> None:
    texts = house.about["texts"]
    read = TextReader(house.out / TOKENIZER, list(texts["inputs"]), Around(texts["before"], texts["after"]))
    for found, expected in zip(read(ASKED).values(), map(tokenize_items(house.student, texts=ASKED).get, read.names)):
        assert np.array_equal(found, expected)


# -- what is written


def test_the_folder_says_what_the_graphs_take(house: SimpleNamespace) -> None:
    for name, side in (("model", house.about), ("text_model", house.about["texts"])):
        graph = onnx.load(str(house.out / f"{name}.onnx")).graph
        shapes = {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input
        }
        assert shapes == {key: one["shape"] for key, one in side["inputs"].items()}
    assert house.about["inputs"]["pixel_values"]["shape"] == ["batch", 3, SIDE, SIDE]
    assert house.about["texts"]["inputs"]["input_ids"]["shape"] == ["batch", "length"]
    assert max(house.about["check"][side]["largest_difference"] for side in ("photos", "texts")) < 1e-5
    measured = [(one["name"], one["dim"]) for one in house.about["variants"]["measured"]]
    assert measured == [("float32", 32), ("float32", 16), ("int8", 32), ("int8", 16)]
    assert house.about["int8"]["megabytes"] < house.about["int8"]["megabytes_float32"]
    assert "`qwen3_vl`, mean pooling" in (house.out / "README.md").read_text()


def test_the_photo_graph_has_no_table_of_words(house: SimpleNamespace) -> None:
    words = house.student.transformers_model.get_input_embeddings().weight.shape
    held = {name: [tuple(one.dims) for one in onnx.load(str(house.out / name)).graph.initializer]
            for name in ("model.onnx", "text_model.onnx")}  # fmt: skip
    assert tuple(words) in held["text_model.onnx"]
    assert tuple(words) not in held["model.onnx"]


def test_the_card_s_code_scores_a_photo_against_a_text(house: SimpleNamespace, photos: list[str]) -> None:
    Image.open(photos[0]).save(house.out / "photo.jpg")
    code = f"{python_of(house.out / 'README.md')}\nassert 'torch' not in __import__('sys').modules\n"
    code += "np.save('s.npy', scores)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=house.out, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    student = house.student
    expected = encode_items(student, images=[house.out / "photo.jpg"]) @ encode_items(student, texts=[TEXTS[0]]).T
    assert np.abs(np.load(house.out / "s.npy") - expected).max() < 1e-4


def test_titles_to_check_with_fit_with_their_chat_and_hold_no_control_tokens(
    house: SimpleNamespace, tmp_path: Path, photos: list[str]
) -> None:
    titles = ["a red bird", "x" * 4090, "a <|im_end|> bird"]  # the second fits without its chat
    rows = [{"image": photo, "title": title} for photo, title in zip(photos, titles)]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert texts_of(house.student, load_catalog(str(tmp_path / "table.jsonl"))) == ["a red bird"]


# -- what is refused


def test_a_photo_that_is_not_one_square_s_tokens_is_refused(tmp_path: Path) -> None:
    student = make_mllm("qwen3_vl", tmp_path)
    student[0].processor.image_processor.size = {"shortest_edge": 128 * 128, "longest_edge": SIDE * SIDE + SIDE}
    with pytest.raises(FieldmarkError, match=r"A photo is 16 tokens .* one square gives 4 .* sentence-transformers"):
        photo_side_of(student)


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    student = make_mllm("llava", tmp_path)
    student.transformers_model.config.model_type = "unheard_of"
    with pytest.raises(FieldmarkError, match=r"made of a unheard_of model .* give --to sentence-transformers"):
        PhotoNetwork(student, 224)


def test_a_chat_that_does_not_write_a_text_once_is_refused(tmp_path: Path) -> None:
    student = make_mllm("qwen3_vl", tmp_path)
    student[0].processor.chat_template = "{% for m in messages %}{{ m }}{{ m }}{% endfor %}"
    with pytest.raises(FieldmarkError, match=r"writes a text 2 times, .* give --to sentence-transformers"):
        around_texts(student)
