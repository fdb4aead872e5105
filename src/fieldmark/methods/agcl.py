"""AFMRL's first stage, attribute-guided contrastive learning (AGCL), arXiv 2604.20135, sections 3.1 and 4.1.

A generator has named the key attributes of every item (`fieldmark label attributes`). The embedder is trained by
InfoNCE whose negatives weigh the more, the more telling attributes they share with the query. Those that are much
nearer than the positive are taken for the same product and left out:

    Eq. 1   w_ij = e^(1 + tanh BM25(attributes of query i, attributes of candidate j))
    Eq. 2   M_ij = 1 where s_ij > s_ii + delta: a false negative, left out
    Eq. 3   L = -log(w_ii e^(s_ii / tau) / (w_ii e^(s_ii / tau) + sum over j with M_ij = 0 of w_ij e^(s_ij / tau)))

The embedder is a multimodal LLM: causal attention, the last token's state, LoRA on its language model. Deviations and
assumptions, each a setting:

1. Steps take three tasks in turn (`tasks`): photo to title, title to photo, and photo with title to another item of the
   product; the paper measures all three and does not say which it trains on.
2. LoRA's alpha is 64 (VLM2Vec's; `lora_alpha`) and has no dropout.
3. `enriched_share` of the query titles are followed by their attributes, as queries are at inference (`enrich`); the
   paper enriches at inference and is silent on training. Of the catalogue's own attributes the category stays out of
   all texts, since coarse retrieval counts it; it weighs negatives all the same.
4. An item that shares product or title with a query is not its negative.
5. BM25's statistics are those of the training items, fixed; Lucene's variant, k1 1.5, b 0.75. Chinese and Japanese are
   cut into pairs of characters, not by a dictionary.
6. One answer about photo and title together gives an item's attributes, as query and as candidate; in the paper's
   figure 3 the photo and the title go through the generator separately.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from fieldmark.data.batches import stable_random
from fieldmark.data.candidates import match_keys
from fieldmark.data.catalog import select_split
from fieldmark.data.checks import BadPhoto
from fieldmark.data.options import read_catalog
from fieldmark.data.product_pairs import TASKS, ProductPairs, sample_products
from fieldmark.data.squares import Squares
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.enriched import EnrichedEvaluation, evaluate_enriched
from fieldmark.evaluation.products import CATEGORY, categories_of
from fieldmark.losses.bm25 import BM25, Attributes
from fieldmark.losses.cached import CachedColumnsLoss, ColumnsLoss
from fieldmark.losses.contrastive import AttributeGuidedObjective
from fieldmark.methods.run import (
    RunConfig,
    check_folder,
    checkpoint_to_resume,
    make_multimodal_student,
    refuse,
    run_arguments,
    save_results,
)
from fieldmark.methods.trainer import AdapterTrainer, this_process
from fieldmark.students.enrich import enriched_text
from fieldmark.students.frozen_tower import TowerTokens, remembered_tower
from fieldmark.students.items import photo_side, tokenize_items
from fieldmark.students.lora import merge_lora
from fieldmark.teacher.attribute_labels import CATALOGUE, known_attributes, without

logger = logging.getLogger(__name__)

_ENRICHED, _SHUFFLED = 7, 8  # random streams that must not share a seed


@dataclass
class AgclConfig(RunConfig):
    """Settings of AGCL beside those every method has.

    Attributes:
        attributes: file of `fieldmark label attributes` (of the split train, and of test unless --enrich none), or
            `catalogue` for the catalogue's own attributes; null leaves them out, which needs --weights none.
        weights: bm25; shuffled weighs negatives by attributes dealt anew among the items, while texts keep their own (a
            control); none is InfoNCE with the same negatives.
        bm25_scale: raw as in Eq. 1, or self: relative to the score of the query's own candidate.
        temperature: tau.
        delta: margin of the mask of false negatives.
        symmetric: also from candidate to query.
        tasks: what pairs show: image-text, text-image, product; null is all that the catalogue has pairs for.
        enriched_share: share of the query titles that are followed by their attributes in training.
        enrich: whose attributes join the titles when measuring: query, both or none.
        sample_share: share of the training items that are used, in whole products, drawn by the seed.
        pairs_per_batch: B, of all processes together.
        pooling: mean of all tokens, or the last one.
        attention: bidirectional or causal.
        lora_rank: rank of the adapters.
        lora_alpha: their output is scaled by alpha / rank.
        mini_batch_size: items embedded at once by GradCache; 0 embeds a batch as a whole.
        category: attribute that holds a product's category, for coarse retrieval; null takes `category`.
        photo_memory_mb: decoded photos kept between steps.
        tower_memory_mb: tokens of the frozen tower kept between steps, and as much again of the test photos'.
    """

    attributes: str | None = None
    weights: Literal["bm25", "shuffled", "none"] = "bm25"
    bm25_scale: Literal["raw", "self"] = "raw"
    temperature: float = 0.02
    delta: float = 0.4
    symmetric: bool = False
    tasks: list[str] | None = None
    enriched_share: float = 0.5
    enrich: Literal["query", "both", "none"] = "query"
    sample_share: float = 1.0
    pairs_per_batch: int = 64
    pooling: Literal["mean", "lasttoken"] = "lasttoken"
    attention: Literal["bidirectional", "causal"] = "causal"
    lora_rank: int = 8
    lora_alpha: int = 64
    mini_batch_size: int = 0
    category: str | None = None
    photo_memory_mb: int = 1024
    tower_memory_mb: int = 1024
    learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        """Refuses numbers that no run could have."""
        super().__post_init__()
        refuse(self, ("temperature", "lora_rank", "lora_alpha"), above_zero=True)
        refuse(self, ("delta", "mini_batch_size", "photo_memory_mb", "tower_memory_mb"))
        if self.pairs_per_batch < 2:
            raise FieldmarkError(f"pairs_per_batch is {self.pairs_per_batch}; give 2 or more.")
        if not 0 < self.sample_share <= 1:
            raise FieldmarkError(f"sample_share is {self.sample_share}; give a number above 0, at most 1.")
        if not 0 <= self.enriched_share <= 1:
            raise FieldmarkError(f"enriched_share is {self.enriched_share}; give a number from 0 to 1.")
        if self.attributes is None and self.weights != "none":
            raise FieldmarkError(
                "AGCL weighs negatives by attributes; give --attributes F.parquet of `fieldmark label attributes` (or "
                "catalogue for the catalogue's own), or --weights none."
            )


AgclConfig.__doc__ = f"{RunConfig.__doc__}\n{AgclConfig.__doc__}"


@dataclass
class ProductTask:
    """A catalogue made ready: rows with a title, and the attributes of each, None where there are none."""

    train: datasets.Dataset
    test: datasets.Dataset
    attributes: list[Attributes]
    test_attributes: list[Attributes]
    tasks: tuple[str, ...]
    bad: list[BadPhoto]
    unsaid: str | None = None  # attribute that weighs negatives and joins no title


class ProductCollator:
    """Turns the pairs of a step into queries, candidates, and what is known of them.

    Args:
        student: prepares photos and texts.
        task: the training items.
        batches: whose task each step has.
        seed: chooses the titles that are followed by attributes.
        enriched_share: how many of the queries' are.
        memory_mb: decoded photos kept.
    """

    valid_label_columns = ("label",)  # of sentence-transformers' trainer

    def __init__(
        self,
        student: SentenceTransformer,
        task: ProductTask,
        batches: ProductPairs,
        *,
        seed: int,
        enriched_share: float,
        memory_mb: int,
    ) -> None:
        self.student, self.batches, self.seed, self.share = student, batches, seed, enriched_share
        self.titles = list(task.train["title"])
        self.attributes = task.attributes if task.unsaid is None else list(without(task.attributes, task.unsaid))
        self.squares = Squares(list(task.train["image"]), photo_side(student), memory_mb)
        self.keys = match_keys(task.train["label"][:], self.titles)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        step = int(rows[0]["step"])
        query, candidate = ([int(row[name]) for row in rows] for name in ("query", "candidate"))
        query_side, candidate_side = {"product": ("both", "both")}.get(
            self.batches.task(step), tuple(self.batches.task(step).split("-"))
        )
        columns = {
            "query": self._features(query, query_side, [self.query_text(item, step) for item in query]),
            "candidate": self._features(candidate, candidate_side, [self.titles[item] for item in candidate]),
        }
        labels = {
            "keys": self.keys[query],
            "query_rows": torch.tensor(query),
            "candidate_rows": torch.tensor(candidate),
        }
        features = {f"{name}_{key}": value for name, found in columns.items() for key, value in found.items()}
        return {**features, "label": labels}

    def query_text(self, item: int, step: int) -> str:
        """The title of a query, now and then with its attributes."""
        enriched = stable_random(self.seed, step, _ENRICHED, item).random() < self.share
        return enriched_text(self.titles[item], self.attributes[item] if enriched else None)

    def _features(self, items: list[int], side: str, texts: list[str]) -> dict[str, Any]:
        images = None if side == "text" else [self.squares[item] for item in items]
        return tokenize_items(self.student, images=images, texts=None if side == "image" else texts)


def train(config: AgclConfig) -> Path:
    """Trains an embedder by AGCL; returns the run folder."""
    started = time.time()
    # 1. Catalogue, and the attributes of its items
    task = open_task(config)
    batches = make_batches(config, task)
    # 2. Student
    student = make_student(config)
    out = check_folder(config, task.bad)
    # 3. The untrained student. The tower is frozen: each test photo passes it once in the whole run
    seen = TowerTokens(config.tower_memory_mb)
    with remembered_tower(student.transformers_model, seen):
        before = measure(student, task, config)
    # 4. Loss: weights of the negatives by their attributes
    objective = make_objective(config, task)
    loss: nn.Module = ColumnsLoss(student, objective)
    if config.mini_batch_size:
        loss = CachedColumnsLoss(student, objective, config.mini_batch_size)
    # 5. Training
    trainer = AdapterTrainer(
        model=student,
        args=run_arguments(config, out, batches, {}),
        train_dataset=datasets.Dataset.from_dict(batches.table()),
        data_collator=ProductCollator(
            student,
            task,
            batches,
            seed=config.seed,
            enriched_share=config.enriched_share,
            memory_mb=config.photo_memory_mb,
        ),
        loss=loss,
        batches=batches,
        log_path=out / "log.jsonl",
        description="AGCL",
        objective=objective,
    )
    with remembered_tower(student.transformers_model, TowerTokens(config.tower_memory_mb)):
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(config, out))
    # 6. The trained student, its adapters merged; 7. run folder
    merge_lora(student)
    with remembered_tower(student.transformers_model, seen):
        after = measure(student, task, config)
    save_results(out, student, before, after, started, method="agcl", seed=config.seed)
    return out


def open_task(config: AgclConfig) -> ProductTask:
    """Reads the catalogue and the attributes; what cannot be trained or measured is said before anything is loaded."""
    catalog, bad = read_catalog(config)
    train, test = select_split(catalog, "train"), select_split(catalog, "test")
    for split, part in (("train", train), ("test", test)):
        missing = sum(not title for title in part["title"])
        if missing:
            raise FieldmarkError(
                f"{missing} of {len(part)} {split} rows of {config.data} have no title; AFMRL needs one for "
                "every photo, add a column (--title_column)."
            )
    if config.sample_share < 1:  # items alone would lose their pairs
        most = round(config.sample_share * len(train))
        train = train.select(sample_products(train["label"][:], most, seed=config.seed))
    attributes = find_attributes(config, train)
    test_attributes: list[Attributes] = [None] * len(test)
    # Coarse retrieval counts items of the category, which a query of the catalogue's own attributes must not be told.
    unsaid = (config.category or CATEGORY) if config.attributes == CATALOGUE else None
    if config.enrich != "none":
        test_attributes = find_attributes(config, test)
        if unsaid is not None:
            test_attributes = list(without(test_attributes, unsaid))
    categories_of(test, config.category)  # refuses one that no item has
    if not (config.tasks or has_pairs(train)):
        logger.warning("no product of %s has two training items: trained on photos and titles alone", config.data)
    tasks = tuple(config.tasks or (TASKS if has_pairs(train) else TASKS[:2]))
    return ProductTask(train, test, attributes, test_attributes, tasks, bad, unsaid)


def find_attributes(config: AgclConfig, rows: datasets.Dataset) -> list[Attributes]:
    """Attributes of each row, from where the run takes them.

    Raises:
        FieldmarkError: none of the rows has any.
    """
    return [None] * len(rows) if config.attributes is None else list(known_attributes(rows, config.attributes))


def has_pairs(rows: datasets.Dataset) -> bool:
    """Whether a product has two items."""
    labels = [label for label in rows["label"] if label is not None]
    return len(set(labels)) < len(labels)


def make_student(config: AgclConfig) -> SentenceTransformer:
    """The student at the start; new adapters are drawn from the run's seed."""
    if config.student is None:
        raise FieldmarkError(
            "AGCL trains a multimodal LLM as an embedder; name one with --student (a folder or hub id)."
        )
    return make_multimodal_student(config, config.student)


def make_batches(config: AgclConfig, task: ProductTask) -> ProductPairs:
    """The run's pairs: `max_steps` steps, else `epochs` passes over the items for each task."""
    steps = config.max_steps or max(
        1, round(config.epochs * len(task.tasks) * len(task.train) / config.pairs_per_batch)
    )
    return ProductPairs(
        task.train["label"][:],
        task.tasks,
        config.pairs_per_batch,
        seed=config.seed,
        steps=steps,
        world_size=this_process().num_processes,
    )


def make_objective(config: AgclConfig, task: ProductTask) -> AttributeGuidedObjective:
    """The loss over the training items' attributes; shuffled ones are dealt from the run's seed."""
    encoded = None
    if config.weights != "none":
        attributes = task.attributes
        if config.weights == "shuffled":
            order = stable_random(config.seed, _SHUFFLED).permutation(len(attributes)).tolist()
            attributes = [attributes[place] for place in order]
        encoded = BM25.fit(attributes).encode(attributes)
    return AttributeGuidedObjective(
        encoded,
        weights="none" if config.weights == "none" else "bm25",
        scale=config.bm25_scale,
        temperature=config.temperature,
        delta=config.delta,
        symmetric=config.symmetric,
    )


def measure(student: SentenceTransformer, task: ProductTask, config: AgclConfig) -> EnrichedEvaluation:
    """Cross-modal, instance and coarse retrieval of the test part, its queries with attributes too."""
    return evaluate_enriched(
        student,
        task.test,
        task.test_attributes,
        enrich=config.enrich if any(task.test_attributes) else "none",
        category=config.category,
        batch_size=config.eval_batch_size,
    )
