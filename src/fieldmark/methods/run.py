"""What every method shares around its training: settings, the run folder, the evaluation before and after."""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import yaml
from sentence_transformers import SentenceTransformer

from fieldmark.data.catalog import select_split
from fieldmark.data.checks import BadPhoto, read_bad_photos, write_bad_photos
from fieldmark.data.options import CatalogOptions, read_catalog
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.runs import write_per_query
from fieldmark.evaluation.student import Evaluation, evaluate_student, has_positives
from fieldmark.losses.metric import MetricLoss, build_metric_loss
from fieldmark.methods.trainer import ClassBalancedSteps, last_checkpoint, this_process, training_arguments
from fieldmark.students.build import build_student
from fieldmark.students.multimodal import build_multimodal_student

# Settings that a resumed run may change: they say where it lies and how fast it goes, not what is trained.
CHANGEABLE = ("out", "resume", "workers", "eval_batch_size", "save_steps")


@dataclass
class FolderConfig(CatalogOptions):
    """Settings of everything that leaves a run folder.

    Attributes:
        out: run folder.
        student: checkpoint the student comes from (a folder or a hub id), or a trained student.
        resolution: side of the square photo in pixels.
        seed: of everything random.
        save_steps: steps between checkpoints, 0 for none.
        workers: processes that decode photos beside the training, 0 to decode in it.
        eval_batch_size: photos a batch when embedding.
        precision: fp32 or bf16 (autocast).
        resume: go on from the last checkpoint of `out`.
    """

    out: str
    student: str | None = None
    resolution: int = 224
    seed: int = 0
    save_steps: int = 0
    workers: int = 0
    eval_batch_size: int = 64
    precision: Literal["fp32", "bf16"] = "fp32"
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that no run could have."""
        refuse(self, ("eval_batch_size", "resolution"), above_zero=True)
        refuse(self, ("save_steps", "workers", "seed"))


FolderConfig.__doc__ = f"{CatalogOptions.__doc__}\n{FolderConfig.__doc__}"


@dataclass
class RunConfig(FolderConfig):
    """Settings that every method has.

    Attributes:
        epochs: passes over the training photos (papers.md 1.6: 3); `max_steps` wins where it is given.
        max_steps: optimizer steps, or null.
        learning_rate: of the tower, or of the adapters.
        weight_decay: of AdamW.
        warmup: share of steps with rising learning rate.
        max_grad_norm: clip of the global gradient norm of the student.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup: float = 0.05
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        """Refuses numbers that no run could have."""
        super().__post_init__()
        refuse(self, ("learning_rate", "epochs", "max_steps"), above_zero=True)
        refuse(self, ("weight_decay", "max_grad_norm", "warmup"))


def refuse(config: Any, names: Sequence[str], *, above_zero: bool = False) -> None:
    """Raises for the first of the settings that is below zero (or zero, where that cannot be either); null passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value > 0 if above_zero else value >= 0):
            expected = "a number above 0" if above_zero else "0 or more"
            raise FieldmarkError(f"{name} is {value}; give {expected}.")


RunConfig.__doc__ = f"{FolderConfig.__doc__}\n{RunConfig.__doc__}"


@dataclass
class TrainConfig(RunConfig):
    """Settings of the methods with a metric loss.

    Attributes:
        pooling: how tokens become one vector.
        embedding_dim: size of the embedding; null keeps the tower's.
        loss: metric loss (proxy_anchor, potential_field, multi_similarity, info_nce).
        loss_options: options of that loss, e.g. {"temperature": 0.05}.
        classes_per_batch: classes in a micro-batch.
        items_per_class: photos of each class in a micro-batch.
        pooler_learning_rate: of the pooler.
        proxy_learning_rate: of the proxies; null is 100 x `learning_rate` (Proxy Anchor's own recipe).
        fast_decode: decode JPEGs of at least twice the resolution at a fraction of their size: faster, with slightly
            other pixels than the papers'.
    """

    pooling: Literal["attention", "mean"] = "attention"
    embedding_dim: int | None = None
    loss: str = "proxy_anchor"
    loss_options: dict[str, Any] | None = None
    classes_per_batch: int = 16
    items_per_class: int = 4
    pooler_learning_rate: float = 1e-4
    proxy_learning_rate: float | None = None
    fast_decode: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that no run could have."""
        super().__post_init__()
        names = ("classes_per_batch", "items_per_class", "pooler_learning_rate", "proxy_learning_rate")
        refuse(self, names, above_zero=True)


TrainConfig.__doc__ = f"{RunConfig.__doc__}\n{TrainConfig.__doc__}"


@dataclass
class Task:
    """A catalogue made ready for training and measuring."""

    train: datasets.Dataset
    test: datasets.Dataset
    classes: list[str]
    photos: datasets.Dataset
    labels: list[int]
    bad: list[BadPhoto]


def open_task(config: TrainConfig) -> Task:
    """Reads the catalogue: training photos with class indices, and the test part of the zero-shot protocol."""
    catalog, bad = read_catalog(config)
    train, test = select_split(catalog, "train"), select_split(catalog, "test")
    names = train["label"][:]
    if any(name is None for name in names):
        raise FieldmarkError(
            f"{config.data} has training photos without a label; metric learning needs a class for each, "
            "add a label column."
        )
    classes = sorted(set(names))
    if len(classes) < 2:
        raise FieldmarkError(f"{config.data} has {len(classes)} training class; at least 2 are needed.")
    _check_measurable(test, config.data)
    index = {name: i for i, name in enumerate(classes)}
    labels = [index[name] for name in names]
    photos = train.select_columns(["image"]).rename_column("image", "photo").add_column("label", labels)
    return Task(train, test, classes, photos, labels, bad)


def _check_measurable(test: datasets.Dataset, source: str) -> None:
    """Refuses test photos that say nothing, before a folder is made: without a label, or no query with a positive."""
    if any(label is None for label in test["label"]):
        raise FieldmarkError(f"{source} has test photos without a label; evaluation needs the class of each.")
    if not has_positives(test):
        raise FieldmarkError(
            f"No test photo of {source} has another one of its class to find; give two photos of a class or more."
        )


def check_folder(config: FolderConfig, bad: list[BadPhoto]) -> Path:
    """Makes the run folder, writes its `config.yaml` and the list of photos left out; a folder with a finished or
    other run is refused."""
    out = Path(config.out)
    processes = this_process()
    if processes.is_main_process:
        _prepare_folder(config, out)
        if config.bad_photos == "skip":
            _check_same_photos(out / "bad_files.csv", bad)
            write_bad_photos(bad, out / "bad_files.csv")
    processes.wait_for_everyone()
    return out


def check_unused(config: FolderConfig) -> None:
    """Refuses what `check_folder` would, a file or a folder with a finished or other run, and makes nothing."""
    if this_process().is_main_process:
        _settings_for(config, Path(config.out))


def _prepare_folder(config: FolderConfig, out: Path) -> None:
    text = _settings_for(config, out)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(text, encoding="utf-8")


def _settings_for(config: FolderConfig, out: Path) -> str:
    """What `config.yaml` of the folder will hold, if the run may use it."""
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise FieldmarkError(f"--out {out} is a file or lies in one; give a folder for the run.")
    if (out / "metrics.json").exists():
        raise FieldmarkError(f"--out {out} holds a finished run; give a new folder.")
    if out.is_dir() and any(out.iterdir()) and not config.resume:
        raise FieldmarkError(f"--out {out} is not empty; give a new folder, or --resume true to go on with that run.")
    settings = {key: value for key, value in asdict(config).items() if key != "resume"}
    text = yaml.safe_dump(settings, sort_keys=False)
    if (out / "config.yaml").exists():
        check_same_run(out / "config.yaml", config, yaml.safe_load(text))
    return text


def check_same_run(path: Path, config: FolderConfig, settings: dict[str, Any]) -> None:
    """Refuses to go on with a run under other settings; a setting that its version did not have had the default."""
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        stored = None
    if not isinstance(stored, dict):
        raise FieldmarkError(f"{path} does not hold the settings of a run; give a new folder for this one.")
    defaults = {field.name: field.default for field in fields(config) if field.default is not MISSING}
    were = {name: stored.get(name, defaults.get(name)) for name in {**settings, **stored} if name not in CHANGEABLE}
    # A setting that only the other method has is a difference, whatever its value.
    differ = [name for name in were if name not in settings or were[name] != settings[name]]
    if differ:
        changes = ", ".join(f"{name} was {were[name]!r}, is {settings.get(name, 'none')!r}" for name in differ)
        raise FieldmarkError(
            f"--out {path.parent} holds a run with other settings ({changes}); "
            "resume it with its own settings, or give a new folder."
        )


def _check_same_photos(path: Path, bad: list[BadPhoto]) -> None:
    """Refuses to go on with a run whose catalogue is another one now, since other photos can be read."""
    if not path.exists():
        return
    before, now = {one.item_id for one in read_bad_photos(path)}, {one.item_id for one in bad}
    if before != now:
        changes = [
            f"{len(items)} can {word} be read ({min(items)}{', ...' if len(items) > 1 else ''})"
            for items, word in ((now - before, "no longer"), (before - now, "now"))
            if items
        ]
        raise FieldmarkError(
            f"--out {path.parent} holds a run on other photos: since it started, {' and '.join(changes)}; "
            "put the files back as they were, or give a new folder."
        )


def make_student(config: TrainConfig, source: str) -> SentenceTransformer:
    """The student at the start of training; a new pooler is drawn from the run's seed."""
    torch.manual_seed(config.seed)
    student = build_student(
        source, pooling=config.pooling, embedding_dim=config.embedding_dim, resolution=config.resolution
    )
    student[0].fast_decode = config.fast_decode  # type: ignore[assignment]
    return student


def make_multimodal_student(config: Any, source: str) -> SentenceTransformer:
    """An image-text student at the start of training; new adapters are drawn from the run's seed.

    Args:
        config: a `RunConfig` with `pooling`, `attention`, `lora_rank` and `lora_alpha`.
        source: the multimodal LLM, or a trained student.
    """
    torch.manual_seed(config.seed)
    student = build_multimodal_student(
        source,
        pooling=config.pooling,
        attention=config.attention,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        resolution=config.resolution,
    )
    hide_training_rows(student)
    return student


def hide_training_rows(student: SentenceTransformer) -> None:
    """The student's card shows no examples: they would be rows of the training table."""
    card: Any = student.model_card_data
    card.generate_widget_examples = False


def make_loss(config: TrainConfig, student: SentenceTransformer, num_classes: int) -> MetricLoss:
    """The metric loss around the student, its proxies drawn from the run's seed."""
    torch.manual_seed(config.seed)
    dim = student.get_embedding_dimension()
    assert dim is not None
    options = config.loss_options or {}
    metric = build_metric_loss(config.loss, num_classes, dim, **options)
    # Most losses look at their options when they are first used, which would be in the first step. Nothing is drawn;
    # neighbours of two classes, so that mining leaves pairs.
    points, labels = torch.linspace(-1.0, 1.0, 4 * dim).reshape(4, dim), torch.tensor([0, 1, 0, 1])
    try:
        with torch.no_grad():
            metric(points, labels)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise FieldmarkError(
            f"{config.loss} cannot compute with the loss_options {options}; give values of the type that their "
            "defaults have, see docs/papers.md."
        ) from error
    return MetricLoss(student, metric)


def make_batches(config: TrainConfig, labels: Sequence[int]) -> ClassBalancedSteps:
    """The run's class-balanced batches; with fewer classes than asked for, all of them."""
    world_size = this_process().num_processes
    classes = min(config.classes_per_batch, len(set(labels)))
    size = classes * config.items_per_class
    if size % world_size:
        raise FieldmarkError(
            f"A batch of {size} photos cannot be shared by {world_size} processes; "
            f"choose classes_per_batch x items_per_class as a multiple of {world_size}."
        )
    steps = config.max_steps or max(1, round(config.epochs * len(labels) / size))
    return ClassBalancedSteps(
        list(labels), classes, config.items_per_class, seed=config.seed, steps=steps, world_size=world_size
    )


def make_arguments(config: TrainConfig, out: Path, batches: ClassBalancedSteps, loss: MetricLoss) -> Any:
    """Learning rates per part: the pooler's, the proxies', and the tower's for all else."""
    rates = {}
    if any(name.startswith("model.1.") for name, _ in loss.named_parameters()):
        rates[r"^model\.1\."] = config.pooler_learning_rate
    if any(True for _ in loss.metric.parameters()):
        rates[r"^metric\."] = config.proxy_learning_rate or 100 * config.learning_rate
    return run_arguments(config, out, batches, rates)


def run_arguments(config: RunConfig, out: Path, batches: Any, rates: dict[str, float]) -> Any:
    """The Hugging Face arguments of a run.

    Args:
        config: its settings.
        out: run folder.
        batches: its batch sampler, with `steps` and `batch_size`.
        rates: learning rates of parameters by regular expression; `learning_rate` is that of all others.
    """
    return training_arguments(
        out / "checkpoints",
        seed=config.seed,
        steps=batches.steps,
        batch_size=batches.batch_size,
        learning_rate=config.learning_rate,
        learning_rates=rates,
        weight_decay=config.weight_decay,
        warmup=config.warmup,
        save_steps=config.save_steps,
        workers=config.workers,
        bf16=config.precision == "bf16",
        max_grad_norm=config.max_grad_norm,
    )


def checkpoint_to_resume(config: RunConfig, out: Path) -> str | None:
    """The checkpoint a resumed run starts from (none: from the beginning), the log cut back to its step."""
    found = last_checkpoint(out / "checkpoints") if config.resume else None
    if not this_process().is_main_process:
        return str(found) if found else None
    step = int(found.name.rpartition("-")[2]) if found else 0
    log = out / "log.jsonl"
    if log.exists():
        kept = [line for line in log.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return str(found) if found else None


def _step_of(line: str) -> float:
    """The step of a line of the log; of one that a kill cut short, none that is kept."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def measure(student: SentenceTransformer, test: datasets.Dataset, config: TrainConfig) -> Evaluation:
    """All metrics of the student on the test part, and the vectors they come from."""
    return evaluate_student(student, test, batch_size=config.eval_batch_size)


def save_run(
    out: Path,
    student: SentenceTransformer,
    test: datasets.Dataset,
    before: Evaluation,
    after: Evaluation,
    started: float,
    *,
    method: str,
    seed: int,
) -> bool:
    """Writes `per_query.parquet` (what each test photo found before and after), then all of `save_results`."""
    if not this_process().is_main_process:
        return False
    found = {"before": before.per_query, "after": after.per_query}
    write_per_query(out, found, list(test["item_id"]), list(test["label"]))
    return save_results(out, student, before, after, started, method=method, seed=seed)


def save_results(
    out: Path, student: SentenceTransformer, before: Any, after: Any, started: float, *, method: str, seed: int
) -> bool:
    """Writes `model/` and `metrics.json` (means and intervals before and after, seconds, peak memory); checkpoints go
    when it is whole. `before` and `after` have `metrics` and `intervals`."""
    if not this_process().is_main_process:
        return False
    student.save_pretrained(str(out / "model"), create_model_card=True)
    unit = 1024**3 if sys.platform == "darwin" else 1024**2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    measured = {"before": before, "after": after}
    metrics = {
        "method": method,
        "seed": seed,
        **{when: one.metrics for when, one in measured.items()},
        "intervals": {when: one.intervals for when, one in measured.items()},
        "seconds": round(time.time() - started, 1),
        "peak_memory_gb": round(peak, 2),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").mkdir()
    return True
