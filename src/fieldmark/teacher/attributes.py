"""The attribute generator: a multimodal LLM names the few attributes that tell an item from its look-alikes.

Paper: AFMRL, arXiv 2604.20135, section 3.1 and appendix D: reasoning inside <think>, then key attributes as JSON inside
<answer>. The wording of the prompt is ours (`prompts/attributes.yaml`), and so is what makes an answer valid (the
paper's flag phi, Eq. 5), see `parse_attributes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from fieldmark.errors import FieldmarkError

MAX_ANSWER_CHARACTERS = 100_000  # an answer longer than this is no answer
TITLE_PLACE = "{title}"
_BLOCKS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class AttributeSchema:
    """What a generator is asked, and which attributes count.

    Attributes:
        prompt: the question, with {title} where the item's title goes.
        untitled: what stands there for an item without a title.
        attributes: names that an answer may use; None allows any.
        most: attributes that are kept of an answer at most.
    """

    prompt: str
    untitled: str
    attributes: tuple[str, ...] | None
    most: int

    def ask(self, title: str | None) -> str:
        """The question about an item."""
        return self.prompt.replace(TITLE_PLACE, title or self.untitled)


@dataclass(frozen=True)
class ParsedAnswer:
    """A parsed answer.

    Attributes:
        attributes: names and values (text, or a list of texts); None where the answer is not valid.
        reason: why it is not; one of few sentences, so that they can be counted. None where it is.
        think: what the answer thought first; None where it has no such block.
    """

    attributes: dict[str, str | list[str]] | None
    reason: str | None
    think: str | None


def load_schema(path: str | Path | None = None) -> AttributeSchema:
    """The schema that comes with the package, or the one of a YAML file with the same fields.

    Raises:
        FieldmarkError: unreadable file, unknown or missing field, wrong value.
    """
    if path is None:
        packaged = files("fieldmark.teacher") / "prompts" / "attributes.yaml"
        return _schema(yaml.safe_load(packaged.read_text("utf-8")), "the packaged schema")
    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FieldmarkError(f"cannot read the attribute schema {path} ({reason}); give a YAML file") from error
    return _schema(found, str(path))


def attribute_answer(names: Sequence[str], attributes: Mapping[str, str]) -> str:
    """The ideal answer: thinks of `names` (of the attributes that tell the item apart), then gives `attributes`."""
    return written_answer(", ".join(names) or "nothing", attributes)


def written_answer(thought: str, attributes: Mapping[str, str | list[str]]) -> str:
    """An answer as `parse_attributes` reads it."""
    return f"<think>{thought}</think>\n<answer>{json.dumps(dict(attributes), ensure_ascii=False)}</answer>"


def parse_attributes(answer: str, *, finished: bool = True, schema: AttributeSchema | None = None) -> ParsedAnswer:
    """Reads the attributes out of an answer; never raises, and takes time linear in the answer's length.

    Valid is an answer that ended by itself, with one <think>...</think> and behind it one <answer>...</answer>, in it a
    JSON object of at least one name, each value a text, a number or a list of these, none of them blank. Text around
    the blocks and a code fence around the JSON are ignored; of a name that occurs twice the last value counts, as in
    JSON readers. Nested objects, true, false and null are not valid.

    Names that the schema does not list are dropped, which makes an answer invalid only if none remain; of more than
    `schema.most` the first ones are kept, so that a long list wins nothing.

    Args:
        answer: what the generator said, without special tokens.
        finished: whether it ended by itself, not at the cap of tokens.
        schema: restricts names and number; None keeps all.
    """
    if not isinstance(answer, str) or len(answer) > MAX_ANSWER_CHARACTERS:
        return ParsedAnswer(None, f"not a text of at most {MAX_ANSWER_CHARACTERS} characters", None)
    places = [answer.find(tag) for tag in _BLOCKS]
    think = answer[places[0] + len(_BLOCKS[0]) : places[1]].strip() if 0 <= places[0] < places[1] else None
    if not finished:
        return ParsedAnswer(None, "cut off before its end", think)
    if any(answer.count(tag) != 1 for tag in _BLOCKS) or places != sorted(places):
        return ParsedAnswer(None, "not one <think> block and one <answer> block behind it", think)
    attributes, reason = _flat_object(answer[places[2] + len(_BLOCKS[2]) : places[3]])
    if attributes is not None and schema is not None:
        known = [name for name in attributes if schema.attributes is None or name in schema.attributes]
        attributes = {name: attributes[name] for name in known[: schema.most]} or None
        reason = None if attributes else "no attribute of the schema"
    return ParsedAnswer(attributes, reason, think)


def validity(answer: str, finished: bool, schema: AttributeSchema | None = None) -> bool:
    """The flag phi of the reward (AFMRL Eq. 5): whether `parse_attributes` finds attributes."""
    return parse_attributes(answer, finished=finished, schema=schema).attributes is not None


def _flat_object(text: str) -> tuple[dict[str, str | list[str]] | None, str | None]:
    """The attributes, or why there are none."""
    body = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        # Numbers stay as they were written, of any length; NaN and Infinity are no JSON.
        found = json.loads(body, parse_int=str, parse_float=str, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None, "the <answer> block is not JSON"
    if not isinstance(found, dict) or not found:
        return None, "the JSON is no object with a name and a value"
    cleaned = {_text(name): _value(value) for name, value in found.items()}
    if None in cleaned or None in cleaned.values():
        return None, "a name or value is blank, nested, or no text, number or list of these"
    return cleaned, None  # type: ignore[return-value]


def _value(given: Any) -> str | list[str] | None:
    """A value with its white space made single; None where it is none."""
    if not isinstance(given, list):
        return _text(given)
    parts = [_text(part) for part in given]
    return None if not parts or None in parts else parts  # type: ignore[return-value]


def _text(given: Any) -> str | None:
    """A text with its white space made single; None for a blank one, for half a surrogate pair, or for no text."""
    if not isinstance(given, str):
        return None
    cleaned = " ".join(given.split())
    return cleaned if cleaned and not any("\ud800" <= char <= "\udfff" for char in cleaned) else None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _schema(found: Any, where: str) -> AttributeSchema:
    names = [field.name for field in fields(AttributeSchema)]
    if not isinstance(found, dict) or set(found) != set(names):
        given = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise FieldmarkError(f"{where} has the fields {given or 'none'}; expected {', '.join(names)}")
    prompt, untitled, listed, most = (found[name] for name in names)
    if not isinstance(prompt, str) or TITLE_PLACE not in prompt:
        raise FieldmarkError(f"{where}: the prompt has no {TITLE_PLACE}; put it where the item's title goes")
    if not isinstance(untitled, str) or not untitled.strip():
        raise FieldmarkError(f"{where}: untitled is {untitled!r}; give the words that stand for a missing title")
    if listed is not None and not (isinstance(listed, list) and listed and all(map(_text, listed))):
        raise FieldmarkError(f"{where}: attributes are {listed!r}; give a list of names, or null for any name")
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise FieldmarkError(f"{where}: most is {most!r}; give a whole number of 1 or more")
    return AttributeSchema(prompt, untitled, None if listed is None else tuple(listed), most)
