"""`fieldmark evaluate MODEL`."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import interval, number, print_json, print_table, quiet_libraries
from fieldmark.commands.enriching import (
    TOO_LONG,
    AttributeSource,
    EnrichOptions,
    Gain,
    Named,
    check_enrich,
    check_takes_both,
    check_titles,
    drop_too_long,
    gain_rows,
    print_gains,
)
from fieldmark.commands.evaluate_teacher import (
    TeacherOptions,
    ask_teacher,
    check_teacher,
    open_teacher,
    print_categories,
    print_teacher,
    sampled_gap,
    teacher_as_json,
)
from fieldmark.commands.labelling import say
from fieldmark.data.options import CatalogOptions, read_catalog
from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from fieldmark.evaluation.confusions import ClassPair
    from fieldmark.evaluation.student import Evaluation

logger = logging.getLogger(__name__)


@dataclass
class EvaluateOptions(TeacherOptions, EnrichOptions, CatalogOptions):
    """Arguments of `evaluate`.

    Attributes:
        model: run folder, model folder or hub id of a student.
        split: part of the catalogue to measure on.
        batch_size: photos embedded at once.
        ks: depths k of recall@k, for example 1,10,100,1000.
        query: what is searched with and for: image for photos alone, image+text for each photo together with its
            title (a student made of a multimodal LLM takes both); null is image, and image+text with --enrich.
        category: attribute that holds a product's category, for coarse retrieval; null takes `category` where there
            is one.
        downstream: also a linear probe, fitted to the train split, and k-means, both on categories.
        clustering: k-means of as many clusters as labels; false leaves it out, since it takes hours for tens of
            thousands of labels.
        groups: JSONL of groups (image_0, image_1, caption_0, caption_1) for an image-text student or a teacher; null
            makes them of the catalogue.
        bad_files: CSV file to write the photos to that were skipped; their number is printed in any case.
        json: print one JSON object.
    """

    model: str
    split: Literal["train", "val", "test"] = "test"
    batch_size: int = 64
    ks: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    query: Literal["image", "image+text"] | None = None
    category: str | None = None
    downstream: bool = False
    clustering: bool = True
    groups: str | None = None
    bad_files: str | None = None
    json: bool = False


EvaluateOptions.__doc__ = "\n".join(
    str(one.__doc__) for one in (CatalogOptions, EnrichOptions, TeacherOptions, EvaluateOptions)
)


def run(argv: list[str]) -> None:
    """Measures retrieval and clustering, and prints tables or one JSON object."""
    options = parse(
        EvaluateOptions,
        argv,
        prog="fieldmark evaluate",
        description="Measures a student on a catalogue.",
        positional=("model",),
        switches=("json", "downstream"),
    )
    positive("batch_size", options.batch_size)
    if not options.ks:
        raise FieldmarkError("--ks was given no depth; expected one or more, such as 1,10,100.")
    for depth in options.ks:
        positive("ks", depth)
    check_enrich(options)
    check_teacher(options)
    if options.query == "image" and options.enrich != "none":
        raise FieldmarkError("--query image was given with --enrich, which joins titles; give --query image+text.")
    options.query = options.query or ("image" if options.enrich == "none" else "image+text")
    quiet_libraries()
    from fieldmark.commands.models import load_model
    from fieldmark.data.catalog import select_split
    from fieldmark.data.checks import write_bad_photos
    from fieldmark.data.groups import find_groups
    from fieldmark.evaluation.multimodal import evaluate_multimodal
    from fieldmark.evaluation.products import CATEGORY
    from fieldmark.students.items import is_multimodal

    # 1. What is measured, and what that needs
    whole, bad = read_catalog(options)
    catalog = select_split(whole, options.split)
    bad = [one for one in bad if one.split == options.split]
    if options.bad_files is not None:
        write_bad_photos(bad, Path(options.bad_files))
    rows = one_row_a_photo(catalog)
    categories = _categories(options, whole, rows)
    if options.enrich != "none":
        check_titles(rows)
    # 2. All that takes part is loaded and can do it, before anything is measured or asked
    student = load_model(options.model)
    if options.enrich != "none":
        check_takes_both(student, options.model)
    metrics: dict[str, float] = {"n_bad_photos": len(bad)} if options.bad_photos == "skip" else {}
    with_texts = is_multimodal(student) and any(catalog["title"])
    if options.groups and not (with_texts or options.teacher):
        lacking = f"{options.data} has no titles" if is_multimodal(student) else f"{options.model} takes no texts"
        raise FieldmarkError(f"--groups was given, but {lacking}; leave it out, or give what has both.")
    wanted = with_texts or options.teacher is not None
    groups = find_groups(options.data, catalog, options.groups, split=options.split) if wanted else []
    plan = _plan(options, rows, categories, with_texts=with_texts)
    if with_texts:
        captions = [text for group in groups for text in group.captions]
        _check_texts(student, [*filter(None, catalog["title"]), *captions], options.batch_size)
    source = AttributeSource.open(options, rows, options.category or CATEGORY) if plan.enriched else None
    teacher = open_teacher(options, groups, options.data)
    # 3. The student
    measured, vectors = _photo_queries(options, student, whole, rows, plan)
    metrics, intervals, more = measured.metrics | metrics, measured.intervals, measured.more
    texts = None
    if with_texts:
        texts = evaluate_multimodal(student, catalog, groups, batch_size=options.batch_size)
        metrics, intervals = metrics | texts.metrics, intervals | texts.intervals
        more["groups_by_category"] = texts.by_category
    # 4. The generator is asked, and the queries are measured with its attributes
    if source is not None:
        assert vectors is not None
        enriched = _enriched(options, student, rows, source.name(), vectors, plan)
        source = None  # the teacher needs the generator's memory
        metrics, intervals, more = metrics | enriched.metrics, intervals | enriched.intervals, more | enriched.more
    # 5. The teacher is asked
    asked = None if teacher is None else ask_teacher(options, teacher, groups)
    if asked is not None and texts is not None:
        metrics |= sampled_gap(asked, texts)
    if options.json:
        about = {"model": options.model, "data": options.data, "split": options.split, "query": options.query}
        of_teacher = {} if asked is None else teacher_as_json(options, asked)
        print_json({**about, **metrics, "intervals": intervals, **more, **of_teacher})
        return
    lines = [(name, number(value, name), interval(intervals.get(name))) for name, value in metrics.items()]
    title = f"{options.model} on {options.data} ({options.split})"
    print_table(title, ("metric", "value", "95 % interval over queries"), lines)
    _print_enriched(options, metrics, more)
    _print_pairs(more.get("hardest_class_pairs", []))
    _print_by_attributes(more.get("recall_by_differing_attributes", []))
    print_categories("groups by category", more.get("groups_by_category", {}))
    if asked is not None:
        print_teacher(options, asked, metrics)


def one_row_a_photo(catalog: datasets.Dataset) -> datasets.Dataset:
    """The catalogue without further captions of a photo, which would find itself by them."""
    first = {photo: row for row, photo in reversed(list(enumerate(catalog["image"])))}
    return catalog if len(first) == len(catalog) else catalog.select(sorted(first.values()))


class _Measured(NamedTuple):
    """Metrics, their intervals, and what else `--json` prints."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    more: dict[str, Any]


class _Plan(NamedTuple):
    """What photos are to find.

    Attributes:
        categories: of each photo, where there are any.
        by_label: whether others of their label are looked for.
        labelled: whether each photo has a label and some photo another one of its own.
        with_texts: whether the student and the catalogue have texts.
        enriched: whether they are also asked with attributes.
    """

    categories: list[str | None] | None
    by_label: bool
    labelled: bool
    with_texts: bool
    enriched: bool


def _plan(
    options: EvaluateOptions, catalog: datasets.Dataset, categories: list[str | None] | None, *, with_texts: bool
) -> _Plan:
    """A catalogue with titles needs neither labels nor categories: a photo's title finds it.

    Raises:
        FieldmarkError: photos with their titles have nothing to find.
    """
    from fieldmark.evaluation.student import has_positives

    labelled = all(catalog["label"]) and has_positives(catalog)
    by_label = labelled or not (with_texts or categories)
    if not (by_label or categories) and options.query == "image+text":
        flag = "--query image+text" if options.enrich == "none" else "--enrich"
        raise FieldmarkError(
            f"{flag} was given for photos without another one of their label or category to find; leave it "
            "out, or give a catalogue with several photos a label"
        )
    return _Plan(categories, by_label, labelled, with_texts, options.enrich != "none")


def _check_texts(student: SentenceTransformer, texts: list[str], batch_size: int) -> None:
    """Refuses a text that is too long for the student."""
    from fieldmark.students.items import tokenize_items

    read = sorted(dict.fromkeys(texts), key=len)
    for start in range(0, len(read), batch_size):
        tokenize_items(student, texts=read[start : start + batch_size])


def _photo_queries(
    options: EvaluateOptions,
    student: SentenceTransformer,
    whole: datasets.Dataset,
    catalog: datasets.Dataset,
    plan: _Plan,
) -> tuple[_Measured, np.ndarray | None]:
    """What photos (or photos with their titles) find: others of their label, of their category; and their vectors."""
    from fieldmark.evaluation.products import KS, evaluate_products
    from fieldmark.evaluation.student import evaluate_student

    if plan.by_label:
        found = evaluate_student(
            student, catalog, batch_size=options.batch_size, ks=options.ks,
            with_titles=options.query == "image+text", clustering=options.clustering, neighbours=max(KS),
        )  # fmt: skip
        measured = _Measured(found.metrics, found.intervals, _confusions(found, catalog))
        by_label, vectors = found.per_query, found.embeddings
    elif plan.categories:
        measured, by_label, vectors = _Measured({}, {}, {}), None, _embed(options, student, catalog)
    else:
        return _Measured({}, {}, {}), None
    if plan.with_texts and not plan.categories:
        logger.warning("coarse retrieval is left out: no photo has an attribute 'category' (or --category NAME)")
    if plan.with_texts or plan.categories:
        products = evaluate_products(by_label, vectors, catalog, plan.categories)
        measured.metrics.update(products.metrics)
        measured.intervals.update(products.intervals)
    if options.downstream:
        measured.metrics.update(_downstream(options, student, whole, vectors, plan.categories or []))
    return measured, vectors


def _enriched(
    options: EvaluateOptions,
    student: SentenceTransformer,
    catalog: datasets.Dataset,
    named: Named,
    vectors: np.ndarray,
    plan: _Plan,
) -> _Measured:
    """What photos with titles and attributes find, and what a generator cost."""
    from fieldmark.evaluation.enriched import PREFIX, enriched_rows, evaluate_asked
    from fieldmark.evaluation.uncertainty import bootstrap_intervals
    from fieldmark.progress import JobProgress

    long = drop_too_long(student, catalog, named.of)
    with JobProgress("measuring with attributes", len(enriched_rows(catalog, named.of, options.enrich))) as job:
        asked = evaluate_asked(
            student, catalog, named.of, vectors, enrich=options.enrich, categories=plan.categories,
            labelled=plan.labelled, batch_size=options.batch_size, progress=job.update,
        )  # fmt: skip
    metrics, intervals = dict(asked.metrics), dict(asked.intervals)
    if asked.per_query is not None:
        values = {PREFIX + name: each for name, each in asked.per_query.values(options.ks).items()}
        metrics = {name: float(each.mean()) for name, each in values.items()} | metrics
        intervals = bootstrap_intervals(values) | intervals
    more: dict[str, Any] = {"enrich": options.enrich, "seconds_per_query": None}
    if named.labels is not None:
        invalid = dict(named.labels.invalid) | ({TOO_LONG: long} if long else {})
        more |= {"seconds_per_query": named.labels.seconds_per_item, "n_answers": named.labels.answers}
        more["invalid_answers"] = invalid
    elif long:
        logger.warning("%d of %d photos are asked without attributes: %s", long, len(catalog), TOO_LONG)
    return _Measured(metrics, intervals, more)


def _categories(
    options: EvaluateOptions, whole: datasets.Dataset, catalog: datasets.Dataset
) -> list[str | None] | None:
    """The photos' categories, where they have any; what --downstream needs is there."""
    from fieldmark.data.catalog import select_split
    from fieldmark.evaluation.products import CATEGORY, categories_of

    categories = categories_of(catalog, options.category)
    if options.downstream and categories is None:
        raise FieldmarkError(
            "--downstream was given, but no photo has an attribute 'category'; name the attribute by --category"
        )
    if options.downstream and options.split == "train":
        raise FieldmarkError("--downstream fits a probe to the split train, which was to be measured; give another")
    if options.downstream:
        categories_of(select_split(whole, "train"), options.category or CATEGORY)
    return categories


def _downstream(
    options: EvaluateOptions,
    student: SentenceTransformer,
    whole: datasets.Dataset,
    vectors: np.ndarray,
    categories: list[str | None],
) -> dict[str, float]:
    """A linear probe fitted to the train split, and k-means, both on categories."""
    from fieldmark.data.catalog import select_split
    from fieldmark.evaluation.probe import downstream_metrics
    from fieldmark.evaluation.products import CATEGORY, categories_of

    train = select_split(whole, "train")
    known = categories_of(train, options.category or CATEGORY)
    assert known is not None
    return downstream_metrics(_embed(options, student, train), known, vectors, categories)


def _embed(options: EvaluateOptions, student: SentenceTransformer, catalog: datasets.Dataset) -> np.ndarray:
    """Vectors of a catalogue as --query says, with a progress bar."""
    from fieldmark.evaluation.student import embed_catalog
    from fieldmark.progress import JobProgress

    with_titles = options.query == "image+text"
    with JobProgress("embedding", len(catalog)) as job:
        return embed_catalog(
            student, catalog, batch_size=options.batch_size, with_titles=with_titles, progress=job.update
        )


def _confusions(measured: Evaluation, catalog: datasets.Dataset) -> dict[str, Any]:
    """Hardest class pairs, their examples by item_id, and recall by the number of differing attributes."""
    from fieldmark.evaluation.confusions import hardest_class_pairs, recall_by_differing_attributes

    labels, attributes, items = (list(catalog[name]) for name in ("label", "attributes", "item_id"))
    pairs = hardest_class_pairs(measured.per_query, labels, attributes)
    return {
        "hardest_class_pairs": [_pair_summary(pair, items) for pair in pairs],
        "recall_by_differing_attributes": recall_by_differing_attributes(measured.per_query, labels, attributes),
    }


def _pair_summary(pair: ClassPair, item_ids: list[str]) -> dict[str, Any]:
    """A pair as JSON: its examples by item_id."""
    examples = [{"query": item_ids[query], "nearest": item_ids[wrong]} for query, wrong in pair.examples]
    return asdict(pair) | {"examples": examples}


def _print_pairs(pairs: list[dict[str, Any]]) -> None:
    if not pairs:
        return
    known = any(pair["differing"] is not None for pair in pairs)
    rows = []
    for pair in pairs:
        row = [" / ".join(pair["classes"]), f"{pair['count']} of {pair['queries']} queries"]
        if known:
            row.append("\n".join(f"{name}: {first} / {second}" for name, first, second in pair["differing"] or []))
        rows.append(row)
    columns = ("classes", "confused", *(["attributes that differ"] if known else []))
    print_table("hardest class pairs", columns, rows)


def _print_enriched(options: EvaluateOptions, metrics: dict[str, float], more: dict[str, Any]) -> None:
    for name in ("instance_recall@1", "coarse_map@1"):
        if f"enriched_{name}" in metrics:
            what = options.generator or options.attributes or ""
            gain = Gain(what, metrics[name], metrics[f"enriched_{name}"], more["seconds_per_query"])
            print_gains(name, gain_rows([gain]))
            break
    for reason, count in more.get("invalid_answers", {}).items():
        say(f"{count} of {more['n_answers']} answers are not valid: {reason}")


def _print_by_attributes(rows: list[dict[str, Any]]) -> None:
    if rows:
        title = "recall@1 by the number of attributes in which the nearest wrong class differs"
        cells = [(str(row["differing"]), number(row["recall@1"]), str(row["n_queries"])) for row in rows]
        print_table(title, ("differing", "recall@1", "n_queries"), cells)
