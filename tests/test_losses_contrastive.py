"""AGCL and its BM25 against slow loops written from the formulas; GradCache, two processes."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from fieldmark.errors import FieldmarkError
from fieldmark.losses.bm25 import BM25, attribute_words, bm25_scores
from fieldmark.losses.cached import CachedColumnsLoss
from fieldmark.losses.contrastive import (
    AttributeGuidedObjective,
    attribute_guided_contrastive,
    attribute_guided_rows,
    false_negatives,
    relative_to_positive,
)


def slow_agcl(similarity, bm25, positive, temperature, delta, same=None):
    """Eq. 1-3 with loops; keeps the graph of `similarity`."""
    total = 0.0
    for i in range(len(similarity)):
        own = positive[i]
        term = [math.exp(1 + math.tanh(b)) * torch.exp(s / temperature) for s, b in zip(similarity[i], bm25[i])]
        denominator = term[own]
        for j in range(len(term)):
            masked = similarity[i][j].item() > similarity[i][own].item() + delta
            if j != own and not masked and not (same is not None and same[i][j]):
                denominator = denominator + term[j]
        total = total - torch.log(term[own] / denominator)
    return total / len(similarity)


def random_batch(seed, queries=7, candidates=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(queries, candidates, generator=generator, dtype=dtype) * 2 - 1
    bm25 = 3 * torch.rand(queries, candidates, generator=generator, dtype=dtype)
    bm25[torch.rand(queries, candidates, generator=generator) < 0.4] = 0
    same = torch.rand(queries, candidates, generator=generator) < 0.2
    return similarity, bm25, same


@pytest.mark.parametrize("delta", [-0.2, 0.0, 0.4, math.inf])
@pytest.mark.parametrize(("temperature", "marked"), [(0.02, False), (0.02, True), (1.0, True)])
def test_agcl_equals_the_formula_in_value_and_gradient(temperature, marked, delta):
    for seed in range(3):
        similarity, bm25, same = random_batch(seed)
        same = same if marked else None
        ours, slow = similarity.clone().requires_grad_(), similarity.clone().requires_grad_()
        value = attribute_guided_contrastive(ours, bm25, temperature, delta, same=same)
        expected = slow_agcl(slow, bm25.tolist(), range(7), temperature, delta, same)
        assert value.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
        value.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, slow.grad, rtol=1e-8, atol=1e-10)
        assert ours.grad.abs().max() > 0


def test_what_the_formula_is_made_of_changes_the_loss():
    """Each part of the last test's inputs takes effect, so that none could be left out unseen."""
    similarity, bm25, same = random_batch(0)
    plain = attribute_guided_contrastive(similarity, bm25, 0.1, 0.4)
    for other in (
        attribute_guided_contrastive(similarity, torch.zeros_like(bm25), 0.1, 0.4),
        attribute_guided_contrastive(similarity, bm25, 0.1, math.inf),
        attribute_guided_contrastive(similarity, bm25, 0.1, 0.4, same=same),
        attribute_guided_contrastive(similarity.T, bm25, 0.1, 0.4),
    ):
        assert abs(other.item() - plain.item()) > 1e-3


def test_agcl_of_two_by_hand():
    """One negative as similar as the positive, which shares all of its attributes: e times the weight."""
    value = attribute_guided_contrastive(torch.full((2, 2), 0.5), torch.tensor([[0.0, 50], [50, 0]]), 0.02, 0.4)
    assert value.item() == pytest.approx(math.log(1 + math.e))
    assert attribute_guided_contrastive(torch.full((2, 2), 0.5), torch.zeros(2, 2), 0.02, 0.4).item() == pytest.approx(
        math.log(2)
    )


def test_the_gradient_is_that_of_finite_differences():
    similarity, bm25, same = random_batch(1, queries=3, candidates=5)
    positive = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(
        lambda s: attribute_guided_rows(s, bm25, positive, 0.3, 0.4, same=same[:3]), similarity.requires_grad_()
    )


@pytest.mark.parametrize("positive", [[4, 0, 2], [5, 6, 8]])
def test_rows_of_one_process_against_all_candidates(positive):
    similarity, bm25, same = random_batch(2, queries=3, candidates=9)
    value = attribute_guided_rows(similarity, bm25, torch.tensor(positive), 0.1, 0.3, same=same)
    assert value.item() == pytest.approx(slow_agcl(similarity, bm25.tolist(), positive, 0.1, 0.3, same).item())


def test_the_mask_spares_the_positive_and_stops_at_the_margin():
    similarity = torch.tensor([[0.25, 0.5, 0.75], [0.0, 0.25, 0.5]], dtype=torch.float64)
    positive = torch.tensor([0, 1])
    assert false_negatives(similarity, positive, 0.25).tolist() == [[False, False, True], [False, False, False]]
    assert false_negatives(similarity, positive, -9.0).tolist() == [[False, True, True], [True, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_negatives_masked_gives_zero_and_no_nan(dtype):
    similarity = torch.eye(4, dtype=dtype).sub(0.5).requires_grad_()
    bm25 = torch.full((4, 4), 1e6)
    for changed in ({"delta": -9.0}, {"delta": 0.4, "same": torch.ones(4, 4, dtype=torch.bool)}):
        value = attribute_guided_contrastive(similarity, bm25, temperature=1e-4, **changed)
        (gradient,) = torch.autograd.grad(value, similarity)
        assert value.item() == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert attribute_guided_contrastive(torch.tensor([[0.3]]), torch.zeros(1, 1), 0.02, 0.4).item() == 0
    value = attribute_guided_contrastive(-similarity, bm25, 1e-3, math.inf)  # logits a thousand apart
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(1000 + math.log(3), rel=1e-3)
    assert similarity.grad.isfinite().all()


def test_zero_bm25_and_no_mask_is_infonce():
    similarity, bm25, _ = random_batch(3)
    expected = F.cross_entropy(similarity / 0.05, torch.arange(7))
    value = attribute_guided_contrastive(similarity, torch.zeros_like(bm25), 0.05, math.inf)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"similarity": torch.zeros(3, 4)}, r"similarity has shape \(3, 4\); expected \[B, B\]"),
        ({"similarity": torch.zeros(3)}, r"similarity has shape \(3,\)"),
        ({"similarity": torch.zeros(0, 0), "bm25": torch.zeros(0, 0)}, "at least one query"),
        ({"bm25": torch.zeros(3, 2)}, r"bm25 \(3, 2\)"),
        ({"bm25": torch.full((3, 3), math.nan)}, "bm25 holds NaN"),
        ({"temperature": 0.0}, r"the temperature is 0\.0"),
        ({"temperature": math.nan}, "the temperature is nan"),
        ({"same": torch.zeros(3, 3)}, r"type torch.float32; expected bool \[3, 3\]"),
        ({"same": torch.zeros(3, 1, dtype=torch.bool)}, r"same has shape \(3, 1\)"),
    ],
)
def test_wrong_inputs_are_said(change, words):
    given = {"similarity": torch.zeros(3, 3), "bm25": torch.zeros(3, 3), "temperature": 0.02, "delta": 0.4}
    with pytest.raises(FieldmarkError, match=words):
        attribute_guided_contrastive(**{**given, **change})


def test_a_positive_outside_the_candidates_is_said():
    with pytest.raises(FieldmarkError, match="one column of the 4 candidates for each of 2 queries"):
        attribute_guided_rows(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 4]), 0.02, 0.4)


# BM25

CATALOG = [
    {"brand": "Acme", "colour": "navy blue", "size": "1.5l"},
    {"brand": "Acme", "colour": "blue", "size": "2.5L", "for": ["men", "boys"]},
    {"brand": "Bolt", "colour": "Blue", "note": "blue, blue"},
    {"brand": "Bolt", "colour": "red", "size": 42},
    {},
    None,
    {"brand": None, "colour": "red blue"},
    {"brand": "Cord", "colour": "blue"},
]


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"colour": "Navy Blue", "fit": "slim-fit"}, ["navy", "blue", "slim", "fit"]),
        ({"for": ["Men", "teen boys"], "pack": 6, "litres": 1.5}, ["men", "teen", "boys", "6", "1.5"]),
        ({"size": "1.5l / 500 ml, 3,4."}, ["1.5l", "500", "ml", "3", "4"]),
        ({"colour": "blue", "shade": "blue"}, ["blue", "blue"]),
        ({"brand": "Zoë’s 东方"}, ["zoë", "s", "东方"]),
        ({"brand": None, "colour": "", "for": [None, " - "]}, []),
        ({}, []),
        (None, []),
    ],
)
def test_words_are_those_of_the_values(attributes, words):
    assert attribute_words(attributes) == words


@pytest.mark.parametrize("attributes", ["blue shirt", ["blue"], {"colour": {"main": "blue"}}, {"colour": [["blue"]]}])
def test_other_attributes_are_refused(attributes):
    with pytest.raises(FieldmarkError, match=r"attributes are .*expected names|the attribute 'colour' is .*expected a"):
        attribute_words(attributes)


def slow_words(attributes):
    values = [v for value in (attributes or {}).values() for v in (value if isinstance(value, list) else [value])]
    return [w for v in values if v is not None for w in re.split(r"[ ,]+", str(v).lower()) if w]


def okapi_idf(corpus):
    """rank_bm25's BM25Okapi: negative ones become a quarter of the mean."""
    idf = {}
    for word in {word for words in corpus for word in words}:
        having = sum(word in words for words in corpus)
        idf[word] = math.log(len(corpus) - having + 0.5) - math.log(having + 0.5)
    floor = 0.25 * sum(idf.values()) / len(idf)
    return {word: floor if value < 0 else value for word, value in idf.items()}


def lucene_idf(corpus):
    idf = {}
    for word in {word for words in corpus for word in words}:
        having = sum(word in words for words in corpus)
        idf[word] = math.log(1 + (len(corpus) - having + 0.5) / (having + 0.5))
    return idf


def slow_okapi(queries, candidates, corpus, idf, k1, b):
    """rank_bm25's BM25Okapi.get_scores, word by word of each query, over the words that the corpus has."""
    average = sum(map(len, corpus)) / len(corpus)
    known = {word for words in corpus for word in words}
    table = []
    for query in queries:
        table.append([])
        for candidate in candidates:
            candidate = [word for word in candidate if word in known]
            score = 0.0
            for word in query:
                frequency = candidate.count(word)
                length = 1 - b + b * len(candidate) / average
                if frequency:  # else the term is 0, or 0 / 0 where b = 1 and the candidate has no word
                    score += idf[word] * frequency * (k1 + 1) / (frequency + k1 * length)
            table[-1].append(score)
    return table


QUERIES = [*CATALOG, {"a": "blue", "b": "blue"}, {"a": "unheard of"}, {"a": "acme unheard"}]


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (1.2, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("idf_of", [lucene_idf, okapi_idf])
def test_bm25_equals_okapi_but_for_its_idf_and_a_constant(idf_of, k1, b):
    corpus, queries = [slow_words(item) for item in CATALOG], [slow_words(item) for item in QUERIES]
    bm25, idf = BM25.fit(CATALOG, k1=k1, b=b), idf_of(corpus)
    if idf_of is okapi_idf:
        bm25 = replace(bm25, idf=np.array([idf[word] for word in bm25.vocabulary]))
    found = bm25_scores(bm25.encode(QUERIES), bm25.encode(QUERIES))
    expected = torch.tensor(slow_okapi(queries, queries, corpus, idf, k1, b)) / (k1 + 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    once = bm25_scores(bm25.encode([{"a": "blue"}]), bm25.encode(QUERIES))[0]
    assert once.max() > 0
    torch.testing.assert_close(found[8], 2 * once)  # the query has the word twice
    for empty in (4, 5, 9):  # no attributes, none at all, unknown words
        assert (found[empty] == 0).all()
        assert (found[:, empty] == 0).all()


def test_okapi_would_be_negative_where_lucene_is_not():
    corpus = [slow_words(item) for item in CATALOG]
    having = sum("blue" in words for words in corpus)
    assert having > len(corpus) / 2 > 0 > math.log((len(corpus) - having + 0.5) / (having + 0.5))
    assert (BM25.fit(CATALOG).idf > 0).all()


def test_many_items_and_selected_rows():
    rng = np.random.default_rng(0)
    items = [{"a": f"w{rng.integers(9)} w{rng.integers(40)}", "b": f"w{rng.integers(400)}"} for _ in range(300)]
    bm25 = BM25.fit(items)
    encoded, rows, columns = bm25.encode(items), rng.integers(0, 300, 20), rng.integers(0, 300, 30)
    words = [slow_words(item) for item in items]
    expected = slow_okapi([words[i] for i in rows], [words[i] for i in columns], words, lucene_idf(words), 1.5, 0.75)
    found = bm25_scores(encoded[rows], encoded[columns])
    torch.testing.assert_close(found, torch.tensor(expected) / 2.5, rtol=1e-5, atol=1e-6)
    assert 0 < (found == 0).sum() < found.numel()


def test_bm25_without_words_or_with_other_constants_is_refused():
    with pytest.raises(FieldmarkError, match="no attribute of the 2 items given has a word"):
        BM25.fit([{}, {"colour": " "}])
    with pytest.raises(FieldmarkError, match="no attribute of the 0 items"):
        BM25.fit([])
    for constants in ({"k1": -1.0}, {"b": 1.5}, {"b": math.nan}):
        with pytest.raises(FieldmarkError, match="expected k1 of 0 or more"):
            BM25.fit(CATALOG, **constants)


def test_relative_scores_are_those_of_the_positive():
    bm25 = torch.tensor([[2.0, 1.0, 4.0], [3.0, 0.0, 5.0]])
    assert relative_to_positive(bm25, torch.tensor([0, 1])).tolist() == [[1.0, 0.5, 2.0], [0.0, 0.0, 0.0]]


# The objective

PAIRS, DIM = 6, 8
WAYS = {
    "bm25": {},
    "self": {"scale": "self"},
    "symmetric": {"symmetric": True},
    "none": {"weights": "none"},
}


def encoded():
    """Attributes of 40 things, some of which share words."""
    rng = np.random.default_rng(1)
    items = [{"a": f"w{rng.integers(3)}", "b": f"v{rng.integers(8)} u{rng.integers(20)}"} for _ in range(40)]
    return BM25.fit(items).encode(items)


def pairs(seed):
    """Inputs of queries and candidates, and labels: two pairs of a product, two of none known."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(PAIRS, DIM, generator=generator)
    candidates = queries + 1.5 * torch.randn(PAIRS, DIM, generator=generator)
    rows = torch.randint(0, 40, (2, PAIRS), generator=generator)
    labels = {
        "keys": torch.tensor([7, 2**40, 7, -1, -1, 10 + seed]),
        "query_rows": rows[0],
        "candidate_rows": rows[1],
    }
    return {"x": queries}, {"x": candidates}, labels


def slow_objective(columns, labels, weights="bm25", scale="raw", symmetric=False, tau=0.02, delta=0.4):
    keys, table, total = labels["keys"].tolist(), encoded(), 0.0
    same = [[one == other != -1 for other in keys] for one in keys]
    sides = [(columns[0], labels["query_rows"]), (columns[1], labels["candidate_rows"])]
    for (ours, rows), (theirs, others) in [sides, sides[::-1]][: 1 + symmetric]:
        similarity = F.cosine_similarity(ours[:, None].double(), theirs[None].double(), dim=2)
        bm25 = bm25_scores(table[rows.numpy()], table[others.numpy()]).double()
        if scale == "self":
            bm25 = torch.stack([row / row[i] if row[i] else row * 0 for i, row in enumerate(bm25)])
        if weights == "none":
            bm25, delta = bm25 * 0, math.inf
        total += slow_agcl(similarity, bm25.tolist(), range(len(keys)), tau, delta, same).item() / (1 + symmetric)
    return total


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_the_objective_equals_the_loop(settings):
    queries, candidates, labels = pairs(0)
    columns = [queries["x"], candidates["x"]]
    objective = AttributeGuidedObjective(encoded(), **settings, temperature=0.1, delta=0.05)
    value = objective(columns, labels)
    expected = slow_objective(columns, labels, **settings, tau=0.1, delta=0.05)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert (objective.parts["masked_share"] > 0) == (settings.get("weights") != "none")
    two_columns = {**labels, "keys": torch.stack([torch.full((PAIRS,), -1), labels["keys"]], dim=1)}
    assert objective(columns, two_columns).item() == value.item()


def test_the_control_needs_no_attributes_and_is_infonce():
    queries, candidates, labels = pairs(0)
    columns = [queries["x"], candidates["x"]]
    objective = AttributeGuidedObjective(None, weights="none", temperature=0.5, delta=-9.0)
    value = objective(columns, {"keys": torch.arange(PAIRS)})
    cosines = F.cosine_similarity(columns[0][:, None], columns[1][None], dim=2)
    assert value.item() == pytest.approx(F.cross_entropy(cosines / 0.5, torch.arange(PAIRS)).item(), rel=1e-5)
    assert objective.parts == {"masked_share": 0.0, "tanh_bm25": 0.0}
    of_a_product = objective(columns, labels).item()  # another pair of the product is no negative
    assert of_a_product < value.item() - 0.01
    assert of_a_product == pytest.approx(slow_objective(columns, labels, weights="none", tau=0.5), rel=1e-5)
    with pytest.raises(FieldmarkError, match="BM25 weights need attributes"):
        AttributeGuidedObjective(None)
    for settings in ({"weights": "bm52"}, {"scale": "own"}):
        with pytest.raises(FieldmarkError, match="expected bm25 or none, raw or self"):
            AttributeGuidedObjective(encoded(), **settings)


def test_the_objective_says_how_much_it_masked_and_weighted():
    columns = [torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[0.0, 1], [0.6, 0.8]])]
    items = [{"a": "x y"}, {"a": "x"}, {"a": "z"}]
    table = BM25.fit(items).encode(items)
    labels = {"keys": torch.tensor([0, 1]), "query_rows": torch.tensor([0, 2]), "candidate_rows": torch.tensor([2, 1])}
    objective = AttributeGuidedObjective(table, delta=0.4)
    value = objective(columns, labels)
    x_with_x, z_with_z = (
        math.tanh(bm25_scores(table[np.array([i])], table[np.array([j])]).item()) for i, j in ((0, 1), (2, 2))
    )
    assert 0 < x_with_x < z_with_z
    # The first query's cosines are 0 and 0.6, which is masked; the second's 0.8 and 1, which is not.
    assert objective.parts == pytest.approx({"masked_share": 0.5, "tanh_bm25": (x_with_x + z_with_z) / 2})
    assert value.item() == pytest.approx(math.log(1 + math.exp((1 - 0.8) / 0.02 + z_with_z)) / 2, rel=1e-5)
    objective(columns, {**labels, "keys": torch.tensor([3, 3])})  # no negative is left
    assert objective.parts == {"masked_share": 0.0, "tanh_bm25": 0.0}


class Embedder(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(DIM, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 6))

    def forward(self, features):
        return {"sentence_embedding": self.layers(features["x"])}


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("dropout", "mini_batch"), [(0.0, 4), (0.0, 64), (0.5, 4)])
@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_gradcache_equals_the_plain_loss(settings, dropout, mini_batch):
    """With dropout the plain loss embeds the same sub-batches in the same order, so it draws the same masks."""
    queries, candidates, labels = pairs(0)
    model, objective = Embedder(dropout), AttributeGuidedObjective(encoded(), **settings, temperature=0.2, delta=0.0)
    torch.manual_seed(5)
    columns = [
        torch.cat([model({"x": part})["sentence_embedding"] for part in column["x"].split(mini_batch)])
        for column in (queries, candidates)
    ]
    plain = objective(columns, labels)
    plain.backward()
    expected, parts = gradients(model), objective.parts
    model.zero_grad()
    torch.manual_seed(5)
    value = CachedColumnsLoss(model, objective, mini_batch)([queries, candidates], labels)
    value.backward()
    assert value.item() == pytest.approx(plain.item(), abs=1e-5)
    assert objective.parts == pytest.approx(parts)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)
        assert gradient.abs().max() > 0, name


def step(settings, share):
    queries, candidates, labels = share
    model, objective = Embedder(), AttributeGuidedObjective(encoded(), **settings, temperature=0.2, delta=0.0)
    value = CachedColumnsLoss(model, objective, 4)([queries, candidates], labels)
    value.backward()
    return model, value.item(), objective.parts


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, settings in WAYS.items():
        model, value, parts = step(settings, pairs(rank))
        for parameter in model.parameters():  # as DDP does
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        torch.save({"value": value, "parts": parts, "gradients": gradients(model)}, f"{folder}/{rank}-{name}.pt")
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    both = [pairs(rank) for rank in range(2)]
    joint = [{"x": torch.cat([share[side]["x"] for share in both])} for side in range(2)]
    labels = {name: torch.cat([share[2][name] for share in both]) for name in both[0][2]}
    for name, settings in WAYS.items():
        model, value, parts = step(settings, (*joint, labels))
        expected = gradients(model)
        found = [torch.load(tmp_path / f"{rank}-{name}.pt") for rank in range(2)]
        assert sum(one["value"] for one in found) / 2 == pytest.approx(value, abs=1e-5)
        assert found[0]["value"] != pytest.approx(found[1]["value"], abs=1e-3)
        for one in found:
            for key, gradient in one["gradients"].items():
                torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4)
        means = {part: sum(one["parts"][part] for one in found) / 2 for part in parts}
        assert means == pytest.approx(parts, rel=1e-5)
        assert (parts["masked_share"] > 0) == (name != "none")


def test_names_of_properties_are_no_words_and_unspaced_scripts_are_pairs():
    assert attribute_words({"properties": "brand: Hipp; size: 1.5l"}) == ["hipp", "1.5l"]
    assert attribute_words({"a": "brand", "properties": "品牌: 耐克; 颜色: 深蓝色"}) == [
        "brand",
        "耐克",
        "深蓝",
        "蓝色",
    ]
    assert attribute_words({"a": "iphone手机壳"}) == ["iphone", "手机", "机壳"]
    assert attribute_words({"a": "Star Wars: Lego"}) == ["star", "wars", "lego"]
    assert attribute_words({"a": "red; large: 3"}) == ["red", "large", "3"]
