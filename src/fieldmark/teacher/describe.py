"""Comparative captions: a frozen multimodal LLM writes of two look-alike photos what tells them apart.

Paper: MAPLE, arXiv 2506.06970, section 3.1 and figure 4: two brief captions that stress the visual differences of two
images, as JSON {"Image 1": ..., "Image 2": ...}; temperature 0.7, three generations a pair, pairs among an anchor and
its hard negatives. The wording of the prompt is ours.

A teacher that compares attribute by attribute (SAGA's question, `compare`) but writes no captions can serve too: two of
the attributes in which its answer says that the photos differ become the captions (`comparison_form`). The paper has
no such form.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from fieldmark.data.photos import PhotoRef, open_photo
from fieldmark.errors import FieldmarkError
from fieldmark.teacher.cache import AnswerCache, answer_key, photo_hash, read_answers, teacher_fingerprint
from fieldmark.teacher.compare import Domain, compare_prompt, parse_verdict
from fieldmark.teacher.model import Teacher
from fieldmark.teacher.prefix import rollout

logger = logging.getLogger(__name__)

CAPTION_PROMPT = (
    "Look at both images and find the key visual differences between them. Write one brief caption for each image that "
    'stresses these differences. Answer with JSON only: {"Image 1": "caption of the first image", '
    '"Image 2": "caption of the second image"}'
)
CAPTION_KEYS = ("Image 1", "Image 2")
MAX_CAPTION_CHARACTERS = 400
MOST_NAMED = 2  # attributes in a caption that is made of a comparison
_KINDS = {"colour", "color", "shape"}  # "red crown" says what "red crown colour" does
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("photo_1", "photo_2", "caption_1", "caption_2", "answer")]
    + [("generation", pa.int32())]
)


@dataclass(frozen=True)
class Form:
    """How captions are asked for.

    Attributes:
        prompt: the question behind the two photos.
        read: the captions of an answer and its key in the cache; None where it has none.
    """

    prompt: str
    read: Callable[[str, str], tuple[str, str] | None]


@dataclass(frozen=True)
class Captions:
    """Captions of each photo, and how many answers were none.

    Attributes:
        of: for each photo its captions, in the order of pairs and generations, each once.
        answers: answers in all.
        failed: answers without two captions; each is in the cache with its text.
    """

    of: list[list[str]]
    answers: int
    failed: int


def parse_captions(answer: str) -> tuple[str, str] | None:
    """The two captions of an answer; None where it is not one JSON object of two texts (prose around it is allowed)."""
    start, stop = answer.find("{"), answer.rfind("}")
    if start < 0 or stop < start:
        return None
    try:
        found = json.loads(answer[start : stop + 1])
    except (ValueError, RecursionError):
        return None
    captions = [found.get(key) for key in CAPTION_KEYS] if isinstance(found, dict) else []
    cleaned = [" ".join(text.split()) for text in captions if isinstance(text, str)]
    if len(cleaned) != 2 or not all(0 < len(text) <= MAX_CAPTION_CHARACTERS for text in cleaned):
        return None
    return cleaned[0], cleaned[1]


PAPER_FORM = Form(CAPTION_PROMPT, lambda answer, key: parse_captions(answer))


def comparison_form(domain: Domain) -> Form:
    """Captions of answers to SAGA's question in the words of `domain`.

    Raises:
        FieldmarkError: the domain names no attributes to be compared.
    """
    if not domain.attributes:
        raise FieldmarkError(
            f"the domain {domain.name!r} names no attributes; captions need some in which photos differ"
        )
    return Form(compare_prompt(domain), partial(compared_captions, domain))


def compared_captions(domain: Domain, answer: str, key: str) -> tuple[str, str] | None:
    """One or two of the attributes that an answer gives both photos and that differ, in words: `red crown`.

    Which ones, if there are more, depends on `key` alone. None where the answer is not valid or names no difference;
    whether its verdict is "the same kind" does not matter.
    """
    fields = parse_verdict(answer, domain).fields or {}
    one, other = (_stated(fields.get(item)) for item in domain.item_keys)
    shared = [name for name in domain.attributes if name in one and name in other]
    differing = [name for name in shared if one[name].casefold() != other[name].casefold()]
    if not differing:
        return None
    rng = np.random.default_rng(int(key[:12], 16))
    chosen = sorted(rng.permutation(len(differing))[: int(rng.integers(1, MOST_NAMED + 1))].tolist())
    first, second = (", ".join(_phrase(differing[i], each[differing[i]]) for i in chosen) for each in (one, other))
    return (first, second) if max(len(first), len(second)) <= MAX_CAPTION_CHARACTERS else None


def _stated(description: object) -> dict[str, str]:
    """The attributes of one photo that an answer puts into words, in one line each."""
    items = description.items() if isinstance(description, dict) else ()
    texts = {name: " ".join(value.split()) for name, value in items if isinstance(value, str)}
    return {name: text for name, text in texts.items() if text.casefold() not in ("", "unknown")}


def _phrase(name: str, value: str) -> str:
    """An attribute in words: `red crown` of crown_colour, `no wing bars` of wing_bars, `number of doors: 2`."""
    words = name.partition("(")[0].replace("_", " ").split()
    if len(words) > 2:
        return f"{' '.join(words)}: {value}"
    if value.casefold() in ("none", "no"):
        return " ".join(["no", *words])
    if len(words) > 1 and words[-1].casefold() in _KINDS:
        words = words[:-1]
    return " ".join([value, *words])


def candidate_pairs(anchor: int, negatives: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs among an anchor and its hard negatives: six for three negatives (MAPLE, section 3.1)."""
    return list(itertools.combinations((anchor, *negatives), 2))


def caption_cache(
    path: Path, teacher: Teacher, *, temperature: float, max_new_tokens: int, seed: int, form: Form = PAPER_FORM
) -> AnswerCache:
    """The cache of a teacher's comparative captions; see :class:`AnswerCache` for what is refused."""
    made_by = {
        "answers": "captions",
        "teacher": teacher_fingerprint(teacher),
        "precision": str(teacher.dtype).removeprefix("torch."),
        "prompt": form.prompt,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    return AnswerCache(path, SCHEMA, made_by)


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions that `fieldmark label captions` wrote, by `photo_hash`, in the file's order, each once.

    Photos of which no answer could be used are not in it.

    Raises:
        FieldmarkError: the file cannot be read, is unfinished, or holds something else.
    """
    of: dict[str, dict[str, None]] = {}
    for row in read_answers(path, "captions"):
        if row["caption_1"] is not None:
            of.setdefault(row["photo_1"], {})[row["caption_1"]] = None
            of.setdefault(row["photo_2"], {})[row["caption_2"]] = None
    return {photo: list(texts) for photo, texts in of.items()}


def label_captions(
    teacher: Teacher,
    photos: Sequence[PhotoRef],
    pairs: Sequence[tuple[int, int]],
    cache: AnswerCache,
    *,
    generations: int = 3,
    batch_size: int = 4,
    form: Form = PAPER_FORM,
    progress: Callable[[int], None] = lambda done: None,
) -> Captions:
    """Captions of photos by the pairs they stand in; what the cache knows is not asked again.

    Args:
        teacher: the frozen teacher; its own tower sees the photos.
        photos: P photos.
        pairs: indices of two photos each; a pair given twice is asked once.
        cache: of `caption_cache`, opened by the caller's `with`; its settings are used.
        generations: answers a pair.
        batch_size: pairs asked about at once.
        form: how captions are asked for; that of the cache.
        progress: called with the number of pairs done.

    Raises:
        FieldmarkError: a photo cannot be read, no pair, or not one valid answer in all.
    """
    if not pairs or generations < 1:
        raise FieldmarkError(f"{len(pairs)} pairs and {generations} generations were given; expected 1 or more of each")
    hashes = [photo_hash(ref) for ref in photos]
    distinct = list(dict.fromkeys(pairs))
    keys = {pair: [answer_key(*(hashes[i] for i in pair), str(g)) for g in range(generations)] for pair in distinct}
    waiting = [pair for pair in distinct if any(key not in cache for key in keys[pair])]
    done = len(distinct) - len(waiting)
    progress(done)
    settings = cache.made_by
    for start in range(0, len(waiting), batch_size):
        chunk = waiting[start : start + batch_size]
        visual = teacher.visual_tokens([open_photo(photos[i]) for pair in chunk for i in pair])
        rolled = rollout(
            teacher,
            teacher.prompt(form.prompt, 2, visual.tokens.shape[1]),
            visual,
            group_size=generations,
            temperature=settings["temperature"],
            top_p=1.0,
            max_new_tokens=settings["max_new_tokens"],
            # Of its photos and the seed alone, so that an answer does not depend on when it was asked for.
            generator=[torch.Generator().manual_seed(int(keys[pair][0][:12], 16) + settings["seed"]) for pair in chunk],
        )
        for pair, answers in zip(chunk, rolled.texts, strict=True):
            cache.add(row for row in _rows(hashes, pair, keys[pair], answers, form) if row["key"] not in cache)
        done += len(chunk)
        progress(done)
    return _gather(len(photos), distinct, keys, cache)


def _rows(
    hashes: Sequence[str], pair: tuple[int, int], keys: Sequence[str], answers: Sequence[str], form: Form
) -> list[dict]:
    rows = []
    for generation, (key, answer) in enumerate(zip(keys, answers, strict=True)):
        first, second = form.read(answer, key) or (None, None)
        photos = {"photo_1": hashes[pair[0]], "photo_2": hashes[pair[1]]}
        captions = {"caption_1": first, "caption_2": second}
        rows.append({"key": key, **photos, **captions, "answer": answer, "generation": generation})
    return rows


def _gather(
    photos: int, pairs: Sequence[tuple[int, int]], keys: dict[tuple[int, int], list[str]], cache: AnswerCache
) -> Captions:
    of: list[dict[str, None]] = [{} for _ in range(photos)]
    answers = failed = 0
    for pair in pairs:
        for key in keys[pair]:
            row = cache[key]
            answers += 1
            if row["caption_1"] is None:
                failed += 1
                continue
            of[pair[0]][row["caption_1"]] = None
            of[pair[1]][row["caption_2"]] = None
    if failed == answers:
        example = cache[keys[pairs[0]][0]]["answer"]
        raise FieldmarkError(
            f"none of the teacher's {answers} answers holds two captions (the first: {example[:60]!r}); "
            "use the catalogue's titles, or another teacher"
        )
    if failed:
        logger.warning("%d of %d answers hold no two captions; they are listed in %s", failed, answers, cache.path)
    return Captions([list(texts) for texts in of], answers, failed)
