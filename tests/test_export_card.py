"""The card of an export: what a run says, what several seeds say, what is not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from fieldmark.errors import FieldmarkError
from fieldmark.export.card import CardFacts, write_card
from fieldmark.export.provenance import Provenance, provenance_of
from helpers_export import finish_run

CHECK = {
    "precision": "float32", "runtime": "onnxruntime 1.0", "tolerance": 1e-4,
    "photos": {"source": "aviary:1", "count": 32, "largest_difference": 2e-7},
}  # fmt: skip
ABOUT: dict[str, Any] = {
    "file": "model.onnx", "preprocessing": {"width": 64}, "embedding": {"dim": 24}, "check": CHECK,
}  # fmt: skip
FACTS = CardFacts("birds", "onnx", "qwen3_vl_vision", "attention", 2_300_000, texts=False)


def card(provenance: Provenance, **more: Any) -> str:
    return write_card(FACTS, ABOUT | more, provenance)


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    run = finish_run(tmp_path / "run", data="someone/birds@main", teacher="Owner/Big-VL")
    data = ModelCard(card(provenance_of(str(run), []))).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "onnx", "image-feature-extraction", "Owner/Big-VL",
    )  # fmt: skip
    assert data.datasets == ["someone/birds"]
    assert data.license is None
    assert {"fieldmark", "image-retrieval", "saga"} <= set(data.tags)
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"recall_at_1": 0.6, "recall_at_4": 0.8, "map_at_r": 0.4, "nmi": 0.8}
    assert {result.dataset_type for result in data.eval_results} == {"someone/birds"}
    assert data.model_name == "birds"


def test_a_run_says_how_it_was_trained_and_measured(tmp_path: Path) -> None:
    text = card(provenance_of(str(finish_run(tmp_path / "run") / "model"), []))
    for words in (
        "arxiv.org/abs/2606.15134", "proxy anchor", "`judge` (not on the hub)", "`aviary:8` (birds drawn by Fieldmark)",
        "40 steps", "| recall@1 | 0.500 | 0.600 | 0.550 – 0.650 |", "960 queries", "One seed",
        "2.0e-07 on 32 photos of `aviary:1` (allowed: 0.0001)", "64 x 64 pixels",
    ):  # fmt: skip
        assert words in text
    for place in (str(tmp_path), "/home/someone"):
        assert place not in text


def test_several_seeds_are_a_mean_and_a_spread(tmp_path: Path) -> None:
    runs = [finish_run(tmp_path / f"run{seed}", seed) for seed in (0, 2, 4)]
    # the model's own run may be named again: it is counted once
    text = card(provenance_of(str(runs[1]), [str(run) for run in runs]))
    assert "| recall@1 | 0.500 ± 0.000 | 0.620 ± 0.020 | 0.550 – 0.650 |" in text
    assert "over 3 seeds" in text
    assert "| Seed | 2, 0, 4 (the first is this model's) |" in text
    assert ModelCard(text).data.eval_results[0].metric_value == 0.62


def test_runs_that_are_no_other_seeds_are_refused(tmp_path: Path) -> None:
    run, other = finish_run(tmp_path / "run"), finish_run(tmp_path / "other", 1, max_steps=80, loss="info_nce")
    with pytest.raises(FieldmarkError, match=r"is no other seed of .*: it differs in loss, max_steps"):
        provenance_of(str(run), [str(other)])
    (tmp_path / "loose").mkdir()
    with pytest.raises(FieldmarkError, match="which is not the model of a run"):
        provenance_of(str(tmp_path / "loose"), [str(run)])


def test_what_is_unknown_is_said_to_be_unknown(tmp_path: Path) -> None:
    for model in (str(tmp_path), "owner/model"):
        text = card(provenance_of(model, []))
        assert "## Training\n\nUnknown" in text
        assert "## Results\n\nUnknown" in text
        data = ModelCard(text).data
        assert (data.base_model, data.datasets, data.eval_results, data.license) == (None, None, None, None)


def test_local_names_are_not_taken_for_the_hub_s(tmp_path: Path) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    run = finish_run(tmp_path / "runs" / "a", student="models/base", data="cub:/data/CUB_200_2011", teacher=None)
    provenance = provenance_of(str(run), [])
    assert provenance.base == "models/base"
    assert provenance.hub_id("models/base") is None
    assert provenance.hub_id("models/deleted_since") is None, "its first part is a folder here"
    assert provenance.hub_id("/abs/name") is None
    assert provenance.hub_id("Owner/Name@v1") == "Owner/Name"
    shown = {
        name: provenance.shown(name) for name in ("cub:/data/x", "aviary:8", "runs/a/model", "/a/b.csv", "wds:/s/x")
    }
    assert list(shown.values()) == ["cub", "aviary:8", "a/model", "b.csv", "x"]


def test_variants_and_int8_stand_in_the_card() -> None:
    measured = [
        {"name": "float32", "dim": 24, "recall@1": 0.6, "interval": [0.55, 0.65], "loss_points": 0.0},
        {"name": "int8", "dim": 8, "recall@1": 0.61, "interval": [0.56, 0.66], "loss_points": -1.0},
    ]
    int8 = {
        "file": "model_int8.onnx", "method": "dynamic", "megabytes": 1.5, "megabytes_float32": 6.0, "threads": 1,
        "milliseconds_per_photo": 9.0, "milliseconds_per_photo_float32": 8.0, "batch_size": 32,
    }  # fmt: skip
    text = card(Provenance(), variants={"source": "birds", "queries": 960, "measured": measured}, int8=int8)
    assert "| int8 | 8 | 0.6100 | 0.560 – 0.660 | -1.00 |" in text
    assert "9.00 ms a photo against 8.00" in text, "slower is said as it is"
    assert "short = photos[:, :8]" in text
