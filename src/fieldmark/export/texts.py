"""The text side of a student without PyTorch: a `tokenizer.json` that pads as the student was trained (and cuts, for a
dual encoder), and the chat that a multimodal LLM reads around each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from fieldmark.errors import FieldmarkError
from fieldmark.export.networks import LENGTH, Side
from fieldmark.students.items import embeds_both

TOKENIZER = "tokenizer.json"
MARK = "fieldmark"


class Around(NamedTuple):
    """What is written before and after a text before it is tokenized; for a dual encoder nothing."""

    before: str = ""
    after: str = ""

    def wrap(self, text: str) -> str:
        return f"{self.before}{text}{self.after}"


NOTHING = Around()


def around_texts(student: SentenceTransformer) -> Around:
    """The chat and the prompt around a text, out of the student's own chat template.

    Raises:
        FieldmarkError: the template does not write a text once and as it stands.
    """
    if not embeds_both(student):
        return NOTHING
    first: Any = student[0]
    _, chat = first.input_formatter.batch_to_message("text", {"text": [MARK]})
    options = dict(first.processing_kwargs.get("chat_template", {}))
    options.pop("sanitize_control_tokens", None)  # a setting of tokens, not of the words that are written
    written = first.processor.apply_chat_template(chat["message"][0], tokenize=False, **options)
    parts = written.split(MARK)
    if len(parts) != 2:
        raise FieldmarkError(
            f"The student's chat template writes a text {len(parts) - 1} times, so its text side is not exported as a "
            "graph; give --to sentence-transformers."
        )
    return Around(*parts)


def context_of(student: SentenceTransformer) -> int:
    """How many tokens a text may have, with what is around it."""
    first: Any = student[0]
    return int(first.config.get_text_config().max_position_embeddings)


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
    length = None if LENGTH in side.axes else side.inputs["input_ids"].shape[1]
    if length is None:
        tokenizer.no_truncation()  # it would cut the prompt off
    else:
        tokenizer.enable_truncation(length)
    side_of_padding = first.processing_kwargs.get("text", {}).get("padding_side", first.tokenizer.padding_side)
    tokenizer.enable_padding(
        direction=side_of_padding,
        length=length,
        pad_id=first.tokenizer.pad_token_id,
        pad_token=first.tokenizer.pad_token,
    )
    tokenizer.save(str(path))
    return True


class TextReader:
    """Texts to the inputs of an exported text network.

    Args:
        path: a `tokenizer.json`.
        names: inputs of the network.
        around: what is written around each text; it then brings the special tokens, and the tokenizer adds none.
    """

    def __init__(self, path: Path, names: Sequence[str], around: Around = NOTHING) -> None:
        self.tokenizer, self.names, self.around = Tokenizer.from_file(str(path)), names, around

    def __call__(self, texts: Sequence[str]) -> Mapping[str, np.ndarray]:
        """`input_ids` and, where the network takes it, `attention_mask`, each [B, T] int64."""
        written = [self.around.wrap(text) for text in texts]
        rows = self.tokenizer.encode_batch(written, add_special_tokens=self.around == NOTHING)
        known = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}
        return {name: np.asarray(known[name], np.int64) for name in self.names}
