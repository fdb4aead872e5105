"""Where an exported model comes from: read from its run folder, or said to be unknown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.runs import Group, group_runs

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ABOUT_READING = (
    "image_column", "label_column", "title_column", "item_id_column", "split_column", "role_column",
    "attribute_columns", "bad_photos", "eval_batch_size", "save_steps", "resume", "workers", "out", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Provenance:
    """What is known of a model's training.

    Attributes:
        group: its run, and runs that differ in their seed alone; None for a model without a run.
        intervals: `before` and `after` training, metric -> 95 % bootstrap interval over the queries of its own run.
    """

    group: Group | None = None
    intervals: dict[str, dict[str, Sequence[float]]] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """What the student was made of, as it was given: a student or multimodal LLM, else the teacher's tower."""
        if self.group is None:
            return None
        return self.group.settings.get("student") or self.group.settings.get("teacher")

    @property
    def data(self) -> str | None:
        """The catalogue, as it was given."""
        return None if self.group is None else self.group.settings.get("data")

    def hub_id(self, name: str | None) -> str | None:
        """A name that stands for something on the hub: `OWNER/NAME`, and no folder that is or was beside the run."""
        if name is None:
            return None
        name = name.partition("@")[0]
        folders = [] if self.group is None else [run.folder.resolve() for run in self.group.runs]
        places = [Path.cwd(), *(place for folder in folders for place in (folder, *folder.parents))]
        local = any((place / name).exists() or (place / name.partition("/")[0]).is_dir() for place in places)
        return name if _HUB_ID.fullmatch(name) and not local else None

    def settings(self) -> dict[str, Any]:
        """The settings of training, of paths their last part only: a card travels further than its machine's layout."""
        if self.group is None:
            return {}
        kept = {key: value for key, value in self.group.settings.items() if key not in _ABOUT_READING}
        return {
            key: self.shown(value) if isinstance(value, str) else value
            for key, value in kept.items()
            if value is not None
        }

    def shown(self, name: str) -> str:
        """A source or model in words for others: a hub id as it is, `NAME` of `NAME:DIR`, else the last part."""
        if self.hub_id(name):
            return name
        prefix, colon, rest = name.partition(":")
        if colon and prefix not in ("products", "wds") and not prefix.startswith(("/", ".")) and len(prefix) > 1:
            return name if rest.isdigit() else prefix
        path = Path(rest if colon and prefix in ("products", "wds") else name)
        return f"{path.parent.name}/model" if path.name == "model" else path.name or name


def provenance_of(model: str, runs: Sequence[str]) -> Provenance:
    """The run of a model, and more seeds of it.

    Args:
        model: run folder, its `model/`, or any other model folder or hub id.
        runs: further run folders.

    Raises:
        FieldmarkError: a run is broken or has not ended, differs from the model's in more than its seed, or is given
            for a model without a run.
    """
    folder = Path(model).expanduser()
    own = next((place for place in (folder, folder.resolve().parent) if _is_run_of(place, folder)), None)
    if own is None:
        if runs:
            raise FieldmarkError(
                f"--runs was given for {model}, which is not the model of a run; give the run folder as MODEL."
            )
        return Provenance()
    others = [Path(name) for name in runs if Path(name).resolve() != own.resolve()]
    groups = group_runs([own, *others])
    if len(groups) > 1:
        first, other = groups[0].runs[0], groups[1].runs[0]
        names = sorted(first.settings.keys() | other.settings.keys())
        differs = [name for name in names if first.settings.get(name) != other.settings.get(name)]
        differs = ["method", *differs] if first.method != other.method else differs
        raise FieldmarkError(
            f"The run {other.folder} is no other seed of {own}: it differs in {', '.join(differs)}; give runs that "
            "differ in their seed alone."
        )
    metrics = json.loads((own / "metrics.json").read_text(encoding="utf-8"))
    return Provenance(groups[0], metrics.get("intervals") or {})


def _is_run_of(place: Path, model: Path) -> bool:
    """Whether a folder is a finished run whose student the model folder is, or which was itself given."""
    if not ((place / "config.yaml").is_file() and (place / "metrics.json").is_file()):
        return False
    return (place / "model" / "modules.json").is_file() and model.resolve() in (
        place.resolve(),
        (place / "model").resolve(),
    )
