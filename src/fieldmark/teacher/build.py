"""`fieldmark build-teacher`: a small teacher for a catalogue with attributes, when no public multimodal LLM serves.

1. The catalogue's teacher part: classes of its own where the source keeps some apart (aviary, grocery), else its train
   rows.
2. A tokenizer for the answers it will give.
3. A body: Qwen3-VL's architecture, made from nothing; or, with `--tower`, a pre-trained vision network, a projector
   and a small language model (`composed`).
4. The tower learns to read attributes; a pre-trained one stays as it is and its projector is fitted (`reading`).
5. The language model learns to say them and to give a verdict (`speaking`).
6. An examination on the student's classes (`examine`), a card, safetensors (bf16; float32 with a pre-trained tower,
   whose batch statistics bf16 would round).

A killed build goes on where the last finished stage ended (`--resume true`).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fieldmark.data.catalog import load_catalog, select_split
from fieldmark.errors import FieldmarkError
from fieldmark.progress import JobProgress
from fieldmark.students.tower import VisionTower
from fieldmark.teacher.compare import Domain, answer_json, compare_prompt, domain_for_attributes
from fieldmark.teacher.examine import Examination, examine
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.reading import AttributeTable, fit_projector, train_tower
from fieldmark.teacher.speaking import PhotoBank, train_language
from fieldmark.teacher.tiny import make_model, make_processor, make_tokenizer


@dataclass
class BuildConfig:
    """Settings of `build-teacher`.

    Attributes:
        data: catalogue with attributes (`aviary`, `aviary:PHOTOS_PER_SPECIES`, `grocery:DIR`, a table with a train
            split).
        out: folder of the teacher.
        tower: folder or hub id of a pre-trained timm network; null makes a Qwen3-VL tower from nothing.
        tower_steps: optimizer steps of a tower from nothing.
        tower_batch: photos a step.
        tower_learning_rate: its peak.
        language_steps: optimizer steps of the language model.
        language_batch: pairs of photos a step.
        language_drills: comparisons of made-up items a step.
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

    data: str
    out: str
    tower: str | None = None
    tower_steps: int = 400
    tower_batch: int = 48
    tower_learning_rate: float = 1.5e-3
    language_steps: int = 1800
    language_batch: int = 10
    language_drills: int = 12
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
        least |= {"max_photos": 1, "exam_pairs": 2, "language_drills": 0, "workers": 0, "seed": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise FieldmarkError(f"{name} is {getattr(self, name)}; give {number} or more.")
        for name in ("tower_learning_rate", "language_learning_rate"):
            if not getattr(self, name) > 0:
                raise FieldmarkError(f"{name} is {getattr(self, name)}; give a number above 0.")


def build_teacher(config: BuildConfig) -> Path:
    """Builds, examines and saves a teacher; returns its folder."""
    started = time.time()
    _check_out(config)
    # 1. Catalogue, the examination's too: what it lacks is said before anything is trained
    catalog = load_catalog(config.data, part="teacher")
    attributes = class_attributes(catalog)
    unseen = {split: select_split(load_catalog(config.data), split) for split in ("test", "train")}
    for rows in unseen.values():
        class_attributes(rows)
    torch.manual_seed(config.seed)
    domain = domain_for_attributes(list(catalog.features["attributes"]))  # all names: no item need have every one
    # 2. Tokenizer, 3. body
    tokenizer = make_tokenizer(_texts(domain, list(attributes.values()), config.seed))
    if config.tower is None:
        processor: Any = make_processor(tokenizer, config.resolution)
        teacher = Teacher(make_model(tokenizer), processor)
    else:
        from fieldmark.teacher.composed import make_composed

        pretrained = VisionTower.from_pretrained(config.tower, config.resolution)
        model, processor = make_composed(pretrained, tokenizer)
        teacher = Teacher(model, processor)
    out = _open_folder(config)
    _save(teacher, out / "stages" / "body")
    # 4. Tower
    tower = VisionTower.from_pretrained(out / "stages" / "body", config.resolution)
    table = AttributeTable.of([attributes[label] for label in catalog["label"]])
    truth = table.encode([attributes[label] for label in catalog["label"]])
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
        lambda: _teach_language(config, teacher, domain, bank),
    )
    # 6. Examination, card, weights
    teacher = save_teacher(teacher, out, torch.bfloat16 if config.tower is None else torch.float32)
    results = _examine_unseen(config, teacher, tower, domain, unseen)
    known = {split for split, rows in unseen.items() if not attributes.keys().isdisjoint(rows["label"])}
    write_card(out, config, domain, teacher, results, minutes=(time.time() - started) / 60, known=known)
    return out


def class_attributes(catalog: datasets.Dataset) -> dict[str, dict[str, str]]:
    """Attributes of each class: those of its first item; names that this item does not have are left out.

    Raises:
        FieldmarkError: rows without label or attributes, too few classes, or too few photos to pair.
    """
    found: dict[str, dict[str, str]] = {}
    for label, attributes in zip(catalog["label"], catalog["attributes"], strict=True):
        if label is None or not attributes:
            raise FieldmarkError(
                "build-teacher needs a label and attributes for every photo; add the columns or another source."
            )
        found.setdefault(label, {name: value for name, value in attributes.items() if value is not None})
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
    labels = np.array([index[label] for label in catalog["label"]])
    chosen = _spread(labels, max_photos, np.random.default_rng(seed))
    refs = list(catalog.select(chosen)["image"])
    banks = [_tokens(tower, refs, mirrored=view % 2 == 1) for view in range(views)]
    return PhotoBank(torch.cat(banks), np.tile(labels[chosen], views), [attributes[name] for name in names])


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


def _teach_language(config: BuildConfig, teacher: Teacher, domain: Domain, bank: PhotoBank) -> None:
    with _progress("language", config.language_steps) as progress:
        train_language(
            teacher,
            domain,
            bank,
            steps=config.language_steps,
            batch_size=config.language_batch,
            drills=config.language_drills,
            learning_rate=config.language_learning_rate,
            bf16=config.precision == "bf16",
            seed=config.seed,
            progress=progress,
        )


def _examine_unseen(
    config: BuildConfig, teacher: Teacher, tower: VisionTower, domain: Domain, unseen: dict[str, datasets.Dataset]
) -> dict[str, Examination]:
    """On the student's classes: the test part with look-alikes, and training pairs as SAGA draws them."""
    results = {}
    for split, lookalikes in (("test", 1.0), ("train", 0.0)):
        rows = unseen[split]
        bank = photo_bank(tower, rows, class_attributes(rows), max_photos=1200, seed=config.seed)
        results[split] = examine(
            teacher, domain, bank, pairs=config.exam_pairs, lookalikes=lookalikes, seed=config.seed
        )
    return results


def _texts(domain: Domain, attributes: list[dict[str, str]], seed: int) -> Iterator[str]:
    """Answers and prompts the tokenizer is trained on."""
    rng = np.random.default_rng(seed)
    for _ in range(3000):
        a, b = rng.integers(len(attributes), size=2)
        yield answer_json(domain, attributes[a], attributes[b], bool(a == b))
    for _ in range(20):
        yield compare_prompt(domain)


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


def write_card(
    out: Path,
    config: BuildConfig,
    domain: Domain,
    teacher: Teacher,
    results: dict[str, Examination],
    *,
    minutes: float,
    known: Collection[str] = (),
) -> None:
    """`README.md` and `card.json`: how the teacher was made and how it did; `known` names the student's splits whose
    classes the teacher has seen."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "resume")}
    parameters = sum(p.numel() for p in teacher.model.parameters())
    card = {
        "settings": settings,
        "domain": domain.name,
        "model_type": teacher.model_type,
        "parameters": parameters,
        "minutes": round(minutes, 1),
        "unseen_test_classes": results["test"].as_dict(),
        "student_training_pairs": results["train"].as_dict(),
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {value} | {results['train'].as_dict()[name]} |"
        for name, value in results["test"].as_dict().items()
    )
    tower = f"{config.tower_steps} steps" if config.tower is None else f"`{config.tower}` as it is, a projector fitted"
    classes, examined = "classes that no student trains on or is tested on", "classes it has never seen"
    if known:
        classes = "its train rows, which a student trains on too"
        seen = " and ".join(split for split in ("train", "test") if split in known)
        examined = f"the student's classes (those of its {seen} rows it has seen while it was made)"
    (out / "README.md").write_text(
        f"""# A small teacher, built by `fieldmark build-teacher`

{parameters / 1e6:.1f} M parameters, {teacher.model_type}, made from the teacher part of
`{Path(config.data.split(":")[0]).name}` ({classes}); tower:
{tower}, language: {config.language_steps} steps. It answers one question, in the wording of the
domain `{domain.name}`, and knows nothing else.

Examined on {examined}, {config.exam_pairs} balanced pairs, 8 rollouts each at temperature 0.7, top-p
0.95. *Look-alikes*: test classes, the different half are the nearest classes by attributes. *Training pairs*: the
student's training classes, different ones drawn at random, as SAGA draws them.

| | look-alikes | training pairs |
| --- | --- | --- |
{rows}
""",
        encoding="utf-8",
    )
