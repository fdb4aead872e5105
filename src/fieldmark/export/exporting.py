"""One export from beginning to end: load, write, check, measure, describe; nothing is left of one that fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from fieldmark.data.catalog import select_split
from fieldmark.data.photos import open_photo
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.student import embed_catalog, embed_photos
from fieldmark.export import check, variants
from fieldmark.export.card import CardFacts, write_card
from fieldmark.export.folder import new_folder
from fieldmark.export.networks import EMBEDDING, photo_side_of, text_side_of
from fieldmark.export.onnx_graph import OnnxRunner, int8_method, write_int8, write_onnx
from fieldmark.export.openvino_graph import OpenvinoRunner, write_openvino
from fieldmark.export.packages import require, versions
from fieldmark.export.preprocessing import Preprocessing
from fieldmark.export.provenance import Provenance
from fieldmark.export.sentence_transformers_folder import Loading, encode_elsewhere, square_side, write_folder
from fieldmark.export.texts import NOTHING, TOKENIZER, TextReader, around_texts, context_of, write_tokenizer
from fieldmark.progress import JobProgress
from fieldmark.students.items import encode_items, is_multimodal

Kind = Literal["onnx", "openvino", "sentence-transformers"]
ABOUT = "export.json"
FORMAT = 1  # raised when a reader of export.json must be changed
CALIBRATED = 128  # photos whose activations tell the ranges of static quantisation


@dataclass(frozen=True)
class ExportTask:
    """What is exported, and what it is checked and measured with.

    Attributes:
        student: on the CPU, in eval mode; a graph is made of it in float32.
        kind: format.
        catalog: photos to check with; with `int8` or `dims` also the labelled ones to measure on.
        source: what the catalogue is called in the card.
        provenance: where the student comes from.
        tolerance: largest allowed absolute difference of a number of the embedding.
        int8: also write and measure a file of the photo side with 8-bit weights.
        dims: lengths that the vector is cut to and measured at.
        batch_size: photos at once while measuring.
    """

    student: SentenceTransformer
    kind: Kind
    catalog: datasets.Dataset
    source: str
    provenance: Provenance
    tolerance: float = 1e-4
    int8: bool = False
    dims: Sequence[int] = ()
    batch_size: int = 32


def export(task: ExportTask, out: Path) -> dict[str, Any]:
    """Writes the folder `out`: the model, `export.json` and `README.md`.

    Returns:
        The content of `export.json`.

    Raises:
        FieldmarkError: `out` is taken, a package is missing, the student cannot be exported so, the export differs from
            it by more than the tolerance, or the catalogue does not serve. Nothing is left at `out` then.
    """
    require(task.kind)
    dim = task.student.get_embedding_dimension()
    assert dim is not None
    if task.int8 and task.kind != "onnx":
        raise FieldmarkError("--int8 quantises the ONNX file; give --to onnx with it.")
    variants.check_dims(task.dims, dim)
    test = _test_photos(task)
    texts = is_multimodal(task.student)
    with new_folder(out) as folder:
        about: dict[str, Any] = {
            "format": FORMAT,
            "fieldmark": metadata.version("fieldmark"),
            "to": task.kind,
            "preprocessing": Preprocessing.of(task.student).describe(),
            "embedding": {"output": EMBEDDING, "dim": dim, "dtype": "float32", "normalised": True, "similarity": "dot"},
        }
        about |= _write_folder(task, folder) if task.kind == "sentence-transformers" else _write_graph(task, folder)
        if test is not None:
            about |= _measure(task, test, folder)
        facts = CardFacts(out.absolute().name, task.kind, *_network(task.student), texts)
        (folder / "README.md").write_text(write_card(facts, about, task.provenance), encoding="utf-8")
        text = json.dumps(about, indent=2, ensure_ascii=False)
        (folder / ABOUT).write_text(text + "\n", encoding="utf-8")
    return about


def _test_photos(task: ExportTask) -> datasets.Dataset | None:
    """The photos that variants are measured on, or None where none were asked for."""
    if not (task.int8 or task.dims):
        return None
    test = select_split(task.catalog, "test")
    variants.check_measurable(test)
    return test


def _write_graph(task: ExportTask, folder: Path) -> dict[str, Any]:
    """ONNX or OpenVINO: one file a side, each checked."""
    student = task.student.float()
    open_graph: Callable[[Path], check.Runner] = OnnxRunner if task.kind == "onnx" else OpenvinoRunner
    suffix = ".onnx" if task.kind == "onnx" else ".xml"

    def write(side: Any, name: str) -> Path:
        source = folder / f"{name}.onnx"
        write_onnx(side, source)
        if task.kind == "openvino":
            write_openvino(source, folder / f"{name}.xml")
            for path in folder.glob(f"{source.name}*"):
                path.unlink()
        return folder / f"{name}{suffix}"

    side = photo_side_of(student)
    file = write(side, "model")
    photos = check.photos_of(task.catalog)
    largest = check.photo_difference(student, open_graph(file), Preprocessing.of(student), photos)
    check.refuse_difference(largest, task.tolerance, "photo network")
    about: dict[str, Any] = {
        "file": file.name,
        "inputs": {name: {"dtype": "float32", "shape": side.shape(name)} for name in side.inputs},
        "check": _check(task, "float32", "onnxruntime" if task.kind == "onnx" else "openvino", photos, largest),
    }
    text_side = text_side_of(student)
    if text_side is None:
        return about
    if not write_tokenizer(student, text_side, folder / TOKENIZER):
        about["texts_left_out"] = "the tokenizer is Python code of transformers and has no tokenizer.json"
        return about
    around = around_texts(student)
    file, read = write(text_side, "text_model"), TextReader(folder / TOKENIZER, list(text_side.inputs), around)
    texts = check.texts_of(student, task.catalog)
    largest = check.text_difference(student, open_graph(file), read, texts)
    check.refuse_difference(largest, task.tolerance, "text network")
    about["texts"] = {
        "file": file.name,
        "tokenizer": TOKENIZER,
        "inputs": {name: {"dtype": "int64", "shape": text_side.shape(name)} for name in text_side.inputs},
    }
    if around != NOTHING:
        about["texts"] |= {**around._asdict(), "context": context_of(student)}
    about["check"]["texts"] = {"count": len(texts), "largest_difference": largest}
    return about


def _write_folder(task: ExportTask, folder: Path) -> dict[str, Any]:
    """sentence-transformers: the folder is loaded and asked in a fresh process."""
    student = task.student
    loading = write_folder(student, folder)
    photos = check.photos_of(task.catalog)
    texts = check.texts_of(student, task.catalog) if is_multimodal(student) else []
    found = encode_elsewhere(folder, loading, photos, square_side(student), texts)
    expected = embed_photos(student, photos)
    largest = check.difference(expected, found["squares"])
    sizes = np.array([open_photo(photo).size for photo in photos])
    other = (sizes != square_side(student)).any(axis=1)
    whole = check.difference(expected[other], found["photos"][other])
    # Fieldmark's own tower resizes as the student does; other modules resize by their own processor.
    check.refuse_difference(max(largest, whole) if loading.trust else largest, task.tolerance, "folder")
    precision = str(next(student.parameters()).dtype).removeprefix("torch.")
    about: dict[str, Any] = {"check": _check(task, precision, "sentence-transformers", photos, largest)}
    if not loading.trust:
        about["check"]["whole_photos"] = {"count": int(other.sum()), "largest_difference": whole}
    if texts:
        of_texts = check.difference(encode_items(student, texts=texts), found["texts"])
        check.refuse_difference(of_texts, task.tolerance, "folder's text side")
        about["texts"] = {}
        about["check"]["texts"] = {"count": len(texts), "largest_difference": of_texts}
    about["loading"] = {
        "call": loading.call('"."'),
        "imports": loading.imports,
        "trust_remote_code": loading.trust,
        "needs_fieldmark": loading.needs_fieldmark,
        "says": how_it_loads(loading),
    }
    return about


def how_it_loads(loading: Loading) -> str:
    """What a folder needs to be loaded, and why."""
    if loading.trust:
        return (
            "The folder names module classes of fieldmark, which must be installed; sentence-transformers 6 asks for "
            "trust_remote_code=True before it imports a module class of any other package. No code lies in the folder."
        )
    if loading.imports:
        return (
            "The modules are sentence-transformers' own; the model type inside them is fieldmark's, which must be "
            "installed and imported first."
        )
    return "The modules are sentence-transformers' own: neither fieldmark nor trust_remote_code is needed."


def _check(task: ExportTask, precision: str, runtime: str, photos: Sequence[Any], largest: float) -> dict[str, Any]:
    ((name, version),) = versions(runtime).items()
    return {
        "against": f"the student in PyTorch {torch.__version__.partition('+')[0]}, {precision}",
        "precision": precision,
        "runtime": f"{name} {version}",
        "tolerance": task.tolerance,
        "photos": {
            "source": task.source,
            "count": len(photos),
            "batches": [len(batch) for batch in check.in_batches(photos)],
            "largest_difference": largest,
        },
    }


def _measure(task: ExportTask, test: datasets.Dataset, folder: Path) -> dict[str, Any]:
    """Recall@1 of the student, of its cut vectors and of 8-bit weights."""
    with JobProgress("measuring", len(test)) as job:
        vectors = {"float32": embed_catalog(task.student, test, batch_size=task.batch_size, progress=job.update)}
    about: dict[str, Any] = {}
    if task.int8:
        source, path = folder / "model.onnx", folder / "model_int8.onnx"
        method = int8_method(source)
        write_int8(source, path, method, _calibration(task) if method == "static" else ())
        vectors["int8"], own, others = variants.embed_with(
            OnnxRunner(path), OnnxRunner(source), Preprocessing.of(task.student), list(test["image"]),
            batch_size=task.batch_size,
        )  # fmt: skip
        about["int8"] = {
            "file": path.name,
            "method": method,
            "megabytes": _megabytes(path),
            "megabytes_float32": _megabytes(source),
            "milliseconds_per_photo": own,
            "milliseconds_per_photo_float32": others,
            "threads": torch.get_num_threads(),
            "batch_size": task.batch_size,
        }
    measured, queries = variants.measure(vectors, test, task.dims)
    about["variants"] = {
        "source": task.source,
        "split": "test",
        "queries": queries,
        "measured": [one.as_dict() for one in measured],
    }
    return about


def _calibration(task: ExportTask) -> Iterator[Any]:
    """Batches of train photos; test photos would tell the network what it is then measured on."""
    photos = check.spread_over(list(select_split(task.catalog, "train")["image"]), CALIBRATED)
    seen = Preprocessing.of(task.student)
    for start in range(0, len(photos), task.batch_size):
        yield seen.pixels(photos[start : start + task.batch_size])


def _megabytes(path: Path) -> float:
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) / 1e6


def _network(student: SentenceTransformer) -> tuple[str, str | None, int]:
    """Architecture, pooling and number of weights."""
    first: Any = student[0]
    parameters = sum(parameter.numel() for parameter in student.parameters())
    config = first.config if is_multimodal(student) else first.encoder.config
    name = getattr(config, "architecture", None) or type(config).model_type
    if is_multimodal(student):
        pooling: Any = student[1] if len(student) > 1 else None
        return name, str(pooling.pooling_mode) if isinstance(pooling, Pooling) else None, parameters
    return name, type(student[1]).__name__.removesuffix("Pooling").lower(), parameters
