"""What fieldmark's trainers on top of TRL's share: the log, the progress, whole checkpoints, frozen parts."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from fieldmark.methods.trainer import COMPLETE, JsonLines


def shared_arguments(config: Any, out: Path) -> dict[str, Any]:
    """TRL's arguments that all of these trainers set alike.

    Args:
        config: a `RunConfig` with `per_device_batch` and `checkpoint_activations`.
        out: run folder.
    """
    return {
        "output_dir": str(out / "checkpoints"),
        "seed": config.seed,
        "per_device_train_batch_size": config.per_device_batch,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": config.precision == "bf16",
        "gradient_checkpointing": config.checkpoint_activations,
        "logging_steps": 1,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "save_total_limit": 2,
        "dataloader_num_workers": config.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
        "disable_tqdm": True,
        "report_to": "none",
    }


class TrlRun(Trainer):
    """Goes before one of TRL's trainers among the bases of a class.

    Args:
        frozen: modules that must not change; they stay out of training mode, where batch statistics move.
        log_path: file of one JSON object a step.
        progress: shows how far the run is.
    """

    def __init__(
        self, *args: Any, frozen: Sequence[nn.Module], log_path: Path, progress: TrainerCallback, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.frozen = frozen
        self._wait, self._last_log = 0.0, time.perf_counter()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.is_world_process_zero():
            self.add_callback(JsonLines(log_path))
            self.add_callback(progress)
            print(_what_is_trained(self.model), file=sys.stderr)

    def _send_telemetry(self) -> None:
        """TRL would tell its makers of each training; a run tells nobody."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints need none."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = super().get_batch_samples(*args, **kwargs)
        self._wait += time.perf_counter() - start
        return found

    def _prepare_inputs(self, inputs: Any) -> Any:
        for part in self.frozen:  # a step has just put the whole model into training mode
            part.eval()
        return super()._prepare_inputs(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs["data_wait_share"] = round(self._wait / max(now - self._last_log, 1e-9), 4)
            logs["seconds"] = round(now - self._last_log, 3)
            self._wait, self._last_log = 0.0, now
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            # Last of all, so that a checkpoint cut short by a kill is never resumed from.
            (Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()


def _what_is_trained(model: Any) -> str:
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return f"parameters trained: {counts[True]:,}; frozen: {counts[False]:,}"
