"""Shared-prefix rollouts and replay against the teacher's public forward, one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from fieldmark.errors import FieldmarkError
from fieldmark.teacher.model import Prompt, Teacher, VisualTokens
from fieldmark.teacher.prefix import replay, rollout, sample_tokens, token_logprobs
from helpers_tiny import byte_tokenizer, make_tiny_teacher

KINDS = ["qwen3_vl", "qwen2_5_vl", "qwen2_vl", "llava"]
TOKENS = {"qwen3_vl": 49, "qwen2_5_vl": 64, "qwen2_vl": 64, "llava": 49}
LENGTHS = (7, 12, 3)


@dataclass
class Bench:
    """A teacher and six photos: three pairs."""

    kind: str
    teacher: Teacher
    photos: list[Image.Image]
    prompt: Prompt
    visual: VisualTokens

    def public_inputs(self, pair: int) -> dict[str, Tensor]:
        """What the stock processor gives for one pair, sizes fixed."""
        processor = self.teacher.processor
        chat = processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same kind?"}],
                }
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        photos = self.photos[2 * pair : 2 * pair + 2]
        size = {} if self.kind == "llava" else {"size": {"shortest_edge": 224 * 224, "longest_edge": 224 * 224}}
        return dict(processor(images=photos, text=[chat], return_tensors="pt", **size))

    def public_forward(self, pair: int, completion: Tensor, visual: VisualTokens | None = None, **options: bool):
        """The whole model on prompt + completion; `visual` replaces the tower's output, to carry gradients."""
        inputs = self.public_inputs(pair)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], completion[None]], dim=1)
        inputs.pop("attention_mask")
        if "mm_token_type_ids" in inputs:
            zeros = torch.zeros_like(completion[None])
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], zeros], dim=1)

        def replace(module, args, output):
            assert torch.equal(output.pooler_output, visual.tokens.flatten(0, 1))
            output.pooler_output = visual.tokens.flatten(0, 1)
            if visual.deepstack:
                output.deepstack_features = [feature.flatten(0, 1) for feature in visual.deepstack]
            return output

        def replace_projected(module, args, output):
            assert torch.equal(output, visual.tokens)
            return visual.tokens

        backbone = self.teacher.model.model
        if visual is None:
            handle = None
        elif self.kind == "llava":
            handle = backbone.multi_modal_projector.register_forward_hook(replace_projected)
        else:
            handle = backbone.visual.register_forward_hook(replace)
        try:
            return self.teacher.model(**inputs, **options)
        finally:
            if handle is not None:
                handle.remove()
            if self.kind != "llava":
                backbone.rope_deltas = None

    def public_logprobs(self, pair: int, completion: Tensor, temperature: float, visual: VisualTokens | None = None):
        """[T, V] log-probabilities that predict each completion token."""
        logits = self.public_forward(pair, completion, visual).logits[0, -len(completion) - 1 : -1]
        return torch.log_softmax(logits / temperature, dim=-1)

    def pair(self, pair: int) -> VisualTokens:
        return self.visual[2 * pair : 2 * pair + 2]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tensors this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=KINDS)
def bench(request, tmp_path_factory) -> Bench:
    folder = make_tiny_teacher(request.param, tmp_path_factory.mktemp(request.param))
    return _bench(request.param, Teacher.load(folder))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Bench:
    return _bench("qwen3_vl", Teacher.load(make_tiny_teacher("qwen3_vl", tmp_path_factory.mktemp("one"))))


def _bench(kind: str, teacher: Teacher) -> Bench:
    noise = np.random.default_rng(0)
    photos = [Image.fromarray(noise.integers(0, 255, (224, 224, 3), dtype=np.uint8)) for _ in range(6)]
    prompt = teacher.prompt("Same kind?", 2, TOKENS[kind])
    return Bench(kind, teacher, photos, prompt, teacher.visual_tokens(photos))


def _leaves(visual: VisualTokens) -> VisualTokens:
    return VisualTokens(
        visual.tokens.clone().requires_grad_(), tuple(f.clone().requires_grad_() for f in visual.deepstack)
    )


def _completions(lengths=LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (len(lengths), max(lengths)), generator=generator)
    return ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_visual_tokens_and_prompt_are_those_of_the_stock_processor(bench: Bench):
    assert bench.visual.tokens.shape == (6, TOKENS[bench.kind], 32)
    assert len(bench.visual.deepstack) == (2 if bench.kind == "qwen3_vl" else 0)
    assert torch.equal(bench.prompt.input_ids, bench.public_inputs(0)["input_ids"][0])
    assert (bench.prompt.input_ids[bench.prompt.image_slots] == bench.teacher.image_token_id).all()
    if bench.kind == "llava":
        assert bench.prompt.next_position == len(bench.prompt.input_ids)
    else:
        side = int(TOKENS[bench.kind] ** 0.5)
        text = len(bench.prompt.input_ids) - 2 * TOKENS[bench.kind]
        assert bench.prompt.next_position == text + 2 * side


@pytest.mark.parametrize("lengths", [LENGTHS, (5, 5, 5), (1, 4)])
def test_replay_equals_separate_forwards_in_value_and_gradient(bench: Bench, lengths):
    ids, mask = _completions(lengths)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))
    reference = _leaves(bench.pair(1))
    expected = torch.zeros(ids.shape)
    for g, length in enumerate(lengths):
        table = bench.public_logprobs(1, ids[g, :length], 0.7, reference)
        expected[g, :length] = table.gather(1, ids[g, :length, None])[:, 0]
    (expected * weights).sum().backward()

    shared = _leaves(bench.pair(1))
    result = replay(bench.teacher, bench.prompt, shared, ids, mask, temperature=0.7)
    (result.logprobs * weights).sum().backward()

    assert result.attention is None
    assert expected.detach().std() > 0.5
    torch.testing.assert_close(result.logprobs, expected, atol=1e-4, rtol=0)
    pairs = [(shared.tokens, reference.tokens), *zip(shared.deepstack, reference.deepstack)]
    for ours, theirs in pairs:
        assert theirs.grad.abs().max() > 1e-2
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_language_model_is_untouched(bench: Bench):
    model = bench.teacher.model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids, mask = _completions()
    visual = _leaves(bench.pair(0))
    replay(bench.teacher, bench.prompt, visual, ids, mask, temperature=1.0).logprobs.sum().backward()
    generator = torch.Generator().manual_seed(0)
    options = {"group_size": 2, "temperature": 1.0, "top_p": 0.9, "max_new_tokens": 3}
    rollout(bench.teacher, bench.prompt, bench.visual, **options, generator=generator)
    assert visual.tokens.grad.abs().max() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name
    assert bench.teacher.language_model.config._attn_implementation == "sdpa"
    assert not any(module.training for module in model.modules())
    assert not model.is_gradient_checkpointing
    assert getattr(model.model, "rope_deltas", None) is None


def test_checkpointing_changes_nothing(bench: Bench):
    ids, mask = _completions()
    grads = []
    for checkpoint in (True, False):
        visual = _leaves(bench.pair(2))
        result = replay(bench.teacher, bench.prompt, visual, ids, mask, temperature=1.0, checkpoint=checkpoint)
        result.logprobs.square().sum().backward()
        grads.append((result.logprobs.detach(), visual.tokens.grad, *(f.grad for f in visual.deepstack)))
    for kept, computed_again in zip(*grads):
        torch.testing.assert_close(kept, computed_again, atol=1e-6, rtol=1e-6)


class _Counted(TorchDispatchMode):
    """Counts the operators whose name has a word."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word, self.count = word, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += self.word in str(operator) and "backward" not in str(operator)
        return operator(*args, **(kwargs or {}))


def test_checkpointing_computes_no_attention_twice(bench: Bench):
    ids, mask = _completions()
    visual = _leaves(bench.pair(0))
    with _Counted("scaled_dot_product") as counted:
        result = replay(bench.teacher, bench.prompt, visual, ids, mask, temperature=1.0)
        result.logprobs.sum().backward()
    assert counted.count == 2 * bench.teacher.layers  # the prefix and the completions


@pytest.mark.parametrize(("layer", "implementation"), [(0, "sdpa"), (2, "eager"), (-2, "sdpa")])
def test_attention_targets_equal_output_attentions(bench: Bench, layer: int, implementation: str):
    ids, mask = _completions()
    rows = torch.zeros(3, 2, 12, dtype=torch.bool)
    rows[0, 0, [1, 2, 6]] = rows[0, 1, [4, 5]] = rows[1, 0, :9] = rows[1, 1, 11] = rows[2, 0, 0] = True
    model = bench.teacher.model
    model.set_attn_implementation("eager")
    try:
        expected = torch.zeros(3, 2, TOKENS[bench.kind])
        for g, length in enumerate(LENGTHS):
            attentions = bench.public_forward(0, ids[g, :length], output_attentions=True).attentions
            heads = attentions[layer][0].mean(0)  # [S, S]
            for image in range(2):
                chosen = rows[g, image].nonzero().flatten().tolist()
                for t in chosen:
                    row = heads[len(bench.prompt.input_ids) + t][bench.prompt.image_slots[image]]
                    expected[g, image] += row / row.sum() / len(chosen)
        model.set_attn_implementation(implementation)
        result = replay(
            bench.teacher,
            bench.prompt,
            bench.pair(0),
            ids,
            mask,
            temperature=1.0,
            attention_layer=layer,
            attention_rows=rows,
        )
        assert bench.teacher.language_model.config._attn_implementation == implementation
    finally:
        model.set_attn_implementation("sdpa")
    assert not result.attention.requires_grad
    torch.testing.assert_close(result.attention, expected, atol=1e-5, rtol=0)
    assert result.attention[2, 1].abs().sum() == 0
    torch.testing.assert_close(result.attention.sum(-1)[:2], torch.ones(2, 2))
    assert (expected[0, 0] - 1 / TOKENS[bench.kind]).abs().max() > 5e-3


def test_padding_changes_no_other_completion(qwen3: Bench):
    ids, mask = _completions()
    visual = qwen3.pair(0)
    together = replay(qwen3.teacher, qwen3.prompt, visual, ids, mask, temperature=1.0).logprobs
    assert (together[~mask] == 0).all()
    garbage = torch.where(mask, ids, torch.tensor(9))
    same = replay(qwen3.teacher, qwen3.prompt, visual, garbage, mask, temperature=1.0).logprobs
    assert torch.equal(together, same)
    for g, length in enumerate(LENGTHS):
        alone = replay(
            qwen3.teacher, qwen3.prompt, visual, ids[g : g + 1, :length], mask[g : g + 1, :length], temperature=1.0
        ).logprobs
        torch.testing.assert_close(together[g, :length], alone[0], atol=1e-5, rtol=0)


def test_greedy_rollout_equals_generate(bench: Bench, monkeypatch):
    ends = list(range(0, 256, 9))  # many end tokens: the pairs end at different steps
    monkeypatch.setattr(bench.teacher.model.generation_config, "eos_token_id", ends)
    generator = torch.Generator().manual_seed(0)
    options = {"group_size": 2, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 16, "generator": generator}
    result = rollout(bench.teacher, bench.prompt, bench.visual, **options)
    lengths = []
    for pair in range(3):
        inputs = bench.public_inputs(pair)
        theirs = bench.teacher.model.generate(**inputs, do_sample=False, max_new_tokens=16)
        theirs = theirs[0, inputs["input_ids"].shape[1] :]
        for g in range(2):
            assert torch.equal(result.ids[pair, g][result.mask[pair, g]], theirs)
        lengths.append(len(theirs))
    if bench.kind != "llava":
        bench.teacher.model.model.rope_deltas = None
    assert result.ids.shape[-1] == max(lengths)


def test_sampled_rollouts_are_reproducible_and_their_logprobs_are_those_of_the_replay(bench: Bench, monkeypatch):
    ends = list(range(0, 256, 11))
    monkeypatch.setattr(bench.teacher.model.generation_config, "eos_token_id", ends)

    def sample(seed: int):
        generator = torch.Generator().manual_seed(seed)
        options = {"group_size": 3, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 40, "generator": generator}
        return rollout(bench.teacher, bench.prompt, bench.visual, **options)

    first, again, other = sample(0), sample(0), sample(1)
    assert torch.equal(first.ids, again.ids)
    assert first.texts == again.texts
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)
    lengths = first.mask.sum(-1)
    assert len(lengths.unique()) > 2
    for pair in range(3):
        result = replay(
            bench.teacher, bench.prompt, bench.pair(pair), first.ids[pair], first.mask[pair], temperature=0.7
        )
        torch.testing.assert_close(result.logprobs, first.logprobs[pair], atol=1e-4, rtol=0)
        for g, length in enumerate(lengths[pair].tolist()):
            row = first.ids[pair, g, :length]
            assert torch.equal(first.mask[pair, g], torch.arange(first.mask.shape[-1]) < length)
            assert not torch.isin(row[:-1], torch.tensor(ends)).any()
            assert length == 40 or int(row[-1]) in ends


def test_a_completion_does_not_depend_on_when_others_end(qwen3: Bench, monkeypatch):
    """Pairs that have ended leave the batch; what is drawn for the rest must stay the same."""
    options = {"group_size": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 40}
    free = rollout(qwen3.teacher, qwen3.prompt, qwen3.visual, **options, generator=torch.Generator().manual_seed(3))
    ends = torch.arange(0, 256, 7)
    monkeypatch.setattr(qwen3.teacher.model.generation_config, "eos_token_id", ends.tolist())
    cut = rollout(qwen3.teacher, qwen3.prompt, qwen3.visual, **options, generator=torch.Generator().manual_seed(3))
    for pair in range(3):
        for g in range(2):
            row = free.ids[pair, g]
            stops = torch.isin(row, ends).nonzero().flatten().tolist()
            expected = row[: stops[0] + 1] if stops else row
            assert torch.equal(cut.ids[pair, g][cut.mask[pair, g]], expected)


def test_rollouts_stay_inside_top_p(qwen3: Bench):
    options = {"group_size": 4, "temperature": 1.3, "top_p": 0.5, "max_new_tokens": 12}
    result = rollout(qwen3.teacher, qwen3.prompt, qwen3.visual, **options, generator=torch.Generator().manual_seed(0))
    outside_top_one = 0
    for pair in range(3):
        for row in result.ids[pair]:
            text = (row < 256).long().cumprod(0).sum()  # up to a sampled placeholder, which the public forward refuses
            row = row[: max(1, int(text))]
            probs = qwen3.public_logprobs(pair, row, 1.3).exp()
            for t, token in enumerate(row.tolist()):
                above = probs[t][probs[t] > probs[t, token]].sum()
                assert above < 0.5 + 1e-4
                outside_top_one += int(above > 0)
    assert outside_top_one > 5


def _reference_probabilities(logits: list[float], temperature: float, top_p: float) -> list[float]:
    weights = np.exp(np.array(logits, dtype=np.float64) / temperature)
    probs = weights / weights.sum()
    kept = np.zeros_like(probs)
    total = 0.0
    for index in np.argsort(-probs, kind="stable"):
        if total >= top_p:
            break
        kept[index] = probs[index]
        total += probs[index]
    return list(kept / kept.sum())


@pytest.mark.parametrize(
    ("logits", "temperature", "top_p"),
    [
        ([0.0, 0.0, 0.0, 0.0], 1.0, 1.0),
        ([1.0, 3.0, 2.0, -1.0, 0.5], 0.7, 0.95),
        ([1.0, 3.0, 2.0, -1.0, 0.5], 2.0, 0.6),
        ([0.0, 9.0, 0.0], 1.0, 0.3),
        ([-np.inf, 0.0, 1.0], 1.0, 1.0),
        ([5.0], 0.5, 0.1),
    ],
)
@pytest.mark.parametrize("candidates", [1, 2, 64])
def test_sample_tokens_draws_the_truncated_distribution(monkeypatch, logits, temperature, top_p, candidates):
    monkeypatch.setattr("fieldmark.teacher.prefix._CANDIDATES", candidates)
    draws = 4000
    uniform = (torch.arange(draws) + 0.5) / draws
    table = torch.tensor(logits).expand(draws, -1)
    tokens, logprobs = sample_tokens(table, uniform, temperature, top_p)
    counts = torch.bincount(tokens, minlength=len(logits)) / draws
    expected = _reference_probabilities(logits, temperature, top_p)
    assert counts.tolist() == pytest.approx(expected, abs=2 / draws)
    full = torch.log_softmax(torch.tensor(logits) / temperature, dim=0)
    torch.testing.assert_close(logprobs, full[tokens])


def test_sample_tokens_at_the_edges_of_uniform():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(2, -1)
    tokens, _ = sample_tokens(logits, torch.tensor([0.0, 1.0 - 2**-24]), 1.0, 0.9)
    assert tokens.tolist() == [0, 1]


@pytest.mark.parametrize("bias", [True, False])
def test_token_logprobs_by_blocks(monkeypatch, bias):
    monkeypatch.setattr("fieldmark.teacher.prefix._LOGITS_AT_ONCE", 40)
    hidden = torch.randn(11, 6, requires_grad=True)
    weight, offset = torch.randn(13, 6), torch.randn(13) if bias else None
    ids, upstream = torch.randint(0, 13, (11,)), torch.randn(11)
    expected = torch.log_softmax(torch.nn.functional.linear(hidden, weight, offset) / 0.7, -1)[torch.arange(11), ids]
    (theirs,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    ours = token_logprobs(hidden, weight, offset, ids, 0.7)
    (gradient,) = torch.autograd.grad((ours * upstream).sum(), hidden)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient, theirs)


def _bad_replay(bench: Bench, **change):
    ids, mask = _completions()
    given = {"visual": bench.pair(0), "ids": ids, "mask": mask, "temperature": 1.0, **change}
    return lambda: replay(bench.teacher, bench.prompt, **given)


def test_wrong_input_is_refused_in_a_sentence(qwen3: Bench):
    _, mask = _completions()
    holes = mask.clone()
    holes[0, 2] = False
    empty = mask.clone()
    empty[1] = False
    teacher, visual = qwen3.teacher, qwen3.pair(0)
    rows = torch.zeros(3, 2, 12, dtype=torch.bool)
    cases = [
        (_bad_replay(qwen3, visual=qwen3.visual), "6 images"),
        (_bad_replay(qwen3, visual=VisualTokens(visual.tokens[:, :40], visual.deepstack)), "visual tokens of shape"),
        (_bad_replay(qwen3, visual=VisualTokens(visual.tokens)), "expects 2"),
        (_bad_replay(qwen3, mask=holes), "holes"),
        (_bad_replay(qwen3, mask=empty), "holes"),
        (_bad_replay(qwen3, mask=mask.long()), "bool mask"),
        (_bad_replay(qwen3, temperature=0.0), "temperature"),
        (_bad_replay(qwen3, attention_layer=1), "attention_rows"),
        (_bad_replay(qwen3, attention_layer=3, attention_rows=rows), "layers 0 to 2"),
        (lambda: teacher.prompt("Same?", 2, 50), "image tokens"),
        (lambda: teacher.visual_tokens(qwen3.photos, 230), "multiple of 32"),
        (lambda: teacher.visual_tokens([]), "no image"),
        (lambda: Teacher.load("/nowhere/teacher"), "could not be loaded"),
    ]
    for call, words in cases:
        with pytest.raises(FieldmarkError, match=words):
            call()
    for option in ({"temperature": -1.0}, {"top_p": 0.0}, {"group_size": 0}, {"max_new_tokens": 0}):
        options = {"group_size": 1, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1, **option}
        with pytest.raises(FieldmarkError, match="rollout got"):
            rollout(teacher, qwen3.prompt, visual, **options, generator=torch.Generator())


def test_an_unknown_structure_is_named():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(FieldmarkError, match="gpt2"):
        Teacher(model, type("Processor", (), {"tokenizer": byte_tokenizer()})())


def test_a_bfloat16_checkpoint_loads_as_float32(tmp_path):
    teacher = Teacher.load(make_tiny_teacher("qwen3_vl", tmp_path))
    teacher.model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = Teacher.load(tmp_path)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
