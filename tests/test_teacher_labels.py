"""Alignment scores through their cache and `fieldmark label align`: asked once, whatever breaks in between."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fieldmark import cli
from fieldmark.errors import FieldmarkError
from fieldmark.methods.maple import MapleConfig
from fieldmark.teacher import cache as cache_module
from fieldmark.teacher.cache import AnswerCache, teacher_fingerprint
from fieldmark.teacher.labels import alignment_cache, candidate_texts, label_alignment, tower_features
from fieldmark.teacher.model import Teacher
from helpers_cli import fails
from helpers_tiny import make_tiny_teacher
from test_teacher_align import one_by_one, photo, yes_no_teacher

TITLES = ["red bird", "blue bird with a crest", "owl", "grey owl, long tail", "wren"]
KILLED_AFTER_TWO_PARTS = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from fieldmark import cli
from fieldmark.teacher.cache import AnswerCache
from fieldmark.teacher import cache
cache.ROWS_A_PART = 4
write = AnswerCache._write_part
def write_then_die(self):
    write(self)
    if len(list(self.parts.glob("*.parquet"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
AnswerCache._write_part = write_then_die
cli.main(sys.argv[1:])
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Teacher:
    return yes_no_teacher("qwen3_vl", tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def saved(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    teacher.model.save_pretrained(folder)
    teacher.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("photos")
    paths = [str(folder / f"{number}.png") for number in range(5)]
    for number, path in enumerate(paths):
        photo(number).resize((64, 64)).save(path)
    return paths


@pytest.fixture
def catalogue(photos, tmp_path):
    """Writes a table of the photos and returns its path."""

    def write(titles=TITLES, labels="abcde") -> str:
        rows = [f'{path},"{title}",{label},train' for path, title, label in zip(photos, titles, labels, strict=True)]
        (tmp_path / "table.csv").write_text("\n".join(["image,title,label,split", *rows]) + "\n", encoding="utf-8")
        return str(tmp_path / "table.csv")

    return write


@pytest.fixture
def passes(monkeypatch) -> Counter:
    """Counts the photos that towers see, and the passes of language models."""
    counts: Counter = Counter()
    see, answer = Teacher.visual_tokens, torch.nn.Module.__call__

    def seeing(self, images, resolution=None):
        counts["photos"] += len(images)
        return see(self, images, resolution)

    def answering(self, *args, **kwargs):
        counts["passes"] += type(self).__name__ == "Qwen3VLTextModel"
        return answer(self, *args, **kwargs)

    monkeypatch.setattr(Teacher, "visual_tokens", seeing)
    monkeypatch.setattr(torch.nn.Module, "__call__", answering)
    return counts


def align(*flags: object) -> list[str]:
    return ["label", "align", *map(str, flags)]


def score(teacher: Teacher, path: Path, photos, texts, resolution: int | None = None, **settings) -> list[list[float]]:
    with alignment_cache(path, teacher, resolution) as cache:
        return label_alignment(teacher, photos, texts, cache, resolution=resolution, **settings)


def test_candidate_texts_meet_both_ways():
    negatives = np.array([[1], [2], [0], [0]])
    texts = [["a"], ["b", "B"], ["c"], ["a"]]
    slow = []
    for item in range(4):
        met = list(texts[item])
        for other in range(4):
            if other in negatives[item] or item in negatives[other]:
                met += texts[other]
        slow.append(set(met))
    found = candidate_texts(texts, negatives)
    assert [set(row) for row in found] == slow
    assert all(len(row) == len(set(row)) and row[: len(own)] == own for row, own in zip(found, texts, strict=True))


def test_tower_features_are_means_of_the_visual_tokens(teacher, photos):
    found = tower_features(teacher, photos[:3], batch_size=2)
    for row, path in zip(found, photos, strict=False):
        np.testing.assert_allclose(row, teacher.visual_tokens([path]).tokens[0].mean(0), atol=1e-5)


def test_answers_do_not_depend_on_batches_and_order(teacher, photos, tmp_path):
    texts = [TITLES[:1], TITLES[1:3], TITLES[:4], ["owl", "owl"], TITLES[4:]]
    whole = score(teacher, tmp_path / "whole.parquet", photos, texts, batch_size=16)
    backwards = score(
        teacher, tmp_path / "back.parquet", photos[::-1], [row[::-1] for row in texts[::-1]], batch_size=2
    )
    assert [len(row) for row in whole] == [len(row) for row in texts]
    for row, back in zip(whole, backwards[::-1], strict=True):
        np.testing.assert_allclose(row, back[::-1], atol=1e-5)
    assert whole[3][0] == whole[3][1]
    image = photo(2).resize((64, 64))
    np.testing.assert_allclose(whole[2][3], one_by_one(teacher, image, TITLES[3]), atol=1e-4)
    assert len(pq.read_table(tmp_path / "whole.parquet")) == 9  # a text named twice is asked once


def test_what_is_known_is_not_asked_again(teacher, photos, tmp_path, passes):
    texts = [TITLES[:2] for _ in photos]
    first = score(teacher, tmp_path / "f.parquet", photos, texts, batch_size=2)
    assert passes == {"photos": 5, "passes": 6}
    passes.clear()
    written = (tmp_path / "f.parquet").stat().st_mtime_ns
    assert score(teacher, tmp_path / "f.parquet", photos, texts) == first
    assert not passes
    assert (tmp_path / "f.parquet").stat().st_mtime_ns == written
    more = score(teacher, tmp_path / "f.parquet", photos, [[*TITLES[:2], "new"], *texts[1:]])
    assert passes == {"photos": 1, "passes": 2}
    assert [row[:2] for row in more] == first


def test_an_interrupted_job_goes_on(teacher, photos, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(cache_module, "ROWS_A_PART", 2)
    path, texts = tmp_path / "f.parquet", [TITLES[:2] for _ in photos]

    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(teacher, path, photos, texts, batch_size=1, progress=stop)
    parts = tmp_path / "f.parquet.parts"
    assert not path.exists()
    assert sum(len(pq.read_table(file)) for file in parts.glob("*.parquet")) == 6
    passes.clear()
    resumed = score(teacher, path, photos, texts, batch_size=1)
    assert passes["photos"] == 2
    assert not parts.exists()
    assert len(pq.read_table(path)) == 10
    assert resumed == score(teacher, tmp_path / "whole.parquet", photos, texts, batch_size=1)


def test_answers_that_come_slowly_are_written_by_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cache_module.time, "monotonic", lambda: now[0])
    cache = AnswerCache(tmp_path / "f.parquet", pa.schema([("n", pa.int64())]), {})
    parts = tmp_path / "f.parquet.parts"
    cache.add([{"key": "a", "n": 1}])
    assert not parts.exists()
    now[0] = cache_module.SECONDS_A_PART + 1
    cache.add([{"key": "b", "n": 2}])
    assert [len(pq.read_table(file)) for file in parts.iterdir()] == [2]


def test_parts_left_behind_by_a_kill_while_merging_are_harmless(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "ROWS_A_PART", 1)
    schema, path = pa.schema([("n", pa.int64())]), tmp_path / "f.parquet"

    def fill() -> None:
        with AnswerCache(path, schema, {}) as cache:
            for n in range(3):
                cache.add([{"key": str(n), "n": n}])

    def killed(self: Path) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(OSError, match="killed"):
            fill()
    (tmp_path / "f.parquet.parts" / "000000.parquet").unlink()
    with AnswerCache(path, schema, {}) as cache:
        cache.add([{"key": "3", "n": 3}])
    assert sorted(pq.read_table(path)["n"].to_pylist()) == [0, 1, 2, 3]
    assert not (tmp_path / "f.parquet.parts").exists()


def test_a_killed_command_goes_on(saved, catalogue, tmp_path, capsys, passes):
    data, out = catalogue(), tmp_path / "f.parquet"
    flags = align("--teacher", saved, "--data", data, "--negatives", 2, "--batch_size", 1)
    command = [sys.executable, "-c", KILLED_AFTER_TWO_PARTS, *flags, "--out", str(out)]
    assert subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == -signal.SIGKILL
    kept = sum(len(pq.read_table(file)) for file in (tmp_path / "f.parquet.parts").glob("*.parquet"))
    assert kept >= 8
    assert not out.exists()
    assert cli.main([*flags, "--out", str(out)]) == 0
    table = pq.read_table(out)
    assert f"{len(table)} scores, {len(table) - kept} of them asked now" in capsys.readouterr().out
    passes.clear()
    assert cli.main([*flags, "--out", str(out)]) == 0  # nothing runs, neither to score nor to find look-alikes
    printed = capsys.readouterr().out
    assert "all known before, nothing was asked" in printed
    assert "mean score: 0." in printed
    assert not passes
    assert cli.main([*flags, "--out", str(tmp_path / "whole.parquet")]) == 0
    one, other = (
        {(row["photo"], row["text"]): row["score"] for row in pq.read_table(file).to_pylist()}
        for file in (out, tmp_path / "whole.parquet")
    )
    assert one.keys() == other.keys()
    assert len(one) == len(table)
    np.testing.assert_allclose(list(one.values()), [other[key] for key in one], atol=1e-5)


def test_the_file_serves_label_alignment(teacher, saved, catalogue, photos, tmp_path, passes, capsys):
    assert cli.main(align("--teacher", saved, "--data", catalogue(), "--out", tmp_path / "f.parquet")) == 0
    yes, no = (teacher.tokenizer(word).input_ids[0] for word in ("Yes", "No"))
    assert f"answers: 'Yes' is token {yes}, 'No' is token {no}\n" in capsys.readouterr().out
    passes.clear()
    size = MapleConfig(data="x", out="y").resolution  # so that `train maple --alignment` reads it as it is
    own = score(teacher, tmp_path / "f.parquet", photos, [[title] for title in TITLES], size)
    assert not passes
    assert all(0 <= value <= 1 for (value,) in own)


def test_the_fingerprint_tells_teachers_apart_not_precisions(teacher, saved):
    own = teacher_fingerprint(Teacher.load(saved))
    assert own == teacher_fingerprint(teacher)
    other = Teacher.load(saved, dtype=torch.bfloat16)
    assert teacher_fingerprint(other) != own  # float32 weights were rounded
    again = Teacher(other.model.float(), other.processor)
    again.model.config.dtype = torch.float32
    assert teacher_fingerprint(again) == teacher_fingerprint(Teacher.load(saved, dtype=torch.bfloat16))
    again.model.model.language_model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    assert teacher_fingerprint(again) != teacher_fingerprint(Teacher.load(saved, dtype=torch.bfloat16))


def with_scores(path: Path, value: float | None) -> None:
    """The file again, its first score exchanged."""
    table = pq.read_table(path)
    scores = pa.array([value, *table["score"].to_pylist()[1:]], pa.float32())
    pq.write_table(table.set_column(table.schema.get_field_index("score"), table.schema.field("score"), scores), path)


def test_files_that_cannot_be_used_are_one_sentence(saved, catalogue, tmp_path, capsys):
    out = tmp_path / "f.parquet"
    flags = ["--data", catalogue(), "--negatives", "1"]
    usual = align("--teacher", saved, *flags, "--out", out)
    assert cli.main(usual) == 0
    good = out.read_bytes()
    stranger = Teacher.load(saved)
    stranger.model.lm_head.weight.data.mul_(1.5)
    stranger.model.save_pretrained(tmp_path / "other")
    stranger.processor.save_pretrained(tmp_path / "other")
    assert "made otherwise (teacher was" in fails(capsys, align("--teacher", tmp_path / "other", *flags, "--out", out))
    assert "resolution was 224, is 256" in fails(capsys, [*usual, "--resolution", "256"])
    assert "precision was 'float32', is 'bfloat16'" in fails(capsys, [*usual, "--teacher_dtype", "bfloat16"])
    for value, shown in ((float("nan"), "hold nan"), (1.5, "hold 1.5"), (None, "hold None")):
        with_scores(out, value)
        assert shown in fails(capsys, usual)
        out.write_bytes(good)
    out.write_bytes(good[: len(good) // 2])
    assert "cannot read the answers in" in fails(capsys, usual)
    out.write_text("key,photo\n", encoding="utf-8")
    assert "delete the file to ask anew" in fails(capsys, usual)
    pq.write_table(pa.table({"item_id": ["a"], "embedding": [[0.5]]}), out)
    assert "made otherwise" in fails(capsys, usual)
    out.write_bytes(good)
    parts = tmp_path / "f.parquet.parts"
    parts.mkdir()
    (parts / "000000.parquet").write_bytes(good[:100])
    assert "f.parquet.parts/000000.parquet" in fails(capsys, usual)


def test_mistakes_are_one_sentence(saved, catalogue, tmp_path, capsys, passes):
    out = ["--out", tmp_path / "f.parquet"]
    ask = ["--teacher", saved, *out, "--negatives", 1, "--data"]
    assert "5 of 5 photos" in fails(capsys, align(*ask, catalogue(titles=[""] * 5)))
    assert "2 of 5 photos" in fails(capsys, align(*ask, catalogue(titles=["", *TITLES[1:4], ""])))
    assert "have fewer than 1 others of another label" in fails(capsys, align(*ask, catalogue(labels="aaaaa")))
    assert "have fewer than 1 others of another label" in fails(capsys, align(*ask, catalogue(titles=["one"] * 5)))
    assert "no row of split 'test'" in fails(capsys, align(*ask, catalogue(), "--split", "test"))
    for flag in ("--negatives", "--batch_size"):
        assert f"{flag} was given 0; expected 1 or more" in fails(capsys, align(*ask, catalogue(), flag, 0))
    assert "the name of a .parquet file" in fails(capsys, align(*ask, catalogue(), "--out", tmp_path / "f.csv"))
    plain = make_tiny_teacher("qwen3_vl", tmp_path / "bytes")
    no_token = fails(capsys, align("--teacher", plain, *out, "--negatives", 1, "--data", catalogue()))
    assert "no single token for 'Yes'" in no_token
    passes.clear()
    long = catalogue(titles=[*TITLES[:4], "wren " * 1000])
    assert "shorten the text" in fails(capsys, align(*ask, long, "--batch_size", 1))
    assert passes["passes"] == 0  # before the others are asked about


def test_label_help_and_unknown_kinds(capsys):
    assert cli.main(["label", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "align" in printed
    assert "captions" in printed
    assert "did you mean align?" in fails(capsys, ["label", "alin"])
    assert "choose one of align, captions" in fails(capsys, ["label"])


def test_a_score_that_is_no_number_is_refused(teacher, photos, tmp_path, monkeypatch):
    broken = torch.full((1, 1), float("nan"))
    monkeypatch.setattr("fieldmark.teacher.labels.Aligner.scores", lambda self, visual, texts: broken)
    with pytest.raises(FieldmarkError, match="load it with --teacher_dtype float32"):
        score(teacher, tmp_path / "f.parquet", photos[:1], [["owl"]])
    assert not (tmp_path / "f.parquet").exists()
