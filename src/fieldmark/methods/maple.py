"""MAPLE: preferences of a frozen multimodal LLM for image-text embeddings, arXiv 2506.06970.

Off-the-shelf multimodal LLMs judge well how much a text fits a photo (Eq. 10); an embedder trained by InfoNCE pushes
all negatives away alike. MAPLE ranks hard candidates of each anchor by the LLM's graded score and asks the embedder
for the same order, by a loss derived from DPO. At inference the LLM is gone.

    Eq. 1    L_con   symmetric InfoNCE at temperature tau
    App. C.1         expanded negatives: the hard negatives of all anchors are candidates of all, each once
    Eq. 10   alpha = e^Yes / (e^Yes + e^No)                      the teacher's alignment score
    Eq. 5-8  L_RPA   pairwise or listwise, s = beta * cosine      anchor text x K+1 photos, anchor photo x K+1 texts
    Eq. 9    L = lambda L_RPA + (1 - lambda) L_con

The student is itself a multimodal LLM (section 3): bidirectional attention, mean pooling, LoRA on its language model;
or a dual encoder (`student_kind`), which the paper does not train. Deviations and assumptions, each a setting:

1. lambda is 0.5, for the paper gives no value (`preference_weight`).
2. Scores are computed once, before training, and kept in a file (`alignment`): the teacher is frozen, so this equals
   the paper's scoring in every step.
3. tau and beta are learned as logarithms within bounds, at `temperature_learning_rate` (paper: 100 x the base rate).
4. A candidate that shares label or title with an anchor is not its negative; the paper removes near duplicates only.
5. Mining takes the student's own photo embeddings unless `mining` names a vision model (paper: DINOv2); SemDeDup is off
   unless `dedup_clusters` is given (paper: 50,000 clusters of 9 million photos).
6. Texts are the catalogue's titles, or comparative captions of `fieldmark label captions` (`captions`): a photo's from
   all pairs that it stands in, where the paper draws from those of the anchor's set.
7. AdamW's weight decay is that of all parameters, also of log tau and log beta.
8. All photos that are left are trained on; the paper draws an eighth of each cluster (stratified sampling).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from fieldmark.data.candidates import AnchorSteps, CandidateBatch, CandidateSets, check_others, match_keys
from fieldmark.data.captions import Group
from fieldmark.data.catalog import select_split
from fieldmark.data.checks import BadPhoto
from fieldmark.data.groups import find_groups
from fieldmark.data.mining import few_others, folded, hard_negatives, semdedup, shared_titles
from fieldmark.data.options import read_catalog
from fieldmark.data.squares import Squares
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.multimodal import MultimodalEvaluation, evaluate_multimodal
from fieldmark.evaluation.student import embed_photos
from fieldmark.losses.cached import CachedColumnsLoss, ColumnsLoss
from fieldmark.losses.expanded import Candidates, symmetric_contrastive
from fieldmark.losses.preference import MapleTemperatures, maple_loss, relative_preference
from fieldmark.methods.image_text_reporting import ImageTextWitness, write_image_text_report
from fieldmark.methods.run import (
    RunConfig,
    check_folder,
    check_unused,
    checkpoint_to_resume,
    hide_training_rows,
    make_multimodal_student,
    refuse,
    run_arguments,
    save_results,
)
from fieldmark.methods.teacher_groups import on_accelerator
from fieldmark.methods.trainer import AdapterTrainer, this_process
from fieldmark.progress import JobProgress
from fieldmark.students.build import build_student
from fieldmark.students.dual_encoder import dual_encoder_student
from fieldmark.students.frozen_tower import TowerTokens, remembered_tower
from fieldmark.students.items import photo_side, tokenize_items
from fieldmark.students.lora import merge_lora
from fieldmark.teacher.cache import photo_hash
from fieldmark.teacher.describe import read_captions
from fieldmark.teacher.labels import alignment_cache, candidate_texts, check_alignment, label_alignment
from fieldmark.teacher.model import Teacher

logger = logging.getLogger(__name__)


@dataclass
class MapleConfig(RunConfig):
    """Settings of MAPLE beside those every method has.

    Attributes:
        teacher: the frozen multimodal LLM whose alignment scores are preferences (folder or hub id).
        student_kind: mllm (an LLM as embedder, LoRA on its language model) or dual (a CLIP or SigLIP checkpoint).
        pooling: mean of all tokens, or the last one; of an mllm student.
        attention: bidirectional or causal; of an mllm student.
        lora_rank: rank of the adapters; 0 trains a dual encoder as a whole.
        lora_alpha: their output is scaled by alpha / rank.
        anchors_per_batch: N, of all processes together.
        negatives: K, hard negatives of each anchor.
        expanded: whether hard negatives join the contrastive loss as candidates of all anchors.
        preference: listwise, pairwise or none.
        preference_weight: lambda, 0 (contrast alone) to 1 (preferences alone).
        tau: temperature of the contrast at the start.
        beta: scale of the preferences at the start.
        temperature_learning_rate: of log tau and log beta; null is 100 x `learning_rate`.
        captions: file of `fieldmark label captions` whose captions take the place of titles.
        alignment: file of alignment scores, made if it is not there; null keeps them in the run folder.
        mining: vision model whose embeddings find hard negatives; null takes the untrained student's.
        dedup_clusters: clusters of SemDeDup; null leaves near duplicates in.
        dedup_epsilon: photos of one cluster with a cosine above 1 - epsilon are duplicates; the paper's 0.07 is for
            DINOv2's vectors (`mining`), a student's own lie closer together.
        groups: JSONL of groups (image_0, image_1, caption_0, caption_1) to measure; null makes them of the catalogue.
        mini_batch_size: items embedded at once by GradCache; 0 embeds a batch as a whole.
        photo_memory_mb: decoded photos kept between steps.
        tower_memory_mb: tokens of an mllm student's frozen tower kept between steps, and as much of the test photos'.
        teacher_dtype: precision of the teacher.
    """

    teacher: str | None = None
    student_kind: Literal["mllm", "dual"] = "mllm"
    pooling: Literal["mean", "lasttoken"] = "mean"
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    lora_rank: int = 32
    lora_alpha: int = 32
    anchors_per_batch: int = 96
    negatives: int = 3
    expanded: bool = True
    preference: Literal["listwise", "pairwise", "none"] = "listwise"
    preference_weight: float = 0.5
    tau: float = 0.07
    beta: float = 1 / 0.07
    temperature_learning_rate: float | None = None
    captions: str | None = None
    alignment: str | None = None
    mining: str | None = None
    dedup_clusters: int | None = None
    dedup_epsilon: float = 0.07
    groups: str | None = None
    mini_batch_size: int = 0
    photo_memory_mb: int = 1024
    tower_memory_mb: int = 1024
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    learning_rate: float = 5e-4
    warmup: float = 0.025
    epochs: float = 8.0

    def __post_init__(self) -> None:
        """Refuses numbers that no run could have."""
        super().__post_init__()
        refuse(self, ("tau", "beta", "lora_alpha", "temperature_learning_rate", "dedup_clusters"), above_zero=True)
        least = {"anchors_per_batch": 2, "negatives": 0, "lora_rank": 0, "mini_batch_size": 0, "photo_memory_mb": 0}
        least |= {"tower_memory_mb": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise FieldmarkError(f"{name} is {getattr(self, name)}; give {number} or more.")
        if not 0 <= self.preference_weight <= 1:
            raise FieldmarkError(f"preference_weight is {self.preference_weight}; give a number from 0 to 1.")
        if self.student_kind == "mllm" and not self.lora_rank:
            raise FieldmarkError("lora_rank is 0, which trains nothing of an mllm student; give 1 or more.")
        if self.preference != "none" and not self.negatives:
            raise FieldmarkError("A preference needs candidates; give --negatives 1 or more, or --preference none.")


MapleConfig.__doc__ = f"{RunConfig.__doc__}\n{MapleConfig.__doc__}"


@dataclass
class ImageTextTask:
    """A catalogue made ready for training and measuring: rows with a title, and groups to tell apart."""

    train: datasets.Dataset
    test: datasets.Dataset
    groups: list[Group]
    bad: list[BadPhoto]


@dataclass
class TrainItems:
    """Photos to train on, each once, and what is said of them.

    Attributes:
        photos: N photo references.
        texts: the texts of each, one or more, each once.
        titles: the titles of each; none, one, or several where several rows show one photo.
        labels: label of each.
    """

    photos: list[Any]
    texts: list[list[str]]
    titles: list[list[str]]
    labels: list[str | None]

    def select(self, items: Sequence[int]) -> TrainItems:
        """Some of them."""
        return TrainItems(*([part[item] for item in items] for part in vars(self).values()))


class MapleObjective(nn.Module):
    """Eq. 9 over the embeddings of a batch's photos and texts; holds tau and beta."""

    def __init__(self, config: MapleConfig) -> None:
        super().__init__()
        self.config = config
        self.temperatures = MapleTemperatures(config.tau, config.beta)
        self.parts: dict[str, float] = {}

    def forward(self, columns: list[Tensor], labels: Any) -> Tensor:
        """Loss of `columns` (photos [M, D], texts [M, D]) whose rows are a `CandidateBatch`'s items."""
        config, sets = self.config, labels["candidates"]
        anchors = len(sets)
        rows = len(labels["items"]) if config.expanded else anchors
        pools = [Candidates(side[:rows], labels["items"][:rows], labels["keys"][:rows]) for side in columns]
        contrast = symmetric_contrastive(pools[0], pools[1], anchors, self.temperatures.tau)
        self.parts = {"loss/contrast": float(contrast.detach()), "tau": float(self.temperatures.tau.detach())}
        if config.preference == "none":
            return contrast
        photos, texts = (nn.functional.normalize(side, dim=1) for side in columns)
        beta = self.temperatures.beta
        text_to_image = torch.einsum("nd,nkd->nk", texts[:anchors], photos[sets])
        image_to_text = torch.einsum("nd,nkd->nk", photos[:anchors], texts[sets])
        preference = (
            relative_preference(text_to_image, labels["text_to_image"], beta, config.preference)
            + relative_preference(image_to_text, labels["image_to_text"], beta, config.preference)
        ) / 2
        self.parts |= {"loss/preference": float(preference.detach()), "beta": float(beta.detach())}
        return maple_loss(preference, contrast, config.preference_weight)


class Collator:
    """Turns the anchors of a step into photos, texts, and what is known of them.

    Args:
        student: prepares photos and texts.
        sets: items and their hard negatives.
        alignment: scores by (photo item, text); None without preferences.
        seed: chooses texts.
        memory_mb: decoded photos kept.
    """

    valid_label_columns = ("label",)  # of sentence-transformers' trainer

    def __init__(
        self,
        student: SentenceTransformer,
        sets: CandidateSets,
        alignment: dict[tuple[int, str], float] | None,
        *,
        seed: int,
        memory_mb: int,
    ) -> None:
        self.student, self.sets, self.alignment, self.seed = student, sets, alignment, seed
        self.squares = Squares(sets.photos, photo_side(student), memory_mb)
        self.numbers: dict[str, int] = {}
        for own in sets.texts:
            for text in own:
                self.numbers.setdefault(folded(text) or text, len(self.numbers))

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = CandidateBatch.of([row["item"] for row in rows], self.sets.negatives)
        step = int(rows[0]["step"])
        texts = [self.sets.text(item, seed=self.seed, step=step) for item in batch.items]
        columns = {
            "photo": tokenize_items(self.student, images=[self.squares[item] for item in batch.items]),
            "text": tokenize_items(self.student, texts=texts),
        }
        said = torch.tensor([[self.numbers[folded(text) or text]] for text in texts])  # an equal one is no negative
        labels = {
            "items": torch.tensor(batch.items),
            "keys": torch.cat([self.sets.keys[batch.items], said], dim=1),
            "candidates": batch.candidates,
        }
        if self.alignment is not None:
            pairs = [[(batch.items[row[0]], batch.items[other], texts[row[0]], texts[other]) for other in row]
                     for row in batch.candidates.tolist()]  # fmt: skip
            known = self.alignment
            labels["text_to_image"] = torch.tensor([[known[other, text] for _, other, text, _ in row] for row in pairs])
            labels["image_to_text"] = torch.tensor(
                [[known[anchor, text] for anchor, _, _, text in row] for row in pairs]
            )
        features = {f"{name}_{key}": value for name, found in columns.items() for key, value in found.items()}
        return {**features, "label": labels}


def train(config: MapleConfig) -> Path:
    """Trains a student with MAPLE; returns the run folder."""
    started = time.time()
    # 1. Catalogue: items with a photo and texts; groups to measure
    task = open_task(config)
    items = open_items(config, task.train)
    # 2. Teacher
    if config.teacher is None:
        raise FieldmarkError(
            "MAPLE needs a teacher; name a multimodal LLM with --teacher (a folder or a hub id), or build one for your "
            "catalogue with `fieldmark build-teacher`."
        )
    teacher = Teacher.load(config.teacher, dtype=getattr(torch, config.teacher_dtype))
    # 3. Student
    student = make_student(config)
    check_unused(config)
    check_texts(config, teacher, student, task, items)
    out = check_folder(config, task.bad)
    # 4. The untrained student. The tower is frozen: each test photo passes it once in the whole run
    seen = TowerTokens(config.tower_memory_mb)
    with remembered(student, seen, config):
        before = measure(student, task, config)
    # 5. Hard candidates, and the teacher's scores of them
    sets = mine(config, student, items)
    with this_process().main_process_first(), on_accelerator(teacher):  # the others find its answers in the file
        alignment = None if config.preference == "none" else score(config, teacher, sets, out)
        witness = ImageTextWitness.watch(
            teacher, student, task.groups, sets, alignment, path=alignment_path(config, out),
            resolution=config.resolution, seed=config.seed,
        )  # fmt: skip
    # 6. Loss and training
    objective = MapleObjective(config)
    loss: nn.Module = ColumnsLoss(student, objective)
    if config.mini_batch_size:
        loss = CachedColumnsLoss(student, objective, config.mini_batch_size)
    batches = make_batches(config, len(sets.photos))
    trainer = AdapterTrainer(
        model=student,
        args=make_arguments(config, out, batches),
        train_dataset=datasets.Dataset.from_dict(batches.table()),
        data_collator=Collator(student, sets, alignment, seed=config.seed, memory_mb=config.photo_memory_mb),
        loss=loss,
        batches=batches,
        log_path=out / "log.jsonl",
        description="MAPLE",
        objective=objective,
    )
    with remembered(student, TowerTokens(config.tower_memory_mb), config):
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(config, out))
    # 7. The trained student, its adapters merged; 8. run folder: the teacher stays behind
    merge_lora(student)
    with remembered(student, seen, config):
        after = measure(student, task, config)
    if save_results(out, student, before, after, started, method="maple", seed=config.seed):
        # 9. Report
        write_image_text_report(out, student, task.train, before, after, witness)
    return out


def open_task(config: MapleConfig) -> ImageTextTask:
    """Reads the catalogue; its texts are checked before anything is loaded."""
    catalog, bad = read_catalog(config)
    rows = {split: select_split(catalog, split) for split in ("train", "test")}
    for split, part in rows.items():
        missing = sum(not title for title in part["title"])
        if missing and (split == "test" or config.captions is None):
            raise FieldmarkError(
                f"{missing} of {len(part)} {split} rows of {config.data} have no title; MAPLE needs a text for every "
                "photo, add a title column (--title_column) or, for training, --captions."
            )
    return ImageTextTask(rows["train"], rows["test"], find_groups(config.data, rows["test"], config.groups), bad)


def measure(student: SentenceTransformer, task: ImageTextTask, config: MapleConfig) -> MultimodalEvaluation:
    """Recall between photos and titles of the test part, group scores, modality gap."""
    return evaluate_multimodal(student, task.test, task.groups, batch_size=config.eval_batch_size)


def remembered(student: SentenceTransformer, tokens: TowerTokens, config: MapleConfig) -> AbstractContextManager[None]:
    """The block in which a photo's tokens are looked up; the tower of a dual encoder may be trained."""
    return remembered_tower(student.transformers_model, tokens) if config.student_kind == "mllm" else nullcontext()


def make_student(config: MapleConfig) -> SentenceTransformer:
    """The student at the start; new adapters are drawn from the run's seed."""
    source = config.student or config.teacher
    assert source is not None
    if config.student_kind == "mllm":
        return make_multimodal_student(config, source)
    torch.manual_seed(config.seed)
    student = dual_encoder_student(source, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha)
    hide_training_rows(student)
    return student


def open_items(config: MapleConfig, rows: datasets.Dataset) -> TrainItems:
    """The photos to train on with their texts: titles, or comparative captions.

    Raises:
        FieldmarkError: the file of captions cannot be read, or there are too few photos for a batch, for SemDeDup's
            clusters or for candidate sets; near duplicates, which are not known yet, count here.
    """
    captions = read_captions(Path(config.captions)) if config.captions else None
    of: dict[Any, tuple[list[str], list[str]]] = {photo: ([], []) for photo in rows["image"]}
    for photo, title in zip(rows["image"], rows["title"], strict=True):
        texts, titles = of[photo]
        titles += [title] if title else []
        if captions is None:
            texts.append(title)
    if captions is not None:
        for photo, (texts, _) in of.items():
            texts += captions.get(photo_hash(photo), [])
    labels = dict(zip(rows["image"], rows["label"], strict=True))
    items = TrainItems(
        list(of), [list(dict.fromkeys(own)) for own, _ in of.values()], [own for _, own in of.values()],
        list(labels.values()),
    )  # fmt: skip
    told = [item for item, own in enumerate(items.texts) if own]
    if len(told) < len(items.photos):
        missing = len(items.photos) - len(told)
        logger.warning("%d of %d photos have no caption and are left out", missing, len(items.photos))
        items = items.select(told)
    check_anchors(config, items)
    if (config.dedup_clusters or 0) > len(items.photos):
        raise FieldmarkError(
            f"dedup_clusters is {config.dedup_clusters} for {len(items.photos)} photos; give fewer clusters."
        )
    short = few_others(items.labels, shared_titles(items.titles), config.negatives)
    check_others(short, len(items.photos), config.negatives)
    return items


def check_anchors(config: MapleConfig, items: TrainItems) -> None:
    """Refuses fewer items than anchors of a batch, and a batch that the processes cannot share."""
    if len(items.photos) < config.anchors_per_batch:
        raise FieldmarkError(
            f"{len(items.photos)} photos with a text are left to train on; anchors_per_batch is "
            f"{config.anchors_per_batch}, lower it or add photos."
        )
    make_batches(config, len(items.photos))


def check_texts(
    config: MapleConfig, teacher: Teacher, student: SentenceTransformer, task: ImageTextTask, items: TrainItems
) -> None:
    """Refuses what embedding and scoring would, before the run has a folder and anything is measured.

    Raises:
        FieldmarkError: a text is too long for the student or the teacher, the teacher has no token for Yes or No, or
            the file of alignment scores is of another teacher or holds a score that is no number.
    """
    captions = [text for group in task.groups for text in group.captions]
    trained = [text for own in items.texts for text in own]
    read = sorted(dict.fromkeys([*task.test["title"], *captions, *trained]), key=len)
    for start in range(0, len(read), config.eval_batch_size):
        tokenize_items(student, texts=read[start : start + config.eval_batch_size])
    asked = captions + (trained if config.preference != "none" else [])
    if asked:
        path = alignment_path(config, Path(config.out))
        check_alignment(path, teacher, items.photos[0], asked, resolution=config.resolution)


def mine(config: MapleConfig, student: SentenceTransformer, items: TrainItems) -> CandidateSets:
    """Items to train on: near duplicates dropped where asked for, K hard negatives each (MAPLE, section 3.1)."""
    needed = config.negatives or config.dedup_clusters is not None
    count = len(items.photos)
    features = photo_features(config, student, items.photos) if needed else np.zeros((count, 0), np.float32)
    if config.dedup_clusters is not None:
        kept = semdedup(features, clusters=config.dedup_clusters, epsilon=config.dedup_epsilon, seed=config.seed)
        logger.warning("%d of %d photos are near duplicates of others and are left out", count - len(kept), count)
        items, features = items.select(kept.tolist()), features[kept]
        check_anchors(config, items)
    titles = shared_titles(items.titles)
    negatives = np.zeros((len(items.photos), 0), dtype=np.int64)
    if config.negatives:
        negatives = hard_negatives(features, config.negatives, labels=items.labels, titles=titles)
    return CandidateSets(items.photos, items.texts, negatives, match_keys(items.labels, titles))


def photo_features(config: MapleConfig, student: SentenceTransformer, photos: list[Any]) -> np.ndarray:
    """[N, D] vectors that hard negatives are found by."""
    if config.mining is not None:
        student = build_student(config.mining, pooling="mean", resolution=config.resolution)
    with JobProgress("photos for mining", len(photos)) as job:
        return embed_photos(student, photos, batch_size=config.eval_batch_size, progress=job.update)


def score(config: MapleConfig, teacher: Teacher, sets: CandidateSets, out: Path) -> dict[tuple[int, str], float]:
    """The teacher's score of every photo and text that can stand in one candidate set."""
    texts = candidate_texts(sets.texts, sets.negatives)
    with (
        JobProgress("alignment scores", len(texts)) as job,
        alignment_cache(alignment_path(config, out), teacher, config.resolution) as cache,
    ):
        scores = label_alignment(teacher, sets.photos, texts, cache, resolution=config.resolution, progress=job.update)
    return {
        (item, text): value
        for item, (own, values) in enumerate(zip(texts, scores, strict=True))
        for text, value in zip(own, values, strict=True)
    }


def alignment_path(config: MapleConfig, out: Path) -> Path:
    """The file of the teacher's scores."""
    return Path(config.alignment) if config.alignment else out / "alignment.parquet"


def make_batches(config: MapleConfig, items: int) -> AnchorSteps:
    """The run's anchors: `max_steps` steps, else `epochs` passes over the items."""
    steps = config.max_steps or max(1, round(config.epochs * items / config.anchors_per_batch))
    processes = this_process().num_processes
    return AnchorSteps(items, config.anchors_per_batch, seed=config.seed, steps=steps, world_size=processes)


def make_arguments(config: MapleConfig, out: Path, batches: AnchorSteps) -> Any:
    """Learning rates of the adapters, and of tau and beta."""
    rate = config.temperature_learning_rate
    return run_arguments(config, out, batches, {"temperatures": 100 * config.learning_rate if rate is None else rate})
