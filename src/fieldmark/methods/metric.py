"""Metric learning without a teacher: the controls every other method stands beside.

Proxy Anchor (CVPR 2020), Multi-Similarity (CVPR 2019), InfoNCE, Potential Field (arXiv 2405.18560) on the same student,
the same batches and the same evaluation as SAGA.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fieldmark.errors import FieldmarkError
from fieldmark.methods.reporting import LOSSES, write_run_report
from fieldmark.methods.run import (
    TrainConfig,
    check_folder,
    checkpoint_to_resume,
    make_arguments,
    make_batches,
    make_loss,
    make_student,
    measure,
    open_task,
    save_run,
)
from fieldmark.methods.trainer import FieldmarkTrainer


@dataclass
class MetricConfig(TrainConfig):
    __doc__ = TrainConfig.__doc__


def train(config: MetricConfig) -> Path:
    """Trains a student with a metric loss alone; returns the run folder."""
    started = time.time()
    if config.student is None:
        raise FieldmarkError("No student was given; name a vision checkpoint with --student (a folder or a hub id).")
    # 1. Catalogue
    task = open_task(config)
    # 2. Student, 3. loss
    student = make_student(config, config.student)
    loss = make_loss(config, student, len(task.classes))
    out = check_folder(config, task.bad)
    # 4. The untrained student
    before = measure(student, task.test, config)
    # 5. Training
    batches = make_batches(config, task.labels)
    trainer = FieldmarkTrainer(
        model=student,
        args=make_arguments(config, out, batches, loss),
        train_dataset=task.photos,
        loss=loss,
        batches=batches,
        log_path=out / "log.jsonl",
        description=f"{config.loss} ({config.pooling})",
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(config, out))
    # 6. The trained student, 7. run folder, 8. report
    after = measure(student, task.test, config)
    if save_run(out, student, task.test, before, after, started, method="metric", seed=config.seed):
        name = LOSSES[config.loss]
        title = f"{name} on {config.data}"
        write_run_report({name: out}, task.train, task.test, student, after, out / "report.html", title=title)
    return out
