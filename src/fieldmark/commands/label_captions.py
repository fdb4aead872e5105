"""`fieldmark label captions`."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fieldmark.commands.arguments import parse, positive
from fieldmark.commands.console import quiet_libraries
from fieldmark.commands.labelling import (
    LabelOptions,
    asked_now,
    check_negatives,
    check_out,
    check_sampling,
    find_negatives,
    load_teacher,
    read_items,
    say,
)


@dataclass(kw_only=True)
class CaptionOptions(LabelOptions):
    """Arguments of `label captions`.

    Attributes:
        domain: name or YAML file of a comparison prompt (birds, cars, aircraft, groceries, aviary), whose answers'
            differing attributes become captions; null asks for captions, as the paper does.
        generations: answers to each pair of photos.
        temperature: of sampling; 0 takes the most likely answer.
        max_new_tokens: an answer ends there at the latest.
        seed: of sampling.
        batch_size: pairs asked about at once.
    """

    domain: str | None = None
    generations: int = 3
    temperature: float = 0.7
    max_new_tokens: int = 256
    seed: int = 0
    batch_size: int = 4


CaptionOptions.__doc__ = f"{LabelOptions.__doc__}\n{CaptionOptions.__doc__}"


def run(argv: list[str]) -> None:
    """Captions of all pairs among each photo and its look-alikes."""
    options = parse(
        CaptionOptions,
        argv,
        prog="fieldmark label captions",
        description="Writes a teacher's captions of look-alike photos, which stress what tells them apart.",
    )
    for name in ("batch_size", "negatives", "generations", "max_new_tokens"):
        positive(name, getattr(options, name))
    check_sampling(options.temperature, options.seed)
    out = check_out(options.out)
    quiet_libraries()
    from fieldmark.progress import JobProgress
    from fieldmark.teacher.compare import load_domain
    from fieldmark.teacher.describe import (
        PAPER_FORM,
        candidate_pairs,
        caption_cache,
        comparison_form,
        label_captions,
    )

    form = PAPER_FORM if options.domain is None else comparison_form(load_domain(options.domain))
    items = read_items(options, out)
    check_negatives(items, options.negatives)
    teacher = load_teacher(options.teacher, options.teacher_dtype)
    sampling = {name: getattr(options, name) for name in ("temperature", "max_new_tokens", "seed")}
    with caption_cache(out, teacher, form=form, **sampling) as cache:
        negatives = find_negatives(options, teacher, items, out, batch_size=16, resolution=None)
        pairs = [pair for anchor, others in enumerate(negatives.tolist()) for pair in candidate_pairs(anchor, others)]
        pairs = list(dict.fromkeys(pairs))
        before, started = len(cache.rows), time.monotonic()
        with JobProgress("comparative captions", len(pairs)) as job:
            captions = label_captions(
                teacher,
                items.photos,
                pairs,
                cache,
                generations=options.generations,
                batch_size=options.batch_size,
                form=form,
                progress=job.update,
            )
    asked, seconds = len(cache.rows) - before, time.monotonic() - started
    now = asked_now(asked, asked, "answers", seconds)
    say(f"{len(items.photos)} photos, {len(pairs)} pairs, {captions.answers} answers, {now}: {out}")
    if captions.failed:
        say(f"{captions.failed} answers hold no two captions; they stand in the file without captions")
    without = sum(not own for own in captions.of)
    say(f"{sum(map(len, captions.of))} captions; {without} photos have none")
