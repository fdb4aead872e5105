"""A generator's attributes of a catalogue's items, through the cache: what `fieldmark label attributes` writes."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from fieldmark.data.photos import PhotoRef
from fieldmark.errors import FieldmarkError
from fieldmark.teacher.attributes import AttributeSchema, ParsedAnswer, parse_attributes
from fieldmark.teacher.cache import AnswerCache, answer_key, photo_hash, read_answers, teacher_fingerprint
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.questions import Answer, ask_about_photos

logger = logging.getLogger(__name__)

CATALOGUE = "catalogue"  # instead of a file: the attributes that the items have of themselves
PATIENCE = 64  # answers, none of them valid, after which nothing better is to be expected
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("photo", "title", "answer", "think", "attributes")]
    + [("valid", pa.bool_()), ("reason", pa.string()), ("n_tokens", pa.int32())]
)
Attributes = dict[str, str | list[str]]


@dataclass(frozen=True)
class AttributeLabels:
    """Attributes of each item, and how many answers were none.

    Attributes:
        of: for each item its attributes, None where the answer was not valid.
        answers: different items asked about.
        invalid: number of answers by the reason why they are not valid; each is in the cache with its text.
        asked: items that the cache did not know.
        seconds: what their answers took, the photos' reading included.
    """

    of: list[Attributes | None]
    answers: int
    invalid: Counter[str]
    asked: int = field(compare=False)
    seconds: float = field(compare=False)

    @property
    def seconds_per_item(self) -> float | None:
        """What an answer costs; None where all were known."""
        return self.seconds / self.asked if self.asked else None


def attribute_cache(
    path: Path,
    teacher: Teacher,
    schema: AttributeSchema,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    resolution: int | None = None,
) -> AnswerCache:
    """The cache of a generator's attributes; see :class:`AnswerCache` for what is refused."""
    made_by = {
        "answers": "attributes",
        "teacher": teacher_fingerprint(teacher),
        "precision": str(teacher.dtype).removeprefix("torch."),
        "schema": asdict(schema),
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "resolution": resolution,
    }
    return AnswerCache(path, SCHEMA, made_by)


def label_attributes(
    teacher: Teacher,
    photos: Sequence[PhotoRef],
    titles: Sequence[str | None],
    cache: AnswerCache,
    schema: AttributeSchema,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> AttributeLabels:
    """Attributes of items; what the cache knows is not asked again.

    Args:
        teacher: the generator.
        photos: a photo of each of B items.
        titles: their titles, None where there is none.
        cache: of `attribute_cache`, opened by the caller's `with`; its settings are used.
        schema: the question; the one that the cache was made with.
        batch_size: items asked about at once.
        progress: called with the number of different items done.

    Raises:
        FieldmarkError: no items, a photo cannot be read, a question cannot be asked, or none of the answers (of the
            first `PATIENCE`, where there are as many) is valid.
    """
    if not photos:
        raise FieldmarkError("no item was given to ask about; give a catalogue with photos")
    hashes = [photo_hash(photo) for photo in photos]
    keys = [_key(own, title) for own, title in zip(hashes, titles, strict=True)]
    first: dict[str, int] = {}  # the first item of each question
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    known = [key for key in first if key in cache]
    waiting = [i for key, i in first.items() if key not in cache]
    done, valid = len(known), sum(cache[key]["valid"] for key in known)
    progress(done)
    settings, started = cache.made_by, time.monotonic()
    asked = ask_about_photos(
        teacher,
        [photos[i] for i in waiting],
        [schema.ask(titles[i]) for i in waiting],
        temperature=settings["temperature"],
        max_new_tokens=settings["max_new_tokens"],
        # Of its item and the seed alone, so that an answer does not depend on when it was asked for.
        seeds=[int(keys[i][:12], 16) + settings["seed"] for i in waiting],
        resolution=settings["resolution"],
        batch_size=batch_size,
    )
    for batch in asked:
        items = [(waiting[place], answer) for place, answer in batch]
        rows = [_row(keys[i], hashes[i], titles[i], answer, schema) for i, answer in items]
        cache.add(rows)
        done, valid = done + len(rows), valid + sum(row["valid"] for row in rows)
        progress(done)
        if done >= PATIENCE and not valid:
            break
    seconds = time.monotonic() - started
    if not valid:
        raise _never_valid([cache[key] for key in first if key in cache])
    invalid = Counter(cache[key]["reason"] for key in first if not cache[key]["valid"])
    of = [_attributes(cache[key]) for key in keys]
    return AttributeLabels(of, done, invalid, asked=len(waiting), seconds=seconds)


def ask_about_item(
    teacher: Teacher,
    photo: PhotoRef,
    title: str | None,
    schema: AttributeSchema,
    *,
    max_new_tokens: int,
    resolution: int | None = None,
) -> ParsedAnswer:
    """The most likely answer about one item, which is kept nowhere.

    Args:
        teacher: the generator.
        photo: the item's photo.
        title: its title, None where it has none.
        schema: the question.
        max_new_tokens: the answer ends there at the latest.
        resolution: side in pixels the photo is resized to, None for the teacher's usual one.

    Raises:
        FieldmarkError: the photo cannot be read, or the question cannot be asked.
    """
    asked = ask_about_photos(
        teacher, [photo], [schema.ask(title)], max_new_tokens=max_new_tokens, resolution=resolution
    )
    (((_, answer),),) = asked
    return parse_attributes(answer.text, finished=answer.finished, schema=schema)


def read_attributes(path: Path) -> dict[tuple[str, str | None], Attributes]:
    """The valid attributes that `fieldmark label attributes` wrote, by `photo_hash` and title (None for no title).

    Raises:
        FieldmarkError: the file cannot be read, is unfinished, or holds something else.
    """
    return {item: attributes for item, (_, attributes) in read_thoughts(path).items()}


def read_thoughts(path: Path) -> dict[tuple[str, str | None], tuple[str, Attributes]]:
    """As `read_attributes`, each with what the answer thought first.

    Raises:
        FieldmarkError: as `read_attributes`.
    """
    valid = [row for row in read_answers(path, "attributes") if row["valid"]]
    return {(row["photo"], row["title"]): (row["think"], json.loads(row["attributes"])) for row in valid}


def attributes_of(rows: datasets.Dataset, path: Path) -> list[Attributes | None]:
    """Attributes of each row of a catalogue; None where they were not asked for, or the answer was not valid.

    Raises:
        FieldmarkError: as `read_attributes`; or the file has attributes of none of the rows.
    """
    known = read_attributes(path)
    found = [known.get(item) for item in items_of(rows)]
    if not any(found):
        raise FieldmarkError(
            f"{path} has attributes of none of the {len(rows)} items; give the file that `fieldmark label attributes` "
            "wrote for this catalogue and split"
        )
    missing = sum(own is None for own in found)
    if missing:
        logger.warning("%d of %d items have no attributes in %s", missing, len(found), path)
    return found


def known_attributes(rows: datasets.Dataset, source: str) -> list[Attributes | None]:
    """Attributes of each row from a file of `fieldmark label attributes`, or its own where the source is `catalogue`.

    Raises:
        FieldmarkError: as `attributes_of`, or none of the rows has attributes of its own.
    """
    if source != CATALOGUE:
        return attributes_of(rows, Path(source))
    own = [
        {name: value for name, value in (found or {}).items() if value is not None} or None
        for found in rows["attributes"]
    ]
    if not any(own):
        raise FieldmarkError(
            f"none of the {len(rows)} items has attributes of its own; add a column (--attribute_columns), or give "
            "--attributes F.parquet of `fieldmark label attributes`"
        )
    return own


def without(attributes: Sequence[Mapping[str, Any] | None], name: str) -> list[dict[str, Any] | None]:
    """Attributes of each row but for `name`; None where there are no others."""
    return [{key: value for key, value in (own or {}).items() if key != name} or None for own in attributes]


def items_of(rows: datasets.Dataset) -> list[tuple[str, str | None]]:
    """What each row of a catalogue is known by here: `photo_hash` and title."""
    return [(photo_hash(photo), title or None) for photo, title in zip(rows["image"], rows["title"], strict=True)]


def _key(photo: str, title: str | None) -> str:
    return answer_key(photo, title or "")


def _row(key: str, photo: str, title: str | None, answer: Answer, schema: AttributeSchema) -> dict[str, Any]:
    parsed = parse_attributes(answer.text, finished=answer.finished, schema=schema)
    valid = parsed.attributes is not None
    return {
        "key": key,
        "photo": photo,
        "title": title or None,
        "answer": answer.text,
        "think": parsed.think,
        "attributes": json.dumps(parsed.attributes, ensure_ascii=False) if valid else None,
        "valid": valid,
        "reason": parsed.reason,
        "n_tokens": answer.tokens,
    }


def _attributes(row: dict[str, Any]) -> Attributes | None:
    return json.loads(row["attributes"]) if row["valid"] else None


def _never_valid(rows: Sequence[dict[str, Any]]) -> FieldmarkError:
    reason, count = Counter(row["reason"] for row in rows).most_common(1)[0]
    example = rows[0]["answer"]
    return FieldmarkError(
        f"none of the first {len(rows)} answers holds attributes ({count} of them: {reason}; the first: "
        f"{example[:60]!r}); train the generator first (`fieldmark train generator`), give a larger one, or "
        "raise --max_new_tokens where answers are cut off"
    )
