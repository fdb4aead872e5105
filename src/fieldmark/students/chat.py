"""The prompts of image-text embeddings, kept inside a checkpoint's chat template.

MAPLE (arXiv 2506.06970, section 2) embeds `<text> Describe this text in one word:` and `<image> Describe this image in
one word:`. Whoever encodes must attach the same words in the same place as training did. So they are not a setting
that a user could forget: they become a part of the template that is saved with the processor, and a plain
`SentenceTransformer(path).encode("a red bird")` attaches them too.

A user's turn is rewritten, photos first, then the text, then the prompt; the checkpoint's own template does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fieldmark.errors import FieldmarkError

# The paper embeds photos and texts; the third prompt is ours.
PROMPTS: Mapping[str, str] = {
    "text": "Describe this text in one word:",
    "image": "Describe this image in one word:",
    "image+text": "Describe this image and text in one word:",
}

_PROMPTED = """\
{%- set prompted = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- set turn = namespace(media=[], text='') -%}
{%- if message['content'] is string -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{%- set turn.text = turn.text + ' ' + part['text'] if turn.text else part['text'] -%}
{%- else -%}
{%- set turn.media = turn.media + [part] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set prompt = (BOTH_PROMPT if turn.text else IMAGE_PROMPT) if turn.media else TEXT_PROMPT -%}
{%- set text = turn.text + ' ' + prompt if turn.text else prompt -%}
{%- set content = turn.media + [{'type': 'text', 'text': text}] -%}
{%- set prompted.messages = prompted.messages + [{'role': 'user', 'content': content}] -%}
{%- else -%}
{%- set prompted.messages = prompted.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = prompted.messages -%}
"""

# For a checkpoint without a template: the parts of each message one after the other.
_PLAIN = """\
{%- for message in messages -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}{{ IMAGE_TOKEN }}{%- endif -%}
{%- endfor -%}
{%- endfor -%}
"""


def add_prompts(processor: Any, prompts: Mapping[str, str] | None = None) -> None:
    """Put the prompts into the processor's chat template (in place).

    Args:
        processor: processor of a multimodal LLM; one without a template gets a plain one.
        prompts: replaces single entries of `PROMPTS` (keys `text`, `image`, `image+text`).

    Raises:
        FieldmarkError: a prompt for something else was given.
    """
    unknown = sorted(set(prompts or {}) - set(PROMPTS))
    if unknown:
        raise FieldmarkError(f"a prompt for {unknown[0]!r} was given; expected prompts for {', '.join(PROMPTS)}")
    words = {**PROMPTS, **(prompts or {})}
    names = {"TEXT_PROMPT": words["text"], "IMAGE_PROMPT": words["image"], "BOTH_PROMPT": words["image+text"]}
    template = processor.chat_template
    if isinstance(template, dict):
        template = template["default"]
    if not template:
        template = _PLAIN.replace("IMAGE_TOKEN", json.dumps(processor.image_token))
    prompted = _PROMPTED
    for name, text in names.items():
        prompted = prompted.replace(name, json.dumps(text))  # a JSON string is a Jinja string
    processor.chat_template = prompted + template
