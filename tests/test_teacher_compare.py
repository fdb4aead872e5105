"""The comparison question: prompts, ideal answers, the parser on broken answers, tokens that describe an item."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fieldmark.errors import FieldmarkError
from fieldmark.teacher.compare import (
    answer_json,
    attribute_token_spans,
    compare_prompt,
    domain_for_attributes,
    load_domain,
    parse_verdict,
)
from fieldmark.teacher.speaking import PhotoBank, drill

BIRD = load_domain("aviary", attributes=["bill shape", "crown", "breast"])
RED = {"bill shape": "hooked", "crown": "rød 🐦 crête", "breast": "plain"}
BLUE = {"bill shape": "hooked", "crown": "blue", "breast": "plain"}


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE with few merges, so that non-ASCII characters fall into several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]
    )
    tokenizer.train_from_iterator([answer_json(BIRD, BLUE, BLUE, True)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def word_level():
    """Words and single marks, joined by spaces when decoded."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    texts = [answer_json(BIRD, RED, BLUE, False), answer_json(BIRD, BLUE, BLUE, True)]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    ("name", "count", "item", "key"),
    [
        ("birds", 28, "Bird", "same_species"),
        ("cars", 17, "Car", "same_model"),
        ("aircraft", 17, "Aircraft", "same_variant"),
        ("groceries", 8, "Product", "same_product"),
    ],
)
def test_prompt_names_role_attributes_items_and_ends_with_the_verdict(name, count, item, key):
    domain = load_domain(name)
    prompt = compare_prompt(domain)
    places = [prompt.find(domain.expert), *(prompt.find(attribute) for attribute in domain.attributes)]
    assert len(domain.attributes) == count
    assert min(places) >= 0
    assert f"{item.lower()} 1" in prompt.lower()
    assert f"{item.lower()} 2" in prompt.lower()
    keys = [*domain.item_keys, "differences", "confidence", "reasoning", key]
    last = [prompt.rfind(word) for word in keys]
    assert min(last) >= 0
    assert last == sorted(last)


def test_short_prompt_is_short_and_full_prompt_has_the_four_tasks():
    grocery, car = compare_prompt(load_domain("groceries")), compare_prompt(load_domain("cars"))
    assert len(grocery.split()) < 45
    assert all(f"\n{number}. " in car for number in (1, 2, 3, 4))
    assert compare_prompt(load_domain("cars")).startswith("You are helping an automotive expert identify vehicle make")


def test_generic_prompt_has_no_expert_no_list_and_three_keys():
    domain = load_domain("generic")
    prompt = compare_prompt(domain)
    assert domain.attributes == ()
    assert domain.expert not in prompt
    assert not any(key in prompt for key in (*domain.item_keys, "confidence"))
    answer = json.loads(answer_json(domain, RED, BLUE, False))
    assert list(answer) == ["differences", "reasoning", "same_kind"]
    assert answer["differences"] == "crown"


def test_domain_for_attributes():
    assert domain_for_attributes(load_domain("cars").attributes[::-1]).name == "cars"
    own = domain_for_attributes(["sleeve", "collar"])
    assert own.attributes == ("sleeve", "collar")
    assert "sleeve, collar" in compare_prompt(own)
    assert domain_for_attributes([]) == load_domain("generic")


def test_own_yaml(tmp_path):
    path = tmp_path / "shoes.yaml"
    fields = "expert: cobbler\nwhat: shoes\nitem: shoe\nexample: flat\nverdict_question: same shoe\n"
    path.write_text(fields + "verdict_key: same_shoe\nattributes: [heel, toe]\n", encoding="utf-8")
    domain = load_domain(path)
    assert (domain.name, domain.style, domain.attributes) == ("shoes", "full", ("heel", "toe"))
    assert '"same_shoe"' in compare_prompt(domain)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("expert: x\n", "missing"),
        ("- a\n", "mapping"),
        ("a: [\n", "cannot read"),
        ("verdict_key: differences", "another key"),
        ("verdict_key: 'a b'", "letters"),
        ("style: long", "style"),
        ("attributes: [a, a]", "twice"),
        ("attributes: 3", "list"),
        ("colour: red", "unknown"),
        ("example: [1]", "no text"),
    ],
)
def test_wrong_yaml_is_one_sentence(tmp_path, content, word):
    import yaml

    path = tmp_path / "own.yaml"
    whole = {"expert": "e", "what": "w", "item": "i", "example": "x", "verdict_question": "q", "verdict_key": "k"}
    if content not in ("expert: x\n", "- a\n", "a: [\n"):
        content = yaml.safe_dump(whole | yaml.safe_load(content))
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FieldmarkError, match=word) as caught:
        load_domain(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fish", "missing.yaml"])
def test_unknown_domain(name):
    with pytest.raises(FieldmarkError, match=name):
        load_domain(name)


def test_answer_has_the_paper_s_key_order_and_regular_values():
    text = answer_json(BIRD, RED, BLUE, False)
    answer = json.loads(text)
    assert list(answer) == ["bird_1", "bird_2", "differences", "confidence", "reasoning", "same_species"]
    assert answer["bird_1"] == RED
    assert list(answer["bird_2"]) == list(BIRD.attributes)
    assert answer["differences"] == "bill shape hooked hooked no, crown rød 🐦 crête blue yes, breast plain plain no"
    full = replace(BIRD, style="full")
    assert json.loads(answer_json(full, RED, BLUE, False))["differences"] == "crown"
    assert answer["same_species"] == "no"
    assert "rød" in text
    assert json.loads(answer_json(full, RED, RED, True))["differences"] == "none"
    assert json.loads(answer_json(BIRD, RED, {"breast": "plain", "crown": None}, True))["bird_2"] == {"breast": "plain"}
    assert "crown rød 🐦 crête unknown no" in answer_json(BIRD, RED, {"breast": "plain"}, True)
    with pytest.raises(FieldmarkError, match="domain_for_attributes"):
        answer_json(BIRD, {"heel": "flat"}, RED, False)


@pytest.mark.parametrize("same", [True, False])
def test_ideal_answers_parse(same):
    verdict = parse_verdict(answer_json(BIRD, RED, BLUE, same), BIRD)
    assert verdict.valid
    assert verdict.same is same
    assert verdict.fields is not None
    assert verdict.fields["bird_1"] == RED


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('{"same_species": "yes"}', True),
        ('{"same_species": " No "}', False),
        ('{"same_species": "YES"}', True),
        ('{"same_species": true}', True),
        ('{"same_species": false}', False),
        ('Sure!\n```json\n{"same_species": "yes"}\n```\nHope {this} helps', True),
        ('set {a, b} first, then {"same_species": "no"}', False),
        ('{"x": 1} {"same_species": "no"} {"same_species": "yes"}', False),
        ('{"same_species": "no", "same_species": "yes"}', True),
        ('{"reasoning": "a } in \\" text {", "same_species": "yes"}', True),
        ('5" bill {"same_species": "yes"}', True),
        ('{"bird_1": {"same_species": "no"}, "same_species": "yes"}', True),
        ('{"same_species": "yes", "x": NaN}', True),
    ],
)
def test_verdicts_that_count(text, same):
    verdict = parse_verdict(text, BIRD)
    assert verdict.valid
    assert verdict.same is same


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no JSON"),
        ("yes", "no JSON"),
        ('["same_species", "yes"]', "no JSON"),
        ('{"same_species": "yes"', "not closed"),
        ('{"same_species": "ye', "not closed"),
        ("{'same_species': 'yes'}", "not JSON"),
        ('{"same_species": yes}', "not JSON"),
        ('{"same_species": "yes",}', "not JSON"),
        ('{"verdict": "yes"}', "no key"),
        ('{"answer": {"same_species": "yes"}}', "no key"),
        ('{"same_species": "maybe"}', "maybe"),
        ('{"same_species": ""}', "neither"),
        ('{"same_species": null}', "NoneType"),
        ('{"same_species": 1}', "int"),
        ('{"same_species": ["yes"]}', "list"),
        ('{"same_species": {"yes": "yes"}}', "dict"),
        ('{"a": ' * 10000 + '"yes"' + "}" * 10000, "not JSON"),
        ('{"same_species": ' + "[" * 20000 + "]" * 20000 + "}", "not JSON"),
        ('{"same_species": ' + "9" * 50000 + "}", "not JSON"),
        ("{" * 90000, "not closed"),
        ("{}" * 40000, "no key"),
        ('{"' + "\\" * 90000, "not closed"),
        ('{"same_species": "yes"}' + " " * 200000, "characters"),
        (None, "not text"),
        (b'{"same_species": "yes"}', "not text"),
    ],
)
def test_verdicts_that_do_not_count_say_why(text, word):
    verdict = parse_verdict(text, BIRD)
    assert not verdict.valid
    assert verdict.same is None
    assert verdict.fields is None
    assert word in verdict.reason


def test_parser_survives_every_cut_and_random_damage():
    whole = answer_json(BIRD, RED, BLUE, False)
    assert not any(parse_verdict(whole[:cut], BIRD).valid for cut in range(len(whole)))
    rng = random.Random(0)
    for _ in range(500):
        damaged = list(whole)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.choice('{}[]":,\\x\n\ud800')
        verdict = parse_verdict("".join(damaged), BIRD)
        assert verdict.valid == (verdict.same is not None)


def marked_text(tokenizer, ids, row):
    """Text of the marked tokens of one row, each run decoded on its own."""
    runs, run = [], []
    for token, marked in zip([*ids, 0], [*row.tolist(), False]):
        if marked:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return "".join(runs)


def letters(text):
    return "".join(character for character in text if character.isalnum() or ord(character) > 127)


def expected_letters(description):
    return letters("".join(part for pair in description.items() for part in pair))


def test_spans_with_split_characters_and_repeated_values(byte_level):
    ids = byte_level(answer_json(BIRD, RED, BLUE, False)).input_ids
    spans = attribute_token_spans(byte_level, ids, BIRD)
    assert spans.dtype == torch.bool
    assert spans.shape == (2, len(ids))
    assert "\ufffd" in byte_level.decode(ids[ids.index(byte_level("🐦").input_ids[0])])  # the bird is several tokens
    for row, description in zip(spans, (RED, BLUE)):
        assert letters(marked_text(byte_level, ids, row)) == expected_letters(description)
    assert not (spans[0] & spans[1]).any()
    assert not any(set(byte_level.decode(t)) <= set('{}":,') for t, m in zip(ids, spans.any(0).tolist()) if m)


def test_spans_with_a_word_level_tokenizer(word_level):
    ids = word_level(answer_json(BIRD, RED, BLUE, False)).input_ids
    spans = attribute_token_spans(word_level, torch.tensor(ids), BIRD)
    for row, description in zip(spans, (RED, BLUE)):
        words = [word_level.decode([token]) for token, marked in zip(ids, row.tolist()) if marked]
        assert letters("".join(words)) == expected_letters(description)


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ('{"bird_1": {"crown": "red"}, "differences": "crown"}', "crownred", ""),
        ('{"bird_1": {"crown": "red"}, "bird_2": {"crown": "re', "crownred", "crownre"),
        ('{"bird_1": {"cro', "cro", ""),
        ('{"bird_1": {"crown": "red \\"', "crownred", ""),
        ('{"bird_2": {"crown": "red"}, "bird_1": {"crown": "red"}}', "crownred", "crownred"),
        ('{"bird_1": {"a": ["x", {"b": 3}], "c": true}, "z": "y"}', "axb3ctrue", ""),
        ('{"bird_1": "a red one", "bird_2": {}, "z": "y"}', "aredone", ""),
        ('{"reasoning": "bird_1: {red}", "x": {"bird_1": {"a": "b"}}}', "", ""),
        ('Here {it} is: {"bird_1": {"crown": "red"}}', "crownred", ""),
        ('{"bird_1": {"crown": "a } b"}, "bird_2": {"x": "\\\\"}}', "crownab", "x"),
        ("no json at all", "", ""),
        ("", "", ""),
    ],
)
def test_spans_of_unusual_answers(byte_level, text, first, second):
    ids = byte_level(text).input_ids if text else []
    spans = attribute_token_spans(byte_level, ids, BIRD)
    assert spans.shape == (2, len(ids))
    assert letters(marked_text(byte_level, ids, spans[0])) == first
    assert letters(marked_text(byte_level, ids, spans[1])) == second


def test_spans_ignore_what_follows_the_end_token_and_survive_random_bytes(byte_level):
    ids = byte_level(answer_json(BIRD, RED, BLUE, False)).input_ids
    padded = [*ids, *[byte_level.eos_token_id] * 5]
    spans = attribute_token_spans(byte_level, padded, BIRD)
    assert torch.equal(spans[:, : len(ids)], attribute_token_spans(byte_level, ids, BIRD))
    assert not spans[:, len(ids) :].any()
    rng = random.Random(1)
    noise = [rng.randrange(len(byte_level)) for _ in range(200)]
    assert attribute_token_spans(byte_level, noise, BIRD).shape == (2, 200)


def test_drills_compare_what_they_say():
    """Every yes or no follows from the two values before it, the verdict from all of them; many marks differ."""
    rows = [
        {"bill shape": b, "crown": c, "breast": "plain"} for b in ("hooked", "flat") for c in ("red", "blue", "white")
    ]
    bank = PhotoBank(torch.zeros(0), np.zeros(0, dtype=int), rows, [])
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(200):
        answer = json.loads(drill(BIRD, bank, rng))
        one, other = answer["bird_1"], answer["bird_2"]
        said = [f"{n} {one[n]} {other[n]} {'no' if one[n] == other[n] else 'yes'}" for n in BIRD.attributes]
        assert answer["differences"] == ", ".join(said)
        assert answer["same_species"] == ("yes" if one == other else "no")
        counts.append(sum(one[name] != other[name] for name in one))
    assert {0, 1, 2} == set(counts), "breast has one value and never differs"
    assert counts.count(2) > 30
