"""RAR: the reward against a slow loop, as a function of TRL alone, and the whole loop on a tiny generator."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from trl.data_utils import prepare_multimodal_messages

from fieldmark.data.catalog import load_catalog, select_split
from fieldmark.data.photos import load_square
from fieldmark.errors import FieldmarkError
from fieldmark.methods import rar
from fieldmark.methods.rar import RarConfig, RarTrainer
from fieldmark.methods.recall_reward import RecallReward, recall_reward
from fieldmark.students.build import build_student
from fieldmark.students.enrich import enriched_text
from fieldmark.students.items import encode_items
from fieldmark.students.multimodal import build_multimodal_student
from fieldmark.teacher.attributes import ParsedAnswer, attribute_answer, load_schema
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.questions import chat_text, square_processor
from helpers_tiny import make_tiny_teacher
from helpers_training import killed_at, log_of

DOCS = Path(__file__).parents[1] / "docs" / "rar.md"
SIDE = 64
SCHEMA = "prompt: '{title}'\nuntitled: bird\nattributes: null\nmost: 8\n"
COLOURS = ("red", "blue", "grey", "black")
STEPS = 80


@pytest.fixture(scope="module")
def parts(tmp_path_factory, one_thread) -> Path:
    """A folder with a generator that was cold-started, a student, and the schema of a short prompt."""
    folder = tmp_path_factory.mktemp("rar")
    (folder / "schema.yaml").write_text(SCHEMA, encoding="utf-8")
    base = make_tiny_teacher("qwen3_vl", folder / "base")
    student = build_multimodal_student(base, lora_rank=0, resolution=SIDE)
    student.save_pretrained(str(folder / "student"))
    cold_start(base, folder / "generator")
    return folder


def cold_start(base: Path, folder: Path) -> None:
    """Teaches the form of an answer, with any of a few colours; most answers are valid then, and differ."""
    teacher = Teacher.load(base)
    rows = select_split(load_catalog("aviary:1"), "train").select(range(24))
    processor, rng = square_processor(teacher, SIDE), np.random.default_rng(0)
    photos = [load_square(photo, SIDE) for photo in rows["image"]]
    prompts = [chat_text(processor, title) for title in rows["title"]]
    model = teacher.model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        chosen = rng.permutation(len(rows))[:8]
        answers = [attribute_answer(["colour"], {"colour": rng.choice(COLOURS)}) + "<|im_end|>" for _ in chosen]
        inputs = processor(
            images=[photos[i] for i in chosen],
            text=[prompts[i] + answer for i, answer in zip(chosen, answers, strict=True)],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        labels = inputs["input_ids"].clone()
        for row, answer in zip(labels, answers, strict=True):
            row[: -len(teacher.tokenizer(answer).input_ids)] = -100
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
        optimizer.step()
    model.save_pretrained(folder)
    teacher.processor.save_pretrained(folder)


def settings(out: Path, parts: Path, **changes) -> dict:
    return {
        "out": str(out),
        "data": "aviary:3",
        "student": str(parts / "student"),
        "teacher": str(parts / "generator"),
        "schema": str(parts / "schema.yaml"),
        "resolution": SIDE,
        "queries_per_step": 2,
        "group_size": 4,
        "per_device_batch": 4,
        "k": 4,
        "max_new_tokens": 64,
        "gallery_size": 24,
        "eval_items": 3,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,  # it would move what has no gradient
        "warmup": 0.0,
        "max_steps": 2,
        **changes,
    }


def train(out: Path, parts: Path, **changes) -> Path:
    return rar.train(RarConfig(**settings(out, parts, **changes)))


# -- the reward -------------------------------------------------------------------------------------------------------


def slow_recall(found, label, gallery_labels, own):
    """Eq. 4 as two loops."""
    positives = {i for i, other in enumerate(gallery_labels) if other == label and i != own}
    return len(positives & set(found)) / len(positives) if positives else float("nan")


def test_the_recall_is_that_of_a_slow_loop():
    rng = np.random.default_rng(0)
    gallery = rng.integers(0, 6, 40)
    labels, own = rng.integers(0, 8, 200), rng.integers(-1, 40, 200)  # labels 6 and 7 have no item
    found = np.stack([rng.permutation(40)[:12] for _ in range(200)])
    found[::5, 9:] = -1
    values = recall_reward(found, labels, gallery, own)
    expected = [slow_recall(*row, gallery, mine) for *row, mine in zip(found.tolist(), labels.tolist(), own.tolist())]
    np.testing.assert_allclose(values, expected)
    assert 0 < np.isnan(values).sum() < 200
    assert len(set(values[~np.isnan(values)])) > 5


@pytest.mark.parametrize(
    ("title", "attributes", "text"),
    [
        ("Oat milk", {"brand": "Alba", "size": "1 l"}, "Oat milk Key attributes: brand: Alba; size: 1 l"),
        ("Oat milk", {"for": ["coffee", "cereal"]}, "Oat milk Key attributes: for: coffee, cereal"),
        (None, {"brand": "Alba"}, "Key attributes: brand: Alba"),
        ("Oat milk", None, "Oat milk"),
        ("Oat milk", {}, "Oat milk"),
        (None, None, ""),
    ],
)
def test_attributes_stand_behind_the_title(title, attributes, text):
    assert enriched_text(title, attributes) == text


def answer(**attributes) -> str:
    return f"<think>look</think><answer>{json.dumps(attributes)}</answer>"


@pytest.fixture(scope="module")
def judged(parts):
    """A student, twelve items of four products, and their vectors without attributes."""
    rows = select_split(load_catalog("aviary:3"), "train").select(range(12))
    student = SentenceTransformer(str(parts / "student"))
    vectors = encode_items(student, images=rows["image"][:], texts=rows["title"][:])
    return student, rows, vectors


def columns_of(rows, places) -> dict:
    return {name: [rows[i][name] for i in places] for name in ("image", "title", "label", "item_id")}


def test_rewards_are_those_of_the_paper(judged):
    """Eq. 5 against a search by hand, of conversations and of texts."""
    student, rows, vectors = judged
    places = [0, 0, 4, 7, 7]
    said = [
        answer(bill="red"),
        "no answer",
        answer(crown="black", legs=["long", "grey"]),
        answer(size="1"),
        answer(b="x"),
    ]
    read = [{"bill": "red"}, None, {"crown": "black", "legs": ["long", "grey"]}, {"size": "1"}, {"b": "x"}]
    ids = [[5] * 20] * 4 + [[5] * 64]
    reward = RecallReward(
        student, vectors, rows["label"][:], 3, -0.1, gallery_ids=rows["item_id"][:], max_completion_length=64
    )
    columns = columns_of(rows, places)
    rewards = reward(["?"] * 5, said, ids, **columns)
    assert reward(["?"] * 5, [[{"role": "assistant", "content": one}] for one in said], ids, **columns) == rewards
    assert rewards[1] == rewards[4] == -0.1, "no block, and an answer as long as the cap"
    for row in (0, 2, 3):
        item = rows[places[row]]
        query = encode_items(student, images=[item["image"]], texts=[enriched_text(item["title"], read[row])])[0]
        scores = [-np.inf if i == places[row] else float(query @ other) for i, other in enumerate(vectors)]
        found = sorted(range(12), key=lambda i: -scores[i])[:3]
        assert rewards[row] == slow_recall(found, item["label"], rows["label"][:], places[row])
    assert len(set(rewards)) > 2


def test_an_items_own_vector_is_no_neighbour_wherever_it_stands(judged):
    student, rows, vectors = judged
    labels = rows["label"][:]
    # The nearest of all is the item itself; with k = 1 it would be found, and nothing else.
    same = RecallReward(student, vectors, labels, 1, gallery_ids=rows["item_id"][:])
    gallery = same.gallery
    assert 5 not in gallery.nearest(vectors[5:6], [rows[5]["item_id"]], 11)[0]
    assert gallery.nearest(vectors[5:6], [None], 1)[0, 0] == 5
    numbered = RecallReward(student, vectors, labels, 1)
    assert 5 not in numbered.gallery.nearest(vectors[5:6], [5], 11)[0]


def test_equal_texts_of_one_item_are_embedded_once(judged, monkeypatch):
    student, rows, vectors = judged
    reward = RecallReward(student, vectors, rows["label"][:], 3, gallery_ids=rows["item_id"][:])
    seen: list[int] = []

    def counting(*args, texts, **kwargs):
        seen.append(len(texts))
        return encode_items(*args, texts=texts, **kwargs)

    monkeypatch.setattr("fieldmark.methods.recall_reward.encode_items", counting)
    said = [answer(bill="red"), answer(bill="blue"), answer(bill="red"), answer(bill="red")]
    rewards = reward(["?"] * 4, said, **columns_of(rows, [0, 0, 0, 3]))
    assert seen == [3], "item 3 says what item 0 does, and is another photo"
    assert rewards[0] == rewards[2]


def test_one_failing_sample_is_counted_and_the_others_are_rewarded(judged, caplog):
    student, rows, vectors = judged
    reward = RecallReward(student, vectors, rows["label"][:], 3, gallery_ids=rows["item_id"][:])
    columns = columns_of(rows, [0, 3, 6, 9])
    columns["photo"] = [columns["image"][0], "gone.jpg", *columns["image"][2:]]
    columns["label"][3] = "a bird of which there is no other"
    logged: dict[str, float] = {}
    whole = reward(["?"] * 4, [answer(bill="red")] * 4, **columns_of(rows, [0, 3, 6, 9]))
    for _ in range(2):
        rewards = reward(["?"] * 4, [answer(bill="red")] * 4, **columns, log_metric=logged.__setitem__)
        assert rewards == [whole[0], None, whole[2], None]
    assert reward.failed == 4
    assert logged == {"invalid": 0, "failed": 0.5, "think_characters": 4, "answer_characters": len('{"bill": "red"}')}
    warnings = [record.message for record in caplog.records if "could not be computed" in record.message]
    assert len(warnings) == 1
    assert "gone.jpg" in warnings[0]


def test_a_reward_that_cannot_be_given_is_one_sentence(judged, parts):
    student, rows, vectors = judged
    with pytest.raises(FieldmarkError, match="k is 50 and the gallery holds 12 items"):
        RecallReward(student, vectors, rows["label"][:])
    with pytest.raises(FieldmarkError, match="given twice"):
        RecallReward(student, vectors, rows["label"][:], 3, gallery_ids=["a"] * 12)
    with pytest.raises(FieldmarkError, match="have 32 dimensions and the gallery's 8; embed the gallery with this"):
        RecallReward(student, vectors[:, :8], rows["label"][:], 3)
    tower = build_student(parts / "base", resolution=SIDE)
    with pytest.raises(FieldmarkError, match="does not embed both photos and texts"):
        RecallReward(tower, vectors, rows["label"][:], 3)
    columns = columns_of(rows, [0])
    del columns["item_id"]
    with pytest.raises(FieldmarkError, match="of which item_id is not there"):
        RecallReward(student, vectors, rows["label"][:], 3)(["?"], ["x"], **columns)


# -- the training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, parts):
    """A whole run, and the student it was judged by: as it was, and as it is."""
    seen: dict = {}
    opening = rar.open_student

    def opened(config):
        seen["student"] = opening(config)
        seen["before"] = {name: value.clone() for name, value in seen["student"].state_dict().items()}
        return seen["student"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rar, "open_student", opened)
        seen["out"] = train(tmp_path_factory.mktemp("run") / "rar", parts, max_steps=4, save_steps=2)
    return seen


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_student_is_bit_identical_and_the_generators_language_model_moved(run, parts):
    assert all(torch.equal(value, run["before"][name]) for name, value in run["student"].state_dict().items())
    old, new = weights(parts / "generator"), weights(run["out"] / "model")
    assert set(old) == set(new)
    tower = {name for name in old if "visual" in name}
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(old) - tower
    assert tower


def test_a_run_leaves_what_a_run_leaves(run):
    out = run["out"]
    records = log_of(out)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert {"reward", "reward_std", "frac_reward_zero_std", "kl", "completions/mean_length", "invalid", "failed",
                "data_wait_share"} <= set(record)  # fmt: skip
        assert 0 <= record["reward_share"] < 1
    assert any(record["frac_reward_zero_std"] < 1 for record in records), "some groups were mixed"
    assert any(record["think_characters"] == 6 for record in records if record["invalid"] < 1)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    for when in ("before", "after"):
        assert {"valid", "reward", "found@4", "enriched_instance_recall@1", "tokens"} <= set(metrics[when])
        assert metrics[when]["n_gallery"] == 24
        assert metrics[when]["n_queries"] == 3
    assert metrics["before"]["found@4"] == metrics["after"]["found@4"]
    assert not list((out / "checkpoints").iterdir())
    assert Teacher.load(out / "model").model_type == "qwen3_vl"


def test_a_killed_run_resumes_to_the_same_rewards_and_weights(run, parts, tmp_path):
    with killed_at(RarTrainer, 3):
        train(tmp_path / "killed", parts, max_steps=4, save_steps=2)
    before = log_of(tmp_path / "killed")
    resumed = train(tmp_path / "killed", parts, max_steps=4, save_steps=2, resume=True)
    assert log_of(resumed)[:2] == before[:2], "seconds included: these steps were not run again"
    names = ("loss", "reward", "reward_std", "kl", "grad_norm", "completions/mean_length", "invalid")
    logs = [[[record[name] for name in names] for record in log_of(out)] for out in (run["out"], resumed)]
    assert logs[0] == logs[1]
    one, other = weights(run["out"] / "model"), weights(resumed / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_are_merged_at_the_end(parts, tmp_path):
    out = train(tmp_path / "run", parts, lora_rank=4)
    old, new = weights(parts / "generator"), weights(out / "model")
    assert set(old) == set(new)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {name for name in old if "language_model.layers" in name and "proj" in name}


def test_prompts_are_those_of_label_attributes(parts):
    """Token by token, as TRL makes them of the rows and as the teacher is asked."""
    teacher = Teacher.load(parts / "generator")
    schema, rows = load_schema(), select_split(load_catalog("aviary:1"), "train").select(range(2))
    asked = rows.with_transform(rar.RowsToAsk(schema, SIDE))[:]
    processor = rar.left_padding(square_processor(teacher, SIDE))
    prompts = [
        prepare_multimodal_messages(prompt, images=[image])
        for prompt, image in zip(asked["prompt"], asked["image"], strict=True)
    ]
    theirs = processor.apply_chat_template(
        conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    for ids, title in zip(theirs["input_ids"], rows["title"], strict=True):
        assert ids == teacher.prompt(schema.ask(title), 1, (SIDE // 32) ** 2).input_ids.tolist()


@pytest.fixture
def damaged(monkeypatch):
    """Makes some of a step's eight photos unreadable for the student; every answer is valid."""
    asking = rar.RowsToAsk.__call__

    def break_photos(rows: range) -> None:
        def broken(self, given):
            found = asking(self, given)
            return {**found, "photo": ["gone.jpg" if i in rows else one for i, one in enumerate(found["photo"])]}

        monkeypatch.setattr(rar.RowsToAsk, "__call__", broken)

    parsed = ParsedAnswer({"colour": "red"}, None, "look")
    monkeypatch.setattr("fieldmark.methods.recall_reward.parse_attributes", lambda *args, **kwargs: parsed)
    return break_photos


def test_rewards_that_fail_do_not_end_the_run(parts, tmp_path, damaged):
    damaged(range(4))  # the whole first group
    out = train(tmp_path / "run", parts)
    for record in log_of(out):
        assert record["failed"] == 0.5
        assert np.isfinite([record["loss"], record["grad_norm"], record["reward"]]).all()
    assert all(value.isfinite().all() for value in weights(out / "model").values())
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8"))["failed_rewards"] == 8


def test_a_run_whose_rewards_all_fail_stops(parts, tmp_path, damaged):
    damaged(range(8))
    with pytest.raises(
        FieldmarkError, match=r"no answer of the last 2 steps could be rewarded \(most often: .*gone.jpg"
    ):
        train(tmp_path / "run", parts, patience_invalid=2)
    assert [record["reward"] for record in log_of(tmp_path / "run")] == [None, None]


def test_the_reward_works_in_trl_alone(parts, tmp_path, monkeypatch):
    """The snippet of docs/rar.md as it stands, but for its size."""
    snippet = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[1]
    smaller = {
        "max_steps=350": "max_steps=1",
        "gradient_accumulation_steps=32": "gradient_accumulation_steps=1",
        "=512": "=8",
        '"train")': '"train").select(range(60))',
    }
    for old, new in smaller.items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    for name in ("student", "generator"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model").symlink_to(parts / name)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    (record,) = [one for one in names["trainer"].state.log_history if "reward" in one]
    assert record["reward"] == pytest.approx(-0.1), "answers of eight tokens are cut off"
    assert record["invalid"] == 1
    assert dict(names["reward"].faults) == {"cut off before its end": 8}


def test_a_generator_that_never_answers_as_asked_stops_with_advice(parts, tmp_path):
    with pytest.raises(
        FieldmarkError, match=r"no answer of the last 2 steps could be rewarded \(most often: .*\); cold"
    ):
        train(tmp_path / "run", parts, teacher=str(parts / "base"), max_steps=9, max_new_tokens=4, patience_invalid=2)
    assert len(log_of(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 50}, "k is 50 and the train gallery of aviary:3 holds 24 items"),
        ({"data": "aviary:1"}, "no train item of aviary:1 has another item of its product"),
        ({"queries_per_step": 25}, "queries_per_step is 25 and aviary:3 has 24 training items"),
        ({"per_device_batch": 3}, "give a per_device_batch that divides them"),
        ({"teacher": None}, "RAR needs an attribute generator"),
        ({"student": None}, "RAR needs a trained student"),
        ({"group_size": 1}, "a group needs at least 2 answers"),
        ({"temperature": 0.0}, "temperature is 0.0; give a number above 0"),
        ({"lora_rank": 4, "freeze_tower": False}, "give --lora_rank 0 to train the tower"),
        ({"vllm_options": {"mode": "colocate"}}, "vllm_options has 'mode'"),
    ],
)
def test_mistakes_are_one_sentence(parts, tmp_path, changes, words):
    with pytest.raises(FieldmarkError, match=words):
        train(tmp_path / "run", parts, **changes)


def test_vllm_must_be_there_to_be_used(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(rar, "find_spec", lambda name: None)
    with pytest.raises(FieldmarkError, match="vLLM is not installed"):
        train(tmp_path / "run", parts, use_vllm=True)
    monkeypatch.setattr(rar, "find_spec", lambda name: object())
    options = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.4}
    config = RarConfig(**settings(tmp_path / "run", parts, use_vllm=True, vllm_options=options))
    arguments = rar.make_arguments(config, 24)
    assert (arguments.use_vllm, arguments.vllm_mode) == (True, "colocate")
    assert arguments.vllm_gpu_memory_utilization == 0.4


def test_failed_rewards_are_those_of_the_whole_run(parts, tmp_path):
    config = RarConfig(**settings(tmp_path, parts))
    answers = config.queries_per_step * config.group_size
    lines = [
        {"step": 1, "failed": 1 / answers},
        {"step": 2, "failed": 0.0},
        {"step": 3, "failed": 3 / answers},
        {"x": 1},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert rar.failed_rewards(config, tmp_path) == 4
