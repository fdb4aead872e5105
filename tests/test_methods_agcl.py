"""AGCL, the first stage of AFMRL: what moves, resuming, two processes, its controls, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from fieldmark.data.catalog import load_catalog
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.enriched import evaluate_enriched
from fieldmark.losses.bm25 import BM25, bm25_scores
from fieldmark.losses.contrastive import attribute_guided_contrastive
from fieldmark.methods import agcl
from fieldmark.methods.agcl import AgclConfig
from fieldmark.methods.trainer import AdapterTrainer
from fieldmark.students.enrich import enriched_text
from fieldmark.students.items import encode_items
from fieldmark.students.multimodal import build_multimodal_student
from helpers_cli import fails
from helpers_tiny import make_tiny_teacher
from helpers_training import few, killed_at, log_of, train_in_two_processes

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "data": "aviary:2",
    "attributes": "catalogue",
    "pairs_per_batch": 4,
    "resolution": 64,
    "lora_rank": 4,
    "learning_rate": 1e-3,
    "warmup": 0.0,
    "eval_batch_size": 32,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(make_tiny_teacher("qwen3_vl", tmp_path_factory.mktemp("agcl") / "student"))


@pytest.fixture(autouse=True)
def few_photos(monkeypatch):
    full = agcl.open_task
    monkeypatch.setattr(agcl, "open_task", lambda config: few(full(config)))


def train(out: Path, base: str, **changes) -> Path:
    return agcl.train(AgclConfig(**{**SMALL, "out": str(out), "student": base, **changes}))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(next((out / "model").glob("*.safetensors")))


def test_adapters_move_everything_else_stays(tmp_path, base):
    out = train(tmp_path / "run", base, max_steps=3)
    trained, start = weights(out), build_multimodal_student(base, lora_rank=0).transformers_model.state_dict()
    moved = {name for name in trained if not torch.equal(trained[name], start[name])}
    adapted = {name for name in start if "language_model.layers" in name and name.endswith("_proj.weight")}
    assert moved == adapted
    assert set(trained) == set(start)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    expected = {"i2t_recall@1", "instance_recall@1", "enriched_instance_recall@1", "enriched_instance_ndcg@10", "nmi"}
    assert expected <= set(metrics["after"])
    assert [{"masked_share", "tanh_bm25"} <= set(record) for record in log_of(out)] == [True] * 3


def test_a_killed_run_resumes_to_the_same_losses_and_weights(tmp_path, base):
    whole = train(tmp_path / "whole", base, max_steps=4, save_steps=2)
    with killed_at(AdapterTrainer, 3):
        train(tmp_path / "killed", base, max_steps=4, save_steps=2)
    resumed = train(tmp_path / "killed", base, max_steps=4, save_steps=2, resume=True)
    keys = ("loss", "grad_norm/adapters", "masked_share", "tanh_bm25")
    logs = [[[record[key] for key in keys] for record in log_of(out)] for out in (whole, resumed)]
    assert logs[0] == logs[1]
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_give_what_one_gives(tmp_path, base):
    one = train(tmp_path / "one", base, max_steps=3)
    train_in_two_processes("agcl", {**SMALL, "out": str(tmp_path / "two"), "student": base, "max_steps": 3})
    for left, right in zip(log_of(one), log_of(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm/adapters"):
            assert right[key] == pytest.approx(left[key], abs=2e-4, rel=2e-3), key
    left, right = weights(one), weights(tmp_path / "two")
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=5e-5, rtol=1e-3)


def test_grad_cache_trains_as_the_whole_batch_does(tmp_path, base):
    plain = train(tmp_path / "plain", base, max_steps=3)
    cached = train(tmp_path / "cached", base, max_steps=3, mini_batch_size=3)
    for left, right in zip(log_of(plain), log_of(cached), strict=True):
        for key in ("loss", "grad_norm/adapters"):
            assert right[key] == pytest.approx(left[key], rel=1e-4), key


@pytest.mark.parametrize("weights", ["bm25", "shuffled", "none"])
def test_the_first_loss_is_that_of_the_formula_on_the_first_batch(tmp_path, base, weights):
    """What the collator, the student and the loss make together, put together by hand."""
    config = AgclConfig(**{**SMALL, "out": str(tmp_path / "run"), "student": base, "max_steps": 3, "weights": weights})
    task = agcl.open_task(config)
    assert task.tasks == ("image-text", "text-image", "product")
    batches = agcl.make_batches(config, task)
    student = agcl.make_student(config)
    collator = agcl.ProductCollator(student, task, batches, seed=0, enriched_share=0.5, memory_mb=1)
    attributes = task.attributes
    if weights == "shuffled":
        order = np.random.default_rng((0, agcl._SHUFFLED)).permutation(len(attributes))
        attributes = [attributes[place] for place in order]
    bm25 = BM25.fit(attributes)
    photos, titles, labels = list(task.train["image"]), list(task.train["title"]), list(task.train["label"])
    by_hand = []
    for step in range(3):
        pairs, kind = batches.global_batch(step), batches.task(step)
        queries, candidates = zip(*pairs, strict=True)
        texts = [collator.query_text(item, step) for item in queries]
        sides = []
        for items, side, said in (
            (queries, kind.split("-")[0], texts),
            (candidates, kind.split("-")[-1], [titles[item] for item in candidates]),
        ):
            images = [photos[item] for item in items] if side != "text" else None
            rows = encode_items(student, images=images, texts=said if side != "image" else None, convert="tensor")
            sides.append(F.normalize(rows, dim=1))
        scores = bm25_scores(*(bm25.encode([attributes[item] for item in items]) for items in (queries, candidates)))
        same = torch.tensor(
            [[labels[q] == labels[other] or titles[q] == titles[other] for other in queries] for q in queries]
        )
        none = weights == "none"
        by_hand.append(
            attribute_guided_contrastive(
                sides[0] @ sides[1].T,
                torch.zeros_like(scores) if none else scores,
                0.02,
                float("inf") if none else 0.4,
                same=same,
            ).item()
        )
    out = train(tmp_path / "run", base, max_steps=3, weights=weights, learning_rate=1e-12)
    assert [record["loss"] for record in log_of(out)] == pytest.approx(by_hand, rel=2e-3)


def test_some_query_titles_are_followed_by_attributes(tmp_path, base):
    config = AgclConfig(**{**SMALL, "out": str(tmp_path / "run"), "student": base, "max_steps": 1})
    task = agcl.open_task(config)
    batches, student = agcl.make_batches(config, task), agcl.make_student(config)
    collator = agcl.ProductCollator(student, task, batches, seed=0, enriched_share=0.25, memory_mb=1)
    texts = [collator.query_text(3, step) for step in range(400)]
    plain, joined = task.train["title"][3], enriched_text(task.train["title"][3], task.attributes[3])
    assert set(texts) == {plain, joined}
    assert 70 < texts.count(joined) < 130
    assert texts == [collator.query_text(3, step) for step in range(400)]


def test_the_category_weighs_negatives_and_joins_no_title(tmp_path, base):
    settings = {**SMALL, "out": str(tmp_path / "run"), "student": base, "max_steps": 1}
    whole, task = (agcl.open_task(AgclConfig(**settings, category=name)) for name in (None, "crown_colour"))
    assert whole.attributes == task.attributes
    assert all("crown_colour" in own for own in whole.attributes + whole.test_attributes)
    for own, said in zip(whole.test_attributes, task.test_attributes, strict=True):
        assert said == {name: value for name, value in own.items() if name != "crown_colour"}
    config = AgclConfig(**settings)
    batches, student = agcl.make_batches(config, task), agcl.make_student(config)
    for one, told in ((whole, True), (task, False)):
        collator = agcl.ProductCollator(student, one, batches, seed=0, enriched_share=1.0, memory_mb=1)
        assert ("crown_colour: " in collator.query_text(3, 0)) == told


def test_enriched_queries_are_asked_with_their_attributes_and_found_without(base):
    """Against a loop over queries, for each side that may be enriched."""
    student = build_multimodal_student(base, pooling="lasttoken", resolution=64, lora_rank=0)
    rows = load_catalog("aviary:2")
    rows = rows.filter(lambda row: row["split"] == "test").select(range(8))
    roles = ["query", "gallery"] * 3 + ["both", "both"]
    rows = rows.remove_columns("role").add_column("role", roles)
    attributes = [{"mark": f"value {i % 3}"} for i in range(8)]
    photos, titles, labels = list(rows["image"]), list(rows["title"]), list(rows["label"])
    plain = encode_items(student, images=photos, texts=titles)
    told = encode_items(student, images=photos, texts=[enriched_text(t, a) for t, a in zip(titles, attributes)])
    for enrich in ("query", "both", "none"):
        found = evaluate_enriched(student, rows, attributes, enrich=enrich)
        for key, asked, gallery in (
            ("instance_recall@1", plain, plain),
            ("enriched_instance_recall@1", told, told if enrich == "both" else plain),
        ):
            if enrich == "none" and key.startswith("enriched"):
                assert key not in found.metrics
                continue
            hits = []
            for i in range(8):
                others = [j for j in range(8) if roles[j] != "query" and j != i]
                if roles[i] == "gallery" or labels[i] not in [labels[j] for j in others]:
                    continue
                best = max(others, key=lambda j: float(asked[i] @ gallery[j]))
                hits.append(labels[best] == labels[i])
            assert hits
            assert found.metrics[key] == pytest.approx(np.mean(hits)), (enrich, key)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attributes": None}, "AGCL weighs negatives by attributes"),
        ({"student": None}, "name one with --student"),
        ({"pairs_per_batch": 1000}, "1000 pairs a batch were asked for"),
        ({"tasks": ["titles"]}, "expected one or more of image-text"),
        ({"enriched_share": 1.5}, "give a number from 0 to 1"),
        ({"temperature": 0.0}, "give a number above 0"),
        ({"attributes": "nowhere.parquet"}, "nowhere.parquet"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, base, changes, words):
    with pytest.raises(FieldmarkError, match=words) as raised:
        train(tmp_path / "run", base, max_steps=1, **changes)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_catalogue_without_two_items_of_a_product_or_titles_is_refused(tmp_path, base, capsys):
    rows = load_catalog("aviary:1").to_list()
    table = tmp_path / "items.jsonl"

    def write(**changes):
        lines = [
            {**row, "attributes": {"mark": "x"}, **{name: value(i) for name, value in changes.items()}}
            for i, row in enumerate(rows[:40])
        ]
        table.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")

    command = ["train", "agcl", "--data", str(table), "--out", str(tmp_path / "run"), "--student", base]
    write(label=lambda i: f"product {i}", split=lambda i: "train" if i % 2 else "test")
    options = [*command, "--attributes", "catalogue"]
    assert "no product has two items" in fails(capsys, [*options, "--tasks", "[product]"])
    write(title=lambda i: None, split=lambda i: "train" if i % 2 else "test")
    assert "have no title; AFMRL needs one" in fails(capsys, options)
