"""Metric learning alone, on the embedded teacher's tower: what moves and how fast, resuming, two processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fieldmark.methods import metric
from fieldmark.methods.metric import MetricConfig
from fieldmark.methods.quickstart import embedded_teacher
from fieldmark.methods.trainer import FieldmarkTrainer, what_is_trained
from helpers_training import few, killed_at, log_of, train_in_two_processes, weights_of

SMALL = {
    "data": "aviary:4",
    "student": str(embedded_teacher()),
    "classes_per_batch": 4,
    "items_per_class": 2,
    "learning_rate": 1e-4,
    "pooler_learning_rate": 2e-4,
    "eval_batch_size": 32,
}
# settings, and the rates expected of tower, pooler and proxies
RUNS = [
    ({"loss": "proxy_anchor", "pooling": "attention"}, (1e-4, 2e-4, 1e-2)),
    (
        {"loss": "potential_field", "pooling": "mean", "embedding_dim": 32, "proxy_learning_rate": 3e-3},
        (1e-4, 2e-4, 3e-3),
    ),
]


@contextmanager
def watching() -> Iterator[list[tuple[FieldmarkTrainer, dict[str, Tensor]]]]:
    """The trainers of the runs inside the block, each with its weights at the start; measurements on eight photos."""
    seen: list[tuple[FieldmarkTrainer, dict[str, Tensor]]] = []
    full, init = metric.open_task, FieldmarkTrainer.__init__

    def starting(self, *args, **kwargs):
        init(self, *args, **kwargs)
        seen.append((self, {name: value.clone() for name, value in self.own_loss.state_dict().items()}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric, "open_task", lambda config: few(full(config)))
        patch.setattr(FieldmarkTrainer, "__init__", starting)
        yield seen


def train(out: Path, **changes) -> Path:
    return metric.train(MetricConfig(out=str(out), **{**SMALL, **changes}))


@pytest.fixture(scope="module", params=RUNS, ids=[settings["loss"] for settings, _ in RUNS])
def finished(request, tmp_path_factory):
    """A run of two steps: its trainer, the weights it started with, the rates expected of it."""
    settings, rates = request.param
    with watching() as seen:
        train(tmp_path_factory.mktemp("run") / "run", max_steps=2, **settings)
    (((trainer, start)),) = seen
    return trainer, start, rates


def part(name: str) -> str:
    return {"model.0": "tower", "model.1": "pooler"}.get(name[:7], "proxies")


def test_tower_pooler_and_proxies_all_moved(finished):
    trainer, start, _ = finished
    trained = trainer.own_loss.state_dict()
    assert {part(name) for name in start} == {"tower", "pooler", "proxies"}
    still = {name for name, value in start.items() if torch.equal(value, trained[name])}
    # Only a language model reads the DeepStack features, and here is none.
    assert still == {name for name in start if "deepstack" in name}


def test_a_run_says_at_its_start_what_is_trained(finished):
    trainer, _, _ = finished
    line = what_is_trained(trainer.own_loss)
    counted = sum(int(word.replace(",", "")) for word in re.findall(r" ([\d,]+)\b", line))
    assert counted == sum(p.numel() for p in trainer.own_loss.parameters())
    assert all(f"{name} " in line.partition("; frozen: ")[0] for name in ("tower", "merger", "pooler", "proxies"))


def test_each_part_has_its_own_learning_rate(finished):
    trainer, _, expected = finished
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    found = {(part(name), rates[id(p)]) for name, p in trainer.own_loss.named_parameters()}
    assert found == set(zip(("tower", "pooler", "proxies"), expected, strict=True))


def test_a_killed_run_resumes_to_the_same_losses_weights_and_proxies(tmp_path):
    settings = {"max_steps": 4, "save_steps": 2}
    with watching() as seen:
        whole = train(tmp_path / "whole", **settings)
        with killed_at(FieldmarkTrainer, 3):
            train(tmp_path / "killed", **settings)
        with (tmp_path / "killed" / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write('{"step": 4, "lo')  # a line that the kill cut short
        resumed = train(tmp_path / "killed", **settings, resume=True)
    keys = ("step", "loss", "grad_norm/tower", "grad_norm/pooler", "grad_norm/proxies")
    logs = [[[record[key] for key in keys] for record in log_of(out)] for out in (whole, resumed)]
    assert logs[0] == logs[1]
    assert [record[0] for record in logs[0]] == [1, 2, 3, 4]
    one, other = weights_of(whole), weights_of(resumed)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    unbroken, killed, again = (trainer.own_loss.metric.proxies for trainer, _ in seen)
    assert torch.equal(unbroken, again)
    assert not torch.equal(unbroken, killed), "the last step moves the proxies"


def test_two_processes_give_what_one_gives(tmp_path):
    """Same global batch, its loss and proxies on both: losses, gradients and weights agree."""
    settings = {**SMALL, "max_steps": 3}
    with watching():
        one = train(tmp_path / "one", **settings)
    train_in_two_processes("metric", {**settings, "out": str(tmp_path / "two")})
    alone, shared = log_of(one), log_of(tmp_path / "two")
    assert len(alone) == len(shared) == 3
    for left, right in zip(alone, shared, strict=True):
        for key in ("loss", "grad_norm/tower", "grad_norm/pooler", "grad_norm/proxies"):
            assert right[key] == pytest.approx(left[key], abs=2e-4, rel=2e-3), key
    left, right = weights_of(one), weights_of(tmp_path / "two")
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=5e-5, rtol=1e-3)
