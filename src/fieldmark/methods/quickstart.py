"""`fieldmark quickstart`: on a fresh machine, from drawn birds and the embedded teacher to a table and a report.

The same student, the same start, the same batches and steps: once with Proxy Anchor alone (the control), once with
SAGA.
"""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fieldmark.data.catalog import load_catalog, select_split
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.student import evaluate_student
from fieldmark.methods import metric, saga
from fieldmark.methods.reporting import SHOWN, write_run_report
from fieldmark.methods.witness import Witness
from fieldmark.students.build import load_student
from fieldmark.teacher.compare import load_domain
from fieldmark.teacher.model import Teacher


@dataclass
class QuickstartConfig:
    """Settings of the quickstart.

    Attributes:
        out: folder of the two runs and the report.
        data: the catalogue; `aviary:N` draws N photos a species.
        max_steps: optimizer steps of each run.
        seed: of everything random.
    """

    out: str = "runs/quickstart"
    data: str = "aviary:8"
    max_steps: int = 40
    seed: int = 0


def embedded_teacher() -> Path:
    """Folder of the teacher that ships with the package."""
    return Path(str(importlib.resources.files("fieldmark.teacher"))) / "embedded"


def quickstart(config: QuickstartConfig) -> Path:
    """Trains control and SAGA, prints the table, writes `report.html`; returns the report's path."""
    out = Path(config.out)
    if out.exists():
        raise FieldmarkError(f"--out {out} exists already; give another folder, or remove it.")
    teacher = str(embedded_teacher())
    shared = {
        "data": config.data,
        "max_steps": config.max_steps,
        "seed": config.seed,
        "loss": "proxy_anchor",
        "classes_per_batch": 12,
        "items_per_class": 4,
        # The tower has read the marks of thousands of species; what is left to learn is which of its tokens to look at.
        "learning_rate": 5e-6,
        "pooler_learning_rate": 3e-3,
        "proxy_learning_rate": 2e-3,
    }
    runs = {
        "Proxy Anchor": metric.train(metric.MetricConfig(out=str(out / "control"), student=teacher, **shared)),  # type: ignore[arg-type]
        "SAGA": saga.train(
            saga.SagaConfig(
                out=str(out / "saga"),
                teacher=teacher,
                target_pairs=4,
                max_micro_batches=1,
                max_new_tokens=256,
                **shared,  # type: ignore[arg-type]
            )
        ),
    }
    loaded = Teacher.load(teacher)
    student = load_student(runs["SAGA"] / "model", device="cpu")
    catalog = load_catalog(config.data)
    train, test = select_split(catalog, "train"), select_split(catalog, "test")
    report = out / "report.html"
    write_run_report(
        runs,
        train,
        test,
        student,
        evaluate_student(student, test),
        report,
        title="Fieldmark quickstart: drawn birds",
        witness=Witness(loaded, load_domain("aviary"), loaded.layers * 26 // 36),
    )
    _print_table(runs)
    Console().print(f"Report: {report}", markup=False, highlight=False, soft_wrap=True)
    return report


def _print_table(runs: dict[str, Path]) -> None:
    table = Table(title="Drawn birds, species not trained on", title_justify="left")
    table.add_column("")
    for name in SHOWN:
        table.add_column(name, justify="right")
    metrics = {name: json.loads((run / "metrics.json").read_text(encoding="utf-8")) for name, run in runs.items()}
    first = next(iter(metrics.values()))
    table.add_row("untrained", *(f"{first['before'][key]:.3f}" for key in SHOWN))
    for name, values in metrics.items():
        table.add_row(name, *(f"{values['after'][key]:.3f}" for key in SHOWN))
    Console().print(table)
