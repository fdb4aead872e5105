"""Downstream use of frozen embeddings (AFMRL section 4): a linear probe and k-means, both on categories.

The probe is multinomial logistic regression (scikit-learn, L-BFGS) on rows of unit length, each coordinate brought to
mean 0 and variance 1 on the training rows, so that one regularisation serves embeddings of any size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.clustering import clustering_metrics
from fieldmark.evaluation.inputs import Rows, checked_labels, encode_labels

logger = logging.getLogger(__name__)

MAX_ITERATIONS = 1000


def linear_probe(embeddings: Any, labels: Any, test_embeddings: Any, test_labels: Any) -> dict[str, float]:
    """Accuracy of a linear classifier on items that it was not fitted to.

    The same input gives the same accuracy on the same machine. Memory beyond the input: the rows twice in float32, and
    a few tables of training items x classes.

    Args:
        embeddings: [N, D] of the training items, torch or numpy.
        labels: N integers or strings.
        test_embeddings: [M, D].
        test_labels: M of the same kind.

    Returns:
        `probe_accuracy` over the test items whose label the training items have (0 to 1), `n_probe_train`,
        `n_probe_test` (those items), `n_probe_skipped` (the other test items, which no probe could get right).

    Raises:
        FieldmarkError: empty input, lengths or widths that differ, NaN or infinity, a row of zeros, bad labels, fewer
            than two training labels, or no test item with one of them.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, test_rows = Rows(embeddings), Rows(test_embeddings, "test embeddings")
    if rows.dim != test_rows.dim:
        raise FieldmarkError(
            f"embeddings have {rows.dim} dimensions and test embeddings {test_rows.dim}; give both of one student"
        )
    codes, test_codes = encode_labels(
        checked_labels(len(rows), labels), checked_labels(len(test_rows), test_labels, "test labels")
    )
    known = np.isin(test_codes, codes)
    if codes.max() == 0 or not known.any():
        raise FieldmarkError(
            f"the training items have {codes.max() + 1} labels, which {known.sum()} test items share; a probe needs "
            "2 labels or more, and test items of them"
        )
    classifier = LogisticRegression(max_iter=MAX_ITERATIONS)
    probe = make_pipeline(StandardScaler(), classifier).fit(rows.unit(slice(None)).numpy(), codes)
    if classifier.n_iter_.max() >= MAX_ITERATIONS:
        logger.warning("the linear probe has not converged after %d iterations", MAX_ITERATIONS)
    predicted = probe.predict(test_rows.unit(np.flatnonzero(known)).numpy())
    return {
        "probe_accuracy": float((predicted == test_codes[known]).mean()),
        "n_probe_train": len(rows),
        "n_probe_test": int(known.sum()),
        "n_probe_skipped": int((~known).sum()),
    }


def downstream_metrics(
    train_embeddings: np.ndarray,
    train_categories: Sequence[str | None],
    embeddings: np.ndarray,
    categories: Sequence[str | None],
) -> dict[str, float]:
    """The linear probe's accuracy, and k-means of as many clusters as there are categories.

    Args:
        train_embeddings: [N, D], what the probe is fitted to.
        train_categories: N categories; items without one (None) are left out here and below.
        embeddings: [M, D], what is measured.
        categories: M categories.

    Returns:
        The keys of `linear_probe`, and those of `clustering_metrics` as `coarse_nmi`, `coarse_ari`, ...
    """
    train, measured = ([row for row, one in enumerate(given) if one] for given in (train_categories, categories))
    known = [categories[row] for row in measured]
    probed = linear_probe(
        train_embeddings[train], [train_categories[row] for row in train], embeddings[measured], known
    )
    clustered = clustering_metrics(embeddings[measured], known)
    return probed | {f"coarse_{name}": value for name, value in clustered.items()}
