"""`fieldmark index` and `fieldmark search`: what they keep, find, print and refuse; a kill at any moment."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement

from fieldmark import cli
from fieldmark.errors import FieldmarkError
from fieldmark.search import indexing
from fieldmark.search.card import FORMAT, StoreCard
from fieldmark.search.store import Store
from fieldmark.students.build import build_student, load_student
from fieldmark.students.enrich import enriched_text
from fieldmark.students.items import encode_items
from fieldmark.students.multimodal import build_multimodal_student
from fieldmark.teacher import attribute_labels
from fieldmark.teacher.attributes import attribute_answer, load_schema
from fieldmark.teacher.questions import Answer
from helpers_cli import draw, fails, no_file_above
from helpers_tiny import make_tiny_teacher

ROOT = Path(__file__).parents[1]
BENCHMARK, DOCS = ROOT / "benchmarks" / "index_faults.py", ROOT / "docs" / "search.md"
COLOURS, PHOTOS = ("red", "green", "blue"), 18
FIELDS = ("item_id", "image", "label", "title", "split", "role", "attr_Main colour")

pytestmark = pytest.mark.usefixtures("one_thread", "loud_libraries")


class Shop:
    """A catalogue of a CSV file and photos, which a test may change."""

    def __init__(self, root: Path) -> None:
        self.root, self.source, self.db = root, str(root / "items.csv"), str(root / "db")
        self.rows = [
            {
                "item_id": f"item-{number:02d}",
                "image": f"{number}.png",
                "label": f"class {number % 4}",
                "title": f"{COLOURS[number % 3]} bird number {number}",
                "split": "test" if number % 2 else "train",
                "role": "both",
                "attr_Main colour": COLOURS[number % 3],
            }
            for number in range(PHOTOS)
        ]
        for number in range(PHOTOS):
            draw(number).save(root / f"{number}.png")
        self.write()

    def write(self) -> None:
        with open(self.source, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, FIELDS)
            table.writeheader()
            table.writerows(self.rows)

    @property
    def ids(self) -> set[str]:
        return {row["item_id"] for row in self.rows}


@pytest.fixture
def shop(tmp_path) -> Shop:
    return Shop(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Untrained students: of photos, and of photos and texts; and a generator."""
    root = tmp_path_factory.mktemp("models")
    teacher = make_tiny_teacher("qwen3_vl", root / "teacher")
    build_student(teacher, pooling="mean", resolution=64).save_pretrained(str(root / "photos"), create_model_card=False)
    build_multimodal_student(teacher, lora_rank=0, resolution=64).save_pretrained(
        str(root / "texts"), create_model_card=False
    )
    return {name: str(root / name) for name in ("photos", "texts", "teacher")}


@pytest.fixture(scope="module")
def stores(models, tmp_path_factory) -> dict[str, Shop]:
    """A finished store of each student."""
    shops = {}
    for kind in ("photos", "texts"):
        shops[kind] = Shop(tmp_path_factory.mktemp(kind))
        assert cli.main(["index", models[kind], "--data", shops[kind].source, "--out", shops[kind].db]) == 0
    return shops


@pytest.fixture
def run(capsys):
    """Runs a command that succeeds; returns its stdout."""

    def call(*argv: str) -> str:
        capsys.readouterr()
        assert cli.main(list(argv)) == 0
        return capsys.readouterr().out

    return call


def found(run, *argv: str) -> list[dict[str, Any]]:
    return json.loads(run("search", *argv, "--json"))["results"]


# -- index


def test_vectors_are_those_of_the_student(models, stores):
    for kind, shop in stores.items():
        student, photos = load_student(models[kind]), [str(shop.root / row["image"]) for row in shop.rows]
        expected = student.encode(photos) if kind == "photos" else encode_items(student, images=photos)
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        store = Store.open(shop.db)
        np.testing.assert_allclose(store.vectors([row["item_id"] for row in shop.rows]), expected, atol=1e-5)
        assert store.card.model.texts == (kind == "texts")
        assert store.photo("item-03") == photos[3]


def test_a_second_run_embeds_what_is_new_or_changed(models, shop, run, monkeypatch):
    command = ["index", models["photos"], "--data", shop.source, "--out", shop.db]
    out = run(*command)
    assert f"{PHOTOS} items in {shop.db}: {PHOTOS} new, 0 changed, 0 unchanged, 0 deleted, " in out
    assert "search is exact (up to 100,000 items)" in out
    embedded: list[int] = []
    whole = indexing.embed
    monkeypatch.setattr(
        indexing,
        "embed",
        lambda student, features: embedded.append(len(features["pixel_values"])) or whole(student, features),
    )
    before = Store.open(shop.db).vectors(["item-00", "item-01", "item-02"])
    draw(99).save(shop.root / "1.png")
    shop.rows[2]["title"] = "another title"
    shop.rows[3]["attr_Main colour"] = "violet"
    shop.rows.append(shop.rows[0] | {"item_id": "item-new", "image": "0.png"})
    shop.write()
    assert f"{PHOTOS + 1} items in {shop.db}: 1 new, 3 changed, {PHOTOS - 3} unchanged, 0 deleted, " in run(*command)
    assert sum(embedded) == 2
    store = Store.open(shop.db)
    after = store.vectors(["item-00", "item-01", "item-02"])
    np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], atol=1e-6)
    assert np.abs(after[1] - before[1]).max() > 1e-3
    assert store.items(["item-02"])[0].title == "another title"
    assert [hit.item_id for hit in store.search(after[0], 3, "main_colour = 'violet'")] == ["item-03"]
    assert f"0 new, 0 changed, {PHOTOS + 1} unchanged, 0 deleted\n" in run(*command)
    assert sum(embedded) == 2


def test_items_that_left_are_deleted_when_asked(models, shop, run):
    command = ["index", models["photos"], "--data", shop.source, "--out", shop.db]
    run(*command)
    shop.rows = shop.rows[4:]
    shop.write()
    assert f"{PHOTOS} items in {shop.db}: 0 new, 0 changed, {PHOTOS - 4} unchanged, 0 deleted" in run(*command)
    assert f"{PHOTOS - 4} items in {shop.db}: " in run(*command, "--prune")
    assert set(Store.open(shop.db).hashes()) == shop.ids
    out = run("index", "--out", shop.db, "--delete", "item-05", "item-07")
    assert out.startswith(f"2 items deleted, {PHOTOS - 6} left in {shop.db}; search is exact")
    assert set(Store.open(shop.db).hashes()) == shop.ids - {"item-05", "item-07"}


def test_names_to_delete_are_taken_as_they_stand(models, shop, run):
    odd = ["a,b", "c d", "-x", "null", "[1, 2]", "{a: b}", "007", "it's", "e\u0301", "é"]
    for row, name in zip(shop.rows, odd, strict=False):
        row["item_id"] = name
    shop.write()
    run("index", models["photos"], "--data", shop.source, "--out", shop.db)
    assert "1 items deleted" in run("index", "--out", shop.db, "--delete=-x")
    kept = shop.ids - {"-x", "é"}
    assert set(Store.open(shop.db).hashes()) == kept | {"é"}
    # The flag may be repeated, and an item named twice.
    assert "1 items deleted" in run("index", "--delete", "é", "--out", shop.db, "--delete", "é")
    assert set(Store.open(shop.db).hashes()) == kept
    run("index", "--out", shop.db, "--delete", *sorted(kept & set(odd)))
    assert set(Store.open(shop.db).hashes()) == shop.ids - set(odd)


def test_split_and_queries(models, shop, run):
    shop.rows[1]["role"] = "query"
    shop.write()
    out = run("index", models["photos"], "--data", shop.source, "--out", shop.db, "--split", "test")
    assert "1 photos with the role query are left out" in out
    assert set(Store.open(shop.db).hashes()) == {row["item_id"] for row in shop.rows[3::2]}


def test_bad_photos_are_named_or_skipped(models, shop, run, capsys):
    (shop.root / "7.png").write_bytes(b"no photo")
    command = ["index", models["photos"], "--data", shop.source, "--out", shop.db, "--batch_size", "4"]
    assert "7.png: it is not an image" in fails_loudly(capsys, command)
    assert 0 < Store.open(shop.db).count() < 8  # what came before it is kept
    out = run(*command, "--bad_photos", "skip")
    assert f"{PHOTOS - 1} items" in out
    assert f"1 photos left out: {shop.db}/bad_files.csv" in out
    assert set(Store.open(shop.db).hashes()) == shop.ids - {"item-07"}
    (bad,) = csv.DictReader(io.StringIO((Path(shop.db) / "bad_files.csv").read_text()))
    assert (bad["item_id"], "not an image" in bad["reason"]) == ("item-07", True)
    # An item that the store has stays when its photo is gone.
    (shop.root / "8.png").unlink()
    assert f"{PHOTOS - 1} items in {shop.db}: 0 new, 0 changed, {PHOTOS - 2} unchanged" in run(
        *command, "--bad_photos", "skip"
    )
    for number in range(PHOTOS):
        (shop.root / f"{number}.png").unlink(missing_ok=True)
    assert f"None of the {PHOTOS} photos can be read" in fails_loudly(capsys, [*command, "--bad_photos", "skip"])


def fails_loudly(capsys, argv: list[str]) -> str:
    """The last line of a command that fails after it has shown its progress."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, "Traceback" in err) == ("", False)
    assert err.splitlines()[-1].startswith("fieldmark: ")
    return err.splitlines()[-1]


def test_photos_given_as_bytes_are_kept_in_the_store(models, tmp_path, run, monkeypatch):
    photos = []
    for number in range(4):
        draw(number).save(buffer := io.BytesIO(), "PNG")
        photos.append(buffer.getvalue())
    pq.write_table(pa.table({"item_id": list("abcd"), "image": photos, "title": ["x"] * 4}), tmp_path / "items.parquet")
    command = ["index", models["photos"], "--data", str(tmp_path / "items.parquet"), "--out", str(tmp_path / "db")]
    added, add = [], Store.add
    monkeypatch.setattr(Store, "add", lambda self, rows, *more: added.append(len(rows)) or add(self, rows, *more))
    monkeypatch.setattr(indexing, "BYTES_A_WRITE", len(photos[0]) + 1)
    run(*command, "--batch_size", "1")
    assert added == [2, 2], "photos waited in memory"
    store = Store.open(tmp_path / "db")
    assert [store.photo(name) for name in "abcd"] == photos
    assert "4 unchanged" in run(*command)
    draw(2).save(tmp_path / "query.png")
    best = found(run, str(tmp_path / "db"), str(tmp_path / "query.png"), "--k", "1")[0]
    assert (best["item_id"], best["image"], round(best["score"], 4)) == ("c", None, 1.0)


def test_above_the_bound_an_index_is_built_and_measured(models, shop, run):
    command = ["index", models["photos"], "--data", shop.source, "--out", shop.db]
    out = run(*command, "--exact_up_to", "10")
    assert (
        f"search is approximate (IVF_HNSW_SQ): recall@10 against exact search 1.000, measured on {PHOTOS} items" in out
    )
    card = StoreCard.read(Path(shop.db))
    assert (card.exact_up_to, card.index.rows, card.index.recall_at_10) == (10, PHOTOS, 1.0)
    assert found(run, shop.db, str(shop.root / "5.png"), "--k", "1")[0]["item_id"] == "item-05"
    assert "search is approximate" in run(*command)  # the bound is the store's from now on


# -- photos with their titles


@pytest.fixture
def embedded(monkeypatch) -> list[int]:
    """Sizes of the batches that the student embeds."""
    sizes: list[int] = []
    whole = indexing.embed
    monkeypatch.setattr(
        indexing,
        "embed",
        lambda student, features: sizes.append(len(features["input_ids"])) or whole(student, features),
    )
    return sizes


def with_titles(model: str, shop: Shop) -> np.ndarray:
    photos, titles = [str(shop.root / row["image"]) for row in shop.rows], [row["title"] for row in shop.rows]
    return encode_items(load_student(model), images=photos, texts=titles)


def test_photos_are_embedded_with_their_titles(models, shop, run, embedded, capsys):
    model, names = models["texts"], sorted(shop.ids)
    command = ["index", model, "--data", shop.source, "--out", shop.db, "--batch_size", "7"]
    run(*command, "--with_titles")
    store = Store.open(shop.db)
    alone = encode_items(load_student(model), images=[str(shop.root / row["image"]) for row in shop.rows])
    np.testing.assert_allclose(store.vectors(names), with_titles(model, shop), atol=1e-5)
    assert np.abs(store.vectors(names) - alone).max() > 0.01
    assert store.card.with_titles
    assert embedded == [7, 7, 4]
    best = found(run, shop.db, str(shop.root / "5.png"), "--text", shop.rows[5]["title"], "--k", "1")[0]
    assert (best["item_id"], round(best["score"], 4)) == ("item-05", 1.0)
    # Another title is another vector; another label is not.
    shop.rows[2]["title"], shop.rows[3]["label"] = "another title", "another class"
    shop.write()
    assert f"0 new, 2 changed, {PHOTOS - 2} unchanged" in run(*command, "--with_titles")
    assert embedded[3:] == [1]
    np.testing.assert_allclose(Store.open(shop.db).vectors(names), with_titles(model, shop), atol=1e-5)
    assert f"0 new, 0 changed, {PHOTOS} unchanged" in run(*command, "--with_titles")
    refusal = f"The store {shop.db} holds photos embedded together with their titles; give --with_titles, or index into"
    assert refusal in fails(capsys, command)
    assert embedded[4:] == []


def test_a_run_that_was_stopped_goes_on_with_titles_alone(models, shop, run, monkeypatch, capsys):
    model, whole, calls = models["texts"], indexing.embed, []
    command = ["index", model, "--data", shop.source, "--out", shop.db, "--batch_size", "4"]

    def interrupted(student, features):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(student, features)

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "embed", interrupted)
        assert cli.main([*command, "--with_titles"]) == 130
    assert Store.open(shop.db).count() == 8
    assert "give --with_titles, or index into another folder." in fails(capsys, command)
    assert f"{PHOTOS - 8} new, 0 changed, 8 unchanged" in run(*command, "--with_titles")
    np.testing.assert_allclose(Store.open(shop.db).vectors(sorted(shop.ids)), with_titles(model, shop), atol=1e-5)


def test_titles_that_cannot_be_embedded_are_refused(models, shop, run, capsys):
    refusal = fails(capsys, ["index", models["photos"], "--data", shop.source, "--out", shop.db, "--with_titles"])
    assert "--with_titles was given for a student that does not embed a photo together with a text" in refusal
    command = ["index", models["texts"], "--data", shop.source, "--out", shop.db]
    shop.rows[4]["title"], shop.rows[9]["title"] = "", " "
    shop.write()
    refusal = f"2 of {PHOTOS} items have no title, the first 'item-04'; give them one, or leave --with_titles out."
    assert refusal in fails(capsys, [*command, "--with_titles"])
    assert not Path(shop.db).exists()  # else the next run would have to agree with it
    run(*command)
    shop.rows[4]["title"] = shop.rows[9]["title"] = "a title"
    shop.write()
    assert "holds photos embedded without titles; leave out --with_titles" in fails(capsys, [*command, "--with_titles"])


# -- a kill at any moment, a full disk, another writer


def test_a_killed_run_loses_and_doubles_nothing(models, shop):
    argv = ["--model", models["photos"], "--data", shop.source, "--kills", "3", "--seed", "1", "--json"]
    done = subprocess.run([sys.executable, str(BENCHMARK), *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert (result["items"], result["faults"]) == (PHOTOS, 0)
    assert len(result["kills"]) == 3
    assert any(one["items_kept"] < PHOTOS for one in result["kills"])


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_was_there(models, shop, run, capsys, monkeypatch):
    command = ["index", models["photos"], "--data", shop.source, "--out", shop.db]
    run(*command)
    before = Store.open(shop.db).vectors(sorted(shop.ids))
    shop.rows[0]["title"] = "another title"
    shop.rows += [row | {"item_id": f"new {row['item_id']}"} for row in shop.rows]
    shop.write()
    added, add = [], Store.add
    monkeypatch.setattr(Store, "add", lambda self, rows, *more: added.append(len(rows)) or add(self, rows, *more))
    with no_file_above(600):
        sentence = fails_loudly(capsys, command)
    assert re.search(r"The store .* cannot be written \(.*File too large.*\); what it held before is whole", sentence)
    assert added == [PHOTOS], "written more than once"
    names = sorted(row["item_id"] for row in shop.rows)
    np.testing.assert_array_equal(Store.open(shop.db).vectors(names[:PHOTOS]), before)
    assert f"{PHOTOS} new, 1 changed, {PHOTOS - 1} unchanged" in run(*command)
    assert sorted(Store.open(shop.db).hashes()) == names


def test_no_one_writes_between_the_items_and_their_index(models, shop, run, monkeypatch, capsys):
    command = ["index", models["photos"], "--data", shop.source, "--out", shop.db]
    finish, refusals = Store.finish, []

    def looked_at(self):
        try:
            with Store.open(shop.db).writing():
                pass
        except FieldmarkError as error:
            refusals.append(str(error))
        return finish(self)

    monkeypatch.setattr(Store, "finish", looked_at)
    run(*command)
    assert refusals == [f"Another process is writing to {shop.db}; wait until it has ended."]
    with Store.open(shop.db).writing():
        for argv in (command, ["index", "--out", shop.db, "--delete", "item-01"]):
            assert "Another process is writing to" in fails(capsys, argv)


# -- search


def test_search_by_photo(stores, run):
    shop = stores["photos"]
    out = json.loads(run("search", shop.db, str(shop.root / "4.png"), "--k", "3", "--json"))
    assert out["query"] == {
        "image": str(shop.root / "4.png"), "text": None, "where": None, "hybrid": False, "k": 3
    }  # fmt: skip
    first, second, third = out["results"]
    assert set(first) == {"item_id", "score", "margin", "title", "label", "attributes", "image"}
    assert (first["item_id"], first["title"], first["label"]) == ("item-04", "green bird number 4", "class 0")
    assert first["attributes"] == {"Main colour": "green"}
    assert first["image"] == str(shop.root / "4.png")
    assert first["score"] == pytest.approx(1, abs=1e-5)
    assert first["margin"] == pytest.approx(first["score"] - second["score"], abs=1e-6)
    assert second["margin"] == pytest.approx(second["score"] - third["score"], abs=1e-6)
    table = run("search", shop.db, "--image", str(shop.root / "4.png"), "--where", "main_colour = 'blue'")
    assert table.splitlines()[0] == f"6 of {PHOTOS} items for {shop.root}/4.png where main_colour = 'blue'"
    assert "blue bird number 2" in table
    assert "red bird" not in table


def test_search_by_text_and_by_both(models, stores, run):
    shop, student = stores["texts"], load_student(models["texts"])
    store, photo = Store.open(shop.db), str(shop.root / "6.png")
    for argv, vector in [
        (["blue bird"], encode_items(student, texts=["blue bird"])),
        ([photo, "--text", "blue bird"], encode_items(student, images=[photo], texts=["blue bird"])),
        (["--image", photo], encode_items(student, images=[photo])),
    ]:
        expected = store.search(vector[0], 5)
        hits = found(run, shop.db, *argv, "--k", "5")
        assert [hit["item_id"] for hit in hits] == [hit.item_id for hit in expected]
        np.testing.assert_allclose([hit["score"] for hit in hits], [hit.score for hit in expected], atol=1e-5)
    words = found(run, shop.db, "number 13", "--hybrid", "--k", "5")
    expected = store.search(encode_items(student, texts=["number 13"])[0], 5, text="number 13")
    assert [hit["item_id"] for hit in words] == [hit.item_id for hit in expected]


def test_words_may_be_looked_for_beside_a_photo_by_a_student_of_photos(stores, run):
    shop = stores["photos"]
    photo, store = str(shop.root / "0.png"), Store.open(shop.db)
    hits = found(run, shop.db, photo, "--text", "13", "--hybrid", "--k", "4")
    expected = store.search(store.vectors(["item-00"])[0], 4, text="13")
    assert [hit["item_id"] for hit in hits] == [hit.item_id for hit in expected]
    assert hits[0]["item_id"] == "item-13"
    assert hits[0]["margin"] < 0  # the photo itself comes next


@pytest.fixture
def generator(models, monkeypatch) -> Generator:
    said = Generator(models["teacher"])
    monkeypatch.setattr(attribute_labels, "ask_about_photos", said.answer)
    return said


class Generator:
    """A generator that answers what the test says, and what it was asked; `flags` name it to a search."""

    def __init__(self, folder: str) -> None:
        self.asked: list[tuple[Any, str]] = []
        self.attributes: dict[str, str] | None = {"crown": "red", "size": "small"}
        self.flags = ["--enrich", "query", "--generator", folder]

    def answer(self, teacher, photos, questions, **settings):
        self.asked += zip(photos, questions, strict=True)
        text = "no" if self.attributes is None else attribute_answer(["crown"], self.attributes)
        for place in range(len(photos)):
            yield [(place, Answer(text, 4, True))]


def test_a_generators_attributes_join_the_query(models, stores, run, generator):
    shop, student = stores["texts"], load_student(models["texts"])
    store, photo, flags = Store.open(shop.db), str(shop.root / "6.png"), generator.flags
    schema = load_schema()
    for argv, text, words in [
        ([photo], None, None),
        ([photo, "--text", "a bird"], "a bird", None),
        ([photo, "--text", "number 13", "--hybrid"], None, "number 13"),
    ]:
        out = json.loads(run("search", shop.db, *argv, *flags, "--k", "4", "--json"))
        joined = enriched_text(text, generator.attributes)
        seconds = out["enriched"].pop("seconds")
        assert 0 < seconds < 60
        assert out["enriched"] == {"text": joined, "attributes": generator.attributes, "invalid": None}
        assert generator.asked.pop() == (photo, schema.ask(text))
        expected = store.search(encode_items(student, images=[photo], texts=[joined])[0], 4, text=words)
        assert [hit["item_id"] for hit in out["results"]] == [hit.item_id for hit in expected]
        np.testing.assert_allclose([hit["score"] for hit in out["results"]], [hit.score for hit in expected], atol=1e-5)
    first = run("search", shop.db, photo, *flags).splitlines()[0]
    assert re.fullmatch(
        rf"added by {re.escape(models['teacher'])} in \d+\.\d{{3}} s: Key attributes: crown: red; size: small", first
    )


def test_an_answer_that_is_not_valid_adds_nothing_and_that_is_said(stores, run, generator):
    shop, generator.attributes = stores["texts"], None
    photo, reason = str(shop.root / "6.png"), "not one <think> block and one <answer> block behind it"
    for argv, text in [([photo], None), ([photo, "--text", "a bird"], "a bird")]:
        out = json.loads(run("search", shop.db, *argv, *generator.flags, "--json"))
        enriched = out["enriched"]
        assert (enriched["text"], enriched["attributes"], enriched["invalid"]) == (text, None, reason)
        assert out["results"] == found(run, shop.db, *argv)
    shown = run("search", shop.db, photo, *generator.flags)
    assert f" s: nothing, the answer is not valid: {reason}\n" in shown


def test_a_store_without_titles_is_warned_of_where_attributes_join_the_query(
    models, stores, shop, run, generator, caplog
):
    photo, told = str(shop.root / "6.png"), "have no titles in their vectors (--with_titles)"
    run("search", stores["texts"].db, photo, *generator.flags)
    assert sum(told in line for line in caplog.messages) == 1
    caplog.clear()
    run("search", stores["texts"].db, photo)
    run("index", models["texts"], "--data", shop.source, "--out", shop.db, "--with_titles")
    run("search", shop.db, photo, *generator.flags)
    assert not [line for line in caplog.messages if told in line]


def test_attributes_that_cannot_join_are_refused(models, stores, shop, capsys, tmp_path):
    photos, texts = stores["photos"].db, stores["texts"].db
    photo, enrich, named = str(shop.root / "0.png"), ["--enrich", "query"], ["--generator", models["teacher"]]
    for argv, expected in [
        ([texts, photo, *enrich], "--enrich query was given without --generator; give both, or leave it out."),
        ([texts, "red bird", *enrich, *named], "--enrich query was given without a photo; give both, or leave it out."),
        ([texts, photo, *named], "--generator was given without --enrich; add --enrich query, or leave it out."),
        ([texts, photo, "--enrich", "both"], "--enrich was given 'both'; expected one of query, none"),
        ([texts, photo, *enrich, *named, "--max_new_tokens", "0"], "--max_new_tokens was given 0"),
        ([texts, photo, "--max_new_tokens", "9"], "--max_new_tokens was given without --generator; add it, or leave"),
        ([texts, photo, "--schema", "no.yaml"], "--schema was given without --generator"),
        ([texts, photo, *enrich, "--generator", str(tmp_path / "no")], "no' could not be loaded"),
        ([texts, photo, *enrich, *named, "--schema", "no.yaml"], "cannot read the attribute schema no.yaml"),
        (
            [photos, photo, *enrich, *named],
            f"--enrich was given, but the model of {photos} does not embed a photo together with a text; leave it out",
        ),
    ]:
        assert expected in fails(capsys, ["search", *argv])


def test_the_documented_store_has_attributes_in_its_titles(models, shop, run, monkeypatch, generator):
    monkeypatch.chdir(shop.root)
    Path(shop.source).rename("products.csv")
    for split in ("train", "test"):
        data = ["--data", "products.csv", "--split", split, "--out", "attributes.parquet"]
        run("label", "attributes", "--teacher", models["teacher"], *data)
    _, snippet = re.findall(r"```py\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[:2]
    exec(snippet, {})
    (command,) = re.findall(r"`fieldmark (index [^`]*enriched\.db)`", DOCS.read_text(encoding="utf-8"))
    argv = shlex.split(command.replace("runs/products", models["texts"]))
    assert f"{PHOTOS} items in enriched.db" in run(*argv)
    titles = [enriched_text(row["title"], generator.attributes) for row in shop.rows]
    photos = [str(shop.root / row["image"]) for row in shop.rows]
    expected = encode_items(load_student(models["texts"]), images=photos, texts=titles)
    store, names = Store.open("enriched.db"), [row["item_id"] for row in shop.rows]
    np.testing.assert_allclose(store.vectors(names), expected, atol=1e-5)
    assert store.items(["item-00"])[0].attributes == {"Main colour": "red"}


def test_the_documented_snippet_runs(stores, tmp_path, monkeypatch, capsys):
    (tmp_path / "shop.db").symlink_to(stores["photos"].db)
    draw(3).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```py\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet[1], names)
    assert capsys.readouterr().out.count("'Main colour': 'red'") == 5
    assert len(names["alike"]) == 5


def test_the_documented_commands_run(models, shop, run, monkeypatch, generator):
    source = Path(shop.source)
    source.write_text(source.read_text(encoding="utf-8").replace("attr_Main colour", "attr_colour"), encoding="utf-8")
    (shop.root / "runs").mkdir()
    (shop.root / "runs" / "first").symlink_to(models["texts"])
    (shop.root / "runs" / "products" / "4-rar").mkdir(parents=True)
    (shop.root / "runs" / "products" / "4-rar" / "model").symlink_to(models["teacher"])
    draw(3).save(shop.root / "photo.jpg")
    monkeypatch.chdir(shop.root)
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line.replace("--data photos", "--data items.csv"))[1:] for line in lines]
    (index,) = [argv for argv in commands if argv[0] == "index"]
    assert f"{PHOTOS} items in shop.db" in run(*index)
    answers = [found(run, *argv[1:]) for argv in commands if argv[0] == "search"]
    assert [len(one) for one in answers] == [10, 5, 10, 10, 10, 10]
    assert len(generator.asked) == 1
    assert [one[0]["item_id"] for one in answers[:3]] == ["item-03"] * 3


def test_neither_teacher_nor_methods_are_imported_by_search(stores):
    shop = stores["photos"]
    code = (
        "import sys; import fieldmark.search; from fieldmark.cli import main; code = main(sys.argv[1:]); "
        "print(sorted(m for m in sys.modules if m.startswith(('fieldmark.teacher', 'fieldmark.methods')))); "
        "print('fieldmark.search.store' in sys.modules); sys.exit(code)"
    )
    argv = [sys.executable, "-c", code, "search", shop.db, str(shop.root / "0.png"), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "True"]


# -- mistakes: one sentence, exit code 2


def test_wrong_queries(models, stores, tmp_path, capsys):
    photos, texts = stores["photos"].db, stores["texts"].db
    (tmp_path / "cut.png").write_bytes(b"no photo")
    photo = str(stores["photos"].root / "0.png")
    for argv, expected in [
        ([photos], "No query was given; give the path of a photo, a text, or both by --image and --text."),
        ([photos, "red bird"], "embeds photos only; search with a photo, or with a photo and --text WORDS --hybrid."),
        ([photos, photo, "--text", "red"], "embeds photos only"),
        ([photos, "a long text " * 1000], "A text was given, and the model of"),
        ([photos, "no name\0of a file"], "A text was given, and the model of"),
        ([photos, "red", "--hybrid"], "embeds photos only"),
        ([photos, photo, "--hybrid"], "--hybrid was given without a text; give --text"),
        ([photos, photo, "--image", photo], "and --image were given; give one of them."),
        ([texts, " "], "An empty text was given"),
        ([photos, "nowhere.jpg"], "The photo nowhere.jpg cannot be read: no such file"),
        ([photos, str(tmp_path / "cut.png")], "cut.png cannot be read: it is not an image"),
        ([photos, photo, "--k", "0"], "--k was given 0; expected 1 or more."),
        ([photos, photo, "--where", "colour = 'red'"], "No field named colour); give a condition on item_id, title, "),
        ([str(tmp_path), photo], f"{tmp_path} is not a store (it has no store.json); make one by `fieldmark index`."),
        ([photos, photo, "--model", models["texts"]], "holds vectors of"),
        ([photos, photo, "--model", str(tmp_path / "gone")], "gone is not there; give the folder where it lies now"),
        ([], "STORE is missing"),
        ([photos, photo, "--wher", "x"], "did you mean --where?"),
    ]:
        assert expected in fails(capsys, ["search", *argv])


def test_wrong_stores(models, stores, shop, capsys, run):
    photo, model, half = str(shop.root / "0.png"), models["photos"], shop.root / "half.jsonl"
    half.write_text(r'{"item_id": "x", "image": "0.png", "title": "t\ud800"}', encoding="utf-8")
    run("index", model, "--data", shop.source, "--out", shop.db)
    for argv, expected in [
        (
            ["index", "--out", shop.db, "--delete", "item-01", "item-77"],
            "The store has no item 'item-77'; give the item_id",
        ),
        (["index", "--out", shop.db, "--delete", "item-01,item-02"], "The store has no item 'item-01,item-02'"),
        (["index", "--out", shop.db, "--delete", "item-01", "\udcff"], r"The store has no item '\udcff'"),
        (["index", "--out", shop.db, "--delete"], "--delete was given without a value; expected one or more."),
        (["index", "--out", shop.db, "--delete", "item-01", "--prune"], "Unknown flag --prune"),
        (["index", model, "--data", str(half), "--out", shop.db], r"holds 't\ud800', which has half a character"),
        (["index", "--out", str(shop.root), "--delete", "a"], "is not a store"),
        (["index", model, "--data", shop.source, "--out", str(shop.root)], "exists and is not a store"),
        (["index", models["texts"], "--data", shop.source, "--out", shop.db], "holds vectors of"),
        (["index", model, "--data", shop.source], "--out is missing"),
        (["index", model, "--data", shop.source, "--out", shop.db, "--batch_size", "0"], "--batch_size was given 0"),
        (["index", model, "--data", shop.source, "--out", shop.db, "--exact_up_to", "0"], "--exact_up_to was given 0"),
    ]:
        assert expected in fails(capsys, argv)
    assert Store.open(shop.db).count() == PHOTOS
    run("index", "--out", shop.db, "--delete", *sorted(shop.ids))
    assert "has no items; index a catalogue into it first" in fails(capsys, ["search", shop.db, photo])
    card = Path(shop.db) / "store.json"
    card.write_text(card.read_text().replace(f'"format": {FORMAT}', '"format": 9'))
    assert f"was made by a newer fieldmark (layout 9, this one reads {FORMAT})" in fails(
        capsys, ["search", shop.db, photo]
    )


def test_a_model_that_was_trained_on_is_another_one(models, tmp_path, shop, run, capsys):
    student = load_student(models["photos"])
    student.save_pretrained(str(tmp_path / "moving"), create_model_card=False)
    run("index", str(tmp_path / "moving"), "--data", shop.source, "--out", shop.db)
    next(student.parameters()).data.add_(1e-3)
    student.save_pretrained(str(tmp_path / "moving"), create_model_card=False)
    photo = str(shop.root / "0.png")
    message = fails(capsys, ["search", shop.db, photo])
    assert f"holds vectors of {tmp_path}/moving as it was then (" in message
    (tmp_path / "moving").rename(tmp_path / "moved")
    assert "moving is not there; give the folder where it lies now by --model." in fails(
        capsys, ["search", shop.db, photo]
    )


def test_doctor_shows_the_packages_of_the_extra(run):
    wanted = [Requirement(line) for line in metadata.requires("fieldmark") if "extra == 'search'" in line]
    shown = json.loads(run("doctor", "--json"))["versions"]
    assert {one.name: shown.get(one.name) for one in wanted} == {one.name: metadata.version(one.name) for one in wanted}
    assert "lancedb" in shown
    assert re.search(rf"│ lancedb +│ +{re.escape(shown['lancedb'])} │", run("doctor"))


def test_without_the_extra_a_sentence_says_what_to_install(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fieldmark.search.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    expected = 'fieldmark: lancedb is not installed; search needs `pip install "fieldmark[search]"`.'
    assert fails(capsys, ["search", "db", "query"]) == expected
