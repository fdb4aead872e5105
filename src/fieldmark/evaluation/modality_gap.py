"""The modality gap as MAPLE measures it (arXiv 2506.06970, section 2): distances between distributions of scores.

Given N groups of two texts and two images (``T0, T1, I0, I1``; text a of a group goes with image a), ``P_AB`` is the
distribution of the scores between the members of A and of B, and W the 1-Wasserstein distance. For a, b in {0, 1},
b other than a:

- ``W_dist``, across modalities against inside one, is the mean of ``W(P_TaIa, P_TaTa)`` and ``W(P_TaIa, P_IaIa)``: four
  distances, of which lower is better (near 0 also where a space has collapsed);
- ``W_disc``, match against mismatch, is the mean of ``W(P_TaIa, P_TaIb)`` and ``W(P_TaIa, P_TbIa)``: four distances, of
  which higher is better;
- the gap is ``W_dist / W_disc``; lower is better.

The paper gives one example of each and "the corresponding combinations"; these are ours. It does not say either whether
``P_AB`` across modalities holds all N x N pairs (our reading) or the N of one group, which `matched_only` measures, nor
whether an item is paired with itself in ``P_TaTa`` and ``P_IaIa`` (we leave it out).

Of all N x N pairs one in N is a match, so ``W_disc`` falls and the gap rises as N grows: compare gaps of the same
groups alone. The N pairs inside groups do not have this fault. A ``W_disc`` of 0.063 on 135 groups, as the paper's
Table 6 gives for a teacher, is hard to reach with all pairs, of which 0.7 % are matches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.groups import as_array
from fieldmark.evaluation.inputs import Rows

ACROSS = ("T0I0", "T1I1", "T0I1", "T1I0")
INSIDE = ("T0T0", "T1T1", "I0I0", "I1I1")
DIST_TERMS = (("T0I0", "T0T0"), ("T0I0", "I0I0"), ("T1I1", "T1T1"), ("T1I1", "I1I1"))
DISC_TERMS = (("T0I0", "T0I1"), ("T0I0", "T1I0"), ("T1I1", "T1I0"), ("T1I1", "T0I1"))


@dataclass(frozen=True)
class ModalityGap:
    """What :func:`modality_gap` found.

    Attributes:
        w_dist: across modalities against inside one.
        w_disc: match against mismatch.
        terms: each distance that went into the means, by its two distributions (``"T0I0-T0T0"``).
        edges: ``[bins + 1]`` edges of all histograms.
        densities: ``[bins]`` a distribution, by name; they integrate to one.
    """

    w_dist: float
    w_disc: float
    terms: dict[str, float]
    edges: np.ndarray
    densities: dict[str, np.ndarray]

    @property
    def ratio(self) -> float:
        """``w_dist / w_disc``; infinite where matches cannot be told from mismatches at all."""
        return self.w_dist / self.w_disc if self.w_disc > 0 else math.inf

    @property
    def metrics(self) -> dict[str, float]:
        """``gap_dist``, ``gap_disc`` and ``gap_ratio``."""
        return {"gap_dist": self.w_dist, "gap_disc": self.w_disc, "gap_ratio": self.ratio}


def modality_gap(
    texts_0: Any,
    texts_1: Any,
    images_0: Any,
    images_1: Any,
    *,
    exclude_self: bool = True,
    matched_only: bool = False,
    bins: int = 50,
) -> ModalityGap:
    """The gap of an embedder, by cosine.

    Args:
        texts_0, texts_1, images_0, images_1: ``[N, D]`` embeddings, row n of each from group n.
        exclude_self: leave an item's score with itself out of the distributions inside a modality.
        matched_only: across modalities, take the N scores inside groups instead of all N x N.
        bins: of the histograms.

    Returns:
        The gap. Memory: eight N x N float64 tables and a few more of their size.

    Raises:
        FieldmarkError: shapes that differ, fewer than two groups, or rows without direction.
    """
    names = {"T0": texts_0, "T1": texts_1, "I0": images_0, "I1": images_1}
    rows = {name: Rows(values, name) for name, values in names.items()}
    shapes = {(len(one), one.dim) for one in rows.values()}
    if len(shapes) > 1:
        raise FieldmarkError(f"the four sets have the shapes {sorted(shapes)}; expected one embedding a group in each")
    unit = {name: one.unit(slice(None)).double().numpy() for name, one in rows.items()}
    scores = {name: unit[name[:2]] @ unit[name[2:]].T for name in (*ACROSS, *INSIDE)}
    return gap_of_scores(scores, exclude_self=exclude_self, matched_only=matched_only, bins=bins)


def gap_of_scores(
    scores: Mapping[str, Any], *, exclude_self: bool = True, matched_only: bool = False, bins: int = 50
) -> ModalityGap:
    """The gap of any scorer, as a teacher's alignment scores.

    Args:
        scores: ``[N, N]`` tables by name: all of T0I0, T1I1, T0I1, T1I0 and any of T0T0, T1T1, I0I0, I1I1; ``W_dist``
            is the mean over those given (a teacher may have no score for two images), which `terms` then shows.
        exclude_self: leave out the diagonal of the tables inside a modality.
        matched_only: take the diagonal alone of those across modalities.
        bins: of the histograms.

    Raises:
        FieldmarkError: a table that is missing, unknown, of another shape or with numbers that are not finite; fewer
            than two groups.
    """
    samples = _samples(scores, exclude_self, matched_only)
    disc = {f"{one}-{other}": _distance(samples[one], samples[other]) for one, other in DISC_TERMS}
    dist = {f"{one}-{other}": _distance(samples[one], samples[other]) for one, other in DIST_TERMS if other in samples}
    low = min(float(values.min()) for values in samples.values())
    high = max(float(values.max()) for values in samples.values())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    densities = {name: np.histogram(values, edges, density=True)[0] for name, values in samples.items()}
    return ModalityGap(
        float(np.mean(list(dist.values()))), float(np.mean(list(disc.values()))), dist | disc, edges, densities
    )


def _samples(scores: Mapping[str, Any], exclude_self: bool, matched_only: bool) -> dict[str, np.ndarray]:
    """The scores of each distribution in a row."""
    tables = {name: as_array(values, name) for name, values in scores.items()}
    absent = [name for name in ACROSS if name not in tables]
    unknown = [name for name in tables if name not in (*ACROSS, *INSIDE)]
    if absent or unknown or not any(name in tables for name in INSIDE):
        raise FieldmarkError(
            f"scores of {', '.join(tables) or 'nothing'} were given; expected {', '.join(ACROSS)} and at least one of "
            f"{', '.join(INSIDE)}"
        )
    count = len(tables["T0I0"]) if tables["T0I0"].ndim else 0
    samples = {}
    for name, table in tables.items():
        if table.shape != (count, count) or count < 2:
            raise FieldmarkError(f"{name} has shape {table.shape}; expected [N, N], with N >= 2 the same for all")
        if not np.isfinite(table).all():
            raise FieldmarkError(f"{name} holds NaN or infinity; check the model or the cache it is of")
        own = np.eye(count, dtype=bool)
        if name in ACROSS:
            samples[name] = table[own] if matched_only else table.reshape(-1)
        else:
            samples[name] = table[~own] if exclude_self else table.reshape(-1)
    return samples


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Exact W1 of two samples of any sizes: the integral of ``|F - G|``."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(one, other))
