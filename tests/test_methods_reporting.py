"""The page of a run and of `compare --html`: the numbers of the folder in words, and what stops it in a sentence."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from fieldmark import cli
from fieldmark.evaluation.runs import Group, Run, group_runs, read_per_query
from fieldmark.losses.metric import METRIC_LOSSES
from fieldmark.methods.comparing import group_names
from fieldmark.methods.reporting import LOSSES, FinishedRun, cost, curves, health
from helpers_cli import fails
from helpers_tiny import make_tiny_teacher


@pytest.fixture(autouse=True)
def _quiet_machine():
    """Products this small take longer to share than to compute; commands quieten libraries for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    transformers.utils.logging.set_verbosity_warning()


def make_photos(folder: Path) -> Path:
    """Six classes of four photos, their colour an attribute; a table with paths."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        path = folder / f"{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
        rows.append((path.name, f"class {number // 4}", f"colour {number // 8}", "same", f"photo-{number}"))
    table = folder / "photos.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "label", "attr_colour", "attr_shape", "item_id"), *rows])
    return table


def train(house: Path, name: str, *more: str) -> Path:
    where = ["--data", str(house / "photos.csv"), "--student", str(house / "teacher"), "--out", str(house / name)]
    small = ["--classes_per_batch", "2", "--items_per_class", "2", "--max_steps", "2", "--resolution", "64"]
    assert cli.main(["train", "metric", *where, *small, *more]) == 0
    return house / name


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A catalogue, and runs of two losses, of one of them two seeds."""
    house = tmp_path_factory.mktemp("house")
    make_photos(house)
    make_tiny_teacher("qwen3_vl", house / "teacher")
    for name, loss, seed in (("pa-0", "proxy_anchor", 0), ("pa-1", "proxy_anchor", 1), ("nce-0", "info_nce", 0)):
        train(house, name, "--loss", loss, "--seed", str(seed), "--pooler_learning_rate", "0.1")
    return house


@pytest.fixture
def runs(house, tmp_path) -> list[str]:
    """Copies of the runs that a test may break."""
    for name in ("pa-0", "pa-1", "nce-0"):
        shutil.copytree(house / name, tmp_path / name)
    return [str(tmp_path / name) for name in ("pa-0", "pa-1", "nce-0")]


class Text(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words, self.hidden = "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.hidden = tag in ("style", "script")

    def handle_data(self, data):
        if not self.hidden:
            self.words += data


def text_of(path: Path) -> str:
    return " ".join(Text(path).words.split())


# -- the card of the trained student


def test_the_card_names_no_photo_of_this_machine(house):
    card = (house / "pa-0" / "model" / "README.md").read_text(encoding="utf-8")
    assert "dataset_size:12" in card
    assert "widget" not in card
    assert str(house) not in card


# -- the page of one run


def test_the_page_of_a_run_says_what_was_trained_and_what_came_out(house):
    text = text_of(house / "pa-0" / "report.html")
    metrics = json.loads((house / "pa-0" / "metrics.json").read_text())
    before, after = (metrics[when]["recall@1"] for when in ("before", "after"))
    low, high = metrics["intervals"]["after"]["recall@1"]
    found = read_per_query(house / "pa-0")
    better = int((found["after"].values("recall@1") & ~found["before"].values("recall@1")).sum())
    worse = int((found["before"].values("recall@1") & ~found["after"].values("recall@1")).sum())
    assert (
        "A student (the vision tower of teacher with an attention pooler) was trained on 12 photos of 3 classes from "
        f"{house / 'photos.csv'} with Proxy Anchor: 2 optimizer steps, seed 0. It was measured on 12 photos of 3 "
        f"classes that it had not been trained on. R@1, the share of queries whose nearest photo is of their "
        f"class, went from {100 * before:.1f} to {100 * after:.1f} % (95 % interval {100 * low:.1f}–{100 * high:.1f}): "
        f"better on {better} queries, worse on {worse}"
    ) in text
    for part in ("Nearest neighbours", "Confused classes", "Differs in", "Loss", "Cost", "Settings", "class 5"):
        assert part in text
    assert "What the teacher said" not in text


def test_confused_classes_name_the_attribute_that_differs(house):
    source = html.unescape((house / "pa-0" / "report.html").read_text())
    pairs = re.findall(r'<article class="confusion card">.*?</article>', source, re.DOTALL)
    assert pairs
    for pair in pairs:
        classes = [int(number) for number in re.findall(r"<h3><bdi>class (\d)</bdi>.*?<bdi>class (\d)</bdi>", pair)[0]]
        colours = [number * 4 // 8 for number in classes]
        if colours[0] == colours[1]:
            assert "do not tell these classes apart" in pair
        else:
            assert all(f"<td><bdi>colour {colour}</bdi></td>" in pair for colour in colours)
        assert "shape" not in pair


def test_every_loss_has_a_name():
    assert set(LOSSES) == set(METRIC_LOSSES)


def test_curves_are_means_over_seeds_at_steps_that_all_have():
    logs = [
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 4.0}],
        [{"step": 1, "loss": 4.0}, {"step": 1, "message": "x"}],
    ]
    assert curves({"a": logs, "b": [[{"step": 5, "mixed_groups": 0.5}]]}) == {
        "Loss": {"a": [(1, 3.0)]},
        "Mixed groups": {"b": [(5, 0.5)]},
    }


def test_health_is_told_in_shares_and_words():
    log = [
        {"step": 1, "loss": 1.0, "mixed_groups": 0.25, "valid_json": 1.0, "completion_length": 100.0},
        {"step": 2, "loss": 1.0, "mixed_groups": 0.0, "valid_json": 0.5, "completion_length": 110.0},
        {"step": 2, "message": "step 2: no policy gradient, none of 8 answers was valid JSON with a verdict"},
    ]
    facts = health({"SAGA": [log]})
    assert {name: fact["value"] for name, fact in facts.items()} == {
        "SAGA: mixed groups": "12.5 %",
        "SAGA: valid json": "75.0 %",
        "SAGA: tokens an answer": "105",
        "SAGA: steps without the teacher's gradient": "1 of 2",
    }
    assert "none of 8 answers" in facts["SAGA: steps without the teacher's gradient"]["note"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [((30.0,), "30.0 s"), ((59.0, 62.0), "1 min 0 s"), ((4000.0, 4400.0), "1 h 10 min")]
)
def test_cost_is_the_mean_over_seeds(seconds, shown):
    log = [{"step": 1, "seconds": 2.0, "data_wait_share": 0.1}, {"step": 2, "seconds": 4.0, "data_wait_share": 0.3}]
    runs = [FinishedRun(Path("x"), {"seconds": s, "peak_memory_gb": 1.5}, {}, log) for s in seconds]
    facts = cost({"SAGA": runs})
    assert [fact["value"] for fact in facts.values()] == [shown, "3.0 s", "1.5 GB"]
    assert "20.0 % of the time waiting" in facts["SAGA: time a step"]["note"]


# -- the page of several runs


def a_group(method: str = "metric", differs: dict | None = None, **settings) -> Group:
    settings = {"loss": "proxy_anchor", "pooling": "attention", "max_steps": 40, "data": "aviary"} | settings
    return Group([Run(Path("x"), method, 0, settings, {}, {})], differs or {})


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ([a_group()], ["Proxy Anchor"]),
        ([a_group(), a_group("saga")], ["Proxy Anchor", "SAGA over Proxy Anchor"]),
        ([a_group(), a_group(loss="info_nce")], ["Proxy Anchor", "InfoNCE"]),
        (
            [a_group(), a_group(pooling="mean", max_steps=80, data="cub:x")],
            [
                "Proxy Anchor, attention pooling, 40 steps, on aviary",
                "Proxy Anchor, mean pooling, 80 steps, on cub:x",
            ],
        ),
        (
            [a_group(differs={"learning_rate": 0.1}), a_group(differs={"learning_rate": 0.2})],
            ["Proxy Anchor, learning rate 0.1", "Proxy Anchor, learning rate 0.2"],
        ),
        ([a_group(), a_group()], ["Proxy Anchor (1)", "Proxy Anchor (2)"]),
    ],
)
def test_groups_have_names_that_tell_them_apart(groups, names):
    assert group_names(groups) == names


def test_compare_writes_the_page_of_several_runs(capsys, runs, tmp_path):
    page = tmp_path / "deep" / "page.html"
    assert cli.main(["compare", *runs, "--html", str(page)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"The page: {page}")
    text = text_of(page)
    groups = group_runs([Path(run) for run in runs])
    mean, spread = groups[0].spread("after", "recall@1")
    assert f"{100 * mean:.1f} ± {100 * spread:.1f}" in text
    for part in (
        "Proxy Anchor (2 steps, 2 seeds); InfoNCE (2 steps, 1 seed)",
        "It was measured on 12 photos of 3 classes",
        "On R@1, against Proxy Anchor, InfoNCE is better on",
        "those of one seed: Proxy Anchor, seed 0 and InfoNCE, seed 0",
        "proxy_anchor (Proxy Anchor); info_nce (InfoNCE)",
        "Confused classes",
        "InfoNCE: time",
    ):
        assert part in text
    assert "What the teacher said" not in text


def test_the_page_of_one_group_shows_its_worst_queries(capsys, runs, tmp_path):
    assert cli.main(["compare", *runs[:2], "--json", "--html", str(tmp_path / "page.html")]) == 0
    assert len(json.loads(capsys.readouterr().out)["groups"]) == 1
    text = text_of(tmp_path / "page.html")
    assert "Worst queries" in text
    assert "Better with" not in text


def test_an_older_run_is_shown_without_intervals(capsys, runs, tmp_path):
    (Path(runs[0]) / "per_query.parquet").unlink()
    assert cli.main(["compare", runs[0], runs[2], "--html", str(tmp_path / "page.html")]) == 0
    assert f"No intervals and no paired test with {runs[0]}" in text_of(tmp_path / "page.html")


def test_what_the_page_needs_and_lacks_is_one_sentence(capsys, runs, tmp_path):
    page = ["--html", str(tmp_path / "page.html")]
    assert "is a directory; give the name of a file" in fails(capsys, ["compare", *runs, "--html", str(tmp_path)])
    for name in runs:
        settings = Path(name) / "config.yaml"
        settings.write_text(re.sub("data: .*", "data: nowhere", settings.read_text()))
    told = fails(capsys, ["compare", *runs, *page])
    assert f"those of the run {runs[0]} cannot be read" in told
    assert "nowhere" in told
    (Path(runs[2]) / "model" / "modules.json").unlink()
    assert f"the run {runs[2]} has no model/" in fails(capsys, ["compare", *runs, *page])
    (Path(runs[0]) / "log.jsonl").write_text("{broken")
    assert f"log.jsonl of {runs[0]} is missing or broken" in fails(capsys, ["compare", runs[0], *page])
    assert not (tmp_path / "page.html").exists()


def test_runs_on_different_photos_are_refused(capsys, runs, tmp_path):
    shutil.copytree(Path(runs[0]).parent / "pa-0", tmp_path / "other")
    table = make_photos(tmp_path / "other")
    table.write_text(table.read_text().replace("photo-", "picture-"))
    settings = tmp_path / "other" / "config.yaml"
    settings.write_text(re.sub("data: .*", f"data: {table}", settings.read_text()))
    told = fails(capsys, ["compare", runs[0], str(tmp_path / "other"), "--html", str(tmp_path / "page.html")])
    assert "were measured on different photos" in told
