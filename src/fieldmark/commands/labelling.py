"""What the kinds of `fieldmark label` share: their arguments, the photos, and the look-alikes of each photo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fieldmark.commands.console import console
from fieldmark.data.options import CatalogOptions, read_catalog
from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    import numpy as np

    from fieldmark.teacher.model import Teacher


@dataclass(kw_only=True)
class AskOptions(CatalogOptions):
    """Arguments of every kind of labels.

    Attributes:
        teacher: folder or hub id of a multimodal LLM.
        out: Parquet file of the answers; what it knows already is not asked again. Photos that were skipped are listed
            beside it in a file that ends in .bad_files.csv.
        split: part of the catalogue.
        teacher_dtype: precision of the teacher.
    """

    teacher: str
    out: str
    split: Literal["train", "val", "test"] = "train"
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


AskOptions.__doc__ = f"{CatalogOptions.__doc__}\n{AskOptions.__doc__}"


@dataclass(kw_only=True)
class LabelOptions(AskOptions):
    """Arguments of the kinds that compare photos with their look-alikes.

    Attributes:
        out: Parquet file of the answers; what it knows already is not asked again. The look-alikes are kept beside it
            in a file that ends in .candidates.parquet, photos that were skipped in one that ends in .bad_files.csv.
        negatives: look-alikes of each photo, of another label and title.
        mining: vision model whose embeddings find the look-alikes; null takes the teacher's own tower.
    """

    negatives: int = 3
    mining: str | None = None


LabelOptions.__doc__ = f"{AskOptions.__doc__}\n{LabelOptions.__doc__}"


@dataclass(frozen=True)
class LabelItems:
    """Photos of a catalogue, each once.

    Attributes:
        photos: N photo references.
        titles: distinct titles of each; none, one, or several where several rows show one photo.
        labels: label of each.
    """

    photos: list[Any]
    titles: list[list[str]]
    labels: list[str | None]


def check_out(name: str) -> Path:
    """The file to write or to go on with, its folder made."""
    out = Path(name)
    if out.suffix != ".parquet":
        raise FieldmarkError(f"--out {out} was given; expected the name of a .parquet file.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FieldmarkError(f"--out {out} does not lie in a folder; give another name.") from error
    return out


def check_sampling(temperature: float, seed: int) -> None:
    """Refuses what no answer can be drawn with."""
    for name, value in (("temperature", temperature), ("seed", seed)):
        if value < 0:
            raise FieldmarkError(f"--{name} was given {value}; expected 0 or more.")


def read_items(options: AskOptions, out: Path) -> LabelItems:
    """The photos of the chosen split.

    Raises:
        FieldmarkError: see `read_catalog` and `select_split`.
    """
    from fieldmark.data.catalog import select_split
    from fieldmark.data.checks import write_bad_photos

    catalog, bad = read_catalog(options)
    rows = select_split(catalog, options.split)
    if options.bad_photos == "skip":
        write_bad_photos([one for one in bad if one.split == options.split], out.with_suffix(".bad_files.csv"))
    titles: dict[Any, dict[str, None]] = {}
    labels: dict[Any, str | None] = {}
    for photo, title, label in zip(rows["image"], rows["title"], rows["label"], strict=True):
        titles.setdefault(photo, {}).update({title: None} if title else {})
        labels[photo] = label
    return LabelItems(list(titles), [list(own) for own in titles.values()], list(labels.values()))


def load_teacher(name: str, dtype: str) -> Teacher:
    """A teacher or a generator in the precision that was asked for, on the accelerator where there is one."""
    import torch

    from fieldmark.teacher.model import Teacher

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Teacher.load(name, dtype=getattr(torch, dtype), device=device)


def find_negatives(
    options: LabelOptions, teacher: Teacher, items: LabelItems, out: Path, *, batch_size: int, resolution: int | None
) -> np.ndarray:
    """[N, K] look-alikes of each photo; found once and kept beside the answers. `check_negatives` comes first."""
    import numpy as np
    import pyarrow as pa

    from fieldmark.data.mining import hard_negatives, shared_titles
    from fieldmark.evaluation.student import embed_photos
    from fieldmark.progress import JobProgress
    from fieldmark.students.build import build_student
    from fieldmark.teacher.cache import AnswerCache, answer_key, photo_hash, teacher_fingerprint, weights_fingerprint
    from fieldmark.teacher.labels import tower_features

    titles = shared_titles(items.titles)
    # The key holds all that the look-alikes depend on, so that a second run embeds no photo.
    known = [photo_hash(photo) for photo in items.photos]
    student = build_student(options.mining, pooling="mean", resolution=resolution) if options.mining else None
    eyes = weights_fingerprint(student) if student else f"{teacher_fingerprint(teacher)} {teacher.dtype}"
    key = answer_key(*known, *map(str, items.labels), *map(str, titles), eyes, str(resolution), str(options.negatives))
    schema = pa.schema([("negatives", pa.list_(pa.int32()))])
    with AnswerCache(out.with_suffix(".candidates.parquet"), schema, {"answers": "candidates"}) as cache:
        if key not in cache:
            with JobProgress("photos for mining", len(items.photos)) as job:
                if student:
                    features = embed_photos(student, items.photos, batch_size=batch_size, progress=job.update)
                else:
                    features = tower_features(
                        teacher, items.photos, resolution=resolution, batch_size=batch_size, progress=job.update
                    )
            found = hard_negatives(features, options.negatives, labels=items.labels, titles=titles)
            cache.add([{"key": key, "negatives": found.flatten().tolist()}])
    return np.array(cache[key]["negatives"], dtype=np.int64).reshape(-1, options.negatives)


def check_negatives(items: LabelItems, count: int) -> None:
    """Refuses photos that have too few others to compare with, before any is looked at.

    Raises:
        FieldmarkError: photos with fewer than `count` others of another label and title.
    """
    from fieldmark.data.mining import few_others, shared_titles

    short = few_others(items.labels, shared_titles(items.titles), count)
    if short:
        raise FieldmarkError(
            f"{short} of {len(items.photos)} photos have fewer than {count} others of another label and title to "
            "compare with; lower --negatives, or add photos."
        )


def asked_now(asked: int, done: int, unit: str, seconds: float) -> str:
    """How many answers were asked for now and how fast; `asked` is 0 where all were known, whatever the seconds."""
    if not asked:
        return "all known before, nothing was asked"
    return f"{asked} of them asked now, {done / max(seconds, 1e-9):.1f} {unit}/s"


def answers_line(answers: Mapping[str, int]) -> str:
    """The tokens that a teacher's Yes and No are, by the words."""
    return f"answers: {', '.join(f'{word!r} is token {token}' for word, token in answers.items())}"


def say(text: str) -> None:
    """One line on stdout."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)
