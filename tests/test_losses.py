"""The losses against slow loops written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning import losses as pml

from fieldmark.errors import FieldmarkError
from fieldmark.losses.attention import attention_alignment
from fieldmark.losses.metric import METRIC_LOSSES, MetricLoss, build_metric_loss, potential_field
from fieldmark.losses.policy import group_advantages, policy_gradient_loss, policy_gradient_sum


def slow_advantages(rewards, eps, unbiased):
    result = []
    for row in rewards.tolist():
        mean = sum(row) / len(row)
        variance = sum((r - mean) ** 2 for r in row) / (len(row) - (1 if unbiased else 0))
        equal = all(r == row[0] for r in row)
        result.append([0.0 if equal else (r - mean) / (math.sqrt(variance) + eps) for r in row])
    return torch.tensor(result)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(
    "rewards",
    [
        [[1, 0, 1, 1, 0, 1, 0, 1]],
        [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
        [[0.1, 0.1, 0.1], [0.3, -0.1, 0.7]],
    ],
)
def test_advantages_equal_the_formula(rewards, unbiased):
    rewards = torch.tensor(rewards, dtype=torch.float32)
    torch.testing.assert_close(
        group_advantages(rewards, unbiased=unbiased), slow_advantages(rewards, 1e-4, unbiased), atol=1e-5, rtol=1e-4
    )


def test_equal_rewards_give_exactly_zero():
    # 0.1 * 3 / 3 is not 0.1 in floats: the mean of equal rewards is not their value.
    advantages = group_advantages(torch.full((2, 7), 0.1))
    assert torch.equal(advantages, torch.zeros(2, 7))
    assert torch.equal(group_advantages(torch.ones(3, 1)), torch.zeros(3, 1))


def test_advantages_of_the_papers_figure():
    """Five right of eight give about +0.72 and -1.21 (papers' method figure: +0.71, -1.22) with the sample
    deviation."""
    advantages = group_advantages(torch.tensor([[1.0, 1, 1, 1, 1, 0, 0, 0]]))
    assert advantages[0, 0].item() == pytest.approx(0.7244, abs=1e-3)
    assert advantages[0, 7].item() == pytest.approx(-1.2074, abs=1e-3)


def test_policy_gradient_is_token_level_over_the_whole_buffer():
    torch.manual_seed(0)
    logprobs = torch.randn(4, 6, requires_grad=True)
    lengths = [6, 1, 3, 4]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    advantages = torch.tensor([0.5, -1.5, 2.0, 0.0])
    loss = policy_gradient_loss(logprobs, mask, advantages)
    slow = 0.0
    for g in range(4):
        for t in range(lengths[g]):
            slow -= advantages[g].item() * logprobs[g, t].item()
    assert loss.item() == pytest.approx(slow / sum(lengths), rel=1e-5)
    loss.backward()
    expected = -(advantages[:, None] * mask) / sum(lengths)
    torch.testing.assert_close(logprobs.grad, expected)
    parts = sum(policy_gradient_sum(logprobs[g : g + 1], mask[g : g + 1], advantages[g : g + 1]) for g in range(4))
    assert (parts / mask.sum()).item() == pytest.approx(loss.item(), rel=1e-5)


def test_padding_may_hold_anything():
    logprobs = torch.tensor([[-1.0, -math.inf], [-2.0, math.nan]])
    mask = torch.tensor([[True, False], [True, False]])
    assert policy_gradient_loss(logprobs, mask, torch.tensor([1.0, -1.0])).item() == pytest.approx(-0.5)


def test_empty_buffer_is_zero_and_wrong_shapes_are_refused():
    logprobs = torch.zeros(0, 5, requires_grad=True)
    loss = policy_gradient_loss(logprobs, torch.zeros(0, 5, dtype=torch.bool), torch.zeros(0))
    assert loss.item() == 0
    with pytest.raises(ValueError, match="expected logprobs"):
        policy_gradient_loss(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="rewards must be"):
        group_advantages(torch.zeros(3))


def test_attention_alignment_is_the_mean_divergence():
    torch.manual_seed(0)
    teacher = torch.randn(5, 7).softmax(1)
    teacher[0, :3] = 0
    teacher = teacher / teacher.sum(1, keepdim=True)
    scores = torch.randn(5, 7, requires_grad=True)
    student = scores.softmax(1)
    slow = 0.0
    for row in range(5):
        for n in range(7):
            p, q = teacher[row, n].item(), student[row, n].item()
            slow += p * math.log(p / q) if p > 0 else 0.0
    loss = attention_alignment(teacher, student)
    assert loss.item() == pytest.approx(slow / 5, rel=1e-5)
    loss.backward()
    # d KL / d scores of a softmax is (student - teacher), averaged over rows
    torch.testing.assert_close(scores.grad, (student - teacher).detach() / 5, atol=1e-6, rtol=1e-4)


def test_attention_alignment_edges():
    row = torch.tensor([[0.0, 1.0]])
    assert attention_alignment(row, row).item() == 0
    assert math.isfinite(attention_alignment(row, torch.tensor([[1.0, 0.0]])).item())
    assert attention_alignment(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0
    teacher = torch.tensor([[0.5, 0.5]], requires_grad=True)
    attention_alignment(teacher, torch.tensor([[0.1, 0.9]], requires_grad=True)).backward()
    assert teacher.grad is None


class Given(torch.nn.Module):
    """A student whose embeddings are its input."""

    def forward(self, features):
        return {"sentence_embedding": features["x"]}


def slow_potential_field(embeddings, labels, proxies, alpha, delta):
    def unit(v):
        return v / v.norm()

    points = [(unit(e), int(y)) for e, y in zip(embeddings, labels)]
    points += [(unit(p), c) for c, group in enumerate(proxies) for p in group]
    total, terms = 0.0, 0
    for i, (r, owner) in enumerate(points):
        for j, (source, other) in enumerate(points):
            if i == j:
                continue
            distance = max(float((r - source).norm()), 1e-4)
            if owner == other:
                total += -1 / delta**alpha if distance < delta else -1 / distance**alpha
            else:
                total += 1 / distance**alpha if distance < delta else 1 / delta**alpha
            terms += 1
    return total / terms


@pytest.mark.parametrize(("alpha", "delta"), [(3.0, 0.2), (2.0, 0.5), (4.0, 1.2)])
def test_potential_field_equals_a_double_loop(alpha, delta):
    torch.manual_seed(1)
    embeddings, proxies = torch.randn(6, 8, dtype=torch.float64), torch.randn(3, 2, 8, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 2, 2, 1])
    value = potential_field(embeddings, labels, proxies, alpha, delta)
    assert value.item() == pytest.approx(slow_potential_field(embeddings, labels, proxies, alpha, delta), rel=2e-4)


@pytest.mark.parametrize("gap", [0.1, 0.03, 3e-4])
def test_close_embeddings_under_autocast_have_the_same_energy(gap):
    embeddings = torch.tensor([[1.0, 0.0, 0.0], [math.cos(gap), math.sin(gap), 0.0]])
    labels = torch.tensor([0, 1])
    loss = MetricLoss(Given(), build_metric_loss("potential_field", 2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss([{"x": embeddings}], labels)
    expected = slow_potential_field(embeddings.double(), labels, loss.metric.proxies.detach().double(), 3.0, 0.2)
    assert value.item() == pytest.approx(expected, rel=1e-2)


def test_multi_similarity_equals_a_loop_over_mined_pairs():
    """papers.md section 4: weights 2 and 50, base 0.5, mining margin 0.1."""
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(12, 5), dim=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    similarity = (embeddings @ embeddings.T).tolist()
    total = 0.0
    for i in range(12):
        positives = [similarity[i][j] for j in range(12) if labels[j] == labels[i] and j != i]
        negatives = [similarity[i][j] for j in range(12) if labels[j] != labels[i]]
        hard_positives = [s for s in positives if s - 0.1 < max(negatives)]
        hard_negatives = [s for s in negatives if s + 0.1 > min(positives)]
        total += math.log1p(sum(math.exp(-2 * (s - 0.5)) for s in hard_positives)) / 2
        total += math.log1p(sum(math.exp(50 * (s - 0.5)) for s in hard_negatives)) / 50
    loss = build_metric_loss("multi_similarity", 4, 5)
    assert loss(embeddings, labels).item() == pytest.approx(total / 12, rel=1e-4)


def test_potential_field_pulls_same_and_pushes_other():
    """Descent along the gradient brings a photo nearer to its own class and away from a close other one."""
    proxies = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    photo = torch.tensor([[0.6, 0.8]], requires_grad=True)
    potential_field(photo, torch.tensor([0]), proxies, alpha=3.0, delta=0.8).backward()
    moved = photo.detach() - 0.01 * photo.grad / photo.grad.norm()
    assert moved[0, 0] / moved[0].norm() > 0.6
    coincident = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    potential_field(coincident, torch.tensor([0, 1]), proxies).backward()
    assert torch.isfinite(coincident.grad).all()


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_metric_losses_are_differentiable_and_their_proxies_learn(name):
    torch.manual_seed(0)
    loss = build_metric_loss(name, 4, 8)
    embeddings = torch.randn(8, 8, requires_grad=True)
    loss(embeddings, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])).backward()
    assert embeddings.grad.abs().sum() > 0
    for parameter in loss.parameters():
        assert parameter.grad.abs().sum() > 0
    assert (name in ("proxy_anchor", "potential_field")) == any(True for _ in loss.parameters())


def test_proxy_anchor_equals_its_formula():
    torch.manual_seed(0)
    loss = build_metric_loss("proxy_anchor", 3, 4)
    assert isinstance(loss, pml.ProxyAnchorLoss)
    embeddings, labels = torch.randn(5, 4), torch.tensor([0, 0, 1, 1, 1])
    cosine = (
        torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(loss.proxies.detach().view(3, 4)).T
    )
    positive, negative = 0.0, 0.0
    for c in range(3):
        own = [math.exp(-32 * (cosine[i, c].item() - 0.1)) for i in range(5) if labels[i] == c]
        other = [math.exp(32 * (cosine[i, c].item() + 0.1)) for i in range(5) if labels[i] != c]
        positive += math.log(1 + sum(own)) / 2 if own else 0.0
        negative += math.log(1 + sum(other)) / 3
    assert loss(embeddings, labels).item() == pytest.approx(positive + negative, rel=1e-4)


def test_unknown_loss():
    with pytest.raises(FieldmarkError, match="Unknown metric loss 'triplet'"):
        build_metric_loss("triplet", 3, 4)
