"""AFMRL's loop on a tiny generator: all stages in one command, kills, what moves and what stays, `until`, mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import test_methods_rar
from fieldmark import cli
from fieldmark.commands.train import how_to_resume, show_run
from fieldmark.data.catalog import load_catalog, select_split
from fieldmark.errors import FieldmarkError
from fieldmark.methods import afmrl, agcl, rar
from fieldmark.methods.afmrl import AfmrlConfig
from fieldmark.methods.generator import GeneratorTrainer
from fieldmark.methods.rar import RarTrainer
from fieldmark.methods.trainer import AdapterTrainer
from fieldmark.teacher import attribute_labels
from fieldmark.teacher.attribute_labels import read_attributes
from helpers_cli import fails
from helpers_tiny import make_tiny_composed, make_tiny_teacher
from helpers_training import killed_at, log_of
from test_methods_rar import SCHEMA, SIDE, cold_start
from test_report_attributes import check_page

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN, TEST = 24, 8
STEPS = {"generator": 2, "agcl": 3, "rar": 3, "cit": 2}
LADDER = ["untrained", "agcl", "agcl + distilled generator", "agcl + RL generator", "CIT"]
PARTS = ["result", "training", "enrichment", "attributes", "negatives", "masked", "health", "cost", "settings"]
SETTINGS: dict[str, Any] = {
    "generator_settings": {"per_device_batch": 2, "eval_items": 2, "learning_rate": 1e-6},
    "agcl_settings": {"pairs_per_batch": 4, "lora_rank": 4, "learning_rate": 1e-3, "warmup": 0.0},
    "rar_settings": {
        "queries_per_step": 2,
        "group_size": 4,
        "per_device_batch": 8,
        "k": 4,
        "eval_items": 2,
        "learning_rate": 1e-3,
        "warmup": 0.0,
    },
    "cit_settings": {"pairs_per_batch": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread) -> Path:
    """A generator that answers as asked, the schema of a short prompt, and a table of a few birds.

    Titles are as long as each other, so that the generator is asked about many at once.
    """
    folder = tmp_path_factory.mktemp("afmrl")
    (folder / "schema.yaml").write_text(SCHEMA, encoding="utf-8")
    catalog = load_catalog("aviary:2")
    rows = [
        row
        for split, count in (("train", TRAIN), ("test", TEST))
        for row in select_split(catalog, split).select(range(count)).to_list()
    ]
    lines = [json.dumps(row | {"title": f"Bird number {number:02d}"}) + "\n" for number, row in enumerate(rows)]
    (folder / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_methods_rar, "load_catalog", lambda source: load_catalog(str(folder / "items.jsonl")))
        cold_start(make_tiny_teacher("qwen3_vl", folder / "base"), folder / "generator")
    return folder


def options(place: Path, out: Path, **changes: Any) -> dict[str, Any]:
    stages = {name: given | {"max_steps": STEPS[name.removesuffix("_settings")]} for name, given in SETTINGS.items()}
    return {
        "out": str(out),
        "data": str(place / "items.jsonl"),
        "teacher": str(place / "generator"),
        "schema": str(place / "schema.yaml"),
        "resolution": SIDE,
        "max_new_tokens": 64,
        "eval_batch_size": 32,
        "save_steps": 1,
        **stages,
        **changes,
    }


def command(place: Path, out: Path, **changes: Any) -> list[str]:
    words = ["train", "afmrl"]
    for name, value in options(place, out, **changes).items():
        words += [f"--{name}", json.dumps(value) if not isinstance(value, str) else value]
    return words


def train(place: Path, out: Path, **changes: Any) -> Path:
    return afmrl.train(AfmrlConfig(**options(place, out, **changes)))


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@dataclass
class Seen:
    """A whole run, and what was seen in it.

    Attributes:
        out: the run folder.
        starts: an embedder's parameters when a stage began to train it.
        items: how many items a stage trained on.
        judge: the student of RAR, and its parameters as they were at first.
    """

    out: Path
    starts: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    judge: tuple[Any, dict[str, torch.Tensor]] | None = None


@pytest.fixture(scope="module")
def run(place, tmp_path_factory) -> Seen:
    """The whole loop in one command."""
    seen = Seen(tmp_path_factory.mktemp("whole") / "run")
    making, batching, judging = agcl.make_student, agcl.make_batches, rar.open_student

    def make(config):
        student = making(config)
        seen.starts[Path(config.out).name] = copied(student)
        return student

    def batches(config, task):
        seen.items[Path(config.out).name] = len(task.train)
        return batching(config, task)

    def judge(config):
        student = judging(config)
        seen.judge = (student, copied(student))
        return student

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agcl, "make_student", make)
        patch.setattr(agcl, "make_batches", batches)
        patch.setattr(rar, "open_student", judge)
        assert cli.main(command(place, seen.out)) == 0
    transformers.utils.logging.set_verbosity_warning()  # commands quieten the libraries for the whole process
    return seen


def copied(student: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}


# -- the loop


def test_one_command_runs_all_stages(run):
    left = sorted(path.name for path in run.out.iterdir() if path.name[0].isdigit())
    assert left == [
        "1-generator", "2-attributes.json", "2-attributes.parquet", "3-agcl", "4-rar", "5-rl_attributes.json",
        "5-rl_attributes.parquet", "6-cit",
    ]  # fmt: skip
    for name, steps in STEPS.items():
        (folder,) = run.out.glob(f"?-{name}")
        assert [record["step"] for record in log_of(folder)] == list(range(1, steps + 1))
    metrics = metrics_of(run.out)
    assert list(metrics["ladder"]) == LADDER
    first, last = metrics_of(run.out / "3-agcl"), metrics_of(run.out / "6-cit")
    rewarded = json.loads((run.out / "5-rl_attributes.json").read_text(encoding="utf-8"))
    key, joined = "instance_ndcg@10", "enriched_instance_ndcg@10"
    assert [rung[key] for rung in metrics["ladder"].values()] == [
        first["before"][key],
        first["after"][key],
        first["after"][joined],
        rewarded["metrics"][joined],
        last["after"][joined],
    ]
    assert metrics["ladder"]["CIT"]["i2t_recall@1"] == last["after"]["i2t_recall@1"]
    assert (metrics["before"], metrics["after"]) == (metrics["ladder"]["untrained"], metrics["ladder"]["CIT"])
    assert not any(name.startswith("enriched") for rung in metrics["ladder"].values() for name in rung)
    for name, rung in metrics["ladder"].items():
        low, high = metrics["ladder_intervals"][name][key]
        assert low <= rung[key] <= high
    assert {stage: seconds > 0 for stage, seconds in metrics["seconds_per_query"].items()} == {
        "attributes": True,
        "rl_attributes": True,
    }
    files = [run.out / f"{name}.parquet" for name in ("2-attributes", "5-rl_attributes")]
    made_by = [json.loads(pq.read_schema(file).metadata[b"fieldmark"]) for file in files]
    assert [one["resolution"] for one in made_by] == [SIDE, SIDE], "photos as the generator was trained on"
    answers = [read_attributes(file) for file in files]
    assert all(len(found) > TRAIN for found in answers), "valid answers about both splits"
    assert answers[0] != answers[1]


def test_evaluate_asks_the_generator_and_finds_what_the_run_found(place, run, capsys):
    """The whole way once more on the command line: answers, texts, vectors, metrics; and the cost beside the gain."""
    argv = ["evaluate", str(run.out / "3-agcl"), "--data", str(place / "items.jsonl"), "--enrich", "query"]
    argv += ["--generator", str(run.out / "1-generator" / "model"), "--schema", str(place / "schema.yaml")]
    argv += ["--generator_resolution", str(SIDE), "--max_new_tokens", "64"]
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0
    found, stored = json.loads(capsys.readouterr().out), metrics_of(run.out / "3-agcl")["after"]
    names = [name for name in stored if "instance_" in name]
    assert len(names) == 12
    for name in names:
        assert found[name] == pytest.approx(stored[name], abs=1e-6), name
    assert found["seconds_per_query"] > 0
    assert found["n_answers"] == TEST


def test_cit_goes_on_from_stage_three_on_three_tenths_of_the_items(run):
    trained = weights(run.out / "3-agcl")
    start = run.starts["6-cit"]
    assert {name for name, value in trained.items() if any(torch.equal(value, other) for other in start.values())} == (
        set(trained)
    )
    assert run.items == {"3-agcl": TRAIN, "6-cit": 6}, "three products of two: a fourth would be more than 0.3 x 24"
    settings = yaml.safe_load((run.out / "6-cit" / "config.yaml").read_text(encoding="utf-8"))
    assert Path(settings["attributes"]) == run.out / "5-rl_attributes.parquet"
    assert all(torch.equal(value, weights(run.out)[name]) for name, value in weights(run.out / "6-cit").items())
    assert any(not torch.equal(value, trained[name]) for name, value in weights(run.out / "6-cit").items())


def test_the_judge_is_stage_threes_embedder_and_stays_bit_identical(run):
    student, before = run.judge
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    saved = weights(run.out / "3-agcl")
    assert len(saved) == len(before)
    assert all(any(torch.equal(value, other) for other in before.values()) for value in saved.values())


class Killed(Exception):
    """What no part of a run waits for."""


@contextmanager
def killed_while_asking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run inside the block asks about one batch of items."""
    asking = attribute_labels.ask_about_photos

    def asked(*args, **kwargs):
        yield next(asking(*args, **kwargs))
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(attribute_labels, "ask_about_photos", asked)
        with pytest.raises(Killed):
            yield


@contextmanager
def killed_before(monkeypatch: pytest.MonkeyPatch, name: str, *first: Any) -> Iterator[None]:
    """A run inside the block ends where that part of the loop begins (of its calls, the one with these words)."""
    whole = getattr(afmrl, name)

    def dying(*args):
        if all(word in args[1:] for word in first):
            raise Killed
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(afmrl, name, dying)
        with pytest.raises(Killed):
            yield


def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(run, place, tmp_path, monkeypatch):
    out, done = tmp_path / "run", {}

    def go_on(where: str) -> None:
        train(place, out, resume=out.exists())
        raise AssertionError(f"not killed in {where}")

    kills = {
        "1-generator": killed_at(GeneratorTrainer, 1),
        "2-attributes": killed_while_asking(monkeypatch),
        "3-agcl": killed_at(AdapterTrainer, 2),
        "4-rar": killed_at(RarTrainer, 2),
        "before 5": killed_before(monkeypatch, "ask", "rl_attributes"),
        "5-rl_attributes": killed_while_asking(monkeypatch),
        "6-cit": killed_at(AdapterTrainer, 1),
        "before the report": killed_before(monkeypatch, "write_afmrl_report"),
    }
    for where, killed in kills.items():
        with killed:
            go_on(where)
        if not where.startswith("before"):
            assert f"goes on in the stage {where}" in how_to_resume(out)
        finished = [*out.glob("?-*/metrics.json"), *out.glob("?-*.json")]
        done |= {path: done.get(path, path.stat().st_mtime_ns) for path in finished}
    train(place, out, resume=True)
    assert len(done) == 6
    assert {path: path.stat().st_mtime_ns for path in done} == done, "no finished stage was run again"
    assert metrics_of(out)["ladder"] == metrics_of(run.out)["ladder"]
    for stage in ("1-generator", "3-agcl", "4-rar", "6-cit", "."):
        one, other = weights(run.out / stage), weights(out / stage)
        assert all(torch.equal(one[name], other[name]) for name in one), stage
    for name in ("2-attributes", "5-rl_attributes"):
        assert read_attributes(out / f"{name}.parquet") == read_attributes(run.out / f"{name}.parquet")
    with pytest.raises(FieldmarkError, match="holds a finished run"):
        train(place, out, resume=True)


def test_until_ends_the_loop_and_a_later_stage_goes_on_from_there(place, tmp_path, capsys):
    """Without a cold start; what stages that are not run could not do does not matter."""
    start = {"cold_start": False, "rar_settings": {"k": 1000}}
    out = train(place, tmp_path / "run", until="attributes", **start)
    assert sorted(path.name for path in out.glob("?-*")) == ["2-attributes.json", "2-attributes.parquet"]
    assert metrics_of(out)["ladder"] == {}
    show_run(out)
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    asked = (out / "2-attributes.json").stat().st_mtime_ns
    with pytest.raises(FieldmarkError, match="seed was 0, is 1"):
        train(place, out, until="agcl", resume=True, seed=1, **start)
    assert metrics_of(out)["ladder"] == {}, "a refused run is left as it was"
    train(place, out, until="agcl", resume=True, **start)
    assert (out / "2-attributes.json").stat().st_mtime_ns == asked
    assert list(metrics_of(out)["ladder"]) == LADDER[:3]
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(out / "3-agcl").items())
    assert sections(out) == [part for part in PARTS if part != "attributes"]
    with pytest.raises(FieldmarkError, match="The stage rar could not run: k is 1000"):
        train(place, out, until="rar", resume=True, **start)
    with pytest.raises(FieldmarkError, match="holds a finished run"):
        train(place, out, until="attributes", resume=True, **start)


# -- its pages


def sections(out: Path) -> list[str]:
    return re.findall(r'<section id="(\w+)">', (out / "report.html").read_text(encoding="utf-8"))


def test_the_report_says_what_the_run_says(run):
    assert sections(run.out) == PARTS
    source = (run.out / "report.html").read_text(encoding="utf-8")
    words = " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<(style|script)>.*?</\1>", "", source, flags=re.S)).split())
    metrics = metrics_of(run.out)
    for name in ("untrained", "AGCL + distilled generator", "AGCL + RL generator", "CIT"):
        rung = metrics["ladder"][name.replace("AGCL", "agcl")]
        assert f"{100 * rung['instance_recall@1']:.1f} % with" in words
        assert name in words
    for chart in ("Cold start: loss", "AGCL: loss", "share of negatives masked", "mean tanh(BM25)", "RAR: reward",
                  "RAR: share of invalid answers", "RAR: tokens an answer", "RAR: characters an answer"):  # fmt: skip
        assert chart in words
    reward = metrics_of(run.out / "4-rar")
    assert f"its reward from {reward['before']['reward']:.3f} to {reward['after']['reward']:.3f}" in words
    assert "colour" in words


@pytest.mark.parametrize(("size", "scheme"), [("desk", "light"), ("phone", "dark")])
def test_the_report_fits_is_read_and_asks_for_nothing(run, size, scheme):
    pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    from test_report_page import CHROMIUM

    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        check_page(browser, run.out / "report.html", size, scheme, texts=150, pictures=5)
        browser.close()


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        (".", ("afmrl, seed 0", "instance_recall@1", "i2t_recall@1")),
        ("1-generator", ("generator, seed 0", "valid", "completion_length")),
        ("3-agcl", ("agcl, seed 0", "instance_recall@1", "enriched_instance_recall@1")),
        ("4-rar", ("rar, seed 0", "reward", "valid", "recall@1", "tokens")),
    ],
)
def test_each_stage_is_shown_as_a_run(run, capsys, stage, names):
    show_run(run.out / stage)
    said = capsys.readouterr().out
    assert [name for name in names if name not in said] == []


# -- mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"agcl_settings": {"learning_rat": 1.0}}, "'learning_rat' cannot be set for the stage agcl; it takes"),
        ({"rar_settings": {"student": "x"}}, "'student' cannot be set for the stage rar; it takes"),
        ({"cit_settings": {"attributes": "catalogue"}}, "'attributes' cannot be set for the stage cit; it takes"),
        ({"agcl_settings": {"weights": "bm26"}}, "weights of the stage agcl was given 'bm26'; see `fieldmark train ag"),
        ({"cit_settings": {"max_steps": "few"}}, "max_steps of the stage cit was given 'few'; see `fieldmark train ag"),
        ({"generator_settings": {"learning_rate": -1}}, "learning_rate is -1"),
        ({"teacher": None}, "name one with --teacher"),
        ({"until": "generator", "cold_start": False}, "name a later stage"),
        ({"rar_settings": {"k": 50}}, "The stage rar could not run: k is 50 and the"),
        ({"rar_settings": SETTINGS["rar_settings"] | {"per_device_batch": 3}}, "The stage rar could not run: a step's"),
        ({"cit_settings": {"pairs_per_batch": 19}}, "The stage cit could not run: 19 pairs a batch were asked for"),
        ({"agcl_settings": SETTINGS["agcl_settings"], "category": "kind"}, "the category 'kind' was asked for"),
        ({"title_column": "nothing"}, "nothing"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(place, tmp_path, changes, words):
    with pytest.raises(FieldmarkError, match=re.escape(words)) as raised:
        train(place, tmp_path / "run", **changes)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_generator_that_rar_could_not_train_is_refused_before_anything_runs(place, tmp_path):
    composed = make_tiny_composed(tmp_path)
    wrong = {"teacher": str(composed), "rar_settings": SETTINGS["rar_settings"] | {"lora_rank": 0}}
    with pytest.raises(FieldmarkError, match="The stage rar could not run: the generator is a ComposedForCond"):
        train(place, tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_a_mistake_on_the_command_line_is_told(place, tmp_path, capsys):
    wrong = {"agcl_settings": {"pairs_per_batch": "x"}}
    assert "pairs_per_batch of the stage agcl was given 'x'" in fails(capsys, command(place, tmp_path / "r", **wrong))


def test_bad_input_on_the_command_line_is_one_sentence_and_exit_code_2(place, run, tmp_path, capsys):
    """A recall deeper than the gallery; attributes of other birds; a generator that never answers as asked."""
    deep = command(place, tmp_path / "deep", rar_settings=SETTINGS["rar_settings"] | {"k": 50})
    assert "k is 50 and the train gallery of" in fails(capsys, deep)

    others = select_split(load_catalog("aviary:2"), "train").select(range(TRAIN, TRAIN + 8)).to_list()
    others += select_split(load_catalog("aviary:2"), "test").select(range(TEST, TEST + 4)).to_list()
    table = tmp_path / "others.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in others), encoding="utf-8")
    agcl_command = ["train", "agcl", "--data", str(table), "--student", str(place / "base")]
    agcl_command += ["--attributes", str(run.out / "2-attributes.parquet"), "--out", str(tmp_path / "others")]
    assert "has attributes of none of the" in fails(capsys, agcl_command)
    assert not (tmp_path / "others").exists()

    silent = {"teacher": str(place / "base"), "cold_start": False, "max_new_tokens": 4}
    assert cli.main(command(place, tmp_path / "silent", **silent)) == 2
    *_, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith("fieldmark: none of the first")
    assert "train generator" in sentence
