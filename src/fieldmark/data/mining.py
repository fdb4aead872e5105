"""Which photos to train on and which to tell apart: semantic de-duplication and hard negatives (MAPLE, section 3.1).

Features come from any student or vision model. Everything is exact but the clusters (mini-batch k-means), and the same
input and seed give the same answer on the same machine.

Memory beyond the features: one float32 copy of them, of length one (2 GB for 10^6 x 512), and less than 300 MB of
blocks; the clusters add theirs (4 bytes x clusters x D, a few times).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.errors import FieldmarkError

Progress = Callable[[int], None]

# One tile of scores: 512 x 8,192 float32 are 16 MB.
_ROWS, _COLUMNS = 512, 8192
_SAMPLES_PER_CLUSTER = 256  # more rows hardly move a centroid
_PASSES = 3


def semdedup(
    features: Any,
    *,
    clusters: int,
    epsilon: float = 0.07,
    seed: int = 0,
    keep: Literal["hard", "easy"] = "hard",
    progress: Progress = lambda done: None,
) -> np.ndarray:
    """SemDeDup (arXiv 2303.09540): leaves out near-duplicates inside clusters of like items.

    See :func:`cluster_rows` and :func:`drop_duplicates`, which it joins. Time grows with N x clusters and with the sum
    of the squared cluster sizes; the paper has 50,000 clusters for some millions of photos.

    Args:
        features: ``[N, D]`` numpy array (also memory-mapped) or torch tensor.
        clusters: number of clusters, at most N.
        epsilon: an item is dropped where its cosine to an earlier one exceeds ``1 - epsilon``.
        seed: of the starting centroids.
        keep: ``"hard"`` keeps, of duplicates, the one farthest from the centroid, ``"easy"`` the nearest.
        progress: called with the number of items compared.

    Returns:
        Kept row numbers, ascending int64.

    Raises:
        FieldmarkError: features that are no table of finite numbers or have a row of zeros, clusters or epsilon out of
            range.
    """
    unit = unit_rows(features)
    assignment, distance = _clusters(unit, clusters, seed)
    return _keep(unit, assignment, distance, epsilon, keep, progress)


def cluster_rows(features: Any, clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Spherical k-means: mini-batches over at most 256 rows a cluster move the centroids, which are then of length one.

    Args:
        features: ``[N, D]``.
        clusters: number of clusters, at most N.
        seed: of the starting centroids and the order of the batches.

    Returns:
        ``[N]`` int64 cluster of the nearest centroid by cosine (of equal ones the first), ``[N]`` float32 distance to
        it, 1 - cosine.
    """
    return _clusters(unit_rows(features), clusters, seed)


def drop_duplicates(
    features: Any,
    assignment: np.ndarray,
    distance: np.ndarray,
    epsilon: float = 0.07,
    keep: Literal["hard", "easy"] = "hard",
    progress: Progress = lambda done: None,
) -> np.ndarray:
    """The rule of SemDeDup in given clusters.

    Each cluster is put in order of the distance to its centroid, the farthest first (``keep="hard"``) or the nearest
    first, equal ones by row number. An item is dropped if its cosine to any earlier item of that order exceeds
    ``1 - epsilon``, whether or not that item was dropped itself (as in the authors' code): of a chain of duplicates
    only the first stays.

    Args:
        features: ``[N, D]``.
        assignment: ``[N]`` cluster numbers.
        distance: ``[N]`` distances to the centroids.
        epsilon: in 0..1.
        keep: which end of the order comes first.
        progress: called with the number of items compared.

    Returns:
        Kept row numbers, ascending int64.
    """
    return _keep(unit_rows(features), assignment, distance, epsilon, keep, progress)


def shared_titles(titles: Sequence[Sequence[str]]) -> list[str | None]:
    """One title for each of N items: those that share one of theirs, but for case and blanks, get the same.

    So do items that others link, each sharing one with the next. None where an item has no title.
    """
    parent: dict[str, str] = {}

    def root(title: str) -> str:
        while parent.setdefault(title, title) != title:
            parent[title] = title = parent[parent[title]]
        return title

    known = [[name for name in map(folded, own) if name] for own in titles]
    for own in known:
        for other in own[1:]:
            parent[root(other)] = root(own[0])
    return [root(own[0]) if own else None for own in known]


def few_others(labels: Sequence[Any], titles: Sequence[Any], count: int) -> int:
    """How many of N items have fewer than `count` others of another label and title; None is nobody else's."""
    pairs = list(zip(labels, titles, strict=True))
    of_label, of_title, of_both = Counter(labels), Counter(titles), Counter(pairs)
    short = 0
    for label, title in pairs:
        same_label = 1 if label is None else of_label[label]
        same_title = 1 if title is None else of_title[title]
        same_both = 1 if None in (label, title) else of_both[label, title]  # these were counted twice
        short += len(pairs) - (same_label + same_title - same_both) < count
    return short


def hard_negatives(
    features: Any,
    k: int,
    *,
    labels: Sequence[Any] | None = None,
    titles: Sequence[str | None] | None = None,
    rows: np.ndarray | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = lambda done: None,
) -> np.ndarray:
    """The k nearest other items of each by cosine: exact, in float32, of equal scores the one with the lower number.

    Never drawn are the item itself, an item of the same label, and one whose title is the same but for case and blanks.
    Items without a label or title are held apart by what is known. Duplicates of a photo under another label and title
    are drawn: run :func:`semdedup` first. Time grows with len(rows) x N x D.

    Args:
        features: ``[N, D]`` numpy array (also memory-mapped) or torch tensor.
        k: negatives an item.
        labels: N labels, None where unknown.
        titles: N titles, None or blank where unknown.
        rows: the items to find negatives for; None for all. Negatives come from all N in any case.
        device: where the products are computed; the float32 copy of the features lies there.
        progress: called with the number of items done.

    Returns:
        ``[len(rows), k]`` int64 row numbers, nearest first, -1 where fewer than k items may be drawn.

    Raises:
        FieldmarkError: features as in :func:`semdedup`; k below 1; another number of labels or titles; a row number
            that is not there.
    """
    if k < 1:
        raise FieldmarkError(f"{k} negatives an item were asked for; expected at least 1")
    unit = unit_rows(features).to(device)
    wanted = np.arange(len(unit)) if rows is None else np.asarray(rows, dtype=np.int64)
    if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(unit)):
        raise FieldmarkError(f"rows hold {wanted.min()} to {wanted.max()}; expected numbers of the {len(unit)} items")
    codes = [
        torch.from_numpy(_codes(values, len(unit), name)).to(device)
        for name, values in (("labels", labels), ("titles", None if titles is None else list(map(folded, titles))))
        if values is not None
    ]
    found = np.empty((len(wanted), k), dtype=np.int64)
    for start in range(0, len(wanted), _ROWS):
        block = torch.from_numpy(wanted[start : start + _ROWS]).to(device)
        found[start : start + _ROWS] = _nearest_allowed(unit, codes, block, k).cpu().numpy()
        progress(min(start + _ROWS, len(wanted)))
    return found


def folded(title: str | None) -> str | None:
    """A title by which equal ones are known: composed Unicode, case folded, single blanks; None if nothing is left."""
    return " ".join(unicodedata.normalize("NFC", title).casefold().split()) or None if title is not None else None


def unit_rows(features: Any) -> Tensor:
    """A float32 copy with rows of length one, made block by block.

    Raises:
        FieldmarkError: no ``[N, D]`` table, or a row with NaN, infinity or zeros alone.
    """
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise FieldmarkError(f"features have shape {shape}; expected [N, D] with at least one row and column")
    unit = torch.empty(shape, dtype=torch.float32)
    for start in range(0, shape[0], _COLUMNS):
        block = features[start : start + _COLUMNS]
        part = (block.detach().cpu() if isinstance(block, Tensor) else torch.from_numpy(np.array(block))).double()
        length = torch.linalg.vector_norm(part, dim=1, keepdim=True)
        bad = ~(torch.isfinite(length) & (length > 0)).squeeze(1)
        if bad.any():
            row = start + int(bad.nonzero()[0])
            raise FieldmarkError(f"features of item {row} are zero, NaN or infinite; leave such items out")
        unit[start : start + len(part)] = part / length
    return unit


def _clusters(unit: Tensor, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if not 1 <= clusters <= len(unit):
        raise FieldmarkError(f"{clusters} clusters were asked for; expected 1 to {len(unit)}, the number of items")
    centroids = F.normalize(_centroids(unit.numpy(), clusters, seed), dim=1)
    assignment = torch.empty(len(unit), dtype=torch.int64)
    cosine = torch.empty(len(unit))
    for start in range(0, len(unit), _ROWS):
        rows = slice(start, start + _ROWS)
        best = torch.full((len(unit[rows]),), -torch.inf)
        nearest = torch.zeros(len(best), dtype=torch.int64)
        for first in range(0, clusters, _COLUMNS):
            value, column = (unit[rows] @ centroids[first : first + _COLUMNS].T).max(dim=1)
            better = value > best
            best, nearest = torch.where(better, value, best), torch.where(better, column + first, nearest)
        assignment[rows], cosine[rows] = nearest, best
    return assignment.numpy(), (1 - cosine).numpy()


def _centroids(unit: np.ndarray, clusters: int, seed: int) -> Tensor:
    from sklearn.cluster import MiniBatchKMeans

    rng = np.random.default_rng(seed)
    sample = rng.permutation(len(unit))[: clusters * _SAMPLES_PER_CLUSTER]
    batches = max(1, len(sample) // max(_COLUMNS, clusters))  # scikit-learn wants at least `clusters` rows in each
    kmeans = MiniBatchKMeans(clusters, init=unit[sample[:clusters]], n_init=1, random_state=seed)
    for _ in range(_PASSES):
        for rows in np.array_split(rng.permutation(sample), batches):
            kmeans.partial_fit(unit[np.sort(rows)])
    return torch.from_numpy(kmeans.cluster_centers_.astype(np.float32))


def _keep(
    unit: Tensor, assignment: np.ndarray, distance: np.ndarray, epsilon: float, keep: str, progress: Progress
) -> np.ndarray:
    if not 0 <= epsilon <= 1:
        raise FieldmarkError(f"epsilon is {epsilon}; expected a number in 0..1")
    if keep not in ("hard", "easy"):
        raise FieldmarkError(f"keep is {keep!r}; expected hard or easy")
    if not len(assignment) == len(distance) == len(unit):
        raise FieldmarkError(f"{len(assignment)} clusters and {len(distance)} distances for {len(unit)} items")
    rank = -distance if keep == "hard" else distance
    order = np.lexsort((rank, assignment))  # lexsort is stable: equal ones stay in the order of their numbers
    kept = np.ones(len(unit), dtype=bool)
    done = 0
    for members in np.split(order, np.flatnonzero(np.diff(assignment[order])) + 1):
        kept[members] = ~_has_earlier_twin(unit, torch.from_numpy(members), 1 - epsilon)
        done += len(members)
        progress(done)
    return np.flatnonzero(kept)


def _has_earlier_twin(unit: Tensor, members: Tensor, threshold: float) -> np.ndarray:
    """Whether each member's cosine to one before it exceeds the threshold."""
    found = torch.zeros(len(members), dtype=torch.bool)
    for start in range(0, len(members), _ROWS):
        rows = unit[members[start : start + _ROWS]]
        for first in range(0, start + len(rows), _COLUMNS):
            width = min(_COLUMNS, start + len(rows) - first)
            near = rows @ unit[members[first : first + width]].T > threshold
            found[start : start + len(rows)] |= near.tril(start - first - 1).any(dim=1)
    return found.numpy()


def _nearest_allowed(unit: Tensor, codes: list[Tensor], rows: Tensor, k: int) -> Tensor:
    """[b, k] nearest items, none of which shares a code with its row; -1 where there are too few."""
    queries = _padded(unit[rows], _ROWS)
    best = torch.full((len(rows), 0), 0.0, device=unit.device)
    index = torch.zeros(len(rows), 0, dtype=torch.int64, device=unit.device)
    for first in range(0, len(unit), _COLUMNS):
        tile = unit[first : first + _COLUMNS]
        # Every product has one shape, so equal items get equal scores wherever they stand.
        scores = (queries @ _padded(tile, _COLUMNS).T)[: len(rows), : len(tile)]
        inside = ((rows >= first) & (rows < first + len(tile))).nonzero().squeeze(1)
        scores[inside, rows[inside] - first] = -torch.inf
        for code in codes:
            scores.masked_fill_(code[rows][:, None] == code[first : first + len(tile)][None, :], -torch.inf)
        values, columns = _top(scores, k)
        best, index = torch.cat([best, values], dim=1), torch.cat([index, columns + first], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)  # earlier tiles stand first
        best, index = best[:, :k], index.gather(1, order)[:, :k]
    index = index.masked_fill(torch.isneginf(best), -1)
    return F.pad(index, (0, k - index.shape[1]), value=-1)


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row (all, where there are fewer), of equal ones the first columns."""
    k = min(k, scores.shape[1])
    values, columns = scores.topk(k, dim=1)
    # topk takes any of the equals: rows with more of them than places, or with equals among the places, are sorted.
    tied = ((scores >= values[:, -1:]).sum(dim=1) > k) | (values[:, 1:] == values[:, :-1]).any(dim=1)
    again = tied.nonzero().squeeze(1)
    if len(again):
        sorted_values, sorted_columns = scores[again].sort(dim=1, descending=True, stable=True)
        values[again], columns[again] = sorted_values[:, :k], sorted_columns[:, :k]
    return values, columns


def _padded(rows: Tensor, count: int) -> Tensor:
    return rows if len(rows) == count else F.pad(rows, (0, 0, 0, count - len(rows)))


def _codes(values: Sequence[Any], count: int, name: str) -> np.ndarray:
    """[N] int64, equal where values are; an unknown value has a number of its own."""
    if len(values) != count:
        raise FieldmarkError(f"{len(values)} {name} were given for {count} items; expected one each")
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()  # tensors of equal value are no equal keys
    known: dict[Any, int] = {}
    return np.fromiter(
        (-1 - row if value is None else known.setdefault(value, len(known)) for row, value in enumerate(values)),
        dtype=np.int64,
        count=count,
    )
