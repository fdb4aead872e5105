"""The attribute generator's cold start: it learns to think of, then to name what tells an item apart.

Paper: AFMRL, arXiv 2604.20135, section 3.1 and appendix D: a small multimodal LLM is fine-tuned on a large one's
examples, all of its tokens in <think> and <answer>; 10,000 examples, all parameters, learning rate 5e-5, 2,000 steps
(section 4.1). The training is TRL's `SFTTrainer`. What it leaves is a teacher's checkpoint, for `fieldmark label
attributes` and for the reinforcement that follows.

Deviations:
1. Examples are a larger teacher's valid answers (`fieldmark label attributes`), or, where none is at hand, the
   catalogue's own attributes by the rule of `teacher.distinguishing`.
2. The vision tower stays as it is unless `freeze_tower` is false; the paper says "full-parameter" and no more.
3. Linear decay after a warm-up, which the paper leaves open.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import AutoConfig
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from fieldmark.data.catalog import select_split
from fieldmark.data.checks import this_process
from fieldmark.data.options import read_catalog
from fieldmark.errors import FieldmarkError
from fieldmark.methods.run import RunConfig, check_folder, checkpoint_to_resume, refuse
from fieldmark.methods.trainer import StepProgress
from fieldmark.methods.trl_run import TrlRun, shared_arguments
from fieldmark.progress import JobProgress
from fieldmark.students.lora import LANGUAGE_MODEL_LAYERS
from fieldmark.teacher.attribute_labels import items_of, read_thoughts
from fieldmark.teacher.attributes import (
    AttributeSchema,
    attribute_answer,
    load_schema,
    parse_attributes,
    written_answer,
)
from fieldmark.teacher.distinguishing import distinguishing_attributes, key_attributes
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.questions import (
    Answer,
    ask_about_photos,
    chat_text,
    square_photo,
    square_processor,
    square_side,
)

logger = logging.getLogger(__name__)


@dataclass
class GeneratorConfig(RunConfig):
    """Settings of the generator's cold start beside those every method has.

    Attributes:
        student: not used here; the generator is the `teacher` that training starts from.
        resolution: side of the square photo in pixels, where the teacher takes any size.
        teacher: checkpoint of a multimodal LLM (folder or hub id) that becomes the generator.
        examples: file of `fieldmark label attributes` of a larger teacher; null makes examples of the catalogue's own
            attributes.
        max_examples: examples at most, drawn by the seed where there are more.
        schema: YAML file with the question and the attributes that count; null is the packaged one.
        per_device_batch: examples a step, in each process.
        lora_rank: rank of adapters on the language model, merged when it is saved; 0 trains its parameters themselves.
        lora_alpha: their output is scaled by alpha / rank.
        freeze_tower: whether the vision tower and its projector stay as they are.
        checkpoint_activations: compute activations twice to hold fewer of them, for models that would not fit.
        eval_items: held-out items that are asked before and after.
        max_new_tokens: their answers end there at the latest.
    """

    teacher: str | None = None
    examples: str | None = None
    max_examples: int = 10_000
    schema: str | None = None
    per_device_batch: int = 16
    lora_rank: int = 0
    lora_alpha: int = 32
    freeze_tower: bool = True
    checkpoint_activations: bool = False
    eval_items: int = 256
    max_new_tokens: int = 512
    max_steps: int | None = 2000
    learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        """Refuses numbers that no run could have."""
        super().__post_init__()
        refuse(
            self, ("per_device_batch", "lora_alpha", "max_examples", "eval_items", "max_new_tokens"), above_zero=True
        )
        refuse(self, ("lora_rank",))
        if self.student is not None:
            raise FieldmarkError(f"student is {self.student}; the generator starts from --teacher, leave student out.")
        if self.lora_rank and not self.freeze_tower:
            raise FieldmarkError("Adapters are put on the language model only; give --lora_rank 0 to train the tower.")


GeneratorConfig.__doc__ = f"{RunConfig.__doc__}\n{GeneratorConfig.__doc__}"


class ExampleCollator:
    """Opens the photos of examples, then TRL's collator: only the answer's tokens are learned.

    Args:
        teacher: whose processor makes the inputs, as it does when it is asked.
        resolution: side of the photos.
    """

    def __init__(self, teacher: Teacher, resolution: int) -> None:
        self.side = square_side(teacher, resolution)
        self.inner = DataCollatorForVisionLanguageModeling(
            square_processor(teacher, resolution), completion_only_loss=True
        )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.inner([{**row, "image": square_photo(row["image"], self.side)} for row in rows])


class GeneratorTrainer(TrlRun, SFTTrainer):
    """TRL's supervised fine-tuning."""


def train(config: GeneratorConfig) -> Path:
    """Trains a generator; returns the run folder."""
    started = time.time()
    if config.teacher is None:
        raise FieldmarkError(
            "A generator needs a multimodal LLM to start from; name one with --teacher (a folder or a hub id), or "
            "build one for your catalogue with `fieldmark build-teacher`."
        )
    # 1. Catalogue: items to learn from, others to be asked about
    catalog, bad = read_catalog(config)
    held_out = some(select_split(catalog, "test"), config.eval_items, config.seed)
    # 2. Examples
    schema = load_schema(config.schema)
    examples = make_examples(config, select_split(catalog, "train"), schema)
    # 3. The checkpoint it starts from
    teacher = Teacher.load(config.teacher, device=this_process().device)
    out = check_folder(config, bad)
    # 4. Its answers before
    before = measure(teacher, held_out, schema, config, "before")
    # 5. Training
    trainer = GeneratorTrainer(
        model=teacher.model,
        args=make_arguments(config, out, len(examples)),
        train_dataset=with_chat(examples, teacher.processor),
        data_collator=ExampleCollator(teacher, config.resolution),
        processing_class=teacher.processor,
        peft_config=adapters(config.lora_rank, config.lora_alpha),
        frozen=set_trainable(teacher, freeze_tower=config.freeze_tower),
        log_path=out / "log.jsonl",
        progress=StepProgress("generator"),
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(config, out))
    # 6. The generator as it will be loaded, and its answers
    if this_process().is_main_process:
        save_generator(trainer.model, teacher, out / "model", dtype=AutoConfig.from_pretrained(config.teacher).dtype)
        trained = Teacher.load(out / "model", device=this_process().device)
        after = measure(trained, held_out, schema, config, "after")
        write_metrics(config, out, before, after, len(examples), started)
    this_process().wait_for_everyone()
    return out


def some(rows: datasets.Dataset, most: int, seed: int) -> datasets.Dataset:
    """At most so many rows, in their order."""
    return rows.select(sorted(np.random.default_rng(seed).permutation(len(rows))[:most].tolist()))


def make_examples(config: GeneratorConfig, rows: datasets.Dataset, schema: AttributeSchema) -> datasets.Dataset:
    """Photos, questions and ideal answers: columns `image`, `question`, `answer`.

    Raises:
        FieldmarkError: the file of examples is of another catalogue, or the catalogue has no attributes to learn from.
    """
    if config.examples is None:
        rows = some(rows, config.max_examples, config.seed)
        answers = answers_of_the_catalogue(rows, schema, config.data)
    else:
        answers = answers_of_a_teacher(rows, Path(config.examples))
    chosen = [i for i, answer in enumerate(answers) if answer is not None]
    if len(chosen) < len(answers):
        logger.warning("%d of %d items give no example", len(answers) - len(chosen), len(answers))
    titles = rows["title"][:]
    photos = rows.select(chosen).select_columns(["image"])
    asked = photos.add_column("question", [schema.ask(titles[i]) for i in chosen])
    return some(asked.add_column("answer", [answers[i] for i in chosen]), config.max_examples, config.seed)


def answers_of_a_teacher(rows: datasets.Dataset, path: Path) -> list[str | None]:
    """A larger teacher's valid answers about the rows, None where there is none.

    Raises:
        FieldmarkError: as `read_thoughts`; or there is none at all.
    """
    known = read_thoughts(path)
    found = [known.get(item) for item in items_of(rows)]
    if not any(found):
        raise FieldmarkError(
            f"{path} has valid answers about none of the {len(rows)} training items; give the file that `fieldmark "
            "label attributes` wrote for this catalogue and its split train."
        )
    return [None if one is None else written_answer(*one) for one in found]


def answers_of_the_catalogue(rows: datasets.Dataset, schema: AttributeSchema, source: str) -> list[str | None]:
    """Ideal answers from the catalogue's own attributes, None for an item that nothing tells from its look-alikes.

    The attributes of a class (an item without a label is a class of its own) are those of its first item that has any.

    Raises:
        FieldmarkError: no attributes, or none that differ.
    """
    classes: dict[str, Mapping[str, str | None]] = {}
    names_of_rows = [label or item for label, item in zip(rows["label"], rows["item_id"], strict=True)]
    for name, attributes in zip(names_of_rows, rows["attributes"], strict=True):
        if attributes and name not in classes:
            classes[name] = {key: attributes[key] for key in schema.attributes or attributes if key in attributes}
    telling = dict(zip(classes, distinguishing_attributes(list(classes.values())), strict=True))
    answers: list[str | None] = []
    for name, attributes, title in zip(names_of_rows, rows["attributes"], rows["title"], strict=True):
        key = key_attributes(telling.get(name, []), attributes or {}, title, schema.most)
        answers.append(attribute_answer(list(key), key) if key else None)
    if not any(answers):
        raise FieldmarkError(
            f"{source} has no attributes that tell its training items apart; add attribute columns "
            "(--attribute_columns), or give the answers of a larger teacher with --examples."
        )
    return answers


def with_chat(examples: datasets.Dataset, processor: Any) -> datasets.Dataset:
    """The examples as the generator's own chat: columns `image`, `prompt`, `completion`.

    The chat is written out here and not by TRL: some templates (Qwen3's) take what is thought out of an answer.
    """
    end = processor.tokenizer.eos_token
    prompted = examples.add_column("prompt", [chat_text(processor, question) for question in examples["question"]])
    whole = prompted.add_column("completion", [f"{answer}{end}" for answer in examples["answer"]])
    return whole.select_columns(["image", "prompt", "completion"])


def set_trainable(teacher: Teacher, *, freeze_tower: bool) -> list[nn.Module]:
    """Marks what is trained, the language model and its head or everything; returns the modules that must not move."""
    if not freeze_tower:
        teacher.model.requires_grad_(True)
        return []
    for part in (teacher.language_model, teacher.lm_head):
        part.requires_grad_(True)
    body: Any = teacher.model.model
    return [part for part in body.children() if part is not teacher.language_model]


def adapters(rank: int, alpha: int) -> Any:
    """The adapters' settings, None where parameters are trained themselves."""
    if not rank:
        return None
    from peft import LoraConfig

    layers = rf".*{LANGUAGE_MODEL_LAYERS}"
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=layers)


def make_arguments(config: GeneratorConfig, out: Path, examples: int) -> SFTConfig:
    """TRL's arguments of a run; everything not named keeps their default."""
    a_step = config.per_device_batch * this_process().num_processes
    return SFTConfig(
        data_seed=config.seed,
        max_steps=config.max_steps or max(1, round(config.epochs * examples / a_step)),
        max_length=None,
        completion_only_loss=True,
        **shared_arguments(config, out),
    )


def save_generator(model: Any, teacher: Teacher, folder: Path, *, dtype: torch.dtype | None) -> None:
    """Writes the trained model, adapters merged, in the given precision (None: float32)."""
    if is_peft_model(model):
        model = model.merge_and_unload()
    model.to(dtype or torch.float32).save_pretrained(folder)
    teacher.processor.save_pretrained(folder)


def measure(
    teacher: Teacher, rows: datasets.Dataset, schema: AttributeSchema, config: GeneratorConfig, when: str
) -> dict[str, float]:
    """Most likely answers about held-out items against what the catalogue knows of them, see `answer_metrics`."""
    answers: dict[int, Answer] = {}
    with JobProgress(f"answers {when}", len(rows)) as job:
        asked = ask_about_photos(
            teacher,
            rows["image"][:],
            [schema.ask(title) for title in rows["title"]],
            max_new_tokens=config.max_new_tokens,
            resolution=square_side(teacher, config.resolution),
            batch_size=config.eval_batch_size,
        )
        for batch in asked:
            answers.update(batch)
            job.update(len(answers))
    return answer_metrics([answers[i] for i in range(len(rows))], rows["attributes"][:], schema)


def answer_metrics(
    answers: Sequence[Answer], truths: Sequence[Mapping[str, str | None] | None], schema: AttributeSchema
) -> dict[str, float]:
    """How good answers are.

    Args:
        answers: about N items.
        truths: what the catalogue knows of them.
        schema: what was asked.

    Returns:
        `valid`: share of valid answers; `value_accuracy`: share of the values given, of attributes that the catalogue
        knows of the item, that are the catalogue's (case aside; left out where there are none); `known_names`: share
        of the names given that the catalogue knows of the item; `attributes_per_item`: names given, on average over
        all items; `completion_length`: tokens; `n_items`.
    """
    parsed = [parse_attributes(one.text, finished=one.finished, schema=schema).attributes or {} for one in answers]
    given = [
        (name, value, truth or {}) for own, truth in zip(parsed, truths, strict=True) for name, value in own.items()
    ]
    known = [(value, truth[name]) for name, value, truth in given if truth.get(name)]
    right = [_as_text(value) == _as_text(truth or "") for value, truth in known]
    metrics = {
        "valid": sum(map(bool, parsed)) / len(parsed),
        "known_names": len(known) / len(given) if given else 0.0,
        "attributes_per_item": len(given) / len(parsed),
        "completion_length": sum(one.tokens for one in answers) / len(answers),
        "n_items": len(answers),
    }
    return metrics | ({"value_accuracy": sum(right) / len(right)} if right else {})


def _as_text(value: str | list[str]) -> str:
    """A value as a catalogue writes it, case aside."""
    return (", ".join(value) if isinstance(value, list) else value).casefold()


def write_metrics(
    config: GeneratorConfig,
    out: Path,
    before: Mapping[str, float],
    after: Mapping[str, float],
    examples: int,
    started: float,
) -> None:
    """Writes `metrics.json`; the checkpoints go."""
    unit = 1024**3 if sys.platform == "darwin" else 1024**2
    metrics = {
        "method": "generator",
        "seed": config.seed,
        "before": dict(before),
        "after": dict(after),
        "examples": examples,
        "seconds": round(time.time() - started, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").mkdir()
