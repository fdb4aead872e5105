"""Group scores, the modality gap and recall between photos and captions, against slow loops."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.cross_modal import cross_modal_recall
from fieldmark.evaluation.groups import group_scores, group_scores_by_category, group_similarity
from fieldmark.evaluation.modality_gap import ACROSS, INSIDE, gap_of_scores, modality_gap


def slow_group_scores(similarity):
    text = image = both = 0
    for (a, b), (c, d) in similarity.tolist():  # a: photo 0 with caption 0, b: photo 0 with caption 1
        text_right, image_right = a > b and d > c, a > c and d > b
        text, image, both = text + text_right, image + image_right, both + (text_right and image_right)
    return {"text_score": text, "image_score": image, "group_score": both}


def test_group_scores_equal_the_loop():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randint(0, 4, (500, 2, 2), generator=generator) / 4  # many ties
    found = group_scores(similarity)
    for name, count in slow_group_scores(similarity).items():
        assert found[name] == pytest.approx(count / 500)
    assert found["n_groups"] == 500
    assert found["text_score"] != found["image_score"]


def test_random_scores_are_at_chance():
    found = group_scores(np.random.default_rng(0).random((20_000, 2, 2)))
    assert found["text_score"] == pytest.approx(1 / 4, abs=0.02)
    assert found["image_score"] == pytest.approx(1 / 4, abs=0.02)
    assert found["group_score"] == pytest.approx(1 / 6, abs=0.02)


def test_text_and_image_scores_are_not_swapped_and_ties_are_wrong():
    # Photo 1 scores high with everything: each photo finds its caption, caption 0 does not find its photo.
    scores = {"text_score": 1.0, "image_score": 0.0, "group_score": 0.0, "n_groups": 1}
    assert group_scores([[[0.4, 0.3], [0.7, 0.9]]]) == scores
    tied = [[[0.5, 0.5], [0.1, 0.9]]]
    assert group_scores(tied)["text_score"] == 0
    assert group_scores(tied)["image_score"] == 1


def test_scores_by_category():
    similarity = torch.rand(40, 2, 2, generator=torch.Generator().manual_seed(1))
    categories = ["bill", "crown", None, "bill"] * 10
    found = group_scores_by_category(similarity, categories)
    assert list(found) == ["bill", "crown"]
    assert found["bill"] == group_scores(similarity[[number for number in range(40) if number % 4 in (0, 3)]])
    assert found["crown"]["n_groups"] == 10


@pytest.mark.parametrize(
    ("similarity", "words"),
    [
        (np.zeros((3, 2)), r"shape \(3, 2\)"),
        (np.zeros((0, 2, 2)), "expected .groups"),
        ([[[0, 1], [0, math.nan]]], "group 0 hold NaN"),
        ("scores", "no table of numbers"),
    ],
)
def test_wrong_scores_are_said(similarity, words):
    with pytest.raises(FieldmarkError, match=words):
        group_scores(similarity)
    with pytest.raises(FieldmarkError, match=r"1 categories were given for 2"):
        group_scores_by_category(np.zeros((2, 2, 2)), ["a"])


def test_group_similarity_is_cosine_and_equal_captions_tie():
    generator = torch.Generator().manual_seed(2)
    images, captions = torch.randn(6, 2, 9, generator=generator), torch.randn(6, 2, 9, generator=generator)
    captions[3, 1] = captions[3, 0]
    found = group_similarity(images, captions)
    for g in range(6):
        for i in range(2):
            for t in range(2):
                cosine = torch.nn.functional.cosine_similarity(images[g, i], captions[g, t], dim=0).item()
                assert found[g, i, t] == pytest.approx(cosine, abs=1e-6)
    assert (found[3, :, 0] == found[3, :, 1]).all()
    with pytest.raises(FieldmarkError, match="in both"):
        group_similarity(images, captions[:3])


def slow_w1(one, other):
    """The integral of |F - G|, step by step."""
    points = sorted({*one, *other})
    total = 0.0
    for left, right in pairwise(points):
        below = [sum(value <= left for value in sample) / len(sample) for sample in (one, other)]
        total += abs(below[0] - below[1]) * (right - left)
    return total


def cosines(first, second, keep):
    found = []
    for n, a in enumerate(first.tolist()):
        for m, b in enumerate(second.tolist()):
            if keep(n, m):
                found.append(
                    sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
                )
    return found


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("matched_only", [True, False])
def test_gap_equals_the_definition(exclude_self, matched_only):
    generator = torch.Generator().manual_seed(3)
    sets = {name: torch.randn(7, 5, generator=generator, dtype=torch.float64) for name in ("T0", "T1", "I0", "I1")}

    def across(text, image):
        return cosines(sets[text], sets[image], lambda n, m: n == m or not matched_only)

    def inside(name):
        return cosines(sets[name], sets[name], lambda n, m: n != m or not exclude_self)

    dist, disc = [], []
    for a, b in (("0", "1"), ("1", "0")):
        match = across(f"T{a}", f"I{a}")
        dist += [slow_w1(match, inside(f"T{a}")), slow_w1(match, inside(f"I{a}"))]
        disc += [slow_w1(match, across(f"T{a}", f"I{b}")), slow_w1(match, across(f"T{b}", f"I{a}"))]
    found = modality_gap(*sets.values(), exclude_self=exclude_self, matched_only=matched_only)
    assert found.w_dist == pytest.approx(sum(dist) / 4, rel=1e-5)
    assert found.w_disc == pytest.approx(sum(disc) / 4, rel=1e-5)
    assert found.ratio == pytest.approx(sum(dist) / sum(disc), rel=1e-5)
    assert len(found.terms) == 8


def test_gap_of_equal_sizes_is_the_mean_difference_of_sorted_values():
    rng = np.random.default_rng(0)
    scores = {name: rng.random((6, 6)) for name in (*ACROSS, *INSIDE)}
    found = gap_of_scores(scores, exclude_self=False)
    for names, distance in found.terms.items():
        one, other = names.split("-")
        expected = np.abs(np.sort(scores[one].ravel()) - np.sort(scores[other].ravel())).mean()
        assert distance == pytest.approx(expected)


def test_a_shifted_modality_opens_the_gap_and_a_scorer_that_knows_matches_closes_it():
    rng = np.random.default_rng(1)
    meaning = rng.standard_normal((2, 30, 16))
    texts, images = meaning + 0.1 * rng.standard_normal((2, 2, 30, 16))
    together = modality_gap(*texts, *images)
    apart = modality_gap(*(texts + 3), *(images - 3))
    assert apart.w_dist > 10 * together.w_dist
    assert apart.ratio > together.ratio
    # one score for all: no distance at all
    assert gap_of_scores({name: np.full((3, 3), 0.5) for name in (*ACROSS, *INSIDE)}).ratio == math.inf
    # of a scorer of 1 for matches and 0 for mismatches the matched distributions lie 1 apart
    knowing = {name: np.full((4, 4), float(name[1] == name[3])) for name in (*ACROSS, *INSIDE)}
    assert gap_of_scores(knowing, matched_only=True).w_disc == 1


def test_histograms_are_densities_on_common_edges():
    rng = np.random.default_rng(2)
    found = modality_gap(*rng.standard_normal((4, 12, 8)), bins=20)
    assert set(found.densities) == {*ACROSS, *INSIDE}
    for density in found.densities.values():
        assert (density * np.diff(found.edges)).sum() == pytest.approx(1)
    assert len(found.edges) == 21


def test_a_teacher_may_lack_scores_inside_a_modality():
    rng = np.random.default_rng(3)
    scores = {name: rng.random((5, 5)) for name in (*ACROSS, "T0T0", "T1T1")}
    found = gap_of_scores(scores)
    assert set(found.terms) >= {"T0I0-T0T0", "T1I1-T1T1"}
    assert len(found.terms) == 6
    assert found.w_dist == pytest.approx((found.terms["T0I0-T0T0"] + found.terms["T1I1-T1T1"]) / 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"T0I1": None}, "expected T0I0"),
        ({"T0T0": None, "T1T1": None, "I0I0": None, "I1I1": None}, "at least one of T0T0"),
        ({"T2I0": np.zeros((4, 4))}, "T2I0 were given"),
        ({"I0I0": np.zeros((4, 3))}, r"I0I0 has shape \(4, 3\)"),
        ({"T1I1": np.full((4, 4), np.nan)}, "T1I1 holds NaN"),
    ],
)
def test_wrong_tables_are_said(change, words):
    scores = {name: np.zeros((4, 4)) for name in (*ACROSS, *INSIDE)} | change
    with pytest.raises(FieldmarkError, match=words):
        gap_of_scores({name: table for name, table in scores.items() if table is not None})


def test_wrong_sets_are_said():
    table = np.eye(3)
    with pytest.raises(FieldmarkError, match="the four sets have the shapes"):
        modality_gap(table, table, table, table[:2])
    with pytest.raises(FieldmarkError, match="N >= 2"):
        modality_gap(*[table[:1]] * 4)


def slow_recall(queries, gallery, ids, gallery_ids, k):
    unit = [np.asarray(x, dtype=np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery)]
    hits = counted = 0
    for query, own in zip(unit[0], ids):
        if own not in gallery_ids:
            continue
        order = sorted(range(len(gallery)), key=lambda n: (-round(float(unit[1][n] @ query), 9), n))
        counted += 1
        hits += own in [gallery_ids[n] for n in order[:k]]
    return hits / counted


@pytest.mark.parametrize("kind", ["integers", "strings"])
def test_recall_equals_the_loop(kind):
    rng = np.random.default_rng(4)
    images = rng.standard_normal((60, 6)).astype(np.float32)
    owners = rng.integers(70, size=300)  # texts 60 to 69 are of no photo, and some photos may have no text
    texts = (images[owners % 60] + 1.5 * rng.standard_normal((300, 6))).astype(np.float32)
    texts[10:14] = texts[9]  # equal scores
    image_ids, text_ids = list(range(60)), owners.tolist()
    if kind == "strings":
        image_ids, text_ids = [f"photo {n}" for n in image_ids], [f"photo {n}" for n in text_ids]
    found = cross_modal_recall(images, torch.from_numpy(texts), image_ids, text_ids, ks=(1, 5, 10, 1000))
    for k in (1, 5, 10):
        assert found[f"i2t_recall@{k}"] == pytest.approx(slow_recall(images, texts, image_ids, text_ids, k))
        assert found[f"t2i_recall@{k}"] == pytest.approx(slow_recall(texts, images, text_ids, image_ids, k))
    assert found["i2t_recall@1000"] == found["t2i_recall@1000"] == 1
    assert found["n_images"] == len(set(image_ids) & set(text_ids))
    assert found["n_texts"] == sum(own in set(image_ids) for own in text_ids)
    assert found["n_skipped"] == 360 - found["n_images"] - found["n_texts"]
    assert 0 < found["i2t_recall@1"] < 1


def test_any_caption_of_a_photo_is_a_hit_and_ties_go_by_index():
    images, texts = np.eye(2), np.array([[0.0, 1], [1, 0.5], [1, 0.2], [1, 0.2]])
    found = cross_modal_recall(images, texts, ["a", "b"], ["b", "a", "b", "a"], ks=(1, 2))
    assert found["i2t_recall@1"] == 0.5  # photo a: captions 2 and 3 tie, and 2 is of b
    assert found["i2t_recall@2"] == 1.0
    assert found["t2i_recall@1"] == 0.75


def test_mistakes_of_recall_are_said():
    table = np.eye(3)
    with pytest.raises(FieldmarkError, match="no image id is among"):
        cross_modal_recall(table, table, [0, 1, 2], [3, 4, 5])
    with pytest.raises(FieldmarkError, match="text ids: 2 given for 3"):
        cross_modal_recall(table, table, [0, 1, 2], [0, 1])
    with pytest.raises(FieldmarkError, match="k 0"):
        cross_modal_recall(table, table, [0, 1, 2], [0, 1, 2], ks=(0,))
    with pytest.raises(FieldmarkError, match="3 dimensions and the gallery 2"):
        cross_modal_recall(table, table[:, :2] + 1, [0, 1, 2], [0, 1, 2])
