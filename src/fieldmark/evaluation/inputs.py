"""What a metric is given: rows of embeddings and their labels, checked once and read a block at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch

from fieldmark.errors import FieldmarkError

# Rows read at once while the lengths are measured: 4,096 x 512 float64 is 16 MB.
_CHECK_ROWS = 4096
# Lengths between these are safe to divide by in float32; rows outside them are scaled in float64.
_SHORT, _LONG = 1e-30, 1e37


class Rows:
    """Embeddings of any float or integer type, handed out as float32 rows of length one.

    The array itself is never copied as a whole, so a memory-mapped file stays on disk: only the rows asked for are
    converted, and a row's float32 values do not depend on which other rows it is asked for with.

    Args:
        embeddings: [N, D] torch tensor, numpy array or nested sequence.
        name: what the rows are called in error messages.
        index: optional row numbers; the object then stands for these rows in this order.

    Raises:
        FieldmarkError: not a table of numbers, no row, NaN or infinity, or a row of length zero.
    """

    def __init__(self, embeddings: Any, name: str = "embeddings", index: np.ndarray | None = None) -> None:
        self._table = _as_table(embeddings, name)
        self._index = index
        self.dim = int(self._table.shape[1])
        self._length = _lengths(self, name)
        inside = (self._length >= _SHORT) & (self._length <= _LONG)
        self._double = self._table.dtype == torch.float64 or not bool(inside.all())

    def __len__(self) -> int:
        return int(self._table.shape[0]) if self._index is None else len(self._index)

    def number(self, row: int) -> int:
        """The row of the embeddings that row `row` stands for."""
        return row if self._index is None else int(self._index[row])

    def _raw(self, where: slice | np.ndarray) -> torch.Tensor:
        picked: Any = where if self._index is None else self._index[where]
        return self._table[torch.from_numpy(picked) if isinstance(picked, np.ndarray) else picked]

    def unit(self, where: slice | np.ndarray) -> torch.Tensor:
        """Rows `where` (a slice or row numbers) as [n, D] float32, each divided by its length."""
        key: Any = torch.from_numpy(where) if isinstance(where, np.ndarray) else where
        length = self._length[key].unsqueeze(1)
        if self._double:
            return (self._raw(where).double() / length).float()
        return self._raw(where).float() / length.float()


def _as_table(embeddings: Any, name: str) -> torch.Tensor:
    """A detached CPU tensor that shares memory with what was given wherever it can."""
    if isinstance(embeddings, Sequence) and len(embeddings) and isinstance(embeddings[0], torch.Tensor):
        embeddings = torch.stack(list(embeddings))
    if isinstance(embeddings, torch.Tensor):
        table = embeddings.detach().cpu()
    else:
        try:
            table = _share(np.asarray(embeddings))
        except (TypeError, ValueError) as error:
            raise FieldmarkError(f"{name} are no table of numbers ({error}); give [N, D] floats") from None
    if table.is_complex() or table.dtype == torch.bool:
        raise FieldmarkError(f"{name} have type {table.dtype}; give [N, D] floats")
    if not table.is_floating_point():
        table = table.double()
    if table.ndim != 2 or 0 in table.shape:
        raise FieldmarkError(f"{name} have shape {tuple(table.shape)}; give [N, D] with at least one row and column")
    return table


def _share(array: np.ndarray) -> torch.Tensor:
    """A tensor over the array's own memory; integers become float64, the other byte order is copied."""
    if array.dtype.kind in "iu":
        array = array.astype(np.float64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    with warnings.catch_warnings():
        # torch warns of memory it must not write to (a read-only memory map); nothing here writes to it.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _lengths(rows: Rows, name: str) -> torch.Tensor:
    """[N] float64 lengths; raises for the first row that has no direction."""
    lengths = torch.empty(len(rows), dtype=torch.float64)
    for start in range(0, len(rows), _CHECK_ROWS):
        part = rows._raw(slice(start, start + _CHECK_ROWS)).double()
        if not bool(torch.isfinite(part).all()):
            row = rows.number(start + int((~torch.isfinite(part)).any(dim=1).nonzero()[0]))
            raise FieldmarkError(f"row {row} of {name} holds NaN or infinity; every value must be a finite number")
        lengths[start : start + _CHECK_ROWS] = torch.linalg.vector_norm(part, dim=1)
    bad = ((lengths == 0) | ~torch.isfinite(lengths)).nonzero()
    if len(bad):
        raise FieldmarkError(
            f"row {rows.number(int(bad[0]))} of {name} has length {float(lengths[bad[0]]):g} ({len(bad)} such rows); "
            "cosine similarity needs a direction: leave such rows out"
        )
    return lengths


def encode_labels(*groups: Any) -> list[np.ndarray]:
    """Numbers labels 0, 1, ... in order of appearance, the same label the same number in every group.

    Integers are compared as Python integers, so labels above 2^24, 2^53 or 2^63 stay apart.

    Args:
        groups: one sequence of integer or string labels per group (tensor, array, list, dataset column).

    Returns:
        One [N] int64 array per group.

    Raises:
        FieldmarkError: a label is neither an integer nor a string, or both kinds are mixed.
    """
    codes: dict[int | str, int] = {}
    encoded = [
        np.fromiter((codes.setdefault(label, len(codes)) for label in _plain_labels(group)), dtype=np.int64)
        for group in groups
    ]
    if len({isinstance(label, str) for label in codes}) > 1:
        raise FieldmarkError("labels mix integers and strings; give one kind, or no two of them can ever be equal")
    return encoded


def _plain_labels(group: Any) -> list[int | str]:
    """Python integers or strings."""
    if isinstance(group, str | bytes) or not hasattr(group, "__iter__"):
        raise FieldmarkError(f"labels are a single {type(group).__name__}; give one label per row")
    if isinstance(group, torch.Tensor | np.ndarray):
        if group.ndim != 1:
            raise FieldmarkError(f"labels have shape {tuple(group.shape)}; give one label per row")
        group = group.tolist()
    plain: list[int | str] = []
    for row, label in enumerate(group):
        if type(label) is int or type(label) is str:
            plain.append(label)
            continue
        value = label.item() if isinstance(label, torch.Tensor) and label.numel() == 1 else label
        if isinstance(value, str):
            plain.append(str(value))
        elif isinstance(value, Integral):
            plain.append(int(value))
        else:
            raise FieldmarkError(
                f"label {value!r} of row {row} is a {type(value).__name__}; labels are integers or strings"
            )
    return plain


def checked_labels(count: int, labels: Any, name: str = "labels") -> Any:
    """Returns `labels` if there are `count` of them.

    Raises:
        FieldmarkError: another number of labels.
    """
    if not hasattr(labels, "__len__") or len(labels) != count:
        given = len(labels) if hasattr(labels, "__len__") else type(labels).__name__
        raise FieldmarkError(f"{name}: {given} given for {count} embeddings; give one per row")
    return labels
