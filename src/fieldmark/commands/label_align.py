"""`fieldmark label align`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import number, quiet_libraries
from fieldmark.commands.labelling import (
    LabelOptions,
    answers_line,
    asked_now,
    check_negatives,
    check_out,
    find_negatives,
    load_teacher,
    read_items,
    say,
)
from fieldmark.errors import FieldmarkError


@dataclass(kw_only=True)
class AlignOptions(LabelOptions):
    """Arguments of `label align`.

    Attributes:
        batch_size: photos asked about at once.
        resolution: side in pixels the photos are resized to, as in training; null is the teacher's usual one.
    """

    batch_size: int = 16
    resolution: int | None = 224


AlignOptions.__doc__ = f"{LabelOptions.__doc__}\n{AlignOptions.__doc__}"


def run(argv: list[str]) -> None:
    """Scores the photos against their own titles and those of their look-alikes, both ways."""
    options = parse(
        AlignOptions,
        argv,
        prog="fieldmark label align",
        description="Writes a teacher's alignment scores of photos, their titles and those of their look-alikes.",
    )
    positive("batch_size", options.batch_size)
    positive("negatives", options.negatives)
    out = check_out(options.out)
    quiet_libraries()
    from fieldmark.progress import JobProgress
    from fieldmark.teacher.labels import alignment_cache, candidate_texts, check_texts, label_alignment

    items = read_items(options, out)
    missing = sum(not own for own in items.titles)
    if missing:
        raise FieldmarkError(
            f"{missing} of {len(items.photos)} photos of {options.data} have no title; alignment needs a text for "
            "every photo, add a title column (--title_column)."
        )
    check_negatives(items, options.negatives)
    teacher = load_teacher(options.teacher, options.teacher_dtype)
    size = options.resolution
    with alignment_cache(out, teacher, size) as cache:
        known = {row["text"] for row in cache.rows.values()}
        new = [title for own in items.titles for title in own if title not in known]
        answers = check_texts(teacher, items.photos[0], new, resolution=size) if new else {}
        negatives = find_negatives(options, teacher, items, out, batch_size=options.batch_size, resolution=size)
        texts = candidate_texts(items.titles, negatives)
        before, started = len(cache.rows), time.monotonic()
        with JobProgress("alignment scores", len(texts)) as job:
            scores = label_alignment(
                teacher,
                items.photos,
                texts,
                cache,
                resolution=size,
                batch_size=options.batch_size,
                progress=job.update,
            )
    seconds = time.monotonic() - started
    pairs = sum(map(len, texts))
    asked = list(cache.rows.values())[before:]
    now = asked_now(len(asked), len({row["photo"] for row in asked}), "photos", seconds)
    say(f"{len(items.photos)} photos, {pairs} scores, {now}: {out}")
    if answers:
        say(answers_line(answers))
    _say_means(items.titles, scores)


def _say_means(titles: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]) -> None:
    """Own titles stand first among a photo's texts."""
    own = [score for row, mine in zip(scores, titles, strict=True) for score in row[: len(mine)]]
    others = [score for row, mine in zip(scores, titles, strict=True) for score in row[len(mine) :]]
    say(
        f"mean score: {number(sum(own) / len(own))} own titles, {number(sum(others) / len(others))} look-alikes' titles"
    )
