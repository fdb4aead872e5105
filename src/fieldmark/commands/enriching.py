"""Attributes in queries, for `evaluate` and `search`: who names them, what they gain, what they cost."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fieldmark.commands.arguments import check_owned, positive
from fieldmark.commands.console import number, print_table
from fieldmark.commands.labelling import load_teacher
from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    import datasets
    from sentence_transformers import SentenceTransformer

    from fieldmark.data.photos import PhotoRef
    from fieldmark.teacher.attribute_labels import AttributeLabels, Attributes
    from fieldmark.teacher.attributes import AttributeSchema, ParsedAnswer
    from fieldmark.teacher.model import Teacher

logger = logging.getLogger(__name__)

TOO_LONG = "too long for the student together with photo and title"


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
            catalogue's own attributes, without the category.
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
    """Refuses numbers that no answer could have, and settings of a generator without one."""
    positive("max_new_tokens", options.max_new_tokens)
    if options.generator_resolution is not None:
        positive("generator_resolution", options.generator_resolution)
    settings = ("schema", "max_new_tokens", "generator_dtype", "generator_resolution")
    check_owned(options, "generator", settings)


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


class Generator(NamedTuple):
    """A loaded generator, its question, and the settings it is asked with."""

    teacher: Teacher
    schema: AttributeSchema
    asked_with: dict[str, Any]


class Named(NamedTuple):
    """Attributes of each row of a catalogue, None where there are none; and how a generator that was asked did."""

    of: list[Attributes | None]
    labels: AttributeLabels | None


@dataclass(frozen=True)
class AttributeSource:
    """Attributes that can be had.

    Attributes:
        catalog: N rows.
        rows: those that need attributes: those that ask, with --enrich both also those that are found.
        known: their attributes, where a file or the catalogue has them.
        generator: who is asked where they are not known.
    """

    catalog: datasets.Dataset
    rows: list[int]
    known: list[Attributes | None] | None
    generator: Generator | None

    @classmethod
    def open(cls, options: EnrichOptions, catalog: datasets.Dataset, category: str) -> AttributeSource:
        """Reads the attributes, or loads the generator and looks at what it will be asked; asks nothing.

        Args:
            options: where they come from.
            catalog: N rows.
            category: attribute that coarse retrieval counts, which is none of the catalogue's own here.

        Raises:
            FieldmarkError: there are no attributes, or the generator cannot be asked.
        """
        rows = [row for row, role in enumerate(catalog["role"]) if options.enrich == "both" or role != "gallery"]
        part = catalog.select(rows)
        if options.attributes is not None:
            return cls(catalog, rows, _known(options.attributes, part, category), None)
        from fieldmark.teacher.questions import check_questions

        generator = load_generator(options)
        questions = [generator.schema.ask(title) for title in part["title"]]
        if rows:
            check_questions(generator.teacher, part["image"][0], questions, **generator.asked_with)
        return cls(catalog, rows, None, generator)

    def name(self) -> Named:
        """The attributes of each row; a generator is asked now, with a progress bar, and its answers kept nowhere.

        Raises:
            FieldmarkError: none of the generator's answers is valid.
        """
        labels = None if self.generator is None else _ask_about_all(self.generator, self.catalog.select(self.rows))
        found = self.known if labels is None else labels.of
        of: list[Attributes | None] = [None] * len(self.catalog)
        for row, own in zip(self.rows, found or [], strict=True):
            of[row] = own
        return Named(of, labels)


def drop_too_long(student: SentenceTransformer, catalog: datasets.Dataset, attributes: list[Attributes | None]) -> int:
    """Takes attributes away that make photo and title too long for the student; returns from how many rows."""
    from fieldmark.students.enrich import enriched_text
    from fieldmark.students.items import too_long

    rows = [row for row, own in enumerate(attributes) if own]
    part = catalog.select(rows)
    texts = [enriched_text(title, attributes[row]) for row, title in zip(rows, part["title"], strict=True)]
    long = too_long(student, list(part["image"]), texts)
    for place in long:
        attributes[rows[place]] = None
    return len(long)


def check_titles(catalog: datasets.Dataset) -> None:
    """Refuses photos without a title that attributes could join."""
    missing = sum(not title for title in catalog["title"])
    if missing:
        raise FieldmarkError(
            f"--enrich was given, but {missing} of {len(catalog)} photos have no title for attributes to join; leave "
            "it out, or add a column (--title_column)."
        )


def load_generator(options: GeneratorOptions) -> Generator:
    """The generator that --generator names; a line says where it is asked otherwise than its run asked it.

    Raises:
        FieldmarkError: the schema cannot be read, or the generator cannot be loaded.
    """
    from fieldmark.teacher.attributes import load_schema
    from fieldmark.teacher.questions import square_side

    assert options.generator is not None
    schema = load_schema(options.schema)
    teacher = load_teacher(options.generator, options.generator_dtype)
    resolution = square_side(teacher, options.generator_resolution)
    trained = _trained_with(Path(options.generator))
    if "resolution" in trained:
        trained["resolution"] = square_side(teacher, trained["resolution"])
    given = {"resolution": resolution, "max_new_tokens": options.max_new_tokens, "schema": options.schema}
    other = [f"{name} {trained[name]} (here {given[name]})" for name in trained if trained[name] != given[name]]
    if other:
        logger.warning("the generator %s was trained with %s", options.generator, ", ".join(other))
    return Generator(teacher, schema, {"max_new_tokens": options.max_new_tokens, "resolution": resolution})


def ask_about_query(options: GeneratorOptions, photo: PhotoRef, text: str | None) -> tuple[ParsedAnswer, float]:
    """What a generator says of one photo, with its text where there is one, and the seconds that the answer took."""
    from fieldmark.teacher.attribute_labels import ask_about_item

    generator = load_generator(options)
    started = time.monotonic()
    answer = ask_about_item(generator.teacher, photo, text, generator.schema, **generator.asked_with)
    return answer, time.monotonic() - started


def _known(source: str, rows: datasets.Dataset, category: str) -> list[Attributes | None]:
    """Attributes of a file or of the catalogue; of its own not the category, which coarse retrieval counts."""
    from fieldmark.teacher.attribute_labels import CATALOGUE, known_attributes, without

    found = known_attributes(rows, source)
    if source != CATALOGUE:
        return found
    found = without(found, category)
    if not any(found):
        raise FieldmarkError(
            f"none of the {len(rows)} items has attributes of its own beside its category {category!r}; add a column "
            "(--attribute_columns), or give --generator."
        )
    return found


def _ask_about_all(generator: Generator, rows: datasets.Dataset) -> AttributeLabels:
    from fieldmark.progress import JobProgress
    from fieldmark.teacher.attribute_labels import attribute_cache, label_attributes

    teacher, schema, asked_with = generator
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attributes.parquet"
        cache = attribute_cache(path, teacher, schema, temperature=0.0, seed=0, **asked_with)
        with cache, JobProgress("attributes", len(rows)) as job:
            return label_attributes(
                teacher, list(rows["image"]), list(rows["title"]), cache, schema, progress=job.update
            )


def _trained_with(model: Path) -> dict[str, Any]:
    """The settings of the run in whose folder a generator lies, as far as it is asked with them; else none."""
    import yaml

    try:
        settings = yaml.safe_load((model.parent / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    names = ("resolution", "max_new_tokens", "schema")
    return {name: settings[name] for name in names if name in settings} if isinstance(settings, dict) else {}
