"""The page of MAPLE: its numbers against the run folder and slow loops, its parts, its look, and `compare --html`."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from fieldmark import cli
from fieldmark.data.candidates import CandidateSets
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.group_results import (
    GroupResults,
    candidate_health,
    orders_alike,
    read_groups_of,
    spearman,
    write_groups,
)
from fieldmark.evaluation.groups import group_scores
from fieldmark.evaluation.modality_gap import modality_gap
from fieldmark.evaluation.report import MAX_BYTES, write_report
from fieldmark.evaluation.report_image_text import CandidateExample, agreement_view, candidates_view, categories_view
from fieldmark.evaluation.report_sections import Size
from fieldmark.methods import maple
from fieldmark.methods.image_text_reporting import set_scores
from fieldmark.methods.maple import MapleConfig
from fieldmark.teacher.model import Teacher
from helpers_cli import fails
from helpers_tiny import make_tiny_teacher
from helpers_training import few

EVIL = "<b>wren</b> & <img src=x onerror=alert(1)>"
LONG = "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamtengesellschaft"
PARTS = ["result", "training", "categories", "agreement", "gap", "candidates", "health", "cost", "settings"]


def made_results(groups: int = 12, seed: int = 0) -> GroupResults:
    rng = np.random.default_rng(seed)
    teacher, before, after = (rng.random((groups, 2, 2)) for _ in range(3))
    names = [(EVIL, LONG, None)[g % 3] for g in range(groups)]
    return GroupResults([(f"a {g}", EVIL) for g in range(groups)], names, teacher, before, teacher + 0.1 * after)


def noise(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def made_example(candidates: int = 4, side: int = 64) -> CandidateExample:
    rng = np.random.default_rng(1)
    scores = [{who: rng.random(candidates).tolist() for who in ("teacher", "before", "after")} for _ in (0, 1)]
    texts = [LONG, EVIL, *(f"text {i}" for i in range(candidates - 2))]
    return CandidateExample([noise(i, side) for i in range(candidates)], texts, *scores)


def made_report(path: Path, side: int = 64, examples: int = 3) -> Path:
    results, rng = made_results(), np.random.default_rng(2)
    gap = modality_gap(*(rng.normal(size=(12, 8)) for _ in range(4)))
    metrics = {"i2t_recall@1": 0.25, "group_score": {"value": 0.5, "interval": (0.4, 0.6)}, "gap_ratio": 3.25}
    counts = {"n_images": 12, "n_texts": 13, "n_groups": 12}
    return write_report(
        path,
        title=f"MAPLE on {LONG}",
        table=[{"model": "untrained", **metrics, **counts}, {"model": LONG, **metrics, **counts}],
        curves={"Loss": [(1, 1.0), (2, 0.5)]},
        categories={name: results.by_category(who) for who, name in (("before", "Untrained"), ("after", LONG))},
        groups=results,
        gaps={"before": gap, "after": gap},
        candidates=[made_example(4, side)] * examples,
        health={"mean": 0.5},
        settings={"a": 1},
        cost={"time": 1},
    )


# -- numbers


def test_rank_correlation_is_that_of_the_ranks():
    rng = np.random.default_rng(3)
    one, other = rng.integers(0, 5, 30).astype(float), rng.integers(0, 5, 30).astype(float)

    def ranks(values):
        return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]

    assert spearman(one, other) == pytest.approx(np.corrcoef(ranks(one), ranks(other))[0, 1])
    assert spearman(one, one**3) == pytest.approx(1)
    assert spearman(one, np.ones(30)) is None


def test_correlations_and_scores_are_of_their_category_alone():
    results = made_results()
    rows = [g for g in range(12) if g % 3 == 0]
    pairs = [(results.teacher[g, i, t], results.before[g, i, t]) for g in rows for i in (0, 1) for t in (0, 1)]
    assert results.correlation("before", EVIL) == pytest.approx(spearman(*zip(*pairs, strict=True)))
    assert results.by_category("after")[EVIL] == group_scores(results.after[rows])
    assert results.hits("after")["group_score"].mean() == group_scores(results.after)["group_score"]


def test_groups_are_read_as_they_were_written(tmp_path):
    results = made_results()
    assert read_groups_of(tmp_path) is None
    write_groups(tmp_path, results)
    found = read_groups_of(tmp_path)
    assert found is not None
    assert (found.captions, found.categories) == (results.captions, results.categories)
    for who in ("teacher", "before", "after"):
        np.testing.assert_array_equal(getattr(found, who), getattr(results, who))
    (tmp_path / "groups.parquet").write_bytes(b"no table")
    with pytest.raises(FieldmarkError, match="is broken"):
        read_groups_of(tmp_path)


def test_pairs_in_the_teachers_order_are_counted():
    rng = np.random.default_rng(4)
    for _ in range(20):
        teacher, student = rng.integers(0, 4, 6).tolist(), rng.integers(0, 4, 6).tolist()
        told = [(a, b) for a, b in itertools.permutations(range(6), 2) if teacher[a] > teacher[b]]
        right = sum(student[a] > student[b] for a, b in told)
        assert orders_alike(teacher, student) == (right, len(told))


def test_health_of_candidate_sets():
    found = candidate_health(np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.2, 0.1, 0.6], [0.8, 0.8, 0.9]]))
    assert found == {"own_beaten": 0.5, "own_tied": 0.25, "own": pytest.approx(0.6), "others": pytest.approx(3.3 / 8)}


def test_scores_of_sets_stand_by_photo_and_text():
    sets = CandidateSets(["p", "q"], [["x", "x2"], ["y"]], np.array([[1], [0]]), torch.full((2, 2), -1))
    known = {(0, "x"): 0.1, (0, "y"): 0.2, (1, "x"): 0.3, (1, "y"): 0.4}
    to_photos, to_texts = set_scores(sets, known)
    assert to_photos.tolist() == [[0.1, 0.3], [0.4, 0.2]]
    assert to_texts.tolist() == [[0.1, 0.2], [0.4, 0.3]]


def test_views_put_the_best_first_and_each_pair_is_drawn():
    results = made_results()
    view = agreement_view(results)
    assert view is not None
    after = [results.correlation("after", name) for name in results.named]
    assert [row["values"][1] for row in view["rows"]] == [f"{value:.2f}" for value in sorted(after, reverse=True)]
    plot = view["plots"][0]
    assert plot.dots.count("M") == plot.crosses.count("M") == 24
    scores = {
        name: {"group_score": s, "text_score": s, "image_score": s, "n_groups": 3}
        for name, s in zip("abc", (0.1, 0.9, 0.5))
    }
    shown = categories_view({"before": {}, "after": scores})
    assert shown is not None
    assert [(row["name"], row["bars"][0]["text"], row["bars"][1]["text"]) for row in shown["rows"]] == [
        ("b", "–", "90"),
        ("c", "–", "50"),
        ("a", "–", "10"),
    ]


def test_candidates_stand_in_the_order_of_each():
    example = made_example()
    (view,) = candidates_view([example], Size(40, 40, 50))
    for strip, who in zip(view["strips"], ("teacher", "before", "after"), strict=True):
        scores = [float(result["score"]) for result in strip["results"]]
        assert scores == sorted(scores, reverse=True)
        own = next(result for result in strip["results"] if result["own"])
        assert own["score"] == f"{example.text_to_image[who][0]:.3f}"
    assert "first 8 of 11" in candidates_view([made_example(11)], Size(40, 40, 50))[0]["strips"][0]["note"]


# -- a run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A tiny random teacher that answers Yes and No with a token each."""
    folder = make_tiny_teacher("qwen3_vl", tmp_path_factory.mktemp("teacher") / "tiny")
    teacher = Teacher.load(folder)
    teacher.tokenizer.add_tokens(["Yes", "No"])
    torch.manual_seed(1)
    teacher.model.resize_token_embeddings(len(teacher.tokenizer), mean_resizing=False)
    with torch.no_grad():  # random weights of 0.02 answer 0.5 to everything
        for parameter in (*teacher.model.model.language_model.parameters(), teacher.model.lm_head.weight):
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    teacher.model.save_pretrained(folder)
    teacher.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, teacher) -> dict[str, Path]:
    """MAPLE with two seeds, and contrast alone, on eight photos and four groups; the scores are asked for once."""
    folder = tmp_path_factory.mktemp("runs")
    made = {"one": (0, "listwise"), "two": (1, "listwise"), "contrast": (0, "none")}
    full = maple.open_task
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maple, "open_task", lambda config: few(full(config)))
        for name, (seed, preference) in made.items():
            maple.train(
                MapleConfig(
                    out=str(folder / name),
                    data="aviary:1",
                    teacher=str(teacher),
                    seed=seed,
                    preference=preference,
                    anchors_per_batch=4,
                    negatives=2,
                    lora_rank=2,
                    lora_alpha=2,
                    max_steps=2,
                    eval_batch_size=32,
                    alignment=str(folder / "alignment.parquet"),
                )
            )
    return {name: folder / name for name in made}


def words_of(page: Path) -> str:
    text = re.sub(r"<(style|script)>.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def test_the_page_of_a_run_says_what_its_folder_says(runs):
    page = runs["one"] / "report.html"
    source, words = page.read_text(encoding="utf-8"), words_of(page)
    assert re.findall(r'<section id="(\w+)">', source) == PARTS
    metrics = json.loads((runs["one"] / "metrics.json").read_text(encoding="utf-8"))
    results = read_groups_of(runs["one"])
    assert results is not None
    for when in ("before", "after"):
        assert group_scores(getattr(results, when))["group_score"] == metrics[when]["group_score"]
        assert f"{100 * metrics[when]['i2t_recall@1']:.1f}" in words
        assert f"ρ = {results.correlation(when):.2f}".replace("-", "−") in words
    assert f"{metrics['before']['gap_ratio']:.2f} to {metrics['after']['gap_ratio']:.2f}" in words
    assert "2 optimizer steps, seed 0" in words
    for heading in ("Loss", "Contrastive part", "Preference part", "(tau)", "(beta)", "waiting for data"):
        assert f"<b>{heading}" in source or f"{heading}</b>" in source
    assert "Own match not first: photos for a text" in words
    assert source.count('<article class="gallery card">') > 0
    assert re.findall(r"https?://", source) == []
    assert len(source.encode()) < MAX_BYTES


def test_the_teachers_scores_of_groups_are_those_of_its_file(runs):
    import pyarrow.parquet as pq

    results = read_groups_of(runs["one"])
    assert results is not None
    known = {row["text"]: [] for row in pq.read_table(runs["one"].parent / "alignment.parquet").to_pylist()}
    for row in pq.read_table(runs["one"].parent / "alignment.parquet").to_pylist():
        known[row["text"]].append(row["score"])
    for g, captions in enumerate(results.captions):
        for i, t in itertools.product((0, 1), (0, 1)):
            assert results.teacher[g, i, t] in known[captions[t]]
    assert len(np.unique(results.teacher)) > 4


def test_contrast_alone_has_no_candidate_scores_and_says_its_name(runs):
    source = (runs["contrast"] / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)">', source) == [p for p in PARTS if p not in ("candidates", "health")]
    assert "MAPLE without preferences" in source
    assert "contrast alone (2 hard candidates an anchor" in words_of(runs["contrast"] / "report.html")


def test_compare_writes_a_page_of_such_runs(capsys, runs, tmp_path):
    page = tmp_path / "compare.html"
    assert cli.main(["compare", *map(str, runs.values()), "--html", str(page)]) == 0
    source, words = page.read_text(encoding="utf-8"), words_of(page)
    assert re.findall(r'<section id="(\w+)">', source) == ["result", "training", "categories", "cost", "settings"]
    assert "MAPLE, listwise (2 steps, 2 seeds); Contrast alone (2 steps, 1 seed)" in words
    both = [json.loads((runs[name] / "metrics.json").read_text())["after"]["gap_ratio"] for name in ("one", "two")]
    assert f"{np.mean(both):.3g}" in words
    assert "<img" not in source


def test_compare_refuses_runs_of_two_kinds(capsys, runs, tmp_path):
    other = tmp_path / "photos"
    other.mkdir()
    shutil.copy(runs["one"] / "config.yaml", other)
    metrics = json.loads((runs["one"] / "metrics.json").read_text(encoding="utf-8"))
    metrics |= {"method": "metric", "before": {"recall@1": 0.5}, "after": {"recall@1": 0.6}}
    (other / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    told = fails(capsys, ["compare", str(runs["one"]), str(other), "--html", str(tmp_path / "p.html")])
    assert "a page compares runs of one kind" in told
    assert not (tmp_path / "p.html").exists()


# -- in a browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desk", "phone"])
def test_the_page_fits_is_read_and_asks_for_nothing(tmp_path_factory, size, scheme):
    pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    from test_report_page import CHROMIUM, CONTRASTS, opened

    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    path = made_report(tmp_path_factory.mktemp("page") / "r.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for page in opened(browser, path, size, scheme):
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            outside = """[...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, svg")
                && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"""
            assert page.evaluate(outside) == []
            found = page.evaluate(CONTRASTS)
            assert len(found) > 100
            assert [text for text in found if text["contrast"] < text["least"]] == []
            pictures = "[...document.querySelectorAll('img')].map((one) => [one.alt.length > 0, one.naturalWidth > 0])"
            assert all(map(all, page.evaluate(pictures)))
            drawn = page.evaluate("[...document.querySelectorAll('[role=img],[tabindex]')].map((e) => e.ariaLabel)")
            assert len(drawn) > 8
            assert all(drawn)
            levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((e) => Number(e.tagName[1]))")
            assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        browser.close()


def test_photos_are_made_smaller_until_the_page_fits(tmp_path):
    path = made_report(tmp_path / "r.html", side=400, examples=40)
    assert 1_000_000 < path.stat().st_size <= MAX_BYTES
