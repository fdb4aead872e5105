"""What the commands print: tables and JSON on stdout, nothing of third parties."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = (
    "recall@1", "recall@4", "map@r", "nmi", "i2t_recall@1", "t2i_recall@1", "text_score", "image_score", "group_score",
    "gap_ratio", "instance_recall@1", "instance_recall@10", "enriched_instance_recall@1", "enriched_instance_recall@10",
    "reward", "valid", "value_accuracy", "tokens", "completion_length",
)  # fmt: skip
WIDTH_OF_A_FILE = 120


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout; numbers that are not finite become null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A line and a table on stdout: the first column to the left, the others to the right."""
    table = Table(show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console().print(title, markup=False, highlight=False, soft_wrap=True)
    console().print(table, markup=False)


def console() -> Console:
    """Stdout, wide enough for our tables where it is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_A_FILE)


def number(value: float | None, name: str = "") -> str:
    """A metric as text: three decimals, or an integer where its name is that of a count (`n_...`)."""
    if value is None or not math.isfinite(value):
        return "–"
    return str(int(value)) if name.startswith("n_") else f"{value:.3f}"


def interval(bounds: tuple[float, float] | None) -> str:
    """An interval as text, empty where there is none."""
    return "" if bounds is None else " – ".join(number(bound) for bound in bounds)


def quiet_libraries() -> None:
    """Leaves the terminal to our own lines: no warnings, notes and weight-loading bars of the libraries below us.

    Errors still end the command, the hub's download bars stay, and what fieldmark itself warns of is printed.
    """
    import datasets
    import huggingface_hub.utils
    import transformers

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.enable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in ("sentence_transformers", "accelerate", "pytorch_metric_learning", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
