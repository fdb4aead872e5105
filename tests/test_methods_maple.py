"""MAPLE on the embedded teacher: what moves, what does not, resuming, two processes, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fieldmark.data.candidates import AnchorSteps, CandidateBatch, CandidateSets
from fieldmark.errors import FieldmarkError
from fieldmark.losses.expanded import matches
from fieldmark.losses.preference import relative_preference
from fieldmark.methods import maple
from fieldmark.methods.maple import MapleConfig
from fieldmark.methods.quickstart import embedded_teacher
from fieldmark.methods.trainer import AdapterTrainer
from fieldmark.teacher.model import Teacher
from helpers_cli import fails
from helpers_training import few, killed_at, log_of, train_in_two_processes

SMALL = {
    "data": "aviary:1",
    "anchors_per_batch": 4,
    "negatives": 2,
    "lora_rank": 4,
    "lora_alpha": 4,
    "eval_batch_size": 32,
    "temperature_learning_rate": 1e-2,
    "warmup": 0.0,
}
PARTS = ("loss", "loss/contrast", "loss/preference", "grad_norm/adapters", "tau", "beta")


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    """The alignment scores of all runs, asked for once."""
    return tmp_path_factory.mktemp("maple") / "alignment.parquet"


@pytest.fixture(autouse=True)
def few_photos(monkeypatch):
    full = maple.open_task
    monkeypatch.setattr(maple, "open_task", lambda config: few(full(config)))


def settings(out: Path, scores: Path, **changes) -> dict:
    given = {"out": str(out), "teacher": str(embedded_teacher()), "alignment": str(scores)}
    return {**SMALL, **given, **changes}


def train(out: Path, scores: Path, **changes) -> Path:
    return maple.train(MapleConfig(**settings(out, scores, **changes)))


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(next((out / "model").glob("*.safetensors")))


def test_frozen_parts_are_bit_identical_and_adapters_and_temperatures_moved(tmp_path, scores, monkeypatch):
    seen: dict = {}
    init, load = AdapterTrainer.__init__, Teacher.load.__func__

    def loading(cls, *args, **kwargs):
        seen["teacher"] = load(cls, *args, **kwargs)
        seen["before"] = {k: v.clone() for k, v in seen["teacher"].model.state_dict().items()}
        return seen["teacher"]

    def starting(self, *args, **kwargs):
        init(self, *args, **kwargs)
        seen["trainer"] = self
        seen["start"] = {k: v.detach().clone() for k, v in self.own_loss.named_parameters()}

    def merging(student):
        seen["end"] = {k: v.detach().clone() for k, v in seen["trainer"].own_loss.named_parameters()}
        return merge(student)

    merge = maple.merge_lora
    monkeypatch.setattr(Teacher, "load", classmethod(loading))
    monkeypatch.setattr(AdapterTrainer, "__init__", starting)
    monkeypatch.setattr(maple, "merge_lora", merging)
    train(tmp_path / "run", scores, max_steps=2)
    assert all(torch.equal(v, seen["before"][k]) for k, v in seen["teacher"].model.state_dict().items())
    moved = {name for name, value in seen["start"].items() if not torch.equal(value, seen["end"][name])}
    trained = {name for name in seen["start"] if "lora_" in name or "temperatures" in name}
    assert moved == trained
    assert len(trained) == 2 + 2 * 7 * 4, "tau, beta, and A and B of seven projections in four layers"


def test_a_killed_run_resumes_to_the_same_losses_and_weights(tmp_path, scores):
    whole = train(tmp_path / "whole", scores, max_steps=4, save_steps=2)
    with killed_at(AdapterTrainer, 3):
        train(tmp_path / "killed", scores, max_steps=4, save_steps=2)
    resumed = train(tmp_path / "killed", scores, max_steps=4, save_steps=2, resume=True)
    logs = [[[record[key] for key in PARTS] for record in log_of(out)] for out in (whole, resumed)]
    assert logs[0] == logs[1]
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_give_what_one_gives(tmp_path, scores):
    one = train(tmp_path / "one", scores, max_steps=2)
    train_in_two_processes("maple", settings(tmp_path / "two", scores, max_steps=2))
    alone, shared = log_of(one), log_of(tmp_path / "two")
    assert len(alone) == len(shared) == 2
    for left, right in zip(alone, shared, strict=True):
        for key in ("loss", "grad_norm/adapters", "tau", "beta"):
            assert right[key] == pytest.approx(left[key], abs=2e-4, rel=2e-3), key
    left, right = weights(one), weights(tmp_path / "two")
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=5e-5, rtol=1e-3)


def test_grad_cache_trains_as_the_whole_batch_does(tmp_path, scores):
    plain = train(tmp_path / "plain", scores, max_steps=2)
    cached = train(tmp_path / "cached", scores, max_steps=2, mini_batch_size=3)
    for left, right in zip(log_of(plain), log_of(cached), strict=True):
        for key in ("loss", "grad_norm/adapters"):
            assert right[key] == pytest.approx(left[key], rel=1e-4), key


def test_scores_are_asked_for_once_and_another_teachers_are_refused(tmp_path, scores, monkeypatch):
    train(tmp_path / "first", scores, max_steps=1)
    monkeypatch.setattr("fieldmark.teacher.labels.Aligner", None)
    train(tmp_path / "second", scores, max_steps=1)
    monkeypatch.setattr(maple, "alignment_cache", lambda *args: pytest.fail("no scores are needed"))
    out = train(tmp_path / "contrast", scores, max_steps=1, preference="none")
    (record,) = log_of(out)
    assert record["loss"] == pytest.approx(record["loss/contrast"], abs=1e-5)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert {"i2t_recall@1", "t2i_recall@1", "group_score", "gap_ratio"} <= set(metrics["after"])


def test_the_objective_is_its_equations(scores):
    """Eq. 9 over a made batch, against sums written from Eq. 1 and 8."""
    config = MapleConfig(out="x", data="x", preference_weight=0.3, expanded=False)
    torch.manual_seed(0)
    photos, texts = (nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    batch = CandidateBatch.of([3, 7], torch.tensor([[0, 0]] * 3 + [[7, 1]] + [[0, 0]] * 3 + [[9, 4]]).numpy())
    assert (batch.items, batch.candidates.tolist()) == ([3, 7, 1, 9, 4], [[0, 1, 2], [1, 3, 4]])
    labels = {
        "items": torch.tensor(batch.items),
        "keys": torch.full((5, 2), -1),
        "candidates": batch.candidates,
        "text_to_image": torch.rand(2, 3),
        "image_to_text": torch.rand(2, 3),
    }
    found = maple.MapleObjective(config)([photos, texts], labels)
    scale = 1 / 0.07
    contrast = 0.0
    for a in (0, 1):
        for one, other in ((photos, texts), (texts, photos)):
            logits = torch.stack([one[a] @ other[b] * scale for b in (0, 1)])
            contrast += -torch.log_softmax(logits, 0)[a] / 4
    preference = 0.0
    for one, other, alpha in (
        (texts, photos, labels["text_to_image"]),
        (photos, texts, labels["image_to_text"]),
    ):
        similarity = torch.stack(
            [torch.stack([one[row[0]] @ other[c] for c in row]) for row in batch.candidates.tolist()]
        )
        preference += relative_preference(similarity, alpha, scale, "listwise") / 2
    assert found.item() == pytest.approx(float(0.3 * preference + 0.7 * contrast), rel=1e-5)


def test_items_that_share_any_text_are_no_negatives_of_each_other(tmp_path, scores, monkeypatch):
    texts = [[f"title {i}"] for i in range(6)]
    texts[0], texts[3] = ["a", "Same  one"], ["b", "same one"]
    rows = datasets.Dataset.from_list(
        [{"image": f"image {i}", "title": title, "label": None} for i, own in enumerate(texts) for title in own]
    )
    vectors = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    vectors[3] = vectors[0]
    monkeypatch.setattr(maple, "photo_features", lambda config, student, photos: vectors)
    config = MapleConfig(**settings(tmp_path / "run", scores))
    sets = maple.mine(config, None, maple.open_items(config, rows))
    assert 3 not in sets.negatives[0]
    assert 0 not in sets.negatives[3]
    assert sets.keys[0, 1] == sets.keys[3, 1]


def test_an_equal_text_of_a_step_is_no_negative(monkeypatch):
    monkeypatch.setattr(maple, "tokenize_items", lambda student, **items: {})
    monkeypatch.setattr(maple, "photo_side", lambda student: 224)
    monkeypatch.setattr(maple.Squares, "__getitem__", lambda self, item: None)
    sets = CandidateSets(
        ["a", "b", "c"],
        [["red crown"], ["Red  crown"], ["blue crown"]],
        np.zeros((3, 0), np.int64),
        torch.full((3, 2), -1),
    )
    collate = maple.Collator(None, sets, None, seed=0, memory_mb=0)
    keys = collate([{"item": item, "step": 0} for item in range(3)])["label"]["keys"]
    assert matches(keys, keys).tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_near_duplicates_are_left_out_and_counted(tmp_path, scores, monkeypatch, caplog):
    rows = datasets.Dataset.from_dict(
        {name: [f"{name} {i}" for i in range(12)] for name in ("image", "title", "label")}
    )
    vectors = np.random.default_rng(0).normal(size=(12, 32)).astype(np.float32)
    vectors[7] = vectors[2] + 0.01  # cosine 0.9999
    monkeypatch.setattr(maple, "photo_features", lambda config, student, photos: vectors)
    config = MapleConfig(**settings(tmp_path / "run", scores, dedup_clusters=1))
    sets = maple.mine(config, None, maple.open_items(config, rows))
    assert len(sets.photos) == 11
    assert len({"image 2", "image 7"} & set(sets.photos)) == 1
    assert "1 of 12 photos are near duplicates" in caplog.text


def test_anchors_are_dealt_in_shuffled_epochs_and_ranks_share_them():
    one = AnchorSteps(10, 4, seed=1, steps=5)
    batches = [one.global_batch(step) for step in range(5)]
    assert len({*batches[0], *batches[1]}) == 8
    assert batches[0] != batches[2]
    table = one.table()
    assert [table["item"][i] for i in range(4)] == batches[0]
    assert table["step"] == [step for step in range(5) for _ in range(4)]
    ranges = list(AnchorSteps(10, 4, seed=1, steps=5, world_size=2))
    assert ranges[:2] == [[0, 1], [2, 3]]
    assert len(ranges) == len(AnchorSteps(10, 4, seed=1, steps=5, world_size=2)) == 10


def test_texts_of_a_step_are_drawn_alike_and_depend_on_nothing_else():
    sets = CandidateSets(["a"] * 2, [["x"], ["p", "q", "r"]], torch.zeros(2, 0).long().numpy(), torch.full((2, 2), -1))
    drawn = [sets.text(1, seed=0, step=step) for step in range(300)]
    assert drawn == [sets.text(1, seed=0, step=step) for step in range(300)]
    assert all(70 < drawn.count(text) < 130 for text in "pqr")
    assert sets.text(0, seed=0, step=5) == "x"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": None}, "MAPLE needs a teacher"),
        ({"anchors_per_batch": 1000}, "lower it or add photos"),
        ({"negatives": 500}, "lower negatives, or add items"),
        ({"lora_rank": 0}, "lora_rank is 0, which trains nothing of an mllm student"),
        ({"negatives": 0}, "A preference needs candidates"),
        ({"preference_weight": 1.5}, "give a number from 0 to 1"),
        ({"student_kind": "dual"}, "dual encoder such as CLIP"),
        ({"groups": "no/such.jsonl"}, "no/such.jsonl"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, scores, changes, words):
    with pytest.raises(FieldmarkError, match=words):
        train(tmp_path / "run", scores, max_steps=1, **changes)


def test_a_catalogue_without_titles_is_refused_on_the_command_line(capsys, tmp_path):
    table = tmp_path / "birds.csv"
    table.write_text("image,label\n" + "".join(f"aviary://train/x/{i},{i % 4}\n" for i in range(8)), encoding="utf-8")
    argv = [
        "train",
        "maple",
        "--data",
        str(table),
        "--out",
        str(tmp_path / "run"),
        "--teacher",
        str(embedded_teacher()),
    ]
    assert "have no title" in fails(capsys, argv)
