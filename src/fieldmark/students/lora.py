"""Low-rank adapters (LoRA, arXiv 2106.09685) on a student, and their way back into its weights.

Everything else of the student is frozen. MAPLE (arXiv 2506.06970, section 3, table 7): rank = alpha = 32 on the
attention and projection layers of the language model only; vision tower, connector and embeddings stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from fieldmark.errors import FieldmarkError

LANGUAGE_MODEL_LAYERS = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
DUAL_ENCODER_LAYERS = r"(text_model|vision_model)\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"


def add_lora(student: SentenceTransformer, layers: str, *, rank: int, alpha: int) -> None:
    """Freeze the student and add adapters (in place), which change nothing until they are trained.

    Args:
        student: its first module is sentence-transformers' `Transformer`.
        layers: regular expression that names of linear layers match as a whole.
        rank: rank r of the adapters; 0 only freezes.
        alpha: the adapters' output is scaled by alpha / r.

    Raises:
        FieldmarkError: the rank or alpha is out of range, or no layer matches.
    """
    from peft import LoraConfig  # only training needs it

    if rank < 0 or (rank and alpha <= 0):
        raise FieldmarkError(
            f"a LoRA of rank {rank} and alpha {alpha} was asked for; expected a rank of 0 or more and an alpha above 0"
        )
    student.requires_grad_(False)
    if not rank:
        return
    model: Any = student.transformers_model
    if not any(re.fullmatch(layers, name) for name, _ in model.named_modules()):
        raise FieldmarkError(
            f"a {model.config.model_type} model has no layers with the usual names (q_proj, gate_proj, ...) to adapt; "
            "use a checkpoint with a Qwen or Llama language model"
        )
    student.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=layers),
    )


def merge_lora(student: SentenceTransformer) -> SentenceTransformer:
    """Add the adapters to the weights they adapt and take them out (in place), so that loading needs no peft.

    Call it before `save_pretrained`: a student with adapters would save the adapters alone. One without adapters is
    left as it is. No parameter is trainable afterwards.

    Returns:
        The same student.
    """
    model: Any = student.transformers_model
    if not getattr(model, "_hf_peft_config_loaded", False):
        return student
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    # What transformers itself does when the last adapter is deleted.
    del model.peft_config
    model._hf_peft_config_loaded = False
    return student


def load_lora(student: SentenceTransformer, folder: str | Path) -> None:
    """Put the adapters that `save_pretrained` wrote to a training checkpoint into a student with such adapters.

    sentence-transformers' own way of resuming loads the base model anew, in its stored precision and with its stored
    direction of attention, which rounds the adapters of a float32 student to the precision of a bfloat16 checkpoint.

    Args:
        student: built as the one that was saved.
        folder: holds `adapter_model.safetensors`.

    Raises:
        FieldmarkError: there are no adapters, or they are those of another student.
    """
    path = Path(folder) / "adapter_model.safetensors"
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FieldmarkError(f"{path} cannot be read; give a checkpoint folder of a student with LoRA") from error
    saved = {
        re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name.removeprefix("base_model.model.")): weight
        for name, weight in saved.items()
    }
    model: Any = student.transformers_model
    own = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    if {n: p.shape for n, p in own.items()} != {n: w.shape for n, w in saved.items()}:
        raise FieldmarkError(f"the adapters in {path} are not those of this student; build it with the same LoRA rank")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
