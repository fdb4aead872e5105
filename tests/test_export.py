"""Exports of photo students: what they compute, what is left of one that fails, what a mistake says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import transformers
from PIL import Image
from sentence_transformers import SentenceTransformer

from fieldmark import cli
from fieldmark.commands.arguments import parse
from fieldmark.commands.export import ExportOptions
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.retrieval import retrieval_metrics
from fieldmark.export import check, exporting, variants
from fieldmark.export.folder import new_folder
from fieldmark.export.networks import photo_side_of
from fieldmark.export.onnx_graph import OnnxRunner, int8_method, write_onnx
from fieldmark.export.preprocessing import Preprocessing
from fieldmark.export.sentence_transformers_folder import Loading, encode_elsewhere, stock_student
from fieldmark.students.build import load_student
from fieldmark.students.pooling import AttentionPooling
from helpers_cli import fails
from helpers_export import CLASSES, PHOTOS, SIDE, finish_run, make_photos, make_student, python_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _loud_libraries() -> Iterator[None]:
    """Commands quieten the libraries for the whole process."""
    yield
    transformers.utils.logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Photos of four classes, a run with a Qwen3-VL student, and its export to ONNX with all variants."""
    root = tmp_path_factory.mktemp("export")
    photos = make_photos(root / "photos")
    run = finish_run(root / "run", model=make_student("qwen3_vl", root))
    argv = ["export", str(run), "--to", "onnx", "--out", str(root / "onnx"), "--data", str(photos)]
    assert cli.main([*argv, "--int8", "--dims", "16", "8", "--batch_size", "3"]) == 0
    return SimpleNamespace(root=root, photos=photos, run=run, onnx=root / "onnx")


def reuse_graph(house: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of the house's student is taken as it was exported, which saves the seconds of another time."""
    monkeypatch.setattr(exporting, "write_onnx", lambda side, path: shutil.copy(house.onnx / "model.onnx", path))


def pixels(student: SentenceTransformer, count: int, seed: int = 0) -> np.ndarray:
    side = Preprocessing.of(student).side
    return np.random.default_rng(seed).normal(size=(count, 3, side, side)).astype(np.float32)


def embeddings(student: SentenceTransformer, values: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return student({"pixel_values": torch.from_numpy(values)})["sentence_embedding"].numpy()


# -- what is computed


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "siglip2", "timm"])
def test_a_graph_computes_the_student_for_any_batch(tmp_path: Path, kind: str) -> None:
    student = make_student(kind, tmp_path)
    write_onnx(photo_side_of(student), tmp_path / "model.onnx")
    run = OnnxRunner(tmp_path / "model.onnx")
    for count in (1, 3, 7):
        values = pixels(student, count, count)
        expected = embeddings(student, values)
        assert np.linalg.norm(expected, axis=1) == pytest.approx(1)
        assert np.abs(run({"pixel_values": values}) - expected).max() < 1e-5
    assert np.abs(expected[0] - expected[1]).max() > 1e-3, "photos that cannot be told apart would show nothing"


def test_the_graph_names_its_inputs_and_tells_nothing_of_the_machine(house: SimpleNamespace) -> None:
    graph = onnx.load(str(house.onnx / "model.onnx")).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert shapes == {"pixel_values": ["batch", 3, SIDE, SIDE], "embedding": ["batch", 24]}
    for path in house.onnx.iterdir():
        content = path.read_bytes()
        for place in (str(house.root), sys.prefix, str(Path(cli.__file__).parent)):
            assert place.encode() not in content, path.name


def test_the_card_s_code_embeds_a_photo_without_pytorch(house: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    shutil.copytree(house.onnx, folder)
    photo = Image.open(next(house.photos.rglob("*.png")))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    photo.save(folder / "photo.jpg", exif=exif, quality=95)
    code = python_of(folder / "README.md")
    code += "\nassert not {'torch', 'transformers', 'fieldmark'} & set(__import__('sys').modules)\n"
    code += "np.save('photos.npy', photos)\nnp.save('short.npy', short)\n"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, short = np.load(folder / "photos.npy"), np.load(folder / "short.npy")
    expected = load_student(house.run / "model").encode([str(folder / "photo.jpg")])
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(short - variants.cut(expected, 16)).max() < 1e-4


def test_pixels_are_the_student_s_own_without_pytorch(house: SimpleNamespace) -> None:
    student = load_student(house.run / "model")
    photos = [str(path) for path in sorted(house.photos.rglob("*.png"))[:3]]
    found = Preprocessing.of(student).pixels(photos)
    np.testing.assert_allclose(found, student.preprocess(photos)["pixel_values"].numpy(), rtol=0, atol=1e-6)
    assert found.dtype == np.float32
    about = json.loads((house.onnx / "export.json").read_text())["preprocessing"]
    assert (about["width"], about["mean"], about["colour_order"]) == (SIDE, student[0].image_mean, "RGB")


def test_the_exported_pooler_is_the_trained_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pooler = AttentionPooling(8, 4)
    torch.nn.init.normal_(pooler.query)
    tokens = {"token_embeddings": torch.randn(3, 5, 8)}
    expected = pooler(dict(tokens))["sentence_embedding"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(pooler(dict(tokens))["sentence_embedding"], expected, rtol=0, atol=1e-6)


def test_openvino_computes_the_student_and_its_card_says_how(
    house: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reuse_graph(house, monkeypatch)
    out = tmp_path / "ir"
    argv = ["export", str(house.run / "model"), "--to", "openvino", "--out", str(out), "--data", str(house.photos)]
    assert cli.main([*argv, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about == json.loads((out / "export.json").read_text())
    assert about["check"]["photos"]["largest_difference"] < 1e-5
    assert about["check"]["photos"]["batches"] == [1, 3, 7, CLASSES * PHOTOS - 11]
    assert {path.name for path in out.iterdir()} == {"README.md", "export.json", "model.bin", "model.xml"}
    assert 'element_type="f16"' not in (out / "model.xml").read_text()
    photo = next(house.photos.rglob("*.png"))
    Image.open(photo).save(out / "photo.jpg", quality=100)
    code = f"{python_of(out / 'README.md')}\nnp.save('photos.npy', photos)\n"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=out, check=True, capture_output=True)
    expected = load_student(house.run / "model").encode([str(out / "photo.jpg")])
    assert np.abs(np.load(out / "photos.npy") - expected).max() < 1e-4


# -- variants


def test_variants_are_measured_as_everything_else(house: SimpleNamespace) -> None:
    about = json.loads((house.onnx / "export.json").read_text())
    student = load_student(house.run / "model")
    paths = sorted(house.photos.rglob("*.png"))[CLASSES // 2 * PHOTOS :]  # the test half of the classes
    labels = [path.parent.name for path in paths]
    vectors = {
        "float32": student.encode([str(path) for path in paths]),
        "int8": OnnxRunner(house.onnx / "model_int8.onnx")(
            {"pixel_values": Preprocessing.of(student).pixels([str(path) for path in paths])}
        ),
    }
    assert 0 < np.abs(vectors["int8"] - vectors["float32"]).max() < 0.2
    measured = about["variants"]["measured"]
    assert [(one["name"], one["dim"]) for one in measured] == [(n, d) for n in vectors for d in (24, 16, 8)]
    whole = retrieval_metrics(vectors["float32"], labels)["recall@1"]
    for one in measured:
        recall = retrieval_metrics(vectors[one["name"]][:, : one["dim"]], labels)["recall@1"]
        assert one["recall@1"] == pytest.approx(recall)
        assert one["loss_points"] == pytest.approx(100 * (whole - recall))
        assert one["interval"][0] <= recall <= one["interval"][1]
    assert (about["variants"]["queries"], about["int8"]["method"]) == (len(paths), "dynamic")
    assert about["int8"]["megabytes"] < about["int8"]["megabytes_float32"]


def test_int8_of_convolutions_is_calibrated_on_train_photos(house: SimpleNamespace, tmp_path: Path) -> None:
    make_student("timm", tmp_path).save_pretrained(str(tmp_path / "student"), create_model_card=False)
    argv = ["export", str(tmp_path / "student"), "--to", "onnx", "--out", str(tmp_path / "out"), "--int8"]
    assert cli.main([*argv, "--data", str(house.photos)]) == 0
    assert int8_method(tmp_path / "out" / "model.onnx") == "static"
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "out" / "model_int8.onnx")).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    student = load_student(tmp_path / "student")
    photos = [str(path) for path in sorted(house.photos.rglob("*.png"))]
    run = OnnxRunner(tmp_path / "out" / "model_int8.onnx")
    found = run({"pixel_values": Preprocessing.of(student).pixels(photos)})
    assert np.all((found * student.encode(photos)).sum(axis=1) > 0.9)


def test_cut_vectors_are_of_length_one() -> None:
    vectors = np.array([[3.0, 4.0, 1.0], [0.0, 0.0, 1.0]], dtype=np.float32)
    np.testing.assert_allclose(variants.cut(vectors, 2), [[0.6, 0.8], [0.0, 0.0]], atol=1e-7)


def test_both_runners_are_timed_on_the_same_photos(house: SimpleNamespace) -> None:
    student = load_student(house.run / "model")
    photos = [str(path) for path in sorted(house.photos.rglob("*.png"))][:5]
    asked: list[tuple[str, np.ndarray]] = []

    def runner(name: str) -> check.Runner:
        def run(inputs: dict) -> np.ndarray:
            asked.append((name, inputs["pixel_values"]))
            return np.full((len(inputs["pixel_values"]), 2), len(asked), np.float32)

        return run  # type: ignore[return-value]

    ticks = iter([0.0, 0.2, 0.6, 1.0, 1.3, 1.9])  # 2 photos in 0.2 s and 0.4 s, twice 0.15 s and 0.3 s
    found, own, other = variants.embed_with(
        runner("int8"),
        runner("float32"),
        Preprocessing.of(student),
        photos[:4],
        batch_size=2,
        clock=lambda: next(ticks),
    )
    assert [name for name, _ in asked] == ["int8", "float32"] * 2
    assert all(np.array_equal(asked[place][1], asked[place + 1][1]) for place in (0, 2))
    assert found[:, 0].tolist() == [1, 1, 3, 3]
    assert (own, other) == (pytest.approx(125), pytest.approx(250))


# -- sentence-transformers


def test_a_tower_becomes_a_folder_that_a_fresh_process_loads(
    house: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "st"
    argv = ["export", str(house.run), "--to", "sentence-transformers", "--out", str(out), "--data", str(house.photos)]
    assert cli.main(argv) == 0
    assert "trust_remote_code=True" in " ".join(capsys.readouterr().out.split())
    about = json.loads((out / "export.json").read_text())
    assert about["check"]["photos"]["largest_difference"] < 1e-6
    assert "trust_remote_code=True" in python_of(out / "README.md")
    assert not any(path.suffix == ".py" for path in out.rglob("*"))


def test_a_mean_pooled_feature_map_is_written_in_stock_modules(house: SimpleNamespace, tmp_path: Path) -> None:
    student = make_student("timm", tmp_path, pooling="mean")
    student.save_pretrained(str(tmp_path / "student"), create_model_card=False)
    out = tmp_path / "st"
    argv = ["export", str(tmp_path / "student"), "--to", "sentence-transformers", "--out", str(out)]
    assert cli.main([*argv, "--data", str(house.photos)]) == 0
    kinds = [module["type"] for module in json.loads((out / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)
    about = json.loads((out / "export.json").read_text())
    assert about["check"]["photos"]["largest_difference"] < 1e-5
    assert about["check"]["whole_photos"]["count"] == CLASSES * PHOTOS
    assert about["loading"]["call"] == 'SentenceTransformer(".")'
    assert not about["loading"]["needs_fieldmark"]


@pytest.mark.parametrize(("kind", "pooling"), [("qwen3_vl", "mean"), ("timm", "attention")])
def test_other_students_are_not_pressed_into_stock_modules(tmp_path: Path, kind: str, pooling: str) -> None:
    assert stock_student(make_student(kind, tmp_path, pooling), tmp_path / "scratch") is None


def test_a_folder_that_does_not_load_is_said(tmp_path: Path, house: SimpleNamespace) -> None:
    photo = str(next(house.photos.rglob("*.png")))
    with pytest.raises(FieldmarkError, match="does not load in a fresh process"):
        encode_elsewhere(tmp_path / "nothing", Loading(imports="import nowhere_at_all\n"), [photo], SIDE, [])


# -- all or nothing


def test_a_difference_above_the_tolerance_leaves_nothing(
    house: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reuse_graph(house, monkeypatch)
    argv = ["export", str(house.run), "--to", "onnx", "--out", str(tmp_path / "out"), "--data", str(house.photos)]
    sentence = fails(capsys, [*argv, "--tolerance", "0"])
    assert "differs from the student by up to" in sentence
    assert "more than --tolerance 0" in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"

    def interrupted() -> None:
        with new_folder(out) as folder:
            (folder / "half").write_text("x")
            assert not out.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(out.parent.iterdir()) == []
    code = (
        "import os, signal, sys, pathlib\nfrom fieldmark.export.folder import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    out.mkdir()  # an empty folder is no hindrance
    with new_folder(out) as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert out.stat().st_mode == out.parent.stat().st_mode


def test_what_lies_at_out_is_never_touched(
    house: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, words in (("full", "is a folder that is not empty"), ("file", "is not a folder")):
        assert words in fails(capsys, ["export", str(house.run), "--to", "onnx", "--out", str(tmp_path / name)])
    below = str(tmp_path / "file" / "out")
    assert "does not lie in a folder" in fails(capsys, ["export", str(house.run), "--to", "onnx", "--out", below])
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "x"


# -- mistakes


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--to", "tflite"], "'tflite'; expected one of onnx, openvino, sentence-transformers"),
        (["--int8"], "give --data with them"),
        (["--dims", "16"], "give --data with them"),
        (["--tolerance", ".nan"], "--tolerance nan was given; expected 0 or more"),
        (["--tolerance", "-1"], "expected 0 or more"),
        (["--batch_size", "0"], "--batch_size was given 0; expected 1 or more"),
        (["--dims", "16", "x", "--data", "PHOTOS"], "expected a list"),
        (["--dims", "16", "24", "--data", "PHOTOS"], "--dims 24 was given; expected lengths from 1 to 23"),
        (["--dims", "8,8", "--data", "PHOTOS"], "given a length twice"),
        (["--dims", "0", "--data", "PHOTOS"], "--dims 0 was given"),
        (["--to", "openvino", "--int8", "--data", "PHOTOS"], "give --to onnx with it"),
        (["--int8", "--data", "aviary:1"], "two photos of a class"),
        (["--runs", "nowhere"], "The run nowhere does not exist"),
        (["--data", "nowhere/at/all"], "does not exist"),
    ],
)
def test_a_mistake_is_one_sentence(
    house: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], expected: str
) -> None:
    given = [str(house.photos) if word == "PHOTOS" else word for word in more]
    argv = ["export", str(house.run), "--out", str(tmp_path / "out"), *([] if "--to" in given else ["--to", "onnx"])]
    assert expected in fails(capsys, [*argv, *given])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "dims", "runs"),
    [
        (["--dims", "16", "8", "--runs", "a,b", "c [d]"], [16, 8], ["a,b", "c [d]"]),
        (["--dims", "16,8", "--runs", "a", "--runs", "b"], [16, 8], ["a", "b"]),
        (["--dims=16,8"], [16, 8], []),
        (["--dims", "[16,8]"], [16, 8], []),
        ([], [], []),
    ],
)
def test_lists_are_words_behind_their_flag(given: list[str], dims: list[int], runs: list[str]) -> None:
    argv = ["model", "--to", "onnx", "--out", "out", *given]
    options = parse(ExportOptions, argv, prog="export", description="", positional=("model",), several=("dims", "runs"))
    assert (options.dims, options.runs) == (dims, runs)


def test_a_missing_package_names_the_extra(
    house: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, package in (("onnx", "onnxruntime"), ("openvino", "openvino"), ("onnx", "onnxscript")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            sentence = fails(capsys, ["export", str(house.run), "--to", kind, "--out", str(tmp_path / "out")])
        assert f'{package} is not installed; export to {kind} needs `pip install "fieldmark[export]"`' in sentence


def test_a_network_that_cannot_be_exported_is_one_sentence(tmp_path: Path) -> None:
    student = make_student("timm", tmp_path)
    side = photo_side_of(student)
    side.network.forward = lambda pixel_values: pixel_values[: int(pixel_values.sum())]  # type: ignore[method-assign]
    with pytest.raises(FieldmarkError, match="PyTorch cannot export this student") as caught:
        write_onnx(side, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not os.path.exists(tmp_path / "model.onnx")


# -- the check itself


def test_differences_and_batches() -> None:
    one = np.ones((2, 3), np.float32)
    assert check.difference(one, one + np.float32(0.5)) == 0.5
    for wrong in (one[:1], one[:, :2], one * np.nan):
        assert check.difference(one, wrong) == float("inf")
        with pytest.raises(FieldmarkError, match="differs from the student"):
            check.refuse_difference(check.difference(one, wrong), 1e9, "photo network")
    assert [len(batch) for batch in check.in_batches(range(32))] == [1, 3, 7, 21]
    assert [len(batch) for batch in check.in_batches(range(11))] == [1, 3, 7]
    assert [list(batch) for batch in check.in_batches("ab")] == [["a"], ["b"]]
    assert check.spread_over(range(100), 3) == [0, 50, 99]
    assert check.spread_over("ab", 9) == ["a", "b"]
