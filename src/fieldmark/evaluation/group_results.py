"""What each test group scored, before and after training and with the teacher: kept in a run's `groups.parquet`.

Beside the student's cosines stands the teacher's alignment score of the same photo and caption, so that how far a
student orders them as its teacher does can be said by number: Spearman's rank correlation, ties sharing their rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.groups import group_hits, group_scores_by_category

GROUPS = "groups.parquet"
WHEN = ("before", "after")
_PAIRS = ("00", "01", "10", "11")  # photo, caption


@dataclass(frozen=True)
class GroupResults:
    """Groups of two photos and two captions, row g of everything about the same one.

    Attributes:
        captions: both captions of each group.
        categories: what the groups test; None where a group has no category.
        teacher: [G, 2, 2] alignment scores (0..1) of photo i and caption t at [g, i, t].
        before: [G, 2, 2] cosines of the untrained student.
        after: [G, 2, 2] cosines of the trained student.
    """

    captions: list[tuple[str, str]]
    categories: list[str | None]
    teacher: np.ndarray
    before: np.ndarray
    after: np.ndarray

    @property
    def named(self) -> list[str]:
        """The categories, each once, in the order of the alphabet."""
        return sorted({name for name in self.categories if name is not None})

    def rows(self, category: str | None = None) -> np.ndarray:
        """[G] bool: the groups of a category, of None all."""
        return np.array([category is None or name == category for name in self.categories])

    def correlation(self, when: str, category: str | None = None) -> float | None:
        """Spearman's correlation of the teacher's scores with the cosines, four pairs a group; see `spearman`."""
        rows = self.rows(category)
        return spearman(self.teacher[rows], getattr(self, when)[rows])

    def by_category(self, who: str) -> dict[str, dict[str, float]]:
        """Group scores of each category, by `teacher`, `before` or `after`."""
        return group_scores_by_category(getattr(self, who), self.categories)

    def hits(self, who: str) -> dict[str, np.ndarray]:
        """[G] bool of each group score, by `teacher`, `before` or `after`."""
        return group_hits(getattr(self, who))


def spearman(one: Any, other: Any) -> float | None:
    """Spearman's rank correlation of two tables of one shape; None where one of them is the same everywhere."""
    from scipy.stats import spearmanr

    left, right = np.ravel(one), np.ravel(other)
    if len(left) < 2 or (left == left[0]).all() or (right == right[0]).all():
        return None
    return float(spearmanr(left, right).statistic)


def write_groups(run_folder: Path, results: GroupResults) -> None:
    """Writes `groups.parquet`: a row for each group, the pair of photo i and caption t as `before_it`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {f"caption_{t}": [pair[t] for pair in results.captions] for t in (0, 1)}
    columns["category"] = pa.array(results.categories, pa.string())
    for who in ("teacher", *WHEN):
        table = getattr(results, who).reshape(-1, 4).astype(np.float64)
        columns |= {f"{who}_{pair}": table[:, place] for place, pair in enumerate(_PAIRS)}
    pq.write_table(pa.table(columns), run_folder / GROUPS)


def read_groups_of(run_folder: Path) -> GroupResults | None:
    """Reads `groups.parquet` of a run; None where it was measured without groups.

    Raises:
        FieldmarkError: the file is broken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = run_folder / GROUPS
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        scores = {
            who: np.stack([table[f"{who}_{pair}"].to_numpy() for pair in _PAIRS], axis=1).reshape(-1, 2, 2)
            for who in ("teacher", *WHEN)
        }
        captions = list(zip(table["caption_0"].to_pylist(), table["caption_1"].to_pylist(), strict=True))
        return GroupResults(captions, table["category"].to_pylist(), **scores)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise FieldmarkError(f"{path} is broken ({type(error).__name__}); train that run again.") from error


def orders_alike(teacher: Sequence[float], student: Sequence[float]) -> tuple[int, int]:
    """Of the pairs of candidates that a teacher scores differently: how many a student puts in the same order, of all.

    A tie of the student is not the same order.
    """
    ranks, cosines = np.asarray(teacher), np.asarray(student)
    better = ranks[:, None] > ranks[None]
    return int((better & (cosines[:, None] > cosines[None])).sum()), int(better.sum())


def candidate_health(alignment: np.ndarray) -> dict[str, float]:
    """What a teacher says about candidate sets, whose first candidate is the anchor's own match.

    Args:
        alignment: [N, K + 1] alignment scores.

    Returns:
        Shares of sets: `own_beaten` (some other candidate scores higher), `own_tied` (none does, one scores the same);
        means: `own`, `others`.
    """
    own, others = alignment[:, 0], alignment[:, 1:]
    best = others.max(axis=1)
    return {
        "own_beaten": float((best > own).mean()),
        "own_tied": float((best == own).mean()),
        "own": float(own.mean()),
        "others": float(others.mean()),
    }
