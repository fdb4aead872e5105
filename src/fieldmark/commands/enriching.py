"""Attributes in queries, for `evaluate` and `search`: who names them, what they gain, what they cost."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fieldmark.commands.arguments import positive
from fieldmark.commands.console import number, print_table
from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    import datasets
    from sentence_transformers import SentenceTransformer

    from fieldmark.data.photos import PhotoRef
    from fieldmark.teacher.attribute_labels import AttributeLabels, Attributes
    from fieldmark.teacher.attributes import ParsedAnswer
    from fieldmark.teacher.model import Teacher


@dataclass(kw_only=True)
class GeneratorOptions:
    """A generator and how it is asked.

    Attributes:
        generator: folder or hub id of a multimodal LLM that names attributes, such as the model/ of `train rar`.
        schema: YAML file of its question and the attributes that count; null is the packaged one.
        max_new_tokens: its answers end there at the latest.
        generator_dtype: its precision.
        generator_resolution: side in pixels its photos are resized to; null is its usual one.
    """

    generator: str | None = None
    schema: str | None = None
    max_new_tokens: int = 512
    generator_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    generator_resolution: int | None = None


@dataclass(kw_only=True)
class EnrichOptions(GeneratorOptions):
    """Attributes that join titles.

    Attributes:
        enrich: whose titles attributes join, to measure photos with titles without and with them: the queries', those
            of both sides, or none's.
        attributes: instead of --generator: file of `fieldmark label attributes` for this split, or `catalogue` for the
            catalogue's own attributes.
    """

    enrich: Literal["query", "both", "none"] = "none"
    attributes: str | None = None


EnrichOptions.__doc__ = f"{GeneratorOptions.__doc__}\n{EnrichOptions.__doc__}"


class Gain(NamedTuple):
    """Queries of one kind without attributes and with them, and a generator's seconds for one; None: not measured."""

    what: str
    plain: float
    enriched: float
    seconds: float | None


def gain_rows(gains: Iterable[Gain]) -> list[tuple[str, ...]]:
    """Rows of `print_gains`."""
    return [
        (
            one.what,
            number(one.plain),
            number(one.enriched),
            f"{one.enriched - one.plain:+.3f}",
            "not measured here" if one.seconds is None else f"{one.seconds:.3f}",
        )
        for one in gains
    ]


def print_gains(metric: str, rows: Sequence[tuple[str, ...]]) -> None:
    """What attributes in queries gain, beside what a generator's cost; nothing where there are no rows."""
    if rows:
        columns = ("", "without", "with", "gain", "seconds a query")
        print_table(f"queries with attributes, {metric.replace('_', ' ')}", columns, rows)


def check_generator(options: GeneratorOptions) -> None:
    """Refuses numbers that no answer could have."""
    positive("max_new_tokens", options.max_new_tokens)
    if options.generator_resolution is not None:
        positive("generator_resolution", options.generator_resolution)


def check_enrich(options: EnrichOptions) -> None:
    """Refuses attributes that come from nowhere, from two places, or join nothing."""
    check_generator(options)
    given = [flag for flag in ("generator", "attributes") if getattr(options, flag) is not None]
    if options.enrich == "none" and given:
        raise FieldmarkError(f"--{given[0]} was given without --enrich; add --enrich query or both, or leave it out.")
    if options.enrich != "none" and len(given) != 1:
        raise FieldmarkError(
            f"--enrich {options.enrich} was given with {'both' if given else 'neither'} of --generator and "
            "--attributes; give one of them."
        )


def check_takes_both(student: SentenceTransformer, name: str) -> None:
    """Refuses a student that cannot embed a photo together with its attributes."""
    from fieldmark.students.items import embeds_both

    if not embeds_both(student):
        raise FieldmarkError(
            f"--enrich was given, but {name} does not embed a photo together with a text; leave it out, or give a "
            "student made of a multimodal LLM."
        )


class Named(NamedTuple):
    """Attributes of each row of a catalogue, None where there are none; and how a generator that was asked did."""

    of: list[Attributes | None]
    labels: AttributeLabels | None


def name_attributes(options: EnrichOptions, catalog: datasets.Dataset) -> Named:
    """Attributes of the rows that need them: those that ask, with --enrich both also those that are found.

    Raises:
        FieldmarkError: a title is missing, there are no attributes, or the generator cannot be asked.
    """
    missing = sum(not title for title in catalog["title"])
    if missing:
        raise FieldmarkError(
            f"--enrich was given, but {missing} of {len(catalog)} photos have no title for attributes to join; leave "
            "it out, or add a column (--title_column)."
        )
    rows = [row for row, role in enumerate(catalog["role"]) if options.enrich == "both" or role != "gallery"]
    part, labels = catalog.select(rows), None
    if options.attributes is not None:
        from fieldmark.teacher.attribute_labels import known_attributes

        found = known_attributes(part, options.attributes)
    else:
        labels = _ask_about_all(options, part)
        found = labels.of
    of: list[Attributes | None] = [None] * len(catalog)
    for row, own in zip(rows, found, strict=True):
        of[row] = own
    return Named(of, labels)


def _ask_about_all(options: GeneratorOptions, rows: datasets.Dataset) -> AttributeLabels:
    """A generator's answers about all rows, with a progress bar; kept nowhere."""
    from fieldmark.progress import JobProgress
    from fieldmark.teacher.attribute_labels import attribute_cache, label_attributes
    from fieldmark.teacher.attributes import load_schema

    schema = load_schema(options.schema)
    teacher, asked_with = _load_generator(options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attributes.parquet"
        cache = attribute_cache(path, teacher, schema, temperature=0.0, seed=0, **asked_with)
        with cache, JobProgress("attributes", len(rows)) as job:
            return label_attributes(
                teacher, list(rows["image"]), list(rows["title"]), cache, schema, progress=job.update
            )


def ask_about_query(options: GeneratorOptions, photo: PhotoRef, text: str | None) -> tuple[ParsedAnswer, float]:
    """What a generator says of one photo, with its text where there is one, and the seconds that the answer took."""
    from fieldmark.teacher.attribute_labels import ask_about_item
    from fieldmark.teacher.attributes import load_schema

    schema = load_schema(options.schema)
    teacher, asked_with = _load_generator(options)
    started = time.monotonic()
    answer = ask_about_item(teacher, photo, text, schema, **asked_with)
    return answer, time.monotonic() - started


def _load_generator(options: GeneratorOptions) -> tuple[Teacher, dict[str, Any]]:
    """The generator, on the accelerator where there is one, and the settings it is asked with."""
    import torch

    from fieldmark.teacher.model import Teacher
    from fieldmark.teacher.questions import square_side

    assert options.generator is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = Teacher.load(options.generator, dtype=getattr(torch, options.generator_dtype), device=device)
    resolution = square_side(teacher, options.generator_resolution)
    return teacher, {"max_new_tokens": options.max_new_tokens, "resolution": resolution}
