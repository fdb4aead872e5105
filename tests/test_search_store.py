"""The store: what it finds against slow loops, what it keeps, what it refuses."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fieldmark.errors import FieldmarkError
from fieldmark.search import store as store_module
from fieldmark.search.card import FORMAT, NAME, StoredModel, model_fingerprint
from fieldmark.search.nearest import index_nearest, measure_recall, scan_nearest
from fieldmark.search.rows import attribute_columns, facts_hash
from fieldmark.search.store import Store
from helpers_cli import no_file_above

DIM, ITEMS = 12, 240
MODEL = StoredModel("/models/student", "f" * 64, DIM, texts=True)
COLOURS, SIZES = ("red", "blue", "green"), ("small", "large")
WORDS = ["hooked", "long", "round", "pale", "striped", "bill", "tail", "crown", "wing", "leg", "eye", "breast"]


def item(number: int, **more: Any) -> dict[str, Any]:
    """A row of a catalogue; titles of one to six words, the same for the same number."""
    rng = np.random.default_rng(number)
    row = {
        "item_id": f"item-{number:03d}",
        "image": f"/photos/{number}.jpg",
        "label": f"class {number % 7}",
        "title": " ".join(rng.choice(WORDS, rng.integers(1, 7))),
        "attributes": {"Main colour": COLOURS[number % 3], "size": SIZES[number % 2], "order": None},
    }
    return row | more


def some_vectors(count: int = ITEMS, seed: int = 0) -> np.ndarray:
    """Of any length; the last two rows point where the first two do."""
    rows = np.random.default_rng(seed).standard_normal((count, DIM)) * 3
    rows[-2:] = 2 * rows[:2]
    return rows


def fill(store: Store, count: int = ITEMS) -> Store:
    store.add([item(number) for number in range(count)], some_vectors(count), [f"hash {n}" for n in range(count)])
    return store


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Store:
    return fill(Store.create(tmp_path_factory.mktemp("exact") / "db", MODEL))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Store:
    """A store above its bound: an approximate index answers."""
    store = fill(Store.create(tmp_path_factory.mktemp("large") / "db", MODEL, exact_up_to=50))
    store.finish()
    return store


@pytest.fixture
def empty(tmp_path) -> Store:
    return Store.create(tmp_path / "db", MODEL)


def ranking(query: np.ndarray, passes: Any = lambda row: True) -> list[tuple[str, float]]:
    """Items and cosines by a loop, best first, equal ones by item_id."""
    found = []
    for number, vector in enumerate(some_vectors()):
        if passes(item(number)):
            dot = sum(float(a) * float(b) for a, b in zip(query, vector))
            found.append((item(number)["item_id"], dot / math.hypot(*query) / math.hypot(*vector)))
    return sorted(found, key=lambda one: (-round(one[1], 6), one[0]))


def ids(hits: list[Any]) -> list[str]:
    return [hit.item_id for hit in hits]


FILTERS = {
    "main_colour = 'red'": lambda row: row["attributes"]["Main colour"] == "red",
    "size = 'large' AND label <> 'class 3'": lambda row: (
        row["attributes"]["size"] == "large" and row["label"] != "class 3"
    ),
    "title LIKE '%bill%' OR item_id IN ('item-001', 'item-002')": lambda row: (
        "bill" in row["title"] or row["item_id"] in ("item-001", "item-002")
    ),
    "label = 'no such class'": lambda row: False,
}


# -- what is found


@pytest.mark.parametrize("k", [1, 7, ITEMS, ITEMS + 9])
def test_search_is_exact(exact, k):
    query = some_vectors()[0] * 5
    hits, expected = exact.search(query, k), ranking(query)
    assert ids(hits) == [name for name, _ in expected][:k]
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected][:k], atol=1e-6)
    assert ids(hits)[:2] == ["item-000", "item-238"][:k]  # the same direction: ordered by item_id


def test_margin_is_the_score_less_the_next_ones(exact):
    query = np.ones(DIM)
    expected = [score for _, score in ranking(query)]
    margins = [hit.margin for hit in exact.search(query, 5)]
    np.testing.assert_allclose(margins, [expected[n] - expected[n + 1] for n in range(5)], atol=1e-6)
    assert exact.search(query, ITEMS)[-1].margin is None
    assert exact.search(query, 10, "item_id = 'item-007'")[0].margin is None


@pytest.mark.parametrize("where", FILTERS)
@pytest.mark.parametrize("kind", ["exact", "large"])
def test_search_under_a_filter_is_exact_at_any_size(request, kind, where):
    store, query = request.getfixturevalue(kind), np.arange(1.0, DIM + 1)
    expected = ranking(query, FILTERS[where])
    hits = store.search(query, 9, where)
    assert ids(hits) == [name for name, _ in expected][:9]
    np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected][:9], atol=1e-6)


@pytest.mark.parametrize("exact_up_to", [100, 5])
def test_hybrid_search_joins_two_orders_by_reciprocal_rank(tmp_path, exact_up_to):
    store = Store.create(tmp_path / "db", MODEL, exact_up_to=exact_up_to)
    # The more often a title says it, the better it matches; the value of an attribute counts as the title does.
    titles = {3: "zebra", 7: "zebra Zébra", 4: "a zebra, zebra: zebra!", 11: "zebra " * 6}
    rows = [item(n, title=titles.get(n), attributes={"stripes": "zebra" if n == 4 else "none"}) for n in range(14)]
    vectors = some_vectors(14)
    store.add(rows, vectors, ["hash"] * 14)
    store.finish()
    query = np.ones(DIM)
    cosines = {
        row["item_id"]: float(v @ query / np.linalg.norm(v) / np.linalg.norm(query)) for row, v in zip(rows, vectors)
    }
    by_vector = sorted(cosines, key=lambda name: -cosines[name])
    by_words = ["item-011", "item-004", "item-007", "item-003"]
    fused = Counter()
    for order in (by_vector, by_words):
        for rank, name in enumerate(order, 1):
            fused[name] += 1 / (60 + rank)
    expected = sorted(fused, key=lambda name: (-fused[name], -cosines[name]))
    hits = store.search(query, 14, text="ZEBRA")
    assert ids(hits) == expected
    np.testing.assert_allclose([hit.score for hit in hits], [cosines[name] for name in expected], atol=1e-6)
    np.testing.assert_allclose(hits[0].margin, hits[0].score - hits[1].score, atol=1e-6)
    under_filter = store.search(query, 2, "stripes = 'none'", "zebra")
    assert ids(under_filter) == [name for name in expected if name != "item-004"][:2]
    assert ids(store.search(query, 14, text='walrus (AND "')) == by_vector  # no word found: the vector's order


@pytest.mark.parametrize("kind", ["exact", "large"])
def test_a_filter_that_nothing_passes_finds_nothing(request, kind):
    store, nothing = request.getfixturevalue(kind), "label = 'no such class'"
    assert store.search(np.ones(DIM), 5, nothing) == []
    assert store.search(np.ones(DIM), 5, nothing, "bill") == []
    assert store.search(np.ones(DIM), 5, nothing, "no such word") == []
    assert store.similar("item-000", 5, nothing) == []


def test_similar_items_leave_out_the_item_itself(exact):
    query = some_vectors()[0]
    expected = [name for name, _ in ranking(query) if name != "item-000"]
    assert ids(exact.similar("item-000", 6)) == expected[:6]  # its equal, item-238, comes first
    red = [name for name, _ in ranking(query, FILTERS["main_colour = 'red'"]) if name != "item-000"]
    assert ids(exact.similar("item-000", 6, "main_colour = 'red'")) == red[:6]


def test_measured_recall_is_that_of_the_search_that_was_measured(large):
    index = large.card.index
    assert (index.kind, index.rows, index.queries) == ("IVF_HNSW_SQ", ITEMS, 100)
    table = large._now().table

    def right(query, k):
        return scan_nearest(table, query[None], k)[0][0]

    assert measure_recall(table, right) == (1.0, 100)
    # Without every second item of eleven, itself the first, five of ten are left.
    assert measure_recall(table, lambda query, k: right(query, k)[::2])[0] == pytest.approx(0.5, abs=0.01)
    assert index.recall_at_10 == measure_recall(table, lambda query, k: index_nearest(table, query, k)[0])[0] > 0.9


def test_a_scan_is_exact_whatever_a_batch_holds(large, monkeypatch):
    monkeypatch.setattr("fieldmark.search.nearest.ROWS_AT_ONCE", 17)
    queries = some_vectors(4, seed=5)
    _, scores = scan_nearest(large._now().table, queries.astype(np.float32), 9)
    for query, found in zip(queries, scores, strict=True):
        expected = [score for _, score in ranking(query)][:9]
        np.testing.assert_allclose(found / np.linalg.norm(query), expected, atol=1e-6)


# -- what is kept


def test_items_and_photos(exact):
    first, second = exact.items(["item-005", "item-002"])
    assert (first.item_id, second.item_id) == ("item-005", "item-002")
    assert first.attributes == {"Main colour": "green", "size": "large"}
    assert (first.title, first.label, first.image) == (item(5)["title"], "class 5", "/photos/5.jpg")
    assert exact.items([]) == []
    assert exact.photo("item-005") == "/photos/5.jpg"
    np.testing.assert_allclose(
        exact.vectors(["item-005"])[0], some_vectors()[5] / np.linalg.norm(some_vectors()[5]), atol=1e-6
    )


def test_facets_count_values(exact):
    colours = Counter(COLOURS[number % 3] for number in range(ITEMS))
    assert exact.columns() == {"Main colour": "main_colour", "size": "size"}
    assert exact.facets() == {"main_colour": dict(colours), "size": {"large": 120, "small": 120}}


def test_a_photo_without_a_place_is_kept_in_the_store(empty):
    empty.add([item(0, image=b"\x89PNG", title=None, label=None, attributes=None)], some_vectors(3)[:1], ["h"])
    assert empty.photo("item-000") == b"\x89PNG"
    (found,) = empty.search(np.ones(DIM))
    assert (found.image, found.title, found.label, found.attributes) == (None, None, None, {})


def test_adding_replaces_and_deleting_deletes(empty):
    fill(empty, 30)
    empty.add([item(3, title="new title"), item(30)], some_vectors(4, seed=9)[:2], ["other", "hash 30"])
    assert empty.count() == 31
    assert empty.items(["item-003"])[0].title == "new title"
    assert empty.hashes()["item-003"] == ("other", facts_hash(item(3, title="new title")))
    assert ids(empty.search(some_vectors(4, seed=9)[0], 1)) == ["item-003"]
    with pytest.raises(FieldmarkError, match="no item 'item-099'"):
        empty.delete(["item-001", "item-099"])
    assert empty.count() == 31
    empty.delete(["item-001", "item-030"])
    assert set(empty.hashes()) == {f"item-{number:03d}" for number in range(30)} - {"item-001"}
    assert "item-001" not in ids(empty.search(np.ones(DIM), 40))


def test_each_fact_of_an_item_changes_its_hash():
    changed = {"title": "x", "label": "x", "image": "/x.jpg", "attributes": {"size": "x"}}
    hashes = {facts_hash(item(0)), *(facts_hash(item(0, **{name: value})) for name, value in changed.items())}
    assert len(hashes) == 5
    assert facts_hash(item(0)) == facts_hash(item(0, split="test"))


def test_names_of_items_may_be_anything(empty):
    names = ["a'b", 'c"d', "e\\f", "g/ü.jpg", "0123", "null", "two\nlines", "", " ", "鳥"]
    empty.add([item(n, item_id=name) for n, name in enumerate(names)], some_vectors(10), ["h"] * 10)
    assert [one.item_id for one in empty.items(names)] == names
    empty.delete(names[:5])
    assert set(empty.hashes()) == set(names[5:])


COLUMNS = [
    (["Main colour", "main-colour", "main colour"], ["main_colour", "main_colour_2", "main_colour_3"]),
    (["title", "vector", "photo"], ["attribute_title", "attribute_vector", "attribute_photo"]),
    (["2nd", "?!", "Größe", "_x_"], ["attribute_2nd", "attribute", "größe", "x"]),
]


@pytest.mark.parametrize(("names", "expected"), COLUMNS)
def test_columns_of_attributes(empty, names, expected):
    assert attribute_columns(names, {}) == dict(zip(names, expected, strict=True))
    assert attribute_columns(["new", *names], {names[0]: "kept"})[names[0]] == "kept"
    empty.add([item(0, attributes=dict.fromkeys(names, "it's"))], some_vectors(3)[:1], ["h"])
    for column in expected:
        assert ids(empty.search(np.ones(DIM), 1, f"{column} = 'it''s'")) == ["item-000"]


def test_an_attribute_may_come_later_and_its_column_after_a_kill(empty):
    fill(empty, 10)
    # A kill between the card and the table: the card knows a column that the table lacks.
    replace(empty.card, columns={**empty.card.columns, "shape": "shape"}).write(empty.folder)
    store = Store.open(empty.folder)
    assert (
        store.facets()
        == empty.facets()
        == {"main_colour": {"red": 4, "blue": 3, "green": 3}, "size": {"large": 5, "small": 5}}
    )
    store.add([item(10, attributes={"shape": "round", "age": "old"})], some_vectors(3)[:1], ["h"])
    assert ids(store.search(np.ones(DIM), 5, "shape = 'round' AND age = 'old'")) == ["item-010"]
    assert store.items(["item-001"])[0].attributes == {"Main colour": "blue", "size": "large"}


def test_the_index_is_made_anew_when_a_tenth_is_new(tmp_path):
    store = fill(Store.create(tmp_path / "db", MODEL, exact_up_to=50), 100)
    assert store.finish().index.rows == 100
    fill(store, 108)
    assert store.finish().index.rows == 100
    assert ids(store.search(some_vectors(108)[105], 1)) == ["item-105"]  # it joined the index
    fill(store, 112)
    assert store.finish().index.rows == 112
    store.delete([item(number)["item_id"] for number in range(70)])
    assert store.finish().index is None
    assert store.count() == 42


# -- readers and writers


def test_a_reader_sees_what_another_wrote(empty, monkeypatch):
    fill(empty, 10)
    reader = Store.open(empty.folder)
    assert reader.count() == 10
    fill(empty, 12)
    assert reader.count() == 10  # it looks once a second
    monkeypatch.setattr(store_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    assert reader.count() == 12


def test_one_writes_at_a_time(empty):
    other = Store.open(empty.folder)
    with empty.writing():
        fill(empty, 5)  # may write itself
        with pytest.raises(FieldmarkError, match="Another process is writing to"):
            Store.create(empty.folder, MODEL, exact_up_to=3)
        with pytest.raises(FieldmarkError, match="Another process is writing to"):
            other.add([item(9)], some_vectors(3)[:1], ["h"])
    other.add([item(9)], some_vectors(3)[:1], ["h"])
    assert other.count() == 6


def test_threads_search_whole_versions_while_one_writes(empty, monkeypatch):
    monkeypatch.setattr(store_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    fill(empty, 20)
    troubles: list[Any] = []
    done = threading.Event()

    def search() -> None:
        try:
            while not done.is_set():
                hits = empty.search(np.ones(DIM), 60, "size = 'small'")
                if len(set(ids(hits))) != len(hits) or len(hits) not in (10, 15, 20, 25):
                    troubles.append(ids(hits))
        except Exception as error:
            troubles.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for count in (30, 40, 50):
        fill(empty, count)
    empty.finish()
    done.set()
    for thread in threads:
        thread.join()
    assert troubles == []
    assert empty.count() == 50


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(empty):
    fill(empty, 20)
    with no_file_above(600):
        for write in (lambda: fill(empty, 40), lambda: empty.delete(["item-001"]), empty.finish):
            with pytest.raises(FieldmarkError, match=r"cannot be written \(.*File too large.*\); what it held before"):
                write()
        with pytest.raises(FieldmarkError, match="cannot be written"):
            Store.create(empty.folder.with_name("other"), MODEL)
        assert set(Store.open(empty.folder).hashes()) == {f"item-{number:03d}" for number in range(20)}
    assert Store.create(empty.folder.with_name("other"), MODEL).count() == 0
    fill(empty, 40)
    empty.finish()
    assert empty.count() == 40


# -- what is refused


def test_a_store_remembers_its_model(empty):
    other = replace(MODEL, fingerprint="e" * 64, source="/models/other")
    with pytest.raises(FieldmarkError, match=r"holds vectors of /models/student .* not of /models/other"):
        Store.create(empty.folder, other)
    with pytest.raises(FieldmarkError, match="holds photos embedded without titles; leave out --with_titles, or index"):
        Store.create(empty.folder, MODEL, with_titles=True)
    moved = Store.create(empty.folder, replace(MODEL, source="/elsewhere"))
    assert moved.card.model.source == "/elsewhere"
    assert Store.open(empty.folder).card == moved.card


def test_a_fingerprint_is_of_weights_and_settings(tmp_path):
    def make(name: str, **files: str) -> str:
        for path, text in {"config.json": "{}", "1_Pool/model.safetensors": "abc", "README.md": "x", **files}.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return model_fingerprint(tmp_path / name)

    same = make("a")
    assert make("b", **{"README.md": "another text"}) == same
    others = [
        make("c", **{"1_Pool/model.safetensors": "abd"}),
        make("d", **{"config.json": "{} "}),
        make("e", **{"tokenizer.json": ""}),
    ]
    assert len({same, *others}) == 4


def test_folders_that_are_no_store(empty, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FieldmarkError, match=r"other is not a store \(it has no store.json\); make one by"):
        Store.open(tmp_path / "other")
    with pytest.raises(FieldmarkError, match="exists and is not a store"):
        Store.create(tmp_path / "other", MODEL)
    with pytest.raises(FieldmarkError, match="nowhere is not a store"):
        Store.open(tmp_path / "nowhere")
    card = json.loads((empty.folder / NAME).read_text())
    for change, message in [
        (card | {"format": FORMAT + 1}, rf"newer fieldmark \(layout {FORMAT + 1}, this one reads {FORMAT}\); update"),
        (card | {"model": {}}, "damaged"),
        ([card], "damaged"),
        ({}, "damaged"),
    ]:
        (empty.folder / NAME).write_text(json.dumps(change))
        with pytest.raises(FieldmarkError, match=message):
            Store.open(empty.folder)


def test_a_making_that_was_killed_is_taken_up(tmp_path):
    folder = tmp_path / "db"
    folder.mkdir()
    (folder / "writer.lock").touch()
    (folder / "store.json.unfinished").write_text("{")
    assert Store.create(folder, MODEL).count() == 0
    for path in (folder / "items.lance").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(FieldmarkError, match="a store without items; run `fieldmark index` again"):
        Store.open(folder)
    assert fill(Store.create(folder, MODEL), 3).count() == 3
    for manifest in (folder / "items.lance").rglob("*.manifest"):
        manifest.write_bytes(manifest.read_bytes()[:10])
    for make in (Store.open, lambda folder: Store.create(folder, MODEL)):
        with pytest.raises(FieldmarkError, match=r"The items of .* cannot be read \(.*\); index the catalogue into"):
            make(folder)


WRONG_FILTERS = [
    "", "colour", "main_colour =", "main_colour = 3", "nothing = 'x'", "1", "main_colour = 'red' LIMIT 3",
    "main_colour = 'red'; DROP TABLE items", "main_colour = 'red' -- all", "'", "vector = 1", "main_colour = 'red')",
]  # fmt: skip


@pytest.mark.parametrize("where", WRONG_FILTERS)
@pytest.mark.parametrize("kind", ["exact", "large"])
def test_wrong_filters(request, kind, where):
    store = request.getfixturevalue(kind)
    for text in (None, "bill"):
        with pytest.raises(FieldmarkError) as caught:
            store.search(np.ones(DIM), 3, where, text)
        assert str(caught.value).startswith(f"The filter {where!r} was not understood (")
        assert "give a condition on item_id, title, label, main_colour, size, such as" in str(caught.value)
        assert len(str(caught.value)) < 300


def test_wrong_queries(exact, empty):
    for vector, message in [
        (np.ones(DIM + 1), f"A vector of {DIM + 1} numbers was given; expected {DIM}"),
        (np.ones((2, DIM)), "A vector of"),
        (np.zeros(DIM), "length zero"),
        (np.full(DIM, np.nan), "NaN"),
    ]:
        with pytest.raises(FieldmarkError, match=message):
            exact.search(vector)
    with pytest.raises(FieldmarkError, match="k 0 was given"):
        exact.search(np.ones(DIM), 0)
    for ask in (exact.similar, exact.photo, lambda name: exact.items(["item-001", name])):
        with pytest.raises(FieldmarkError, match=r"The store has no item 'x'; give the item_id"):
            ask("x")
    with pytest.raises(FieldmarkError, match="has no items; index a catalogue into it first"):
        empty.search(np.ones(DIM))


def test_wrong_rows(empty):
    for rows, vectors, hashes, message in [
        ([item(0), item(0)], some_vectors(3)[:2], ["h", "h"], "given twice"),
        ([item(0)], some_vectors(3)[:2], ["h"], "1 items, 2 vectors and 1 photo hashes"),
        ([item(0)], np.ones((1, 3)), ["h"], f"A vector of 3 numbers was given; expected {DIM}"),
        ([item(0)], np.zeros((1, DIM)), ["h"], "length zero"),
        ([item(0), item(1)], np.array([[1.0] * DIM, [np.nan] * DIM]), ["h", "h"], "NaN .* for the item 'item-001'"),
    ]:
        with pytest.raises(FieldmarkError, match=message):
            empty.add(rows, vectors, hashes)
    empty.add([], np.empty((0, DIM)), [])
    empty.delete([])
    assert empty.count() == 0
