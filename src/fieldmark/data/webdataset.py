"""Webdataset shards: uncompressed .tar files whose members share a key, `000123.jpg`, `000123.cls`, `000123.json`.

Photos stay in their shard and are read from there, `tar://SHARD#OFFSET,SIZE`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fieldmark.data.columns import ColumnMap, rows_of
from fieldmark.data.readers import SPLIT_NAMES, Row, is_stray
from fieldmark.errors import FieldmarkError

logger = logging.getLogger(__name__)

PHOTO_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXT_ENDINGS = {"cls": "label", "txt": "title"}
_BLOCK = tarfile.BLOCKSIZE
MAX_TEXT = 1 << 20  # bytes of a label, title or JSON; more is not what its name says


def shards_of(pattern: str) -> list[Path]:
    """Shards of a pattern: a .tar file, a folder of them, a glob, braces `{000..009}` or `{a,b}`, in order.

    Raises:
        FieldmarkError: none, or one that is missing.
    """
    found = []
    for name in _expanded(pattern):
        path = Path(name)
        if path.is_dir():
            found += tar_files(path)
        elif any(sign in name for sign in "*?[") and not path.exists():
            found += sorted(one for one in path.parent.glob(path.name) if not is_stray(one.name))
        else:
            found.append(path)
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        what = (
            f"{len(missing)} of {len(found)} shards are missing ({missing[0]}, ...)" if missing else "no shard is there"
        )
        raise FieldmarkError(f"wds:{pattern}: {what}; expected .tar files, e.g. wds:shards/train-{{000..009}}.tar")
    return [path.absolute() for path in found]


def tar_files(folder: Path) -> list[Path]:
    """The .tar files of a folder, by name."""
    return sorted(path for path in folder.glob("*.tar") if not is_stray(path.name))


def read_shards(shards: list[Path], mapping: ColumnMap, where: str) -> list[Row]:
    """Rows of all samples that have a photo; the item_id is SHARD/KEY where the sample's JSON gives none.

    `.cls` is the label, `.txt` the title; the keys of `.json` are columns. Where shards are called train-..., test-...
    (two or more such names), that is the split.

    Raises:
        FieldmarkError: a shard is cut short, compressed, no archive, or holds links or paths that lead out of it.
    """
    splits = {path: SPLIT_NAMES.get(re.split(r"[-_.\d]", path.name.lower())[0]) for path in shards}
    named = len(set(splits.values())) > 1
    records, without = [], 0
    for path in shards:
        for key, record in _samples(path):
            if "image" not in record:
                without += 1
                continue
            record["item_id"] = record.get("item_id") or f"{path.stem}/{key}"
            if named and splits[path]:
                record.setdefault("split", splits[path])
            records.append(record)
    if without:
        logger.warning("%s: %d samples without a photo (KEY.jpg, KEY.png, ...) are left out", where, without)
    names = list(dict.fromkeys(name for record in records for name in record))
    return rows_of(records, names, mapping, shards[0].parent, where)


def _samples(shard: Path) -> Iterator[tuple[str, Row]]:
    """Members that share a key, which in a shard follow each other."""
    current: str | None = None
    record: Row = {}
    for key, ending, value in _members(shard):
        if key != current and current is not None:
            yield current, record
            record = {}
        current = key
        if ending in PHOTO_ENDINGS and "image" in record:
            raise FieldmarkError(f"{shard}: the sample {key!r} has two photos; expected one a key")
        record |= value
    if current is not None:
        yield current, record


def _members(shard: Path) -> Iterator[tuple[str, str, Row]]:
    """Key, ending, and what the member says of its sample."""
    size, end = os.path.getsize(shard), 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                path, end = PurePosixPath(member.name), member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.isdir() or any(is_stray(part) for part in path.parts):
                    continue
                if not member.isfile() or path.is_absolute() or ".." in path.parts:
                    raise FieldmarkError(
                        f"{shard}: the member {member.name!r} is a link or leads out of the archive; expected files"
                    )
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                stem, _, ending = path.name.partition(".")
                key, ending = (path.parent / stem).as_posix(), ending.lower()
                yield key, ending, _said(archive, member, ending, shard)
        with shard.open("rb") as file:  # tarfile takes a broken header for the end, which is a block of zeros
            file.seek(end)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, EOFError) as error:
        raise FieldmarkError(
            f"cannot read {shard}: {error}; expected an uncompressed .tar file that was copied to its end"
        ) from error


def _said(archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str, shard: Path) -> Row:
    if ending in PHOTO_ENDINGS:
        return {"image": f"tar://{shard}#{member.offset_data},{member.size}"}
    if ending not in (*TEXT_ENDINGS, "json"):
        return {}
    file = archive.extractfile(member)
    try:
        if file is None or member.size > MAX_TEXT:
            raise ValueError(f"{member.size} bytes")
        text = file.read().decode("utf-8-sig").strip()
        found: Any = json.loads(text) if ending == "json" else {TEXT_ENDINGS[ending]: text}
    except (ValueError, RecursionError) as error:
        raise FieldmarkError(f"{shard}: the member {member.name!r} is no text in UTF-8 or no JSON ({error})") from error
    if not isinstance(found, dict):
        raise FieldmarkError(f"{shard}: the member {member.name!r} holds a {type(found).__name__}; expected an object")
    return {name: value for name, value in found.items() if name != "image"}


def _expanded(pattern: str) -> list[str]:
    """Braces as a shell expands them: `{000..009}` and `{a,b}`, several one after another."""
    match = re.search(r"\{([^{}]+)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = match[1].split(",")
    return [
        done for choice in choices for done in _expanded(pattern[: match.start()] + choice + pattern[match.end() :])
    ]
