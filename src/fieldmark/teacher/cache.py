"""A teacher's answers that do not depend on the student, kept in a Parquet file: asked once, never again.

The file says in its metadata what made it (teacher, prompt, settings); answers made otherwise are refused. Answers are
written in parts beside the file as they come, so that a killed job goes on where it was; at the end they are one file.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from fieldmark.data.photos import PhotoRef
from fieldmark.errors import FieldmarkError
from fieldmark.teacher.model import Teacher

ROWS_A_PART = 4096
SECONDS_A_PART = 60.0  # what a kill can cost, where answers take long
_MADE_BY = b"fieldmark"


class AnswerCache:
    """Rows with a `key` each, of one teacher under one set of settings.

    Args:
        path: the Parquet file; it may exist.
        schema: columns beside `key`.
        made_by: what the answers depend on beside the key; any difference is refused.

    Raises:
        FieldmarkError: the file cannot be read, has other columns, or was made otherwise.
    """

    def __init__(self, path: Path, schema: pa.Schema, made_by: Mapping[str, Any]) -> None:
        self.path, self.parts = path, path.with_name(f"{path.name}.parts")
        self.made_by = json.loads(json.dumps(dict(made_by), sort_keys=True))
        fields = [pa.field("key", pa.string()), *schema]
        self.schema = pa.schema(fields, metadata={_MADE_BY: json.dumps(self.made_by, sort_keys=True).encode()})
        self.rows: dict[str, dict[str, Any]] = {}
        self._new: list[dict[str, Any]] = []
        self._written = time.monotonic()
        for file in (path, *sorted(self.parts.glob("*.parquet"))):
            if file.exists():
                self.rows |= {row["key"]: row for row in self._read(file)}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.rows[key]

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Keeps answers; every minute, or every few thousand of them, they are written."""
        for row in rows:
            self.rows[row["key"]] = row
            self._new.append(row)
        late = time.monotonic() - self._written > SECONDS_A_PART
        if len(self._new) >= ROWS_A_PART or (late and self._new):
            self._write_part()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        """All in one file; after an error or an interrupt, what there is in parts."""
        if self._new:
            self._write_part()
        if kind is None and self.parts.exists():
            self._write(self.path, list(self.rows.values()))
            for file in self.parts.glob("*"):
                file.unlink()
            self.parts.rmdir()

    def _write_part(self) -> None:
        self.parts.mkdir(parents=True, exist_ok=True)
        number = len(list(self.parts.glob("*.parquet")))
        self._write(self.parts / f"{number:06d}.parquet", self._new)
        self._new, self._written = [], time.monotonic()

    def _write(self, file: Path, rows: list[dict[str, Any]]) -> None:
        unfinished = file.with_name(f"{file.name}.unfinished")
        pq.write_table(pa.Table.from_pylist(rows, schema=self.schema), unfinished)
        unfinished.replace(file)

    def _read(self, file: Path) -> list[dict[str, Any]]:
        table, stored = _read_table(file)
        differ = sorted(name for name in {**stored, **self.made_by} if stored.get(name) != self.made_by.get(name))
        if differ or table.schema.names != self.schema.names:
            what = "; ".join(f"{name} was {stored.get(name)!r}, is {self.made_by.get(name)!r}" for name in differ)
            raise FieldmarkError(
                f"the answers in {file} were made otherwise ({what or 'other columns'}); give another file, or delete "
                "it to ask anew"
            )
        return table.to_pylist()


def read_answers(path: Path, kind: str) -> list[dict[str, Any]]:
    """All rows of a finished file, whichever teacher gave them.

    Args:
        path: the Parquet file.
        kind: what its metadata calls `answers`.

    Raises:
        FieldmarkError: no such file, an unfinished or unreadable one, or one of another kind.
    """
    if path.with_name(f"{path.name}.parts").exists():
        raise FieldmarkError(f"the answers in {path} are unfinished; run the command that writes them again")
    table, made_by = _read_table(path)
    if made_by.get("answers") != kind:
        found = made_by.get("answers", "no answers of a teacher")
        raise FieldmarkError(f"{path} holds {found}, expected {kind}; give a file of `fieldmark label {kind}`")
    return table.to_pylist()


def _read_table(file: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The rows, and what made them ({} where another program wrote the file)."""
    try:
        with pq.ParquetFile(file) as opened:
            table = opened.read()
    except FileNotFoundError as error:
        raise FieldmarkError(f"{file} does not exist; give a file of `fieldmark label`") from error
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise FieldmarkError(f"cannot read the answers in {file}: {reason}; delete the file to ask anew") from error
    return table, json.loads((table.schema.metadata or {}).get(_MADE_BY, b"{}"))


def answer_key(*parts: str) -> str:
    """A short name of what was asked: photo, text, whatever else changes from question to question."""
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def photo_hash(ref: PhotoRef) -> str:
    """What a photo is told by: its file's bytes, or its uri where it is drawn.

    Raises:
        FieldmarkError: the file cannot be read.
    """
    if isinstance(ref, bytes):
        return hashlib.sha256(ref).hexdigest()
    if not isinstance(ref, (str, Path)):
        raise FieldmarkError(f"a photo was given as {type(ref).__name__}; expected a path, a uri or bytes")
    if "://" in str(ref):
        return str(ref)
    try:
        return hashlib.sha256(Path(ref).read_bytes()).hexdigest()
    except OSError as error:
        raise FieldmarkError(f"cannot read the photo {ref}: {error.strerror}; take it out of the catalogue") from error


def teacher_fingerprint(teacher: Teacher) -> str:
    """What a teacher is told by: its configuration and samples of each of its tensors, whatever their precision."""
    return weights_fingerprint(teacher.model, json.dumps(_lasting(teacher.model.config.to_diff_dict()), sort_keys=True))


def _lasting(settings: Any) -> Any:
    """A configuration without the precision it was loaded in and the library's version."""
    if not isinstance(settings, dict):
        return settings if isinstance(settings, (str, int, float, bool, list, type(None))) else str(settings)
    passing = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
    return {str(name): _lasting(value) for name, value in settings.items() if name not in passing}


def weights_fingerprint(model: nn.Module, settings: str = "") -> str:
    """A short name of a model: its settings and samples of each of its tensors."""
    digest = hashlib.sha256(settings.encode())
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)][:64].float().cpu().numpy()
        digest.update(name.encode() + str(tuple(value.shape)).encode() + sample.tobytes())
    return digest.hexdigest()[:16]
