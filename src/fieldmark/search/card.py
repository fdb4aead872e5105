"""What a store says of itself, in `store.json`: its layout, the model that made it, its columns, its index."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fieldmark.errors import FieldmarkError

NAME, UNFINISHED = "store.json", "store.json.unfinished"
FORMAT = 2  # raised when a store of this version can no longer be read by an older fieldmark
MODEL_FILES = (".json", ".safetensors", ".txt", ".jinja", ".model")
_READ_BYTES = 2**20


@dataclass(frozen=True)
class StoredModel:
    """The student whose vectors a store holds.

    Attributes:
        source: folder (absolute) or hub id that it was loaded from.
        fingerprint: see :func:`model_fingerprint`.
        dim: numbers a vector.
        texts: whether it embeds texts as well as photos.
    """

    source: str
    fingerprint: str
    dim: int
    texts: bool


@dataclass(frozen=True)
class ApproximateIndex:
    """The approximate index of a large store, and how much of an exact search it finds.

    Attributes:
        kind: LanceDB's name of it.
        rows: items it was built on; later ones were added to it.
        recall_at_10: share of the exact ten nearest items of a stored item that it finds.
        queries: stored items that this was measured on.
    """

    kind: str
    rows: int
    recall_at_10: float
    queries: int


@dataclass(frozen=True)
class StoreCard:
    """A store's description.

    Attributes:
        model: whose vectors it holds.
        exact_up_to: items up to which search is exact; above, an approximate index answers.
        with_titles: whether each photo was embedded together with its title.
        columns: attribute -> its column, for filters.
        index: the approximate index, if there is one.
    """

    model: StoredModel
    exact_up_to: int
    with_titles: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    index: ApproximateIndex | None = None

    def write(self, folder: Path) -> None:
        """Writes `store.json`: the old one or the new one is there at any time."""
        unfinished = folder / UNFINISHED
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(folder / NAME)

    @classmethod
    def read(cls, folder: Path) -> StoreCard:
        """Reads `store.json`.

        Raises:
            FieldmarkError: the folder is no store, its card is damaged, or a newer fieldmark made it.
        """
        path = folder / NAME
        if not path.is_file():
            raise FieldmarkError(f"{folder} is not a store (it has no {NAME}); make one by `fieldmark index`.")
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = int(found.pop("format"))
            if version > FORMAT:
                raise FieldmarkError(
                    f"{folder} was made by a newer fieldmark (layout {version}, this one reads {FORMAT}); "
                    "update fieldmark."
                )
            index = found.pop("index")
            model = StoredModel(**found.pop("model"))
            return cls(model=model, index=None if index is None else ApproximateIndex(**index), **found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FieldmarkError(f"{path} is damaged; index the catalogue anew into another folder.") from error


def check_titles_agree(card: StoreCard, with_titles: bool, folder: Path) -> None:
    """Refuses photos alone for a store of photos with titles, and the other way round.

    Raises:
        FieldmarkError: they are not of the store's kind.
    """
    if card.with_titles != with_titles:
        held, do = ("together with their titles", "give") if card.with_titles else ("without titles", "leave out")
        raise FieldmarkError(
            f"The store {folder} holds photos embedded {held}; {do} --with_titles, or index into another folder."
        )


def check_model(card: StoreCard, model: StoredModel, folder: Path) -> None:
    """Refuses another model than the one that made a store.

    Raises:
        FieldmarkError: it is another one.
    """
    if card.model.fingerprint != model.fingerprint:
        raise FieldmarkError(
            f"The store {folder} holds vectors of {card.model.source} as it was then ({card.model.fingerprint[:12]}), "
            f"not of {model.source} ({model.fingerprint[:12]}); give that model, or index into another folder."
        )


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over the names and bytes of a model's weights and settings, in hex.

    Read from the files, so that neither the device, nor the precision it is loaded in, nor a library's version matters.
    """
    digest = hashlib.sha256()
    files = [path for path in folder.rglob("*") if path.suffix in MODEL_FILES and path.is_file()]
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
    return digest.hexdigest()
