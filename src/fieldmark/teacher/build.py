"""`fieldmark build-teacher`: a small teacher for a catalogue with attributes, when no public multimodal LLM serves.

1. The catalogue's teacher part: classes of its own where the source keeps some apart (aviary, grocery), else its train
   rows.
2. A tokenizer for the answers it will give.
3. A body: Qwen3-VL's architecture, made from nothing; or, with `--tower`, a pre-trained vision network, a projector
   and a small language model (`composed`).
4. The tower learns to read attributes; a pre-trained one stays as it is and its projector is fitted (`reading`).
5. The language model learns its skills: to say them and to give a verdict about two photos (`speaking`), and, where
   the catalogue has titles, to say whether a text fits a photo (`judging`).
6. An examination on the student's classes (`examine`), a card, safetensors (bf16; float32 with a pre-trained tower,
   whose batch statistics bf16 would round).

A killed build goes on where the last finished stage ended (`--resume true`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fieldmark.data.catalog import select_split
from fieldmark.data.options import CatalogOptions, read_catalog
from fieldmark.errors import FieldmarkError
from fieldmark.progress import JobProgress
from fieldmark.students.tower import VisionTower
from fieldmark.teacher.align import ANSWERS, QUESTION
from fieldmark.teacher.attributes import attribute_answer, load_schema
from fieldmark.teacher.card import write_card
from fieldmark.teacher.compare import Domain, answer_json, compare_prompt, domain_for_attributes
from fieldmark.teacher.examine import AlignmentExamination, Examination, examine, examine_alignment
from fieldmark.teacher.judging import JudgedTexts, Judging
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.reading import AttributeTable, fit_projector, train_tower
from fieldmark.teacher.speaking import Comparing, PhotoBank, train_language
from fieldmark.teacher.tiny import make_model, make_processor, make_tokenizer


@dataclass
class BuildConfig(CatalogOptions):
    """Settings of `build-teacher`.

    Attributes:
        out: folder of the teacher.
        skills: what it learns: compare (SAGA; needs labels and attributes), align (MAPLE; needs titles); null is all
            that the catalogue has the columns for.
        start: folder of a teacher that `build-teacher` made of this catalogue; its language model learns on, its tower
            and tokenizer stay.
        tower: folder or hub id of a pre-trained timm network; null makes a Qwen3-VL tower from nothing.
        tower_steps: optimizer steps of a tower from nothing.
        tower_batch: photos a step.
        tower_learning_rate: its peak.
        language_steps: optimizer steps of the language model.
        language_batch: pairs of photos a step.
        language_drills: comparisons of made-up items a step.
        judged_photos: photos a step whose texts are judged.
        judged_texts: texts about each of them.
        language_learning_rate: its peak.
        views: views kept of each photo for the language stage, every second one mirrored.
        max_photos: photos of the teacher part that are used for the language stage, spread over the classes.
        resolution: side of the square photo.
        exam_pairs: pairs of the examination.
        workers: processes that decode or draw.
        precision: fp32 or bf16 (autocast) while training; faster where the processor computes in bf16.
        seed: of everything random.
        resume: go on with a killed build.
    """

    out: str
    skills: list[Literal["compare", "align"]] | None = None
    start: str | None = None
    tower: str | None = None
    tower_steps: int = 400
    tower_batch: int = 48
    tower_learning_rate: float = 1.5e-3
    language_steps: int = 1800
    language_batch: int = 10
    language_drills: int = 12
    judged_photos: int = 12
    judged_texts: int = 6
    language_learning_rate: float = 1e-3
    views: int = 1
    max_photos: int = 7200
    resolution: int = 224
    exam_pairs: int = 128
    workers: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that no build could have."""
        least = dict.fromkeys(("tower_steps", "tower_batch", "language_steps", "language_batch", "views"), 1)
        # An examination needs a pair of each kind.
        least |= dict.fromkeys(("judged_photos", "judged_texts"), 1)
        least |= {"max_photos": 1, "exam_pairs": 2, "language_drills": 0, "workers": 0, "seed": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise FieldmarkError(f"{name} is {getattr(self, name)}; give {number} or more.")
        for name in ("tower_learning_rate", "language_learning_rate"):
            if not getattr(self, name) > 0:
                raise FieldmarkError(f"{name} is {getattr(self, name)}; give a number above 0.")


BuildConfig.__doc__ = f"{CatalogOptions.__doc__}\n{BuildConfig.__doc__}"


def build_teacher(config: BuildConfig) -> Path:
    """Builds, examines and saves a teacher; returns its folder."""
    started = time.time()
    _check_out(config)
    # 1. Catalogue, the examination's too: what it lacks is said before anything is trained
    catalog, _ = read_catalog(config, part="teacher")
    skills = choose_skills(config, catalog)
    students, _ = read_catalog(config)
    unseen = {split: select_split(students, split) for split in ("test", "train")}
    check = class_attributes if "compare" in skills else item_attributes
    attributes = check(catalog)
    for rows in unseen.values():
        check(rows)
    torch.manual_seed(config.seed)
    domain = domain_for_attributes(list(catalog.features["attributes"]))  # all names: no item need have every one
    # 2. Tokenizer, 3. body
    teacher = Teacher.load(config.start) if config.start else _new_teacher(config, skills, domain, catalog, attributes)
    out = _open_folder(config)
    _save(teacher, out / "stages" / "body")
    # 4. Tower
    tower = VisionTower.from_pretrained(out / "stages" / "body", config.resolution)
    known = [attributes[name] for name in _names(catalog)]
    table = AttributeTable.of(known)
    truth = table.encode(known)
    if config.start is None:
        _stage(
            out / "stages" / "tower.safetensors",
            tower,
            lambda: _teach_tower(config, tower, list(catalog["image"]), truth, table),
        )
        put_tower(teacher, tower)
    # 5. Language
    bank = photo_bank(tower, catalog, attributes, max_photos=config.max_photos, views=config.views, seed=config.seed)
    _stage(
        out / "stages" / "language.safetensors",
        teacher.language_model,
        lambda: _teach_language(config, skills, teacher, domain, bank),
    )
    # 6. Examination, card, weights
    made_here = teacher.model_type == "qwen3_vl"
    teacher = save_teacher(teacher, out, torch.bfloat16 if made_here else torch.float32)
    results = _examine_unseen(config, skills, teacher, tower, domain, unseen, bank)
    seen = {split for split, rows in unseen.items() if not attributes.keys().isdisjoint(_names(rows))}
    write_card(out, config, skills, domain, teacher, results, minutes=(time.time() - started) / 60, known=seen)
    return out


def _new_teacher(
    config: BuildConfig,
    skills: Sequence[str],
    domain: Domain,
    catalog: datasets.Dataset,
    attributes: dict[str, dict[str, str]],
) -> Teacher:
    """Tokenizer and body, nothing learned yet but what a pre-trained tower brings."""
    tokenizer = make_tokenizer(_texts(skills, domain, catalog, attributes, config.seed))
    if config.tower is None:
        return Teacher(make_model(tokenizer), make_processor(tokenizer, config.resolution))
    from fieldmark.teacher.composed import make_composed

    pretrained = VisionTower.from_pretrained(config.tower, config.resolution)
    return Teacher(*make_composed(pretrained, tokenizer))


def choose_skills(config: BuildConfig, catalog: datasets.Dataset) -> list[str]:
    """The skills asked for, else those that the catalogue has the columns for.

    Raises:
        FieldmarkError: titles are missing for `align`, or there is nothing to learn.
    """
    titled = any(catalog["title"])
    skills: list[str] = [*(config.skills or (("compare", "align") if titled else ("compare",)))]
    if "align" in skills and not titled:
        raise FieldmarkError(f"{config.data} has no titles; the skill align needs them, add a title column.")
    return skills


def item_attributes(catalog: datasets.Dataset) -> dict[str, dict[str, str]]:
    """Attributes by label (by item where there is none): those of its first item, possibly none."""
    found: dict[str, dict[str, str]] = {}
    for name, attributes in zip(_names(catalog), catalog["attributes"], strict=True):
        found.setdefault(name, {key: value for key, value in (attributes or {}).items() if value is not None})
    return found


def _names(catalog: datasets.Dataset) -> list[str]:
    return [label or item for label, item in zip(catalog["label"], catalog["item_id"], strict=True)]


def class_attributes(catalog: datasets.Dataset) -> dict[str, dict[str, str]]:
    """Attributes of each class: those of its first item; names that this item does not have are left out.

    Raises:
        FieldmarkError: rows without label or attributes, too few classes, or too few photos to pair.
    """
    for label, attributes in zip(catalog["label"], catalog["attributes"], strict=True):
        if label is None or not attributes:
            raise FieldmarkError(
                "build-teacher needs a label and attributes for every photo; add the columns or another source."
            )
    found = item_attributes(catalog)
    if len(found) < 4:
        raise FieldmarkError(
            f"{len(found)} classes ({', '.join(found)}) are given to build or examine a teacher; at least 4 are needed."
        )
    if sum(count > 1 for count in Counter(catalog["label"]).values()) < 2:
        raise FieldmarkError("Fewer than two classes have two photos to compare; add photos to the catalogue.")
    return found


def photo_bank(
    tower: VisionTower,
    catalog: datasets.Dataset,
    attributes: dict[str, dict[str, str]],
    *,
    max_photos: int,
    views: int = 1,
    seed: int = 0,
) -> PhotoBank:
    """Tokens of (at most `max_photos`, spread over classes) photos, the odd views mirrored, in half precision."""
    names = list(attributes)
    index = {name: i for i, name in enumerate(names)}
    labels = np.array([index[name] for name in _names(catalog)])
    chosen = _spread(labels, max_photos, np.random.default_rng(seed))
    refs = list(catalog.select(chosen)["image"])
    banks = [_tokens(tower, refs, mirrored=view % 2 == 1) for view in range(views)]
    titles = list(catalog.select(chosen)["title"]) * views
    return PhotoBank(torch.cat(banks), np.tile(labels[chosen], views), [attributes[name] for name in names], titles)


def put_tower(teacher: Teacher, tower: VisionTower) -> None:
    """Copies tower and projector into the teacher."""
    body: Any = teacher.model.model
    with torch.no_grad():
        if hasattr(body, "visual"):
            body.visual.load_state_dict(tower.encoder.model.state_dict())
        else:
            body.vision_tower.load_state_dict(tower.encoder.model.state_dict())
            assert tower.projector is not None
            body.multi_modal_projector.load_state_dict(tower.projector.state_dict())


def save_teacher(teacher: Teacher, out: Path, dtype: torch.dtype) -> Teacher:
    """Writes the weights and returns the teacher as anyone will load it, rounding included."""
    teacher.model.to(dtype)
    _save(teacher, out)
    return Teacher.load(out)


def _save(teacher: Teacher, folder: Path) -> None:
    teacher.model.save_pretrained(folder)
    teacher.processor.save_pretrained(folder)


def _teach_tower(
    config: BuildConfig, tower: VisionTower, refs: list[str], truth: torch.Tensor, table: AttributeTable
) -> None:
    if config.tower is not None:
        with _progress("projector", len(refs)) as progress:
            fit_projector(tower, refs, progress=progress)
        return
    with _progress("tower", config.tower_steps) as progress:
        train_tower(
            tower,
            refs,
            truth,
            table,
            steps=config.tower_steps,
            batch_size=config.tower_batch,
            learning_rate=config.tower_learning_rate,
            workers=config.workers,
            bf16=config.precision == "bf16",
            seed=config.seed,
            progress=progress,
        )


def _teach_language(
    config: BuildConfig, skills: Sequence[str], teacher: Teacher, domain: Domain, bank: PhotoBank
) -> None:
    lessons: list[Comparing | Judging] = []
    if "compare" in skills:
        sizes = {"batch_size": config.language_batch, "drills": config.language_drills}
        lessons.append(Comparing(teacher, domain, bank, seed=config.seed, **sizes))
    if "align" in skills:
        sizes = {"batch_size": config.judged_photos, "texts": config.judged_texts}
        lessons.append(Judging(teacher, bank, seed=config.seed, **sizes))
    with _progress("language", config.language_steps) as progress:
        train_language(
            teacher,
            lessons,
            steps=config.language_steps,
            learning_rate=config.language_learning_rate,
            bf16=config.precision == "bf16",
            progress=progress,
        )


def _examine_unseen(
    config: BuildConfig,
    skills: Sequence[str],
    teacher: Teacher,
    tower: VisionTower,
    domain: Domain,
    unseen: dict[str, datasets.Dataset],
    learned: PhotoBank,
) -> dict[str, Examination | AlignmentExamination]:
    """On the student's classes: verdicts on the test part with look-alikes and on training pairs as SAGA draws them,
    titles of the test part."""
    results: dict[str, Examination | AlignmentExamination] = {}
    for split, lookalikes in (("test", 1.0), ("train", 0.0)):
        rows = unseen[split]
        if "compare" not in skills and split == "train":
            continue
        bank = photo_bank(tower, rows, item_attributes(rows), max_photos=1200, seed=config.seed)
        if "compare" in skills:
            results[split] = examine(
                teacher, domain, bank, pairs=config.exam_pairs, lookalikes=lookalikes, seed=config.seed
            )
        if "align" in skills and split == "test":
            values = JudgedTexts(learned.titles, learned.attributes, np.random.default_rng(0)).values
            results["titles"] = examine_alignment(
                teacher, bank, values=values, photos=2 * config.exam_pairs, seed=config.seed
            )
    return results


def _texts(
    skills: Sequence[str],
    domain: Domain,
    catalog: datasets.Dataset,
    attributes: dict[str, dict[str, str]],
    seed: int,
) -> Iterator[str]:
    """Answers and prompts the tokenizer is trained on."""
    rng = np.random.default_rng(seed)
    if "compare" in skills:
        known = list(attributes.values())
        for _ in range(3000):
            a, b = rng.integers(len(known), size=2)
            yield answer_json(domain, known[a], known[b], bool(a == b))
        for _ in range(20):
            yield compare_prompt(domain)
    if "align" in skills:
        titles, names, schema = list(catalog["title"]), _names(catalog), load_schema()
        texts = JudgedTexts(titles, [attributes[name] for name in names], rng)
        for item in rng.permutation(len(titles))[:3000].tolist():
            for one in texts.draw(item, 3):
                yield QUESTION.format(text=one.text)
            yield from ANSWERS
            own = attributes[names[item]]
            yield schema.ask(titles[item])
            yield attribute_answer(list(own), own)


def _spread(labels: np.ndarray, most: int, rng: np.random.Generator) -> list[int]:
    """At most `most` indices, as evenly over the classes as they allow, in ascending order."""
    order = rng.permutation(len(labels))
    turn = np.zeros(len(labels), dtype=np.int64)
    seen: dict[int, int] = {}
    for i in order:
        turn[i] = seen[labels[i]] = seen.get(labels[i], -1) + 1
    return sorted(order[np.argsort(turn[order], kind="stable")][:most].tolist())


@torch.no_grad()
def _tokens(tower: VisionTower, refs: list[Any], *, mirrored: bool, batch: int = 64) -> torch.Tensor:
    """[photos, 1 + DeepStack, N, D] in half precision."""
    tower.eval()
    parts = []
    with _progress("photos", len(refs)) as progress:
        for start in range(0, len(refs), batch):
            pixels = tower.preprocess(refs[start : start + batch])["pixel_values"]
            features = tower({"pixel_values": pixels.flip(-1) if mirrored else pixels})
            parts.append(torch.stack([features["token_embeddings"], *features["deepstack"]], dim=1).half())
            progress(min(start + batch, len(refs)), 0.0)
    return torch.cat(parts)


def _stage(path: Path, module: torch.nn.Module, work: Callable[[], None]) -> None:
    """Runs a stage, or loads what it left when it had been finished before."""
    if path.exists():
        module.load_state_dict(load_file(path))
        return
    work()
    partial = path.with_suffix(".part")
    save_file({name: value.detach().clone().contiguous() for name, value in module.state_dict().items()}, partial)
    partial.rename(path)


@contextmanager
def _progress(description: str, total: int) -> Iterator[Callable[[int, float], None]]:
    with JobProgress(description, total) as job:
        yield lambda done, loss: job.update(done, f"loss {loss:.3f}" if loss else "")


def _check_out(config: BuildConfig) -> None:
    out = Path(config.out)
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise FieldmarkError(f"--out {out} is a file or lies in one; give a folder for the teacher.")
    if out.is_dir() and any(out.iterdir()) and not config.resume:
        raise FieldmarkError(f"--out {out} is not empty; give a new folder, or --resume true to go on with that build.")


def _open_folder(config: BuildConfig) -> Path:
    out = Path(config.out)
    (out / "stages").mkdir(parents=True, exist_ok=True)
    return out
