"""The text side of a dual encoder without PyTorch: a `tokenizer.json` that pads and cuts as the student was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from fieldmark.export.networks import Side

TOKENIZER = "tokenizer.json"


def write_tokenizer(student: SentenceTransformer, side: Side, path: Path) -> bool:
    """Writes the tokenizer, padding to the rows that the exported network takes.

    Returns:
        False, and nothing is written, for a tokenizer that is not one of the `tokenizers` library (Python code would be
        needed to run it).
    """
    first: Any = student[0]
    if not first.tokenizer.is_fast:
        return False
    tokenizer = Tokenizer.from_str(first.tokenizer.backend_tokenizer.to_str())
    length = side.inputs["input_ids"].shape[1]
    tokenizer.enable_truncation(length)
    pad = first.tokenizer.pad_token
    tokenizer.enable_padding(length=length, pad_id=first.tokenizer.pad_token_id, pad_token=pad)
    tokenizer.save(str(path))
    return True


class TextReader:
    """Texts to the inputs of an exported text network.

    Args:
        path: a `tokenizer.json`.
        names: inputs of the network.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.tokenizer, self.names = Tokenizer.from_file(str(path)), names

    def __call__(self, texts: Sequence[str]) -> Mapping[str, np.ndarray]:
        """`input_ids` and, where the network takes it, `attention_mask`, each [B, T] int64."""
        rows = self.tokenizer.encode_batch(list(texts))
        known = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}
        return {name: np.asarray(known[name], np.int64) for name in self.names}
