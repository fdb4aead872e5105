"""Comparative captions: the parser, the pairs, the cache, `fieldmark label captions` and its file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fieldmark import cli
from fieldmark.errors import FieldmarkError
from fieldmark.teacher import cache as cache_module
from fieldmark.teacher import describe
from fieldmark.teacher.cache import answer_key, photo_hash
from fieldmark.teacher.compare import answer_json, compare_prompt, domain_for_attributes, load_domain
from fieldmark.teacher.describe import (
    MAX_CAPTION_CHARACTERS,
    MOST_NAMED,
    candidate_pairs,
    caption_cache,
    compared_captions,
    label_captions,
    parse_captions,
    read_captions,
)
from fieldmark.teacher.model import Teacher
from helpers_cli import fails
from helpers_tiny import make_tiny_teacher
from test_teacher_align import photo

PAIRS = [(0, 1), (0, 2), (1, 2), (3, 0)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_teacher("qwen3_vl", tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(folder) -> Teacher:
    return Teacher.load(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    place = tmp_path_factory.mktemp("photos")
    paths = [str(place / f"{number}.png") for number in range(4)]
    for number, path in enumerate(paths):
        photo(number).resize((64, 64)).save(path)
    return paths


@pytest.fixture
def talker(monkeypatch, teacher, photos) -> list[int]:
    """A rollout that knows the photos: every answer says which; the last generation about photo 0 first is none.

    Returns a list that grows by the number of pairs of each call.
    """
    names = {float(teacher.visual_tokens([path]).tokens.sum()): number for number, path in enumerate(photos)}
    calls: list[int] = []

    def speak(teacher, prompt, visual, *, group_size, generator, **settings):
        seen = [min(names, key=lambda known: abs(known - float(one.sum()))) for one in visual.tokens]
        pairs = [(names[a], names[b]) for a, b in zip(seen[::2], seen[1::2], strict=True)]
        calls.append(len(pairs))
        return SimpleNamespace(texts=[[answer(pair, g, group_size) for g in range(group_size)] for pair in pairs])

    monkeypatch.setattr(describe, "rollout", speak)
    return calls


def answer(pair: tuple[int, int], generation: int, generations: int) -> str:
    if pair[0] == 0 and generation == generations - 1:
        return "I cannot tell"
    return json.dumps({f"Image {1 + k}": f"photo {one}, unlike {pair[1 - k]}" for k, one in enumerate(pair)})


def ask(teacher, path, photos, pairs=PAIRS, *, max_new_tokens=4, seed=0, **settings) -> describe.Captions:
    with caption_cache(path, teacher, temperature=0.7, max_new_tokens=max_new_tokens, seed=seed) as cache:
        return label_captions(teacher, photos, pairs, cache, **settings)


GOOD = '{"Image 1": "a red bill", "Image 2": "a blue bill"}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"Here you are:\n```json\n{GOOD}\n```\nI hope it helps.",
        '{"Image 2": "a blue bill", "Image 1": "a red bill"}',
        '{"Image 1": " a  red\\nbill ", "Image 2": "a blue bill", "note": 3}',
    ],
)
def test_good_answers(text):
    assert parse_captions(text) == ("a red bill", "a blue bill")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON at all",
        "}{",
        GOOD[:-1],
        '{"Image 1": "a red bill"}',
        '{"image 1": "a", "image 2": "b"}',
        '{"Image 1": "a red bill", "Image 2": ""}',
        '{"Image 1": "a red bill", "Image 2": "  "}',
        '{"Image 1": "a red bill", "Image 2": 3}',
        '{"Image 1": ["a red bill"], "Image 2": "b"}',
        '{"Image 1": null, "Image 2": "b"}',
        '["Image 1", "Image 2"]',
        f"{GOOD} or {GOOD}",
        '{"a": ' * 2000 + "}" * 2000,
        json.dumps({"Image 1": "x" * (MAX_CAPTION_CHARACTERS + 1), "Image 2": "b"}),
    ],
)
def test_bad_answers(text):
    assert parse_captions(text) is None


BIRDS = [
    {"crown_colour": "red", "wing_bars": "two", "bill_shape": "hooked", "back_colour": "green"},
    {"crown_colour": "black", "wing_bars": "none", "bill_shape": "hooked", "back_colour": "blue"},
]
DOMAIN = domain_for_attributes(list(BIRDS[0]))
PHRASES = {
    "red crown": "black crown",
    "two wing bars": "no wing bars",
    "green back": "blue back",
}  # what may be said of the first, and then of the second


def test_captions_of_a_comparison_name_differing_attributes_of_both():
    answer = answer_json(DOMAIN, *BIRDS, same=False)
    found = {key: compared_captions(DOMAIN, f"Well: {answer}", key) for key in map(answer_key, "abcdefghijklmnop")}
    for first, second in found.values():
        said = first.split(", ")
        assert 1 <= len(said) <= MOST_NAMED
        assert second.split(", ") == [PHRASES[one] for one in said]
    assert {one for first, _ in found.values() for one in first.split(", ")} == set(PHRASES)
    assert {len(first.split(", ")) for first, _ in found.values()} == {1, 2}
    assert all(compared_captions(DOMAIN, answer, key) == captions for key, captions in found.items())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("crown_colour", "red", "red crown"),
        ("crown color", "None", "no crown color"),
        ("bill_shape", "spoon", "spoon bill"),
        ("wing_bars", "none", "no wing bars"),
        ("shape", "round", "round shape"),
        ("number of doors", "2", "number of doors: 2"),
        ("engine type (turbofan/turboprop)", "turbofan", "turbofan engine type"),
        ("baseColour", "Navy\n Blue ", "Navy Blue baseColour"),
    ],
)
def test_an_attribute_in_words(name, value, words):
    domain = domain_for_attributes([name])
    described = {domain.item_keys[0]: {name: value}, domain.item_keys[1]: {name: "other"}, domain.verdict_key: "yes"}
    first, second = compared_captions(domain, json.dumps(described), answer_key("a")) or ("", "")
    assert first == words
    assert "other" in second


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop(DOMAIN.verdict_key),
        lambda fields: fields.pop(DOMAIN.item_keys[1]),
        lambda fields: fields.update({DOMAIN.item_keys[0]: "a red bird"}),
        lambda fields: fields.update({DOMAIN.item_keys[1]: BIRDS[0]}),
        lambda fields: fields.update({DOMAIN.item_keys[0]: dict.fromkeys(BIRDS[0], 3)}),
        lambda fields: fields.update({DOMAIN.item_keys[0]: dict.fromkeys(BIRDS[0], " ")}),
        lambda fields: fields.update({DOMAIN.item_keys[0]: dict.fromkeys(BIRDS[0], "Unknown")}),
        lambda fields: fields.update({DOMAIN.item_keys[0]: {n: f"{v.upper()} " for n, v in BIRDS[1].items()}}),
        lambda fields: fields.update({DOMAIN.item_keys[0]: dict.fromkeys(BIRDS[0], "x" * MAX_CAPTION_CHARACTERS)}),
    ],
)
def test_comparisons_without_captions(change):
    fields = json.loads(answer_json(DOMAIN, *BIRDS, same=False))
    change(fields)
    assert compared_captions(DOMAIN, json.dumps(fields), answer_key("a")) is None
    assert compared_captions(DOMAIN, "no JSON", answer_key("a")) is None


def test_label_captions_of_a_teacher_that_compares(folder, photos, tmp_path, monkeypatch, capsys):
    """Two of three answers see a difference; a file of the paper's question is another one."""
    domain = load_domain("aviary")
    first = dict.fromkeys(domain.attributes, "red")
    answers = [answer_json(domain, first, first | {name: "black"}, same=False) for name in domain.attributes[:2]]
    answers.append(answer_json(domain, first, first, same=True))

    def speak(teacher, prompt, visual, **settings):
        asked.append(teacher.tokenizer.decode(prompt.input_ids))
        return SimpleNamespace(texts=[answers] * (len(visual.tokens) // 2))

    asked: list[str] = []
    monkeypatch.setattr(describe, "rollout", speak)
    rows = [f"{path},{label},train" for path, label in zip(photos, "abca", strict=True)]
    (tmp_path / "table.csv").write_text("\n".join(["image,label,split", *rows]) + "\n", encoding="utf-8")
    out = tmp_path / "f.parquet"
    command = ["label", "captions", "--teacher", str(folder), "--data", str(tmp_path / "table.csv"), "--out", str(out)]
    command += ["--negatives", "1", "--domain"]
    assert cli.main([*command, "aviary"]) == 0
    assert all(compare_prompt(domain) in one for one in asked)
    table = pq.read_table(out).to_pylist()
    assert f"{len(table) // 3} answers hold no two captions" in capsys.readouterr().out
    said = {(row["generation"], row["caption_1"], row["caption_2"]) for row in table}
    assert said == {(0, "red body", "black body"), (1, "red bill", "black bill"), (2, None, None)}
    assert "prompt was" in fails(capsys, command[:-1])
    assert "names no attributes" in fails(capsys, [*command, "generic"])
    assert "no domain 'fish'" in fails(capsys, [*command, "fish"])


def test_pairs_of_an_anchor_and_its_negatives():
    assert candidate_pairs(7, [2, 9, 4]) == [(7, 2), (7, 9), (7, 4), (2, 9), (2, 4), (9, 4)]
    assert candidate_pairs(7, [2]) == [(7, 2)]


def test_captions_go_to_their_photos_and_failures_are_counted(teacher, photos, tmp_path, talker):
    found = ask(teacher, tmp_path / "f.parquet", photos, [*PAIRS, PAIRS[0]], generations=2, batch_size=3)
    assert (found.answers, found.failed) == (8, 2)
    assert talker == [3, 1]
    expected: list[list[str]] = [[], [], [], []]
    for pair in PAIRS:
        for generation in range(2):
            captions = parse_captions(answer(pair, generation, 2))
            for one, caption in zip(pair, captions or (), strict=False):
                expected[one] += [caption] if caption not in expected[one] else []
    assert found.of == expected
    rows = pq.read_table(tmp_path / "f.parquet").to_pylist()
    assert [row["answer"] for row in rows if row["caption_1"] is None] == ["I cannot tell"] * 2
    read = read_captions(tmp_path / "f.parquet")
    assert read == {photo_hash(path): own for path, own in zip(photos, expected, strict=True)}
    assert ask(teacher, tmp_path / "f.parquet", photos, generations=2) == found
    assert talker == [3, 1]  # nothing was asked again
    ask(teacher, tmp_path / "f.parquet", photos, [*PAIRS, (2, 3)], generations=2)
    assert talker == [3, 1, 1]


def test_an_interrupted_job_goes_on(teacher, photos, tmp_path, talker, monkeypatch):
    monkeypatch.setattr(cache_module, "ROWS_A_PART", 1)
    path = tmp_path / "f.parquet"

    def stop(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(teacher, path, photos, batch_size=1, progress=stop)
    with pytest.raises(FieldmarkError, match="are unfinished; run the command"):
        read_captions(path)
    talker.clear()
    resumed = ask(teacher, path, photos, batch_size=1)
    assert talker == [1, 1]
    assert resumed == ask(teacher, tmp_path / "whole.parquet", photos)
    assert read_captions(path) == read_captions(tmp_path / "whole.parquet")


def test_more_generations_keep_the_answers_there_are(teacher, photos, tmp_path, talker):
    path = tmp_path / "f.parquet"
    ask(teacher, path, photos, [(1, 2)], generations=2)
    with caption_cache(path, teacher, temperature=0.7, max_new_tokens=4, seed=0) as cache:
        known = {key: row | {"answer": f"kept: {row['answer']}"} for key, row in cache.rows.items()}
        cache.add(known.values())
    ask(teacher, path, photos, [(1, 2)], generations=4)
    with caption_cache(path, teacher, temperature=0.7, max_new_tokens=4, seed=0) as cache:
        assert len(cache.rows) == 4
        assert {key: cache[key] for key in known} == known


def test_answers_depend_on_photos_and_seed_alone(teacher, photos, tmp_path):
    """A random teacher says no JSON: its answers are kept all the same, and are those of any batch and order."""

    def answers(name: str, pairs=PAIRS, **settings) -> dict[tuple[str, str, int], str]:
        with pytest.raises(FieldmarkError, match="none of the teacher's 8 answers holds two captions"):
            ask(teacher, tmp_path / name, photos, pairs, generations=2, **settings)
        rows = [
            row for file in (tmp_path / f"{name}.parts").glob("*.parquet") for row in pq.read_table(file).to_pylist()
        ]
        return {(row["photo_1"], row["photo_2"], row["generation"]): row["answer"] for row in rows}

    together = answers("together.parquet")
    assert len(together) == 8
    assert len(set(together.values())) > 4
    assert answers("alone.parquet", PAIRS[::-1], batch_size=1) == together
    assert answers("other.parquet", seed=1) != together


def test_other_settings_and_empty_lists_are_refused(teacher, photos, tmp_path, talker):
    ask(teacher, tmp_path / "f.parquet", photos)
    with pytest.raises(FieldmarkError, match="seed was 0, is 1"):
        ask(teacher, tmp_path / "f.parquet", photos, seed=1)
    with pytest.raises(FieldmarkError, match="max_new_tokens was 4, is 5"):
        ask(teacher, tmp_path / "f.parquet", photos, max_new_tokens=5)
    with pytest.raises(FieldmarkError, match="0 pairs and 3 generations"):
        ask(teacher, tmp_path / "g.parquet", photos, [])


def test_label_captions_and_its_second_run(folder, photos, tmp_path, talker, capsys):
    rows = [f"{path},{label},train" for path, label in zip(photos, "abca", strict=True)]  # no titles
    (tmp_path / "table.csv").write_text("\n".join(["image,label,split", *rows]) + "\n", encoding="utf-8")
    out = tmp_path / "f.parquet"
    command = ["label", "captions", "--teacher", str(folder), "--data", str(tmp_path / "table.csv"), "--out", str(out)]
    command += ["--negatives", "2", "--generations", "2"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    table = pq.read_table(out).to_pylist()
    failed = sum(row["caption_1"] is None for row in table)
    assert 0 < failed < len(table)
    assert f"{len(table) // 2} pairs, {len(table)} answers, {len(table)} of them asked now" in printed
    assert f"{failed} answers hold no two captions" in printed
    hashes = [photo_hash(path) for path in photos]
    assert set(read_captions(out)) == set(hashes)
    talker.clear()
    assert cli.main(command) == 0
    assert not talker
    assert "all known before, nothing was asked" in capsys.readouterr().out


def test_mistakes_are_one_sentence(folder, photos, tmp_path, talker, capsys):
    rows = [f"{path},a,train" for path in photos]
    (tmp_path / "table.csv").write_text("\n".join(["image,label,split", *rows]) + "\n", encoding="utf-8")
    command = ["label", "captions", "--teacher", str(folder), "--data", str(tmp_path / "table.csv")]
    command += ["--out", str(tmp_path / "f.parquet")]
    assert "4 of 4 photos have fewer than 3 others" in fails(capsys, command)
    for flag, value, words in (
        ("--generations", "0", "--generations was given 0; expected 1 or more"),
        ("--max_new_tokens", "0", "--max_new_tokens was given 0; expected 1 or more"),
        ("--temperature", "-1", "--temperature was given -1.0; expected 0 or more"),
        ("--temperature", "nan", "--temperature was given 'nan'; expected a number"),
        ("--seed", "-1", "--seed was given -1; expected 0 or more"),
    ):
        assert words in fails(capsys, [*command, flag, value])


def test_read_captions_refuses_other_files(teacher, photos, tmp_path, talker):
    with pytest.raises(FieldmarkError, match="does not exist; give a file of `fieldmark label`"):
        read_captions(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("captions", encoding="utf-8")
    with pytest.raises(FieldmarkError, match="cannot read the answers"):
        read_captions(tmp_path / "text.parquet")
    ask(teacher, tmp_path / "f.parquet", photos)
    table = pq.read_table(tmp_path / "f.parquet")
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "bare.parquet")
    with pytest.raises(FieldmarkError, match="holds no answers of a teacher, expected captions"):
        read_captions(tmp_path / "bare.parquet")
    made_by = json.dumps({"answers": "alignment"})
    pq.write_table(table.replace_schema_metadata({"fieldmark": made_by}), tmp_path / "scores.parquet")
    with pytest.raises(FieldmarkError, match="holds alignment, expected captions"):
        read_captions(tmp_path / "scores.parquet")
