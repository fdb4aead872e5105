"""`fieldmark label attributes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import quiet_libraries
from fieldmark.commands.labelling import (
    AskOptions,
    asked_now,
    check_out,
    check_sampling,
    load_teacher,
    read_items,
    say,
)


@dataclass(kw_only=True)
class AttributeOptions(AskOptions):
    """Arguments of `label attributes`.

    Attributes:
        schema: YAML file with the question and the attributes that count; null is the packaged one.
        temperature: of sampling; 0 takes the most likely answer.
        max_new_tokens: an answer ends there at the latest.
        seed: of sampling.
        batch_size: items asked about at once.
        resolution: side in pixels the photos are resized to; null is the teacher's usual one.
    """

    schema: str | None = None
    temperature: float = 0.0
    max_new_tokens: int = 512
    seed: int = 0
    batch_size: int = 16
    resolution: int | None = None


AttributeOptions.__doc__ = f"{AskOptions.__doc__}\n{AttributeOptions.__doc__}"


def run(argv: list[str]) -> None:
    """Attributes of every item, each of its titles."""
    options = parse(
        AttributeOptions,
        argv,
        prog="fieldmark label attributes",
        description="Writes the few attributes that tell each item from its look-alikes, as a generator names them.",
    )
    for name in ("batch_size", "max_new_tokens"):
        positive(name, getattr(options, name))
    check_sampling(options.temperature, options.seed)
    out = check_out(options.out)
    quiet_libraries()
    from fieldmark.progress import JobProgress
    from fieldmark.teacher.attribute_labels import attribute_cache, label_attributes
    from fieldmark.teacher.attributes import load_schema

    schema = load_schema(options.schema)
    items = read_items(options, out)
    asked: list[tuple[Any, str | None]] = []
    for photo, titles in zip(items.photos, items.titles, strict=True):
        asked += [(photo, title) for title in titles] or [(photo, None)]
    teacher = load_teacher(options.teacher, options.teacher_dtype)
    with (
        attribute_cache(
            out,
            teacher,
            schema,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            resolution=options.resolution,
        ) as cache,
        JobProgress("attributes", len(asked)) as job,
    ):
        labels = label_attributes(
            teacher,
            [photo for photo, _ in asked],
            [title for _, title in asked],
            cache,
            schema,
            batch_size=options.batch_size,
            progress=job.update,
        )
    now = asked_now(labels.asked, labels.asked, "answers", labels.seconds)
    say(f"{len(items.photos)} photos, {labels.answers} answers, {now}: {out}")
    for reason, count in labels.invalid.most_common():
        say(f"{count} answers are not valid: {reason}")
    named = [len(own) for own in labels.of if own]
    say(f"{len(named)} items have attributes, {sum(named) / len(named):.1f} each on average")
