"""MAPLE's losses: preferences, contrast over expanded negatives, GradCache, two processes; against slow loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from fieldmark.errors import FieldmarkError
from fieldmark.losses.cached import CachedColumnsLoss
from fieldmark.losses.expanded import Candidates, deduplicate, expanded_contrastive, matches, symmetric_contrastive
from fieldmark.losses.preference import MapleTemperatures, maple_loss, relative_preference
from fieldmark.losses.processes import gather_rows


def slow_pairwise(similarity, alignment, beta):
    total = 0.0
    for s, a in zip(similarity.tolist(), alignment.tolist()):
        for k in range(len(s)):
            for m in range(len(s)):
                if a[k] > a[m]:
                    total += (a[k] - a[m]) * math.log(1 + math.exp(-beta * (s[k] - s[m])))
    return total / len(similarity)


def slow_listwise(similarity, alignment, beta):
    total = 0.0
    for s, a in zip(similarity.tolist(), alignment.tolist()):
        order = sorted(range(len(s)), key=lambda i: -a[i])
        last = len(s) - 1
        for k in range(last):
            weight = sum(a[order[k]] - a[order[j]] for j in range(k + 1, last + 1)) / (last - k)
            suffix = sum(math.exp(beta * s[order[j]]) for j in range(k, last + 1))
            total -= weight * math.log(math.exp(beta * s[order[k]]) / suffix)
    return total / len(similarity)


SLOW = {"pairwise": slow_pairwise, "listwise": slow_listwise}


@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("candidates", [2, 4, 9])
def test_preference_equals_the_formula(kind, candidates):
    generator = torch.Generator().manual_seed(candidates)
    similarity = torch.rand(6, candidates, generator=generator, dtype=torch.float64) * 2 - 1
    alignment = torch.rand(6, candidates, generator=generator, dtype=torch.float64)
    alignment[1, 0] = alignment[1, 1]
    value = relative_preference(similarity, alignment, 14.29, kind)
    assert value.item() == pytest.approx(SLOW[kind](similarity, alignment, 14.29), rel=1e-10)
    single = relative_preference(similarity.float(), alignment.float(), 14.29, kind)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(value.item(), rel=1e-5)
    assert relative_preference(similarity.half(), alignment.half(), 1.0, kind).dtype == torch.float32


@pytest.mark.parametrize("kind", SLOW)
def test_preference_has_the_right_gradient_and_gives_the_teacher_none(kind):
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    alignment = torch.rand(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, b: relative_preference(s, alignment, b, kind), (similarity, beta))
    relative_preference(similarity, alignment, beta, kind).backward()
    assert alignment.grad is None
    assert beta.grad.abs() > 0


@pytest.mark.parametrize("kind", SLOW)
def test_order_of_candidates_does_not_matter(kind):
    generator = torch.Generator().manual_seed(1)
    similarity = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    alignment = torch.rand(5, 6, generator=generator, dtype=torch.float64)
    # ties at the end of the order, and a row of nothing else: their weights are zero
    alignment[0, :3] = 0.0
    alignment[1] = 0.4
    value = relative_preference(similarity, alignment, 5.0, kind)
    for _ in range(5):
        shuffled = torch.randperm(6, generator=generator)
        again = relative_preference(similarity[:, shuffled], alignment[:, shuffled], 5.0, kind)
        assert again.item() == pytest.approx(value.item(), rel=1e-12)
    assert relative_preference(similarity[1:2], alignment[1:2], 5.0, kind).item() == 0


@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scores_stay_finite(kind, dtype):
    similarity = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]], dtype=dtype, requires_grad=True)
    alignment = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 1.0]])
    loss = relative_preference(similarity, alignment, 1e4, kind)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(similarity.grad).all()
    assert loss.item() > 1000  # the second row is in the wrong order by 20,000


def test_of_equal_alignments_above_a_worse_one_the_first_stands_first():
    similarity, alignment = torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([[0.5, 0.5, 0.0]])
    expected = slow_listwise(similarity, alignment, 2.0)
    assert relative_preference(similarity, alignment, 2.0).item() == pytest.approx(expected, rel=1e-5)
    swapped = relative_preference(similarity[:, [1, 0, 2]], alignment, 2.0)
    assert swapped.item() == pytest.approx(slow_listwise(similarity[:, [1, 0, 2]], alignment, 2.0), rel=1e-5)


@pytest.mark.parametrize(
    ("similarity", "alignment", "words"),
    [
        (torch.zeros(2, 1), torch.zeros(2, 1), "1 candidates each; a preference needs"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "0 anchors"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"\(2, 3\) and alignment \(2, 4\)"),
        (torch.zeros(2, 2), torch.tensor([[0.1, 0.2], [math.nan, 0.5]]), "anchor 1 are"),
        (torch.zeros(2, 2), torch.tensor([[0.1, 1.2], [0.3, 0.5]]), "anchor 0 are"),
        (torch.zeros(1, 2), torch.tensor([[-0.1, 0.2]]), "anchor 0 are"),
    ],
)
def test_mistakes_are_said(similarity, alignment, words):
    with pytest.raises(FieldmarkError, match=words):
        relative_preference(similarity, alignment, 1.0)


def test_total_mixes_the_parts():
    rpa, contrastive = torch.tensor(2.0), torch.tensor(6.0)
    assert [maple_loss(rpa, contrastive, lam).item() for lam in (0, 0.25, 1)] == [6.0, 5.0, 2.0]
    with pytest.raises(FieldmarkError, match=r"lambda is 1\.5"):
        maple_loss(rpa, contrastive, 1.5)
    with pytest.raises(FieldmarkError, match="expected listwise or pairwise"):
        relative_preference(torch.zeros(1, 2), torch.zeros(1, 2), 1.0, "pair")


def test_temperatures_start_where_the_paper_does_and_are_saved():
    temperatures = MapleTemperatures()
    assert temperatures.tau.item() == pytest.approx(0.07, rel=1e-6)
    assert temperatures.beta.item() == pytest.approx(1 / 0.07, rel=1e-6)
    trained = MapleTemperatures(tau=0.03, beta=40)
    temperatures.load_state_dict(trained.state_dict())
    assert temperatures.tau.item() == pytest.approx(0.03, rel=1e-6)
    assert temperatures.beta.item() == pytest.approx(40, rel=1e-6)
    with pytest.raises(FieldmarkError, match=r"tau is 0\.9"):
        MapleTemperatures(tau=0.9)


@pytest.mark.parametrize(("name", "bounds"), [("tau", (0.01, 0.5)), ("beta", (1.0, 100.0))])
@pytest.mark.parametrize("end", [0, 1])
def test_a_temperature_comes_back_from_its_clamp(name, bounds, end):
    temperatures = MapleTemperatures()
    parameter = getattr(temperatures, f"log_{name}")
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    outwards = -1.0 if end else 1.0
    for _ in range(20):  # far over the bound, were it not clamped
        optimizer.zero_grad()
        (outwards * getattr(temperatures, name).log()).backward()
        optimizer.step()
    value = getattr(temperatures, name)
    assert value.item() == pytest.approx(bounds[end], rel=1e-5)
    optimizer.zero_grad()
    (-outwards * value.log()).backward()
    optimizer.step()
    assert getattr(temperatures, name).item() == pytest.approx(bounds[end] * math.exp(0.5 * outwards), rel=1e-4)


def slow_contrastive(anchors, candidates, positive, excluded, tau):
    total = 0.0
    for n in range(len(anchors)):
        scores = [F.cosine_similarity(anchors[n], c, dim=0).item() / tau for c in candidates]
        kept = [s for m, s in enumerate(scores) if m == positive[n] or not excluded[n][m]]
        total -= scores[positive[n]] - math.log(sum(math.exp(s) for s in kept))
    return total / len(anchors)


def test_contrastive_equals_the_formula_with_masks_and_pairs():
    generator = torch.Generator().manual_seed(2)
    anchors = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    candidates = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    positive = torch.tensor([3, 0, 11, 3, 7])
    excluded = torch.rand(5, 12, generator=generator) < 0.3
    excluded[0, 3] = True  # the positive itself stays in
    expected = slow_contrastive(anchors, candidates, positive.tolist(), excluded.tolist(), 0.07)
    assert expanded_contrastive(anchors, candidates, positive, excluded, 0.07).item() == pytest.approx(expected)
    pairs = excluded.nonzero()
    assert expanded_contrastive(anchors, candidates, positive, pairs, 0.07).item() == pytest.approx(expected)
    plain = slow_contrastive(anchors, candidates, positive.tolist(), torch.zeros_like(excluded).tolist(), 0.07)
    assert expanded_contrastive(anchors, candidates, positive, None, 0.07).item() == pytest.approx(plain)
    assert plain > expected


def test_contrastive_gradient():
    generator = torch.Generator().manual_seed(3)
    anchors = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    positive, excluded = torch.tensor([1, 4, 1]), torch.tensor([[0, 2], [2, 3]])
    assert torch.autograd.gradcheck(
        lambda a, c, t: expanded_contrastive(a, c, positive, excluded, t), (anchors, candidates, tau)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positive": torch.tensor([0, 4])}, "one column of the 4 candidates"),
        ({"positive": torch.tensor([0])}, "for each of 2 anchors"),
        ({"candidates": torch.zeros(4, 7)}, r"candidates \(4, 7\)"),
        ({"excluded": torch.zeros(2, 3, dtype=torch.bool)}, r"excluded has shape \(2, 3\)"),
        ({"anchors": torch.zeros(0, 6), "positive": torch.zeros(0, dtype=torch.int64)}, "at least one anchor"),
    ],
)
def test_wrong_columns_are_said(change, words):
    given = {
        "anchors": torch.randn(2, 6), "candidates": torch.randn(4, 6), "positive": torch.tensor([0, 1]),
        "excluded": None,
    }  # fmt: skip
    with pytest.raises(FieldmarkError, match=words):
        expanded_contrastive(**{**given, **change}, tau=0.1)


def test_deduplicate_keeps_first_appearances():
    ids = torch.tensor([7, 2**40, 7, -3, 2**40, 7, 5])
    kept, inverse = deduplicate(ids)
    assert kept.tolist() == [0, 1, 3, 6]
    assert torch.equal(ids[kept][inverse], ids)
    kept, inverse = deduplicate(torch.zeros(0, dtype=torch.int64))
    assert (len(kept), len(inverse)) == (0, 0)


def test_unknown_keys_match_nothing():
    ours, theirs = torch.tensor([[1, -1], [2, 9]]), torch.tensor([[-1, -1], [3, 9], [1, 5]])
    assert matches(ours, theirs).tolist() == [[False, False, True], [False, True, False]]


def batch(seed, anchors=4, negatives=6, dim=8):
    """Images and texts of a batch: features a model embeds, ids and keys; some ids and keys repeat."""
    generator = torch.Generator().manual_seed(seed)
    rows = anchors + negatives
    ids = torch.cat([torch.arange(anchors), torch.randint(2, 9, (negatives,), generator=generator)]) + 100
    table = torch.randn(120, dim, generator=torch.Generator().manual_seed(99))
    keys = torch.stack([ids % 5, torch.full((rows,), -1)], dim=1)
    return {"x": table[ids]}, {"x": table.flip(0)[ids]}, ids, keys


def slow_symmetric(images, texts, ids, keys, anchors, tau):
    """Both directions with loops over anchors and over the distinct ids."""
    total = 0.0
    for queries, pool in ((images, texts), (texts, images)):
        for n in range(anchors):
            score = {}
            for m in range(len(ids)):
                score.setdefault(int(ids[m]), F.cosine_similarity(queries[n], pool[m], dim=0).item() / tau)
            key = {int(i): int(k) for i, k in zip(ids, keys[:, 0])}
            own = int(ids[n])
            kept = [s for i, s in score.items() if i == own or key[i] != key[own]]
            total -= (score[own] - math.log(sum(math.exp(s) for s in kept))) / (2 * anchors)
    return total


def test_symmetric_contrast_counts_a_candidate_once_and_no_positive_as_negative():
    images, texts, ids, keys = batch(0)
    assert len(set(ids.tolist())) < len(ids)  # the same candidate serves several anchors
    value = symmetric_contrastive(Candidates(images["x"], ids, keys), Candidates(texts["x"], ids, keys), 4, 0.2)
    assert value.item() == pytest.approx(slow_symmetric(images["x"], texts["x"], ids, keys, 4, 0.2), rel=1e-5)
    with pytest.raises(FieldmarkError, match="11 anchors were given with 10 images"):
        symmetric_contrastive(Candidates(images["x"], ids, keys), Candidates(texts["x"], ids, keys), 11, 0.2)
    with pytest.raises(FieldmarkError, match=r"keys \(10,\)"):
        Candidates(images["x"], ids, keys[:, 0])


class Embedder(nn.Module):
    def __init__(self, dim=8, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(dim, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 6))

    def forward(self, features):
        return {"sentence_embedding": self.layers(features["x"])}


class Contrast(nn.Module):
    """Contrast and preferences over two columns, with learnable temperatures."""

    def __init__(self, ids, keys, anchors):
        super().__init__()
        self.ids, self.keys, self.anchors = ids, keys, anchors
        self.temperatures = MapleTemperatures(tau=0.2, beta=5.0)

    def forward(self, columns, labels=None):
        images, texts = columns
        contrast = symmetric_contrastive(
            Candidates(images, self.ids, self.keys), Candidates(texts, self.ids, self.keys), self.anchors,
            self.temperatures.tau,
        )  # fmt: skip
        cosines = F.normalize(images[: self.anchors], dim=1) @ F.normalize(texts[:4], dim=1).T
        alignment = torch.linspace(0, 1, cosines.numel()).reshape(cosines.shape)
        return maple_loss(relative_preference(cosines, alignment, self.temperatures.beta), contrast, 0.5)


def gradients(*modules):
    return {f"{i}.{n}": p.grad.clone() for i, module in enumerate(modules) for n, p in module.named_parameters()}


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(("dropout", "mini_batch"), [(0.0, 3), (0.0, 64), (0.5, 3)])
def test_cached_loss_equals_the_plain_one(dropout, mini_batch, scale):
    """With dropout the plain loss embeds the same sub-batches in the same order, so it draws the same masks."""
    images, texts, ids, keys = batch(0)
    model, loss = Embedder(dropout=dropout), Contrast(ids, keys, 4)
    torch.manual_seed(5)
    columns = [
        torch.cat([model({"x": part})["sentence_embedding"] for part in column["x"].split(mini_batch)])
        for column in (images, texts)
    ]
    plain = loss(columns)
    (scale * plain).backward()
    expected = gradients(model, loss)
    model.zero_grad()
    loss.zero_grad()
    cached = CachedColumnsLoss(model, loss, mini_batch)
    torch.manual_seed(5)
    value = cached([images, texts])
    assert all(parameter.grad is None for parameter in cached.parameters())  # gradients come in the backward pass
    assert value.item() == pytest.approx(plain.item(), abs=1e-5)
    (scale * value).backward()
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)
        assert gradient.abs().max() > 0, name
    with torch.no_grad():
        model.eval()
        assert not cached([images, texts]).requires_grad


def test_cached_columns_may_differ_in_length_and_stay_unused_in_part():
    model = Embedder()
    short, long = {"x": torch.randn(2, 8)}, {"x": torch.randn(7, 8)}
    cached = CachedColumnsLoss(
        model, lambda columns, labels: (columns[0].sum() * columns[1][:3].sum()) + labels.sum(), 3
    )
    value = cached([short, long], torch.tensor([1.0]))
    value.backward()
    found = gradients(model)
    model.zero_grad()
    outputs = [model(column)["sentence_embedding"] for column in (short, long)]
    (outputs[0].sum() * outputs[1][:3].sum()).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)
    with pytest.raises(FieldmarkError, match="mini_batch_size is 0"):
        CachedColumnsLoss(model, len, 0)


MINI_BATCHES = (0, 3)  # the plain loss, and the cached one


def joint_step(model, loss, images, texts, mini_batch):
    value = CachedColumnsLoss(model, loss, mini_batch)([images, texts]) if mini_batch else None
    if value is None:
        value = loss([model(images)["sentence_embedding"], model(texts)["sentence_embedding"]])
    value.backward()
    return value.item()


def shares(rank):
    """What one of two processes holds: equally many anchors, another number of negatives."""
    return batch(rank, negatives=6 + rank)


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    assert gather_rows(torch.arange(rank + 1)).tolist() == [0, 0, 1]
    images, texts, ids, keys = shares(rank)
    for mini_batch in MINI_BATCHES:
        model, loss = Embedder(), Contrast(ids, keys, 4)
        value = joint_step(model, loss, images, texts, mini_batch)
        for parameter in model.parameters():  # as DDP does; the loss's own are averaged already
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        torch.save({"value": value, "gradients": gradients(model, loss)}, f"{folder}/{rank}-{mini_batch}.pt")
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    both = [shares(rank) for rank in range(2)]
    model, loss = Embedder(), JointContrast(both)
    images, texts = ({"x": torch.cat([share[column]["x"] for share in both])} for column in range(2))
    value = joint_step(model, loss, images, texts, 0)
    expected = gradients(model, loss)
    for mini_batch in MINI_BATCHES:
        found = [torch.load(tmp_path / f"{rank}-{mini_batch}.pt") for rank in range(2)]
        assert sum(one["value"] for one in found) / 2 == pytest.approx(value, abs=1e-5)
        for one in found:
            for name, gradient in one["gradients"].items():
                torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


class JointContrast(Contrast):
    """The loss of one process on the batches of both: anchors first, as the contract wants."""

    def __init__(self, both):
        starts = [0, len(both[0][2])]
        ends = [len(both[0][2]), sum(len(share[2]) for share in both)]
        first = [row for start in starts for row in range(start, start + 4)]
        self.order = first + [row for start, end in zip(starts, ends) for row in range(start + 4, end)]
        super().__init__(*(torch.cat([share[part] for share in both])[self.order] for part in (2, 3)), 8)

    def forward(self, columns, labels=None):
        images, texts = (column[self.order] for column in columns)
        contrast = symmetric_contrastive(
            Candidates(images, self.ids, self.keys), Candidates(texts, self.ids, self.keys), 8, self.temperatures.tau
        )
        alignment = torch.linspace(0, 1, 16).reshape(4, 4)
        preferences = [
            relative_preference(
                F.normalize(images[part], dim=1) @ F.normalize(texts[part], dim=1).T, alignment, self.temperatures.beta
            )
            for part in (slice(4), slice(4, 8))
        ]
        return maple_loss(sum(preferences) / 2, contrast, 0.5)
