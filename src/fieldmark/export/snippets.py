"""How an export is used, as Python in its card; the tests run these lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PIXELS = """about = json.loads(Path("export.json").read_text())
seen = about["preprocessing"]
mean, std = np.float32(seen["mean"]), np.float32(seen["std"])


def pixels(path):
    photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    square = photo.resize((seen["width"], seen["height"]), Image.Resampling.BICUBIC)
    return ((np.asarray(square, np.float32) / 255 - mean) / std).transpose(2, 0, 1)

"""
_HEAD = """import json
from pathlib import Path

import numpy as np
{imports}
from PIL import Image, ImageOps
"""
_CUT = """short = photos[:, :{dim}]
short = short / np.linalg.norm(short, axis=1, keepdims=True)
"""


def snippets(kind: str, about: Mapping[str, Any]) -> str:
    """The section "Use" of the card.

    Args:
        kind: `onnx`, `openvino` or `sentence-transformers`.
        about: the content of `export.json`.
    """
    if kind == "sentence-transformers":
        return _sentence_transformers(about)
    install = {"onnx": "onnxruntime", "openvino": "openvino"}[kind]
    texts = about.get("texts")
    packages = f"numpy pillow {install}" + (" tokenizers" if texts else "")
    imports = f"import {install}" + ("\nfrom tokenizers import Tokenizer" if texts else "")
    code = [_HEAD.format(imports=imports), _PIXELS, _run(kind, about)]
    if texts:
        code.append(_texts(kind, about))
    dims = [
        one["dim"] for one in about.get("variants", {}).get("measured", []) if one["dim"] < about["embedding"]["dim"]
    ]
    if dims:
        code.append(f"# shorter vectors, see below\n{_CUT.format(dim=dims[0])}")
    rest = (
        "`export.json` says all of this: size, filter, colour order, mean and standard deviation. The resize is "
        "Pillow's bicubic one, which smooths while it shrinks; OpenCV's and PyTorch's without antialiasing give other "
        "pixels and other vectors. Fieldmark also lays transparent photos over white and converts embedded colour "
        "profiles to sRGB."
    )
    if texts and "before" in texts:
        rest += (
            " A text, which must not be empty, stands between `before` and `after`, with them at most "
            f"{texts['context']:,} tokens; nothing is cut. Control tokens such as `<|im_end|>` would act as such: take "
            "them out of texts that others wrote."
        )
    if kind == "openvino":
        rest += " Without the hint OpenVINO may compute in bfloat16, which is not what was checked."
    return f"`pip install {packages}`, in this folder:\n\n```python\n{chr(10).join(code).rstrip()}\n```\n\n{rest}"


def _run(kind: str, about: Mapping[str, Any]) -> str:
    if kind == "onnx":
        return (
            f'session = onnxruntime.InferenceSession("{about["file"]}", providers=["CPUExecutionProvider"])\n'
            '(photos,) = session.run(["embedding"], {"pixel_values": np.stack([pixels("photo.jpg")])})\n'
        )
    return (
        f'model = openvino.Core().compile_model("{about["file"]}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})\n'
        'photos = model({"pixel_values": np.stack([pixels("photo.jpg")])})["embedding"]\n'
    )


def _texts(kind: str, about: Mapping[str, Any]) -> str:
    texts = about["texts"]
    values = {"input_ids": "[row.ids for row in rows]", "attention_mask": "[row.attention_mask for row in rows]"}
    inputs = ", ".join(f'"{name}": np.int64({values[name]})' for name in texts["inputs"])
    lines = f'tokenizer = Tokenizer.from_file("{texts["tokenizer"]}")\ntexts = ["a small bird with a red bill"]\n'
    if "before" in texts:  # the chat around a text brings the special tokens
        lines += 'chat = about["texts"]\ntexts = [chat["before"] + text + chat["after"] for text in texts]\n'
        lines += "rows = tokenizer.encode_batch(texts, add_special_tokens=False)\n"
    else:
        lines += "rows = tokenizer.encode_batch(texts)\n"
    if kind == "onnx":
        return lines + (
            f'reader = onnxruntime.InferenceSession("{texts["file"]}", providers=["CPUExecutionProvider"])\n'
            f'(texts,) = reader.run(["embedding"], {{{inputs}}})\nscores = photos @ texts.T\n'
        )
    return lines + (
        f'reader = openvino.Core().compile_model("{texts["file"]}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})\n'
        f'texts = reader({{{inputs}}})["embedding"]\nscores = photos @ texts.T\n'
    )


def _sentence_transformers(about: Mapping[str, Any]) -> str:
    loading = about["loading"]
    packages = "sentence-transformers" + (" fieldmark" if loading["needs_fieldmark"] else "")
    code = f"{loading['imports']}from sentence_transformers import SentenceTransformer\n\nmodel = {loading['call']}\n"
    code += 'photos = model.encode(["photo.jpg"])\n'
    if "texts" in about:
        code += 'texts = model.encode(["a small bird with a red bill"])\nscores = model.similarity(photos, texts)\n'
    return f"`pip install {packages}`, in this folder:\n\n```python\n{code.rstrip()}\n```\n\n{loading['says']}"
