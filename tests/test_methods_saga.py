"""SAGA on the embedded teacher: what moves, what does not, resuming, two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from fieldmark.errors import FieldmarkError
from fieldmark.methods import saga
from fieldmark.methods.quickstart import embedded_teacher
from fieldmark.methods.saga import SagaConfig
from fieldmark.students.build import build_student
from fieldmark.teacher.model import Teacher
from helpers_training import few, killed_at, log_of, train_in_two_processes, weights_of

SMALL = {
    "data": "aviary:4",
    "teacher": str(embedded_teacher()),
    "classes_per_batch": 4,
    "items_per_class": 2,
    "pairs_per_batch": 4,
    "target_pairs": 2,
    "group_size": 4,
    "max_micro_batches": 2,
    "max_new_tokens": 160,
    "temperature": 1.5,
    "top_p": 1.0,
    "learning_rate": 1e-4,
    "eval_batch_size": 32,
}


@pytest.fixture
def few_photos(monkeypatch):
    """The measurement before and after on eight photos: these tests are about training."""
    full = saga.open_task
    monkeypatch.setattr(saga, "open_task", lambda config: few(full(config)))


def train(out: Path, **changes) -> Path:
    return saga.train(SagaConfig(out=str(out), **{**SMALL, **changes}))


@pytest.fixture
def watched(monkeypatch):
    """The teacher and trainer of the run that follows."""
    seen: dict = {}
    load = Teacher.load.__func__
    init = saga.SagaTrainer.__init__

    def loading(cls, *args, **kwargs):
        seen["teacher"] = load(cls, *args, **kwargs)
        seen["before"] = {k: v.clone() for k, v in seen["teacher"].model.state_dict().items()}
        return seen["teacher"]

    def starting(self, *args, **kwargs):
        seen["trainer"] = self
        init(self, *args, **kwargs)
        seen["start"] = {k: v.clone() for k, v in self.loss.state_dict().items()}

    monkeypatch.setattr(Teacher, "load", classmethod(loading))
    monkeypatch.setattr(saga.SagaTrainer, "__init__", starting)
    return seen


def test_the_teacher_is_bit_identical_and_everything_trained_moved(tmp_path, few_photos, watched):
    out = train(tmp_path / "run", max_steps=2)
    after = watched["teacher"].model.state_dict()
    assert after.keys() == watched["before"].keys()
    for name, value in watched["before"].items():
        assert torch.equal(value, after[name]), f"{name} of the frozen teacher has changed"
    assert all(p.grad is None for p in watched["teacher"].model.parameters())
    trained = watched["trainer"].loss.state_dict()
    still = [name for name, value in watched["start"].items() if torch.equal(value, trained[name])]
    assert still == [], "these were meant to be trained and have not moved"
    log = log_of(out)
    assert len(log) == 2
    assert any(record.get("kept_pairs", 0) > 0 for record in log)
    for record in log:
        for key in ("loss/dml", "loss/lm", "loss/kl", "mixed_groups", "verdict_accuracy", "valid_json"):
            assert key in record
        for key in ("tower", "merger", "pooler", "tower_dml", "tower_lm", "proxies"):
            assert record[f"grad_norm/{key}"] >= 0
        for key in ("completion_length", "rollout_tokens_per_second", "replay_tokens_per_second", "data_wait_share"):
            assert key in record


def test_attention_loss_moves_the_pooler_only(tmp_path, few_photos, watched):
    train(tmp_path / "run", max_steps=1, lambda_dml=0.0, lambda_lm=0.0, weight_decay=0.0, warmup=0.0)
    trained = watched["trainer"].loss.state_dict()
    moved = {name for name, value in watched["start"].items() if not torch.equal(value, trained[name])}
    # W_o is behind the attention: beta does not depend on it.
    assert moved == {"model.1.query", "model.1.key_weight"}


def test_policy_gradient_moves_the_tower_only(tmp_path, few_photos, watched):
    train(tmp_path / "run", max_steps=1, lambda_dml=0.0, lambda_kl=0.0, weight_decay=0.0, warmup=0.0)
    trained = watched["trainer"].loss.state_dict()
    moved = {name for name, value in watched["start"].items() if not torch.equal(value, trained[name])}
    tower = {name for name in trained if name.startswith("model.0.")}
    assert moved == tower


def test_a_killed_run_resumes_to_the_same_losses(tmp_path, few_photos):
    whole = train(tmp_path / "whole", max_steps=4, save_steps=2)
    with killed_at(saga.SagaTrainer, 3):
        train(tmp_path / "killed", max_steps=4, save_steps=2)
    with pytest.raises(FieldmarkError, match="not empty"):
        train(tmp_path / "killed", max_steps=4, save_steps=2)
    resumed = train(tmp_path / "killed", max_steps=4, save_steps=2, resume=True)
    keys = ("step", "loss", "loss/dml", "loss/lm", "loss/kl", "mixed_groups", "grad_norm/tower", "grad_norm/proxies")
    assert [[r.get(k) for k in keys] for r in log_of(resumed)] == [[r.get(k) for k in keys] for r in log_of(whole)]
    one, other = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_give_what_one_gives(tmp_path, few_photos):
    """Same global batch, pairs and rollouts: losses and weights agree, phases B and C included."""
    one = train(tmp_path / "one", max_steps=2)
    train_in_two_processes("saga", {**SMALL, "out": str(tmp_path / "two"), "max_steps": 2})
    keys = ("loss/dml", "loss/lm", "loss/kl", "mixed_groups", "kept_pairs", "verdict_accuracy")
    keys += ("grad_norm/tower", "grad_norm/tower_dml", "grad_norm/tower_lm")
    alone, shared = log_of(one), log_of(tmp_path / "two")
    assert len(alone) == len(shared) == 2
    assert any(record["kept_pairs"] > 0 for record in alone)
    for left, right in zip(alone, shared, strict=True):
        for key in keys:
            assert right[key] == pytest.approx(left[key], abs=2e-4, rel=2e-3), key
    left, right = weights_of(one), weights_of(tmp_path / "two")
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=5e-5, rtol=1e-3)


def test_a_step_with_nothing_to_learn_says_why(tmp_path, few_photos, capsys):
    out = train(tmp_path / "run", max_steps=1, max_new_tokens=5)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    said = [line["message"] for line in lines if "message" in line]
    assert len(said) == 1
    assert [line["step"] for line in lines] == [1, 1], "words and numbers of one step carry its number"
    assert "none of 32 answers was valid JSON" in said[0]
    assert said[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": None}, "SAGA needs a teacher"),
        ({"teacher": "/no/such/teacher"}, "could not be loaded"),
        ({"data": "nonsense:x"}, "unknown prefix"),
        ({"domain": "fish"}, "fish"),
        ({"loss": "triplet"}, "Unknown metric loss"),
        ({"group_size": 1}, "group_size"),
        ({"attention_layer": 99}, "attention_layer"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"replay_temperature": 0.0}, "replay_temperature"),
        ({"lambda_lm": -1.0}, "lambda_lm"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, changes, words):
    with pytest.raises(FieldmarkError, match=words) as error:
        train(tmp_path / "run", max_steps=1, **changes)
    assert "\n" not in str(error.value)


def test_another_towers_tokens_are_refused(tmp_path):
    student = build_student(embedded_teacher(), pooling="mean")
    student[0].projector = torch.nn.Linear(student[0].token_dim, 8)
    with pytest.raises(FieldmarkError, match="width 8"):
        saga.check_tower(student[0], Teacher.load(embedded_teacher()))
    other = build_student(make_vit(tmp_path, width=student[0].token_dim), pooling="mean", resolution=32)
    assert other[0].token_dim == student[0].token_dim
    with pytest.raises(FieldmarkError, match="vit"):
        saga.check_tower(other[0], Teacher.load(embedded_teacher()))


def make_vit(folder: Path, width: int) -> Path:
    """A random vision transformer whose tokens are as wide as the teacher's."""
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "vit")
    ViTImageProcessor().save_pretrained(folder / "vit")
    return folder / "vit"
