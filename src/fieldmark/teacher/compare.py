"""The comparison question: "are these two the same kind, attribute by attribute?" and how its answer is read.

Paper: SAGA, arXiv 2606.15134, appendix E (prompt), Eq. 3 (only the verdict is rewarded), Eq. 6 (tokens that describe
an item). One template for all domains, filled from `prompts/domains.yaml`; the JSON answer ends with the verdict, so
that the verdict is conditioned on the descriptions.

Deviations: 1) a `short` style of the same structure for small teachers; 2) a parser that never raises: the authors
needed none, a small teacher does.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldmark.errors import FieldmarkError

MAX_ANSWER_CHARACTERS = 100_000  # an answer longer than this is no answer
_FIELDS = ("expert", "what", "item", "example", "verdict_question", "verdict_key", "style", "attributes")
_RESERVED_KEYS = ("differences", "confidence", "reasoning")
_STYLES = ("full", "short")
_PENDING_TOKENS = 8  # a UTF-8 character has at most 4 bytes: more waiting tokens are no character any more
# strings (possibly cut off), structure, bare words: each branch starts with another character, so matching is linear
_LEXER = re.compile(r'"(?:[^"\\]|\\.)*"?|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)


@dataclass(frozen=True)
class Domain:
    """What a comparison prompt is filled with; see `prompts/domains.yaml`. No attributes: the generic question."""

    name: str
    expert: str
    what: str
    item: str
    attributes: tuple[str, ...]
    example: str
    verdict_question: str
    verdict_key: str
    style: str = "full"

    @property
    def item_keys(self) -> tuple[str, str]:
        """JSON keys of the two descriptions, such as `bird_1`, `bird_2`."""
        return f"{self.item}_1", f"{self.item}_2"

    def __post_init__(self) -> None:
        if self.style not in _STYLES:
            raise FieldmarkError(f"domain {self.name!r} has style {self.style!r}; expected one of {', '.join(_STYLES)}")
        if not re.fullmatch(r"\w+", self.item) or not re.fullmatch(r"\w+", self.verdict_key):
            raise FieldmarkError(
                f"domain {self.name!r} has item {self.item!r} and verdict_key {self.verdict_key!r}; "
                "both become JSON keys and may hold letters, digits and underscores only"
            )
        if self.verdict_key in (*_RESERVED_KEYS, *self.item_keys):
            raise FieldmarkError(f"domain {self.name!r}: verdict_key {self.verdict_key!r} is another key of the answer")
        if len(set(self.attributes)) != len(self.attributes):
            raise FieldmarkError(f"domain {self.name!r} lists an attribute twice; each name may occur once")


@dataclass(frozen=True)
class Verdict:
    """A parsed answer: `same` and `fields` are None where it is not valid, `reason` then says why."""

    valid: bool
    same: bool | None
    fields: dict[str, Any] | None
    reason: str


def load_domain(name_or_path: str | Path, attributes: Sequence[str] | None = None) -> Domain:
    """Read a domain by its name in `prompts/domains.yaml`, or from a YAML file of one's own.

    Args:
        name_or_path: a name (`birds`, `groceries`, ...) or the path of a YAML file with a domain's fields.
        attributes: names that take the place of the listed ones.

    Raises:
        FieldmarkError: unknown name, unreadable file, missing or unknown field, wrong value.
    """
    given = str(name_or_path)
    packaged = _packaged_domains()
    if given in packaged:
        name, fields = given, packaged[given]
    elif given.endswith((".yaml", ".yml")):
        name, fields = Path(given).stem, _read_yaml(Path(given))
    else:
        raise FieldmarkError(f"no domain {given!r}; expected one of {', '.join(packaged)} or the path of a YAML file")
    return _domain(name, fields, attributes)


def domain_for_attributes(names: Sequence[str]) -> Domain:
    """The packaged domain that has exactly these attributes, else the generic one with these (there may be none)."""
    wanted = set(names)
    if wanted:
        for name, fields in _packaged_domains().items():
            domain = _domain(name, fields, None)
            if set(domain.attributes) == wanted:
                return domain
    return load_domain("generic", attributes=names)


def compare_prompt(domain: Domain) -> str:
    """The instruction behind the two photos (papers: images first, SAGA Eq. 1), same for every pair of a domain."""
    if not domain.attributes:
        return _generic_prompt(domain)
    return _short_prompt(domain) if domain.style == "short" else _full_prompt(domain)


def answer_json(domain: Domain, attrs_1: Mapping[str, Any], attrs_2: Mapping[str, Any], same: bool) -> str:
    """The ideal answer for two items whose attributes are known: what a small teacher is trained to say.

    Keys in the order of the prompt: item 1, item 2, differences, confidence, reasoning, verdict. Attributes that are
    None or missing are left out of a description and never counted as a difference. The differences are the names that
    differ or "none"; in the short style every name with both values and yes (they differ) or no.

    Raises:
        FieldmarkError: one of the items has none of the domain's attributes.
    """
    names = domain.attributes or tuple(dict.fromkeys((*attrs_1, *attrs_2)))
    known = [{name: str(attrs[name]) for name in names if attrs.get(name) is not None} for attrs in (attrs_1, attrs_2)]
    if domain.attributes and not all(known):
        raise FieldmarkError(
            f"an item has none of the attributes of domain {domain.name!r} ({', '.join(domain.attributes)}); "
            "give the catalogue's own names with domain_for_attributes"
        )
    differing = [name for name in names if name in known[0] and name in known[1] and known[0][name] != known[1][name]]
    answer: dict[str, Any] = dict(zip(domain.item_keys, known)) if domain.attributes else {}
    answer["differences"] = ", ".join(differing) or "none"
    if domain.style == "short" and domain.attributes:
        answer["differences"] = ", ".join(_compared(name, *known) for name in names)
    if domain.attributes:
        answer["confidence"] = _confidence(len(differing), same)
    answer["reasoning"] = _reasoning(bool(differing), same)
    answer[domain.verdict_key] = "yes" if same else "no"
    return json.dumps(answer, ensure_ascii=False)


def parse_verdict(text: str, domain: Domain) -> Verdict:
    """Read the verdict out of an answer; never raises, and takes time linear in the answer's length.

    Valid: the outermost `{...}` is a JSON object whose verdict key says yes or no (any case) or true or false. Text
    around it and code fences are ignored; of several objects the first with a verdict key counts; of a key that
    occurs twice the last value counts, as in JSON readers.
    """
    if not isinstance(text, str):
        return _invalid(f"the answer is {type(text).__name__}, not text")
    if len(text) > MAX_ANSWER_CHARACTERS:
        return _invalid(f"the answer has {len(text)} characters, more than {MAX_ANSWER_CHARACTERS}")
    reason = "no JSON object in the answer"
    for start, end, _ in _objects(text):
        if end is None:
            return _invalid("the JSON object is not closed")
        try:
            fields = json.loads(text[start:end])
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error}"
            continue
        if domain.verdict_key in fields:
            return _verdict(fields, domain.verdict_key)
        reason = f"no key {domain.verdict_key!r}"
    return _invalid(reason)


def attribute_token_spans(tokenizer: Any, ids: Sequence[int] | torch.Tensor, domain: Domain) -> torch.Tensor:
    """Which generated tokens describe which item (the sets A_a and A_b of SAGA Eq. 6).

    Args:
        tokenizer: anything with the `decode` of a transformers tokenizer.
        ids: [T] generated token ids of one completion; padding behind the end token does no harm.
        domain: names the two description objects.

    Returns:
        bool [2, T]: row 0 marks tokens that overlap a name or value in the description of item 1, row 1 of item 2;
        quotes, braces, colons and commas alone are not marked. Rows stay empty where the answer has no such key.
        An answer that is cut off is read as far as it goes.
    """
    text, spans = _token_characters(tokenizer, [int(i) for i in ids])
    marks = np.zeros((2, len(text) + 1), dtype=np.int64)
    for _, _, lexemes in _objects(text):
        for row, begin, end in _description_ranges(text, lexemes, domain.item_keys):
            marks[row, begin + 1 : end + 1] = 1
    counts = marks.cumsum(axis=1)
    starts = np.array([start for start, _ in spans], dtype=np.int64)
    ends = np.array([end for _, end in spans], dtype=np.int64)
    return torch.from_numpy(counts[:, ends] > counts[:, starts])


def _packaged_domains() -> dict[str, dict[str, Any]]:
    import yaml

    source = importlib.resources.files("fieldmark.teacher").joinpath("prompts/domains.yaml")
    return yaml.safe_load(source.read_text(encoding="utf-8"))


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = str(error).replace("\n", " ")
        raise FieldmarkError(f"cannot read the domain file {path}: {problem}; expected a YAML file") from error


def _domain(name: str, fields: Any, attributes: Sequence[str] | None) -> Domain:
    if not isinstance(fields, dict):
        raise FieldmarkError(f"domain {name!r} is no mapping; expected the fields {', '.join(_FIELDS)}")
    unknown = [str(field) for field in fields if field not in _FIELDS]
    missing = [field for field in _FIELDS if field not in fields and field not in ("style", "attributes")]
    wrong = [field for field, value in fields.items() if field != "attributes" and not isinstance(value, str)]
    if unknown or missing or wrong:
        raise FieldmarkError(
            f"domain {name!r}: unknown fields {unknown}, missing fields {missing}, fields that are no text {wrong}; "
            f"expected {', '.join(_FIELDS)}"
        )
    values = {field: fields[field] for field in fields if field != "attributes"}
    names = _attribute_names(name, fields.get("attributes")) if attributes is None else tuple(attributes)
    return Domain(name=name, attributes=names, **values)


def _attribute_names(name: str, listed: Any) -> tuple[str, ...]:
    if listed == "aviary":  # imported by name and late: drawing code is not needed for any other domain
        return tuple(importlib.import_module("fieldmark.data.aviary").ATTRIBUTES)
    if listed is None:
        return ()
    if not isinstance(listed, list) or not all(isinstance(entry, str) and entry.strip() for entry in listed):
        raise FieldmarkError(f"domain {name!r}: attributes are {listed!r}; expected a list of names or none")
    return tuple(listed)


def _article(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"


def _full_prompt(domain: Domain) -> str:
    title = domain.item.capitalize()
    first, second = domain.item_keys
    return "\n".join(
        (
            f"You are helping {_article(domain.expert)} identify {domain.what} from photographs.",
            f"Specialists tell look-alikes apart by these attributes: {', '.join(domain.attributes)}.",
            f"The first photo shows {title} 1, the second photo shows {title} 2.",
            f'1. Describe {title} 1 attribute by attribute, in short natural phrases such as "{domain.example}".',
            f"2. Describe {title} 2 in the same way.",
            "3. Summarise the key differences.",
            f"4. Predict whether both are the {domain.verdict_question}.",
            "Answer with one JSON object and nothing else, its keys in this order:",
            f'{{"{first}": {{"<attribute>": "<phrase>", ...}}, "{second}": {{same attributes}}, '
            '"differences": "<text>", "confidence": "<high, medium or low>", "reasoning": "<one sentence>", '
            f'"{domain.verdict_key}": "<yes or no>"}}',
        )
    )


def _short_prompt(domain: Domain) -> str:
    first, second = domain.item_keys
    return (
        f"Help {_article(domain.expert)} identify {domain.what} by {', '.join(domain.attributes)}. "
        f"Compare {domain.item} 1 and {domain.item} 2. "
        f"JSON: {first}, {second}, differences, confidence, reasoning, {domain.verdict_key} (yes or no)."
    )


def _generic_prompt(domain: Domain) -> str:
    return (
        f"Compare the two photos: describe the most important differences, then decide whether both show the "
        f'{domain.verdict_question}. Answer with one JSON object, its keys in this order: "differences", '
        f'"reasoning" (one sentence), "{domain.verdict_key}" ("yes" or "no").'
    )


def _compared(name: str, first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """One attribute in the short style, "bill_shape conical hooked yes".

    Both values once more before the yes or no: a small model that must compare two words of two lists at a distance did
    not learn it in thousands of steps, one that may copy them side by side first learns it in three hundred.
    """
    one, other = first.get(name, "unknown"), second.get(name, "unknown")
    return f"{name} {one} {other} {'yes' if one != other and 'unknown' not in (one, other) else 'no'}"


def _confidence(differences: int, same: bool) -> str:
    """How sure one may be after these descriptions: a difference inside a kind, or none between kinds, says little."""
    if same == (differences > 0):
        return "low"
    return "medium" if differences == 1 else "high"


def _reasoning(differs: bool, same: bool) -> str:
    if same:
        return "The differences are within one kind." if differs else "All attributes match."
    return "The attributes differ." if differs else "The listed attributes do not tell them apart."


def _invalid(reason: str) -> Verdict:
    return Verdict(valid=False, same=None, fields=None, reason=reason)


def _verdict(fields: dict[str, Any], key: str) -> Verdict:
    value = fields[key]
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, bool) or word in ("yes", "no"):
        return Verdict(valid=True, same=word is True or word == "yes", fields=fields, reason="")
    given = repr(value[:40]) if isinstance(value, str) else type(value).__name__
    return _invalid(f"{key!r} is {given}, neither yes nor no")


def _objects(text: str) -> Iterator[tuple[int, int | None, list[tuple[int, int]]]]:
    """Outermost `{...}` one after the other: start, end (None when cut off), (begin, end) of every lexeme."""
    start = text.find("{")
    while start >= 0:
        lexemes: list[tuple[int, int]] = []
        depth, end = 0, None
        for match in _LEXER.finditer(text, start):
            lexemes.append(match.span())
            depth += {"{": 1, "}": -1}.get(match.group(), 0)
            if depth == 0:
                end = match.end()
                break
        yield start, end, lexemes
        start = -1 if end is None else text.find("{", end)


def _description_ranges(
    text: str, lexemes: list[tuple[int, int]], item_keys: tuple[str, str]
) -> Iterator[tuple[int, int, int]]:
    """(item, begin, end) of every name and value below the item keys of an outermost object."""
    depth, key, item = 0, "", -1  # item: 0 or 1 inside that item's value, else -1
    for begin, end in lexemes:
        first = text[begin]
        if first in "{[":
            depth += 1
        elif first in "}]":
            depth -= 1
            item = -1 if depth <= 1 else item
        elif first == "," and depth == 1:
            item = -1
        elif first == ":" and depth == 1:
            item = item_keys.index(key) if key in item_keys else -1
        elif first not in ":,":
            begin, end = _content(text, begin, end)
            if depth == 1 and item < 0:
                key = "".join(text[begin:end].split())  # word-level tokenizers decode "bird_1" as "bird _ 1"
            elif item >= 0:
                yield item, begin, end


def _content(text: str, begin: int, end: int) -> tuple[int, int]:
    """A lexeme without its quotes and outer white space (tokenizers that join words by spaces add some)."""
    if text[begin] == '"':
        inner = text[begin + 1 : end - 1]
        escaped = (len(inner) - len(inner.rstrip("\\"))) % 2 == 1  # cut off just behind an escaped quote
        closed = end - begin > 1 and text[end - 1] == '"' and not escaped
        begin, end = begin + 1, end - closed
    inner = text[begin:end]
    begin += len(inner) - len(inner.lstrip())
    return begin, begin + len(inner.strip())


def _token_characters(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """Decoded text and the characters of every token in it; tokens that share one character share its span."""

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = window = done = 0  # tokens before `window` are settled context, tokens from `done` on are waiting
    for position in range(1, len(ids) + 1):
        before, now = decode(ids[window:done]), decode(ids[window:position])
        waiting = position - done
        # a trailing replacement character is half a character: the next token brings the rest
        if now.endswith("\ufffd") and waiting < _PENDING_TOKENS and position < len(ids):
            continue
        piece = now[len(before) :]
        spans += [(length, length + len(piece))] * waiting
        pieces.append(piece)
        length += len(piece)
        window, done = done, position
    return "".join(pieces), spans
