"""RAR: retrieval recall rewards the attribute generator (AFMRL stage 2), arXiv 2604.20135.

A generator writes the few attributes that tell an item from its look-alikes. Which ones do, a frozen student knows: an
answer is worth as much as the item finds of its own product with these attributes in its query. GRPO makes the
generator write what finds more.

    Eq. 4   R(x, a) = |P_x and top_k(x, a)| / |P_x|                    see `methods.recall_reward`
    Eq. 5   R(x, a, phi) = R(x, a) if the answer is valid, else eta
    Eq. 6   J = E[min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) - beta KL(pi || pi_SFT)],   A_i = (R_i - mean R) / std R
            TRL's `GRPOTrainer`: groups of G answers of one item, KL by the k3 estimator, one update a batch

The reference is the generator as it was at the start: cold-start it first (`methods.generator`). The prompts are those
of `fieldmark label attributes`, token by token. Deviations and assumptions, each a setting of :class:`RarConfig`:

1. 32 items a step, 8 answers each, at temperature 1 and of at most 512 tokens: the paper gives G alone.
2. The loss is the mean over answers of the mean over tokens (`loss_type`: grpo); Eq. 6 does not say.
3. The gallery is a sample of the training items, photo and title, in whole products (`gallery_size`).
4. The tower is left as it is (`freeze_tower`); the paper trains all parameters.
5. TRL adds 1e-4 to the standard deviation, so a group of equal rewards trains nothing.
6. The learning rate falls linearly after a warm-up; the paper gives its start alone.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from transformers import PretrainedConfig
from trl import GRPOConfig, GRPOTrainer

from fieldmark.data.batches import stable_random
from fieldmark.data.candidates import AnchorSteps
from fieldmark.data.catalog import select_split
from fieldmark.data.checks import BadPhoto
from fieldmark.data.options import read_catalog
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.enriched import PREFIX
from fieldmark.evaluation.products import KS
from fieldmark.evaluation.uncertainty import bootstrap_intervals
from fieldmark.methods.generator import adapters, save_generator, set_trainable, some
from fieldmark.methods.recall_reward import Gallery, RecallReward, answer_block, check_depth
from fieldmark.methods.run import RunConfig, check_folder, checkpoint_to_resume, refuse
from fieldmark.methods.trainer import StepProgress, this_process
from fieldmark.methods.trl_run import TrlRun, shared_arguments
from fieldmark.progress import JobProgress
from fieldmark.students.build import load_student
from fieldmark.students.enrich import enriched_text
from fieldmark.students.frozen_tower import TowerTokens, remembered_tower
from fieldmark.students.items import encode_items
from fieldmark.teacher.attributes import AttributeSchema, load_schema, parse_attributes
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.questions import Answer, ask_about_photos, square_photo, square_processor, square_side


@dataclass
class RarConfig(RunConfig):
    """Settings of RAR beside those every method has.

    Attributes:
        student: the trained student that judges attributes, of photos with a text (`model/` of a run); it is frozen.
        teacher: the attribute generator to train (folder or hub id), cold-started.
        schema: YAML file of the generator's prompt and attributes; null is the packaged one.
        queries_per_step: items a step, of all processes together.
        group_size: G, answers an item.
        k: how many nearest items count for the reward.
        invalid: eta, the reward of an answer that is not valid.
        beta: weight of the KL divergence from the generator at the start; 0 needs no copy of it.
        epsilon: the probability ratio is clipped to 1 - epsilon and 1 + epsilon.
        loss_type: how token losses become one: grpo (mean over each answer, then over answers), dapo (over all tokens)
            or dr_grpo (over answers of constant length).
        temperature: of sampling.
        max_new_tokens: longest answer; one that is cut off there is not valid.
        per_device_batch: answers in one forward and backward pass.
        lora_rank: rank of adapters on the language model, merged at the end; 0 trains it as a whole.
        lora_alpha: their output is scaled by alpha / rank.
        freeze_tower: train the language model alone.
        gallery_size: training items that are searched, at most; a sample of whole products.
        eval_items: held-out items that are asked about before and after, at most.
        tower_memory_mb: tokens kept between answers and steps, of each of the two frozen towers.
        patience_invalid: steps in a row without one valid answer after which the run stops.
        checkpoint_activations: recompute activations in the backward pass to save memory.
        use_vllm: let vLLM generate (install fieldmark[vllm]).
        vllm_options: TRL's vLLM settings, e.g. {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}.
        learning_rate: of the generator; it falls linearly to 0.
        epochs: passes over the training items; `max_steps` wins where it is given.
        max_grad_norm: clip of the global gradient norm.
    """

    teacher: str | None = None
    schema: str | None = None
    queries_per_step: int = 32
    group_size: int = 8
    k: int = 50
    invalid: float = -0.1
    beta: float = 0.01
    epsilon: float = 0.2
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    temperature: float = 1.0
    max_new_tokens: int = 512
    per_device_batch: int = 8
    lora_rank: int = 0
    lora_alpha: int = 32
    freeze_tower: bool = True
    gallery_size: int = 100_000
    eval_items: int = 256
    tower_memory_mb: int = 1024
    patience_invalid: int = 20
    checkpoint_activations: bool = True
    use_vllm: bool = False
    vllm_options: dict[str, Any] | None = None
    learning_rate: float = 1e-6
    max_steps: int | None = 350

    def __post_init__(self) -> None:
        """Refuses numbers that no run could have."""
        super().__post_init__()
        counts = ("queries_per_step", "k", "per_device_batch", "lora_alpha", "gallery_size", "eval_items")
        refuse(self, (*counts, "max_new_tokens", "patience_invalid", "epsilon", "temperature"), above_zero=True)
        refuse(self, ("beta", "lora_rank", "tower_memory_mb"))
        if self.group_size < 2:
            raise FieldmarkError(f"group_size is {self.group_size}; a group needs at least 2 answers to differ.")
        known = {field.name for field in fields(GRPOConfig) if field.name.startswith("vllm_")}
        unknown = sorted(set(self.vllm_options or {}) - known)
        if unknown:
            raise FieldmarkError(
                f"vllm_options has {unknown[0]!r}; give settings of TRL's GRPOConfig that start vllm_."
            )
        if self.use_vllm and find_spec("vllm") is None:
            raise FieldmarkError(
                "use_vllm was asked for and vLLM is not installed; install fieldmark[vllm], or leave it out."
            )
        if self.lora_rank and not self.freeze_tower:
            raise FieldmarkError("Adapters are put on the language model only; give --lora_rank 0 to train the tower.")


RarConfig.__doc__ = f"{RunConfig.__doc__}\n{RarConfig.__doc__}"


@dataclass
class Products:
    """Items that are searched, and those of them that search: each has another item of its product to find."""

    gallery: datasets.Dataset
    queries: datasets.Dataset


@dataclass
class GeneratorTask:
    """A catalogue made ready for training and measuring."""

    train: Products
    test: Products
    bad: list[BadPhoto]


@dataclass
class HeldOut:
    """Held-out queries, what they search, and what they find without attributes."""

    queries: datasets.Dataset
    gallery: Gallery
    plain: dict[str, np.ndarray]


@dataclass
class Measured:
    """What a generator's attributes do for held-out queries: means, and 95 % bootstrap intervals over queries."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def train(config: RarConfig) -> Path:
    """Trains an attribute generator with RAR; returns the run folder."""
    started = time.time()
    # 1. Catalogue: products with several items
    task = open_task(config)
    # 2. Generator, and the student that judges it
    teacher = open_generator(config)
    student = open_student(config)
    schema = load_schema(config.schema)
    arguments = make_arguments(config, len(task.train.queries))
    out = check_folder(config, task.bad)
    # 3. What is searched, embedded once without attributes
    items = task.train.gallery
    vectors = embed(config, student, items, plain_texts(items), "gallery")
    held = hold_out(config, student, task.test)
    # 4. The untrained generator
    before = measure(config, teacher, schema, student, held)
    # 5. Training
    reward = RecallReward(
        student,
        vectors,
        items["label"][:],
        config.k,
        config.invalid,
        gallery_ids=items["item_id"][:],
        max_completion_length=config.max_new_tokens,
        schema=schema,
        batch_size=config.eval_batch_size,
    )
    trainer = RarTrainer(
        model=teacher.model,
        reward=reward,
        args=arguments,
        train_dataset=rows_to_ask(config, task.train.queries, schema, square_side(teacher, config.resolution)),
        processing_class=left_padding(square_processor(teacher, config.resolution)),
        peft_config=adapters(config.lora_rank, config.lora_alpha),
        frozen=set_trainable(teacher, freeze_tower=config.freeze_tower),
        log_path=out / "log.jsonl",
        patience=config.patience_invalid,
    )
    with ExitStack() as towers:
        towers.enter_context(remembered_tower(student.transformers_model, TowerTokens(config.tower_memory_mb)))
        if config.freeze_tower:
            towers.enter_context(remembered_tower(teacher.model.model, TowerTokens(config.tower_memory_mb)))
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(config, out))
    # 6. The trained generator. In float32: a step of 1e-6 would be lost in the precision of most checkpoints
    if this_process().is_main_process:
        save_generator(trainer.model, teacher, out / "model", dtype=torch.float32)
    after = measure(config, Teacher(teacher.model, teacher.processor), schema, student, held)
    # 7. Run folder: the student stays what it was
    if this_process().is_main_process:
        write_metrics(config, out, before, after, failed_rewards(config, out), started)
    this_process().wait_for_everyone()
    return out


# -- what is trained on -----------------------------------------------------------------------------------------------


def open_task(config: RarConfig) -> GeneratorTask:
    """Reads the catalogue; what could not be rewarded is refused before anything is loaded."""
    catalog, bad = read_catalog(config)
    train, test = (find_products(config, select_split(catalog, split), split) for split in ("train", "test"))
    if len(train.queries) < config.queries_per_step:
        raise FieldmarkError(
            f"queries_per_step is {config.queries_per_step} and {config.data} has {len(train.queries)} training items "
            "with another item of their product; lower it, or add photos."
        )
    held_out = some(test.queries, config.eval_items, config.seed)
    return GeneratorTask(train, Products(test.gallery, held_out), bad)


def find_products(config: RarConfig, rows: datasets.Dataset, split: str) -> Products:
    """What is searched of a split's rows (at most `gallery_size`, in whole products), and who searches it."""
    labels, roles = rows["label"][:], rows["role"][:]
    if None in labels:
        raise FieldmarkError(
            f"{config.data} has {split} photos without a label; the reward needs the product of each, add a label "
            "column."
        )
    items = Counter(label for label, role in zip(labels, roles, strict=True) if role != "query")
    names = sorted(set(labels))
    kept, size = set(), 0
    for place in stable_random(config.seed).permutation(len(names)).tolist():
        if size + items[names[place]] > config.gallery_size:
            continue
        kept.add(names[place])
        size += items[names[place]]
    gallery = [i for i, label in enumerate(labels) if label in kept and roles[i] != "query"]
    queries = [
        i for i, label in enumerate(labels)
        if label in kept and roles[i] != "gallery" and items[label] > (roles[i] == "both")
    ]  # fmt: skip
    if not queries:
        raise FieldmarkError(
            f"no {split} item of {config.data} has another item of its product to find among gallery_size "
            f"{config.gallery_size}; give products with two photos or more that fit in it."
        )
    check_depth(config.k, len(gallery), f"the {split} gallery of {config.data}")
    return Products(rows.select(gallery), rows.select(queries))


class RowsToAsk:
    """Turns catalogue rows into what TRL takes: prompt, photo as the generator sees it, the reward's columns."""

    def __init__(self, schema: AttributeSchema, side: int | None) -> None:
        self.schema, self.side = schema, side
        self.photos: dict[Any, Any] = {}

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The batch; photos of the last one stay, for TRL reads a batch as often as it has forward passes."""
        kept = self.photos
        self.photos = {
            ref: kept[ref] if ref in kept else square_photo(ref, self.side) for ref in dict.fromkeys(rows["image"])
        }
        return {
            "prompt": [[{"role": "user", "content": self.schema.ask(title)}] for title in rows["title"]],
            "image": [self.photos[ref] for ref in rows["image"]],
            "photo": rows["image"],
            **{name: rows[name] for name in ("title", "label", "item_id")},
        }


def rows_to_ask(
    config: RarConfig, queries: datasets.Dataset, schema: AttributeSchema, side: int | None
) -> datasets.Dataset:
    """The queries of the whole run in order: those of a step are a function of the seed and the step alone."""
    count = len(queries)
    order = AnchorSteps(count, config.queries_per_step, seed=config.seed, steps=steps_of(config, count)).table()["item"]
    return queries.select(order).with_transform(RowsToAsk(schema, side))


def steps_of(config: RarConfig, queries: int) -> int:
    """Optimizer steps of the run."""
    return config.max_steps or max(1, round(config.epochs * queries / config.queries_per_step))


# -- the parts --------------------------------------------------------------------------------------------------------


def open_generator(config: RarConfig) -> Teacher:
    """The generator as it was cold-started, in float32."""
    if config.teacher is None:
        raise FieldmarkError(
            "RAR needs an attribute generator; name one with --teacher (a folder or a hub id), cold-started so that "
            "it answers in the form asked for."
        )
    teacher = Teacher.load(config.teacher, device=this_process().device)
    check_reference(config, teacher.model.config)
    return teacher


def check_reference(config: RarConfig, generator: PretrainedConfig) -> None:
    """Refuses a generator that TRL cannot load once more, as the KL term's reference needs without adapters."""
    kind = (generator.architectures or [""])[0]
    if config.beta and not config.lora_rank and not hasattr(transformers, kind):
        raise FieldmarkError(
            f"the generator is a {kind}, of which TRL cannot load the copy that beta {config.beta} needs; train "
            "adapters (lora_rank 32), or set beta to 0."
        )


def open_student(config: RarConfig) -> SentenceTransformer:
    """The trained student, frozen."""
    if config.student is None:
        raise FieldmarkError(
            "RAR needs a trained student whose recall is the reward; name the model folder of a run with --student."
        )
    return load_student(config.student).requires_grad_(False).eval()


def left_padding(processor: Any) -> Any:
    """The same processor: TRL pads prompts on the left, and pads what it computes of photos as the processor does."""
    processor.tokenizer.padding_side = "left"
    return processor


def make_arguments(config: RarConfig, queries: int) -> GRPOConfig:
    """TRL's settings; what is not named keeps its default."""
    answers, processes = config.queries_per_step * config.group_size, this_process().num_processes
    if answers % (config.per_device_batch * processes):
        raise FieldmarkError(
            f"a step's {answers} answers (queries_per_step x group_size) cannot be cut into batches of "
            f"{config.per_device_batch} on {processes} processes; give a per_device_batch that divides them."
        )
    return GRPOConfig(
        max_steps=steps_of(config, queries),
        gradient_accumulation_steps=answers // (config.per_device_batch * processes),
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        beta=config.beta,
        epsilon=config.epsilon,
        loss_type=config.loss_type,
        shuffle_dataset=False,
        use_vllm=config.use_vllm,
        **shared_arguments(config, Path(config.out)),
        **(config.vllm_options or {}),
    )


class RarTrainer(TrlRun, GRPOTrainer):
    """Logs the share of a step's time that its rewards took; stops where nothing can be learned."""

    def __init__(self, *, reward: RecallReward, patience: int, **kwargs: Any) -> None:
        super().__init__(reward_funcs=reward, progress=_RewardProgress("RAR"), **kwargs)
        self.reward, self._rewarded = reward, 0.0
        self.patience, self.barren = patience, 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        step = "loss" in logs
        if step:
            seconds = max(time.perf_counter() - self._last_log, 1e-9)
            logs["reward_share"] = round((self.reward.seconds - self._rewarded) / seconds, 4)
            self._rewarded = self.reward.seconds
        super().log(logs, start_time)
        if step:
            self._stop_if_barren(logs["invalid"] + logs["failed"] >= 1)

    def _stop_if_barren(self, barren: bool) -> None:
        self.barren = self.barren + 1 if barren else 0
        if self.barren < self.patience:
            return
        reasons = (self.reward.faults + self.reward.failures).most_common(1)
        raise FieldmarkError(
            f"no answer of the last {self.barren} steps could be rewarded (most often: {reasons[0][0]}); cold-start "
            "the generator until it answers as asked, or raise --max_new_tokens if its answers are cut off."
        )


class _RewardProgress(StepProgress):
    """Shows the reward: the loss of GRPO is near 0 whatever it learns."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and logs.get("reward") is not None:  # None where no answer of the step could be rewarded
            self.note = f"reward {logs['reward']:.3f}"
        if self.job is not None:
            self.job.update(state.global_step, self.note)


# -- what it is worth -------------------------------------------------------------------------------------------------


def hold_out(config: RarConfig, student: SentenceTransformer, products: Products) -> HeldOut:
    """The held-out queries and what they find by photo and title alone."""
    items, queries = products.gallery, products.queries
    vectors = embed(config, student, items, plain_texts(items), "held-out gallery")
    gallery = Gallery(vectors, items["label"][:], items["item_id"][:])
    vectors = embed(config, student, queries, plain_texts(queries), "held-out queries")
    return HeldOut(queries, gallery, search(config, gallery, queries, vectors))


def measure(
    config: RarConfig, teacher: Teacher, schema: AttributeSchema, student: SentenceTransformer, held: HeldOut
) -> Measured:
    """Greedy answers about the held-out items, and what these find with them.

    An item whose answer is not valid is searched without attributes. Metrics: `valid` (share of answers), `reward`
    (mean of Eq. 5), `instance_recall@k` (share of queries with a hit) and `found@k` (Eq. 4: share of the positives
    found) without attributes and, as `enriched_...`, with them; `tokens` an answer, `think_characters` and
    `answer_characters` of valid ones.
    """
    answers = ask(config, teacher, schema, held.queries)
    parsed = [parse_attributes(one.text, finished=one.finished, schema=schema) for one in answers]
    titles = held.queries["title"][:]
    texts = [enriched_text(title, one.attributes) for title, one in zip(titles, parsed, strict=True)]
    vectors = embed(config, student, held.queries, texts, "enriched queries")
    valid = np.array([one.attributes is not None for one in parsed])
    enriched = search(config, held.gallery, held.queries, vectors)
    values: dict[str, Any] = {
        "valid": valid,
        "reward": np.where(valid, enriched[f"found@{config.k}"], config.invalid),
        **held.plain,
        **{PREFIX + name: each for name, each in enriched.items()},
        "tokens": np.array([one.tokens for one in answers]),
    }
    metrics = {name: float(each.mean()) for name, each in values.items()}
    lengths = [
        (len(one.think or ""), len(answer_block(answer.text)))
        for one, answer in zip(parsed, answers, strict=True)
        if one.attributes is not None
    ]
    if lengths:
        metrics["think_characters"], metrics["answer_characters"] = np.mean(lengths, axis=0).tolist()
    metrics |= {"n_queries": len(held.queries), "n_gallery": len(held.gallery)}
    return Measured(metrics, bootstrap_intervals(values))


def ask(config: RarConfig, teacher: Teacher, schema: AttributeSchema, rows: datasets.Dataset) -> list[Answer]:
    """The generator's most likely answer about each item."""
    answers: dict[int, Answer] = {}
    with JobProgress("answers about held-out items", len(rows)) as job:
        for batch in ask_about_photos(
            teacher,
            rows["image"][:],
            [schema.ask(title) for title in rows["title"]],
            max_new_tokens=config.max_new_tokens,
            resolution=square_side(teacher, config.resolution),
            batch_size=config.eval_batch_size,
        ):
            answers |= dict(batch)
            job.update(len(answers))
    return [answers[row] for row in range(len(rows))]


def search(config: RarConfig, gallery: Gallery, rows: datasets.Dataset, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """What each query finds: `instance_recall@k` (bool) for the usual depths and `found@k` for the reward's."""
    ids, labels = rows["item_id"][:], rows["label"][:]
    found = gallery.nearest(vectors, ids, max(*KS, config.k))
    hits = gallery.same(found, labels)
    values: dict[str, Any] = {f"instance_recall@{k}": hits[:, :k].any(axis=1) for k in KS}
    return values | {f"found@{config.k}": gallery.recall(found[:, : config.k], labels, ids)}


def plain_texts(rows: datasets.Dataset) -> list[str]:
    """The texts of items without attributes."""
    return [enriched_text(title, None) for title in rows["title"]]


def embed(
    config: RarConfig, student: SentenceTransformer, rows: datasets.Dataset, texts: Sequence[str], what: str
) -> np.ndarray:
    """[N, D] vectors of the rows' photos, each with its text."""
    with JobProgress(what, len(rows)) as job:
        return encode_items(
            student, images=rows["image"][:], texts=texts, batch_size=config.eval_batch_size, progress=job.update
        )


def failed_rewards(config: RarConfig, out: Path) -> int:
    """Answers whose reward could not be computed, in the whole run, resumed or not, in all processes."""
    records = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    share = sum(record.get("failed", 0.0) for record in records)
    return round(share * config.queries_per_step * config.group_size)


def write_metrics(config: RarConfig, out: Path, before: Measured, after: Measured, failed: int, started: float) -> None:
    """Writes `metrics.json`; the checkpoints go."""
    unit = 1024**3 if sys.platform == "darwin" else 1024**2
    metrics = {
        "method": "rar",
        "seed": config.seed,
        "before": before.metrics,
        "after": after.metrics,
        "intervals": {"before": before.intervals, "after": after.intervals},
        "failed_rewards": failed,
        "seconds": round(time.time() - started, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").mkdir()
