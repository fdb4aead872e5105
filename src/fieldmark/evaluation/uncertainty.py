"""How far a mean over queries could be from the truth, and whether one model really beats another.

The interval is Efron's percentile bootstrap: queries are drawn with replacement, the mean is taken again, and the
middle `level` of those means is the interval. It treats queries as independent and says nothing of the training seed,
which stands beside it as a spread of its own.

The paired test is the exact two-sided sign test over the queries on which two models differ; for hits and misses that
is McNemar's exact test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fieldmark.errors import FieldmarkError

# Draws held at once: 4 M numbers of 8 bytes, twice (the rows drawn and their values).
_DRAWS = 4 * 2**20
# Differences of means over seeds that are smaller come from the order of their sums.
_EQUAL = 1e-12


def bootstrap_interval(values: Any, *, level: float = 0.95, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over queries.

    Args:
        values: [Q] floats or bools, one a query.
        level: share of the resampled means inside the interval, between 0 and 1.
        samples: resamples.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        (low, high), in the unit of the values. Memory beyond the input is about 64 MB, whatever Q.

    Raises:
        FieldmarkError: no value, a table, NaN or infinity, a level outside (0, 1), or no sample.
    """
    given = _checked_values(values)
    if not 0 < level < 1:
        raise FieldmarkError(f"level is {level}; give a share between 0 and 1, such as 0.95")
    if samples < 1:
        raise FieldmarkError(f"samples is {samples}; give at least 1")
    means = _resampled_means(given, samples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_intervals(values: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """95 % intervals of several metrics on the same queries, such as those of `PerQuery.values`."""
    return {name: bootstrap_interval(per_query) for name, per_query in values.items()}


@dataclass(frozen=True)
class Paired:
    """Two models on the same queries.

    Attributes:
        better: queries on which the first has the higher value.
        worse: queries on which the second has the higher value.
        same: queries on which both have the same.
        p_value: of the exact two-sided sign test; 1 where they never differ.
        difference: mean of first minus second.
        interval: 95 % bootstrap interval of that mean.
    """

    better: int
    worse: int
    same: int
    p_value: float
    difference: float
    interval: tuple[float, float]

    def sentence(self, first_name: str, second_name: str) -> str:
        """Such as "Against A, SAGA is better on 143 queries, worse on 88, equal on 1,209 (p = 0.0004)"."""
        return (
            f"Against {second_name}, {first_name} is better on {self.better:,} queries, worse on {self.worse:,}, "
            f"equal on {self.same:,} ({p_text(self.p_value)})"
        )


def p_text(p_value: float) -> str:
    """A p-value as text: "p = 0.0004", "p = 0.21", "p < 0.0001"."""
    if p_value < 0.0001:
        return "p < 0.0001"
    return f"p = {p_value:.4f}" if p_value < 0.01 else f"p = {p_value:.2f}"


def paired_test(first: Any, second: Any) -> Paired:
    """Compares two models query by query.

    Args:
        first: [Q] floats or bools of the first model, higher is better.
        second: [Q] of the second, on the same queries in the same order.

    Raises:
        FieldmarkError: lengths differ, or values that :func:`bootstrap_interval` refuses.
    """
    from scipy.stats import binomtest

    ours, theirs = _checked_values(first), _checked_values(second)
    if len(ours) != len(theirs):
        raise FieldmarkError(
            f"the first model has {len(ours)} queries and the second {len(theirs)}; give both on the same queries"
        )
    difference = ours - theirs
    difference[np.abs(difference) < _EQUAL] = 0.0
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return Paired(
        better=better,
        worse=worse,
        same=len(difference) - better - worse,
        p_value=p_value,
        difference=float(difference.mean()),
        interval=bootstrap_interval(difference),
    )


def _checked_values(values: Any) -> np.ndarray:
    """[Q] float64, a copy."""
    try:
        given = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise FieldmarkError(f"the values per query are no numbers ({error}); give one number a query") from None
    if given.ndim != 1 or not len(given):
        raise FieldmarkError(f"the values per query have shape {given.shape}; give one number a query, at least one")
    if not np.isfinite(given).all():
        raise FieldmarkError("a value per query is NaN or infinite; every value must be a finite number")
    return given


def _resampled_means(values: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """[samples] means of len(values) draws with replacement."""
    distinct, counts = np.unique(values, return_counts=True)
    # Which query was drawn does not matter, only its value: where there are few values (hits and misses), how often
    # each is drawn comes from one multinomial, which is the same distribution at a fraction of the work.
    few = 10 * len(distinct) <= len(values)
    width = len(distinct) if few else len(values)
    rows = max(1, _DRAWS // width)
    means = np.empty(samples)
    for start in range(0, samples, rows):
        size = min(rows, samples - start)
        if few:
            sums = rng.multinomial(len(values), counts / len(values), size=size) @ distinct
        else:
            sums = values[rng.integers(0, len(values), size=(size, len(values)))].sum(axis=1)
        means[start : start + size] = sums / len(values)
    return means
