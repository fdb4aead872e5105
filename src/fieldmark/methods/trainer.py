"""The trainer under every method: a SentenceTransformerTrainer with class-balanced batches, a loss that is saved and
restored with its parameters, separate learning rates, and a log of one JSON object a line."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from fieldmark.data.batches import class_balanced_batch
from fieldmark.data.checks import this_process as this_process
from fieldmark.progress import JobProgress
from fieldmark.students.lora import load_lora

LOSS_STATE = "loss.safetensors"
COMPLETE = "complete"


class ClassBalancedSteps:
    """Batch sampler of a whole run: for step s, one slice a process of the global class-balanced batch of s.

    A pure function of (seed, step): resuming skips steps without drawing them, and any step can be drawn alone.
    """

    def __init__(
        self,
        labels: list[int],
        classes_per_batch: int,
        items_per_class: int,
        *,
        seed: int,
        steps: int,
        world_size: int = 1,
    ) -> None:
        self.labels, self.seed, self.steps, self.world_size = labels, seed, steps, world_size
        self.classes_per_batch, self.items_per_class = classes_per_batch, items_per_class
        self.batch_size = classes_per_batch * items_per_class // world_size
        self.steps_per_epoch = max(1, len(labels) // (classes_per_batch * items_per_class))
        self.drop_last = True

    def global_batch(self, step: int, *, stream: int = 0) -> list[int]:
        """Indices of the global batch of `step`; `stream` numbers independent further batches of the same step."""
        return self._slice(step, 0, 1, stream)

    def _slice(self, step: int, rank: int, world_size: int, stream: int = 0) -> list[int]:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return class_balanced_batch(
            self.labels,
            self.classes_per_batch,
            self.items_per_class,
            seed=self.seed + 1_000_003 * stream,
            epoch=epoch,
            step=step_in_epoch,
            rank=rank,
            world_size=world_size,
        )

    def __len__(self) -> int:
        return self.steps * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            for rank in range(self.world_size):
                yield self._slice(step, rank, self.world_size)


class FieldmarkTrainer(SentenceTransformerTrainer):
    """See the module docstring. `train_dataset` has the columns `photo` (a photo reference) and `label` (class
    index)."""

    def __init__(
        self, *args: Any, batches: ClassBalancedSteps, log_path: Path, description: str, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.batches = batches
        self.own_loss: Any = self.loss
        self.health: dict[str, list[float]] = {}
        self.said = False
        self._wait, self._last_log = 0.0, time.perf_counter()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.is_world_process_zero():
            self.add_callback(JsonLines(log_path))
            self.add_callback(StepProgress(description))
            print(what_is_trained(self.own_loss), file=sys.stderr)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The student's card shows no rows of the training table, which are paths of this machine."""
        card: Any = self.model.model_card_data
        card.widget = [{}]  # examples are drawn where there are none
        super().add_model_card_callback(default_args_dict)
        card.widget = []
        for described in card.train_datasets:
            described["examples"], described["examples_table"] = {}, ""

    def get_batch_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self.batches

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.waiting():
            return super().get_batch_samples(*args, **kwargs)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def note(self, **values: float) -> None:
        """Keeps health numbers of this step; the next log line has their means."""
        for key, value in values.items():
            self.health.setdefault(key, []).append(float(value))

    def say(self, message: str) -> None:
        """Logs a sentence; the first one of a run is printed too."""
        if not self.said and self.is_world_process_zero():
            print(message, file=sys.stderr)
        self.said = True
        self.log({"message": message})  # type: ignore[dict-item]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs["data_wait_share"] = round(self._wait / max(now - self._last_log, 1e-9), 4)
            logs["seconds"] = round(now - self._last_log, 3)
            self._wait, self._last_log = 0.0, now
            logs |= {key: sum(values) / len(values) for key, values in self.health.items() if values}
            self.health = {}
        super().log(logs, start_time)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.note(**{f"grad_norm/{name}": norm for name, norm in gradient_norms(self.model, self.own_loss).items()})
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            if state := loss_state(self.own_loss):
                save_file(state, folder / LOSS_STATE)
            # Last of all, so that a checkpoint cut short by a kill is never resumed from.
            (folder / COMPLETE).touch()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_student(Path(resume_from_checkpoint))
        restore_loss_state(self.own_loss, Path(resume_from_checkpoint) / LOSS_STATE)

    def load_student(self, folder: Path) -> None:
        """Puts a checkpoint's weights into the student."""
        super()._load_from_checkpoint(str(folder))


class AdapterTrainer(FieldmarkTrainer):
    """Trains adapters by an objective over columns (its `parts` are logged), and resumes them bit by bit."""

    def __init__(self, *args: Any, objective: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective: Any = objective

    def load_student(self, folder: Path) -> None:
        if (folder / "adapter_model.safetensors").exists():
            load_lora(self.model, folder)
        else:
            super().load_student(folder)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.note(**self.objective.parts)
        return loss


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def loss_state(loss: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the loss itself (proxies), without the model it holds."""
    return {
        name: value.detach().contiguous() for name, value in loss.state_dict().items() if not name.startswith("model.")
    }


def restore_loss_state(loss: nn.Module, path: Path) -> None:
    """Loads what :func:`loss_state` gave; a loss without parameters has no file."""
    expected = loss_state(loss)
    if not expected:
        return
    saved = load_file(path)
    with torch.no_grad():
        own = loss.state_dict()
        for name in expected:
            own[name].copy_(saved[name])


def gradient_norms(model: SentenceTransformer, loss: nn.Module) -> dict[str, float]:
    """Gradient norm per part: tower, merger (what projects into the LM), pooler, proxies; parts without gradient are
    left out."""
    squares: dict[str, float] = {}
    named = [(_part(name), p) for name, p in model.named_parameters()]
    named += [(_own_part(name), p) for name, p in loss.named_parameters() if not name.startswith("model.")]
    for part, parameter in named:
        if parameter.grad is not None:
            squares[part] = squares.get(part, 0.0) + float(parameter.grad.detach().float().pow(2).sum())
    return {part: math.sqrt(value) for part, value in squares.items()}


def _part(name: str) -> str:
    if "lora_" in name:
        return "adapters"
    if "language_model" in name:
        return "language model"
    if name.startswith("1."):
        return "pooler"
    return "merger" if re.search(r"merger|projector", name) else "tower"


def _own_part(name: str) -> str:
    return "temperatures" if "temperatures" in name else "proxies"


def what_is_trained(loss: Any) -> str:
    """One line a run starts with: parameters per part, trained and frozen."""
    counts: dict[bool, dict[str, int]] = {True: {}, False: {}}
    named = [(_part(name), p) for name, p in loss.model.named_parameters()]
    named += [(_own_part(name), p) for name, p in loss.named_parameters() if not name.startswith("model.")]
    for part, parameter in named:
        chosen = counts[parameter.requires_grad]
        chosen[part] = chosen.get(part, 0) + parameter.numel()
    trained, frozen = (
        ", ".join(f"{part} {n:,}" for part, n in counts[kind].items()) or "none" for kind in (True, False)
    )
    return f"parameters trained: {trained}; frozen: {frozen}"


class JsonLines(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or ("loss" not in logs and "message" not in logs):
            return
        # A message is said during a step, numbers when it is done: a resumed run must not keep words of steps to come.
        record = {"step": state.global_step + ("message" in logs)}
        record |= {key: round(v, 6) if isinstance(v, float) else v for key, v in logs.items() if key != "epoch"}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class StepProgress(TrainerCallback):
    def __init__(self, description: str) -> None:
        self.description, self.note = description, ""
        self.job: JobProgress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.job = JobProgress(self.description, state.max_steps, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {logs['loss']:.3f}"
        if self.job is not None:
            self.job.update(state.global_step, self.note)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.job is not None:
            self.job.close()


def training_arguments(
    folder: Path,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    learning_rates: dict[str, float],
    weight_decay: float,
    warmup: float,
    save_steps: int,
    workers: int,
    bf16: bool,
    max_grad_norm: float,
) -> SentenceTransformerTrainingArguments:
    """The Hugging Face arguments of one run; everything not named keeps the Trainer's default."""
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        learning_rate_mapping=learning_rates,
        weight_decay=weight_decay,
        warmup_steps=warmup,
        lr_scheduler_type="cosine",
        max_grad_norm=max_grad_norm,
        bf16=bf16,
        logging_steps=1,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_total_limit=2,
        dataloader_num_workers=workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_drop_last=True,
        ddp_find_unused_parameters=True,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        report_to="none",
    )
