"""Shared-prefix rollouts and replay against the unshared ways, on random Qwen3-VL models: time and peak memory.

One pair of photos, a prompt of 600 tokens, 8 completions of 300 tokens (SAGA, arXiv 2606.15134: G = 8). Forward and
backward, gradient into the visual tokens and DeepStack features, frozen language model. Every row runs in its own
process, so that its peak memory is its own; on a busy machine `--threads 1` and the CPU seconds are the ones to trust.

    uv run python benchmarks/replay.py --size tiny --repeats 3 --out replay.json

- replay, shared: `fieldmark.teacher.prefix.replay`.
- replay, a batch of G: the stock language model on G sequences of 900 tokens (SDPA, logits at completions only).
- replay, one by one: the same, a sequence at a time.
- step, shared: `rollout`, then `replay` with attention targets of one layer; keeps all activations, as the plain loop.
- step, shared, checkpointed: the same with the layers' activations computed again in the backward pass.
- step, plain loop: `generate(num_return_sequences=G)`, then each sequence with `output_attentions=True`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from fieldmark.teacher.model import Prompt, Teacher, VisualTokens
from fieldmark.teacher.prefix import replay, rollout

PROMPT, COMPLETION, GROUP, TOKENS, SIDE = 600, 300, 8, 49, 7
TEMPERATURE, TOP_P = 0.7, 0.95
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 6, "num_attention_heads": 5,
             "num_key_value_heads": 5, "vocab_size": 4096},
    "0.3b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 20, "num_attention_heads": 16,
             "num_key_value_heads": 8, "vocab_size": 32768},
}  # fmt: skip
ROWS = {
    "replay_shared": "replay, shared prefix",
    "replay_batch": "replay, a batch of G",
    "replay_single": "replay, one by one",
    "step_shared": "step, shared prefix",
    "step_checkpointed": "step, shared prefix, checkpointed",
    "step_plain": "step, plain loop",
}


def make_teacher(size: str) -> Teacher:
    """A random teacher; its photos never reach the tower, so the processor is only a tokenizer that knows no end."""
    settings = SIZES[size]
    image = settings["vocab_size"] - 1
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={
            **settings,
            "head_dim": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": settings["hidden_size"],
            "num_position_embeddings": 196,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=image,
        video_token_id=image - 1,
        tie_word_embeddings=True,
    )
    tokenizer = SimpleNamespace(
        eos_token_id=settings["vocab_size"], pad_token_id=0, batch_decode=lambda rows, **_: ["" for _ in rows]
    )
    model = Qwen3VLForConditionalGeneration(config)
    return Teacher(model, SimpleNamespace(tokenizer=tokenizer))


def make_inputs(teacher: Teacher) -> tuple[Prompt, VisualTokens, Tensor, dict[str, Tensor]]:
    """Prompt, visual tokens, completions, and the public model's arguments for the same prompt."""
    torch.manual_seed(1)
    vocabulary = teacher.lm_head.out_features - 8
    ids = torch.randint(0, vocabulary, (PROMPT,))
    slots = torch.stack([torch.arange(10, 10 + TOKENS), torch.arange(70, 70 + TOKENS)])
    ids[slots.flatten()] = teacher.image_token_id
    grid = torch.tensor([[1, 2 * SIDE, 2 * SIDE]] * 2)
    kinds = (ids == teacher.image_token_id).int()[None]
    positions, _ = teacher.model.model.get_rope_index(ids[None], mm_token_type_ids=kinds, image_grid_thw=grid)
    prompt = Prompt(ids, positions[:, 0], slots, int(positions.max()) + 1)
    features = [torch.randn(2, TOKENS, teacher.hidden_size) * 0.1 for _ in range(3)]
    visual = VisualTokens(features[0], (features[1], features[2]))
    public = {
        "input_ids": ids[None],
        "mm_token_type_ids": kinds,
        "image_grid_thw": grid,
        "pixel_values": torch.randn(2 * 4 * TOKENS, 3 * 2 * 16 * 16),
    }
    return prompt, visual, torch.randint(0, vocabulary, (GROUP, COMPLETION)), public


def _with_gradient(visual: VisualTokens) -> VisualTokens:
    return VisualTokens(
        visual.tokens.clone().requires_grad_(), tuple(feature.clone().requires_grad_() for feature in visual.deepstack)
    )


def _stock_replay(teacher: Teacher, prompt: Prompt, visual: VisualTokens, ids: Tensor) -> None:
    """Unshared: len(ids) whole sequences in one batch of the stock language model."""
    batch = len(ids)
    sequences = torch.cat([prompt.input_ids.expand(batch, -1), ids], dim=1)
    embeds = teacher.language_model.get_input_embeddings()(sequences)
    tokens = visual.tokens.flatten(0, 1).expand(batch, -1, -1)
    embeds = embeds.index_copy(1, prompt.image_slots.flatten(), tokens)
    answer = (prompt.next_position + torch.arange(ids.shape[1])).expand(3, -1)
    positions = torch.cat([prompt.position_ids, answer], dim=1)[:, None].expand(-1, batch, -1)
    slots = torch.zeros(sequences.shape, dtype=torch.bool)
    slots[:, prompt.image_slots.flatten()] = True
    hidden = teacher.language_model(
        inputs_embeds=embeds,
        position_ids=positions,
        use_cache=False,
        visual_pos_masks=slots,
        deepstack_visual_embeds=[f.flatten(0, 1).repeat(batch, 1) for f in visual.deepstack],
    ).last_hidden_state
    logits = teacher.lm_head(hidden[:, -ids.shape[1] - 1 : -1]) / TEMPERATURE
    torch.log_softmax(logits, -1).gather(2, ids[..., None]).sum().backward()


def replay_shared(teacher: Teacher, checkpoint: bool) -> None:
    prompt, visual, ids, _ = make_inputs(teacher)
    mask = torch.ones_like(ids, dtype=torch.bool)
    visual = _with_gradient(visual)
    result = replay(teacher, prompt, visual, ids, mask, temperature=TEMPERATURE, checkpoint=checkpoint)
    result.logprobs.sum().backward()


def replay_batch(teacher: Teacher, checkpoint: bool) -> None:
    prompt, visual, ids, _ = make_inputs(teacher)
    if checkpoint:
        teacher.model.activation_checkpointing_enable()
        teacher.language_model.train()
    _stock_replay(teacher, prompt, _with_gradient(visual), ids)


def replay_single(teacher: Teacher, checkpoint: bool) -> None:
    prompt, visual, ids, _ = make_inputs(teacher)
    if checkpoint:
        teacher.model.activation_checkpointing_enable()
        teacher.language_model.train()
    visual = _with_gradient(visual)
    for row in ids:
        _stock_replay(teacher, prompt, visual, row[None])


def step_shared(teacher: Teacher, checkpoint: bool) -> None:
    _step(teacher, checkpoint=False)


def step_checkpointed(teacher: Teacher, checkpoint: bool) -> None:
    _step(teacher, checkpoint=True)


def _step(teacher: Teacher, checkpoint: bool) -> None:
    prompt, visual, _, _ = make_inputs(teacher)
    generator = torch.Generator().manual_seed(0)
    samples = rollout(
        teacher,
        prompt,
        visual,
        group_size=GROUP,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        max_new_tokens=COMPLETION,
        generator=generator,
    )
    rows = torch.zeros(GROUP, 2, COMPLETION, dtype=torch.bool)
    rows[:, 0, 20:120] = rows[:, 1, 140:240] = True
    result = replay(
        teacher,
        prompt,
        _with_gradient(visual),
        samples.ids[0],
        samples.mask[0],
        temperature=TEMPERATURE,
        attention_layer=teacher.layers * 26 // 36,
        attention_rows=rows,
        checkpoint=checkpoint,
    )
    result.logprobs.sum().backward()


def step_plain(teacher: Teacher, checkpoint: bool) -> None:
    """What a straightforward implementation does: stock generation, then each sequence with all attentions."""
    prompt, visual, _, public = make_inputs(teacher)
    model = teacher.model
    visual = _with_gradient(visual)

    def feed(module: Any, args: Any, output: Any) -> Any:
        output.pooler_output = visual.tokens.flatten(0, 1)
        output.deepstack_features = [feature.flatten(0, 1) for feature in visual.deepstack]
        return output

    model.model.visual.register_forward_hook(feed)
    sequences = model.generate(
        **public,
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        num_return_sequences=GROUP,
        max_new_tokens=COMPLETION,
        eos_token_id=None,
        pad_token_id=0,
        bad_words_ids=[[teacher.image_token_id], [teacher.image_token_id - 1]],
    )
    model.set_attn_implementation("eager")
    layer = teacher.layers * 26 // 36
    kinds = torch.cat([public["mm_token_type_ids"], torch.zeros(1, COMPLETION, dtype=torch.int)], dim=1)
    for row in sequences:
        inputs = {**public, "input_ids": row[None], "mm_token_type_ids": kinds}
        output = model(**inputs, output_attentions=True, logits_to_keep=COMPLETION + 1)
        logits = output.logits[0, :-1] / TEMPERATURE
        torch.log_softmax(logits, -1).gather(1, row[PROMPT:, None]).sum().backward()
        heads = output.attentions[layer][0].detach().mean(0)[PROMPT:]
        for image, slots in enumerate(prompt.image_slots):
            chosen = heads[20 + 120 * image : 120 + 120 * image][:, slots]
            (chosen / chosen.sum(1, keepdim=True)).mean(0)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def work(row: str, size: str, threads: int, checkpoint: bool) -> dict[str, float]:
    """Runs one row once in this process; seconds, and MB above the loaded model."""
    torch.set_num_threads(threads)
    teacher = make_teacher(size)
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = _resident()
    start, cpu = time.perf_counter(), time.process_time()
    globals()[row](teacher, checkpoint)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "extra_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
        "parameters": sum(p.numel() for p in teacher.model.parameters()),
    }


def measure(size: str, repeats: int, threads: int, checkpoint: bool) -> list[dict[str, Any]]:
    """Each row in `repeats` fresh processes, taken in turn so that a busy machine disturbs all rows alike."""
    runs: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
    for _ in range(repeats):
        for row in ROWS:
            command = [sys.executable, __file__, "--worker", row, "--size", size, "--threads", str(threads)]
            done = subprocess.run(
                [*command, *([] if checkpoint else ["--no_checkpoint"])], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{row} failed:\n{done.stderr[-2000:]}")
            runs[row].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{size}: {ROWS[row]}: {runs[row][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    results = []
    for row, found in runs.items():
        base = runs["step_shared" if row.startswith("step") else "replay_shared"]
        fastest = {key: min(run[key] for run in found) for key in ("seconds", "cpu_seconds")}
        shared = {key: min(run[key] for run in base) for key in fastest}
        results.append(
            {
                "size": size,
                "row": row,
                "parameters": int(found[0]["parameters"]),
                **{key: round(value, 3) for key, value in fastest.items()},
                "times_shared": round(fastest["seconds"] / shared["seconds"], 2),
                "times_shared_cpu": round(fastest["cpu_seconds"] / shared["cpu_seconds"], 2),
                "extra_mb": round(max(run["extra_mb"] for run in found)),
            }
        )
    return results


def table(results: list[dict[str, Any]]) -> str:
    """A markdown table."""
    lines = ["| model | what | seconds | x shared | CPU seconds | x shared | peak MB above the model |"]
    lines.append("|" + " --- |" * 7)
    for r in results:
        cells = [f"{r['size']} ({r['parameters'] / 1e6:.0f} M)", ROWS[r["row"]]]
        cells += [f"{r[key]:.2f}" for key in ("seconds", "times_shared", "cpu_seconds", "times_shared_cpu")]
        lines.append("| " + " | ".join([*cells, str(r["extra_mb"])]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "both"], default="tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no_checkpoint", action="store_true", help="keep all activations in the replay rows")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    parser.add_argument("--worker", choices=list(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.size, options.threads, not options.no_checkpoint)))
        return
    sizes = list(SIZES) if options.size == "both" else [options.size]
    results: list[dict[str, Any]] = []
    for size in sizes:
        results += measure(size, options.repeats, options.threads, not options.no_checkpoint)
    print(table(results))
    if options.out:
        setting = {"prompt": PROMPT, "completion": COMPLETION, "group": GROUP, "checkpoint": not options.no_checkpoint}
        options.out.write_text(json.dumps({**setting, "threads": options.threads, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
