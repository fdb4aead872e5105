"""RAR's reward: how much of its own product an item finds with a generator's attributes in its query.

Paper: AFMRL, arXiv 2604.20135, section 3.2. The frozen student is the environment of the generator's reinforcement:

    Eq. 4   R(x, a) = |P_x and top_k(x, a)| / |P_x|          P_x: the gallery items of x's product, without x itself
    Eq. 5   R(x, a, phi) = R(x, a) if phi = 1, eta if phi = 0     phi: whether the answer is valid; eta = -0.1

:class:`RecallReward` is a reward function of TRL and needs nothing else of fieldmark's training.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

from fieldmark.data.photos import PhotoRef, load_square
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.inputs import Rows, checked_labels, encode_labels
from fieldmark.evaluation.neighbours import Scores, top_k
from fieldmark.students.enrich import enriched_text
from fieldmark.students.items import encode_items, photo_side
from fieldmark.teacher.attributes import AttributeSchema, ParsedAnswer, parse_attributes

logger = logging.getLogger(__name__)

COLUMNS = ("image", "label", "item_id")


def recall_reward(found: np.ndarray, labels: np.ndarray, gallery_labels: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Eq. 4: the share of each query's positives that are among its nearest gallery items.

    Args:
        found: [Q, k] gallery positions, each at most once a row; -1 for none.
        labels: [Q] integer labels of the queries.
        gallery_labels: [G] integer labels of the gallery.
        own: [Q] the gallery position of each query's own item, which is no positive; -1 where it is not there.

    Returns:
        [Q] float64 from 0 to 1; NaN where a query has no positive.
    """
    hits = (gallery_labels[found] == labels[:, None]) & (found >= 0) & (found != own[:, None])
    ordered = np.sort(gallery_labels)
    positives = np.searchsorted(ordered, labels, "right") - np.searchsorted(ordered, labels, "left")
    positives = positives - ((own >= 0) & (gallery_labels[own] == labels))
    return np.where(positives > 0, hits.sum(axis=1) / np.maximum(positives, 1), np.nan)


class Gallery:
    """The items that queries search: exact, by cosine, each item's own one left out by its name.

    Args:
        embeddings: [G, D] vectors, made by the frozen student once, without attributes.
        labels: G products, integers or strings.
        ids: G names of the items, each its own; None numbers them from 0.

    Raises:
        FieldmarkError: lengths that differ, a name given twice, or vectors that cannot be searched.
    """

    def __init__(self, embeddings: Any, labels: Sequence[int | str], ids: Sequence[int | str] | None = None) -> None:
        self.rows = Rows(embeddings, "gallery")
        names = range(len(self.rows)) if ids is None else checked_labels(len(self.rows), ids, "gallery ids")
        self.positions = {name: position for position, name in enumerate(names)}
        if len(self.positions) < len(self.rows):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise FieldmarkError(f"the gallery id {twice!r} was given twice; expected a name of its own for each item")
        (self.codes,) = encode_labels(checked_labels(len(self.rows), labels, "gallery labels"))
        self.code = dict(zip(labels, self.codes.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def nearest(self, queries: Any, ids: Sequence[int | str | None], k: int) -> np.ndarray:
        """[Q, k] positions of the nearest other items, best first."""
        return top_k(Scores(Rows(queries, "queries"), self.rows, self.own(ids)), k).indices

    def own(self, ids: Sequence[int | str | None]) -> np.ndarray:
        """[Q] position of each item, -1 where it is not in the gallery."""
        return np.array([-1 if one is None else self.positions.get(one, -1) for one in ids], dtype=np.int64)

    def same(self, found: np.ndarray, labels: Sequence[int | str]) -> np.ndarray:
        """[Q, k] bool: which of the items at `found` are of the queries' products."""
        return (self.codes[found] == self._codes(labels)[:, None]) & (found >= 0)

    def recall(self, found: np.ndarray, labels: Sequence[int | str], ids: Sequence[int | str | None]) -> np.ndarray:
        """`recall_reward` of queries whose nearest items are `found`."""
        return recall_reward(found, self._codes(labels), self.codes, self.own(ids))

    def _codes(self, labels: Sequence[int | str]) -> np.ndarray:
        return np.array([self.code.get(label, -1) for label in labels], dtype=np.int64)


class RecallReward:
    """Eq. 5 as a reward function of TRL's `GRPOTrainer`.

    The dataset needs the columns `image` (photos as `students.items.encode_items` takes them), `label` (product) and
    `item_id` (the item's name in the gallery, None for one that is not there), and may have `title`. With a column
    `photo` the student is given those and `image` is the generator's alone.

    Each answer's attributes join the title (`enriched_text`), the frozen student embeds photo and text together, and
    the reward is the share of the product's other gallery items among the k nearest. Equal texts of one item are
    embedded once. An answer that is not valid gets `invalid`. Where the reward of a sample cannot be computed (its
    photo cannot be read, its product has no other item) it is None, which TRL leaves out of the group's mean and trains
    nothing on; such samples are counted (`failed`), and the first reason is logged as a warning.

    Attributes:
        failed: answers whose reward could not be computed, so far.
        seconds: time spent in rewards, so far.
        faults: why answers were not valid, and how often.
        failures: why rewards could not be computed, and how often.

    Args:
        student: an image-text student that takes a photo with a text; it is frozen.
        gallery_embeddings: [G, D], its vectors of the gallery's items, without attributes.
        gallery_labels: G products.
        k: how many nearest items count.
        invalid: eta.
        gallery_ids: G names of the gallery's items; None numbers them from 0.
        max_completion_length: the trainer's; an answer of that many tokens was cut off and is not valid. None trusts
            that every answer ended by itself.
        schema: restricts the attributes, as it did in the prompt.
        batch_size: queries embedded at once.

    Raises:
        FieldmarkError: k is not between 1 and the gallery's size, the student takes no photo with a text or is not the
            gallery's, or as `Gallery`.
    """

    def __init__(
        self,
        student: SentenceTransformer,
        gallery_embeddings: Any,
        gallery_labels: Sequence[int | str],
        k: int = 50,
        invalid: float = -0.1,
        *,
        gallery_ids: Sequence[int | str] | None = None,
        max_completion_length: int | None = None,
        schema: AttributeSchema | None = None,
        batch_size: int = 32,
    ) -> None:
        self.gallery = Gallery(gallery_embeddings, gallery_labels, gallery_ids)
        check_depth(k, len(self.gallery))
        self.student = student.requires_grad_(False).eval()
        # What is wrong with all samples alike must not be taken for a failure of each.
        width = encode_items(student, images=[Image.new("RGB", (32, 32))], texts=["a"]).shape[1]
        if width != self.gallery.rows.dim:
            raise FieldmarkError(
                f"the student's vectors have {width} dimensions and the gallery's {self.gallery.rows.dim}; embed the "
                "gallery with this student"
            )
        self.k, self.invalid, self.schema = k, invalid, schema
        self.max_completion_length, self.batch_size = max_completion_length, batch_size
        self.side = photo_side(student)
        self.failed, self.seconds = 0, 0.0
        self.faults: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """One reward an answer; see the class.

        Raises:
            FieldmarkError: a column is missing.
        """
        started = time.perf_counter()
        missing = [name for name in COLUMNS if name not in columns]
        if missing:
            raise FieldmarkError(
                f"the reward needs the dataset's columns {', '.join(COLUMNS)}, of which {', '.join(missing)} is not "
                "there; add it to the training dataset"
            )
        answers = [_text(completion) for completion in completions]
        parsed = [
            parse_attributes(answer, finished=self._finished(completion_ids, row), schema=self.schema)
            for row, answer in enumerate(answers)
        ]
        valid = [row for row, one in enumerate(parsed) if one.attributes is not None]
        rewards: list[float | None] = [self.invalid] * len(answers)
        for row, reward in zip(valid, self._rewards(valid, parsed, columns), strict=True):
            rewards[row] = reward
        self.faults.update(one.reason for one in parsed if one.reason is not None)
        failed = sum(reward is None for reward in rewards)
        self.failed += failed
        if log_metric := columns.get("log_metric"):
            log_metric("invalid", 1 - len(valid) / len(answers))
            log_metric("failed", failed / len(answers))
            if valid:
                log_metric("think_characters", float(np.mean([len(parsed[row].think or "") for row in valid])))
                log_metric("answer_characters", float(np.mean([len(answer_block(answers[row])) for row in valid])))
        self.seconds += time.perf_counter() - started
        return rewards

    def _finished(self, completion_ids: Any, row: int) -> bool:
        """Whether an answer ended before the cap."""
        if self.max_completion_length is None or completion_ids is None:
            return True
        return len(completion_ids[row]) < self.max_completion_length

    def _rewards(
        self, rows: Sequence[int], parsed: Sequence[ParsedAnswer], columns: dict[str, Any]
    ) -> list[float | None]:
        """Eq. 4 of the valid answers."""
        photos, titles = columns.get("photo", columns["image"]), columns.get("title")
        ids, labels = columns["item_id"], columns["label"]
        texts = {row: enriched_text(titles and titles[row], parsed[row].attributes) for row in rows}
        # An item that has no name is told by its place in the batch.
        keys = {row: (ids[row], row if ids[row] is None else None, texts[row]) for row in rows}
        first = {key: row for row, key in reversed(keys.items())}
        distinct = list(first.values())
        vectors = self._embed([photos[row] for row in distinct], [texts[row] for row in distinct])
        whole = [(row, vector) for row, vector in zip(distinct, vectors, strict=True) if vector is not None]
        recalls: dict[int, float | None] = dict.fromkeys(distinct)
        if whole:
            asked = [row for row, _ in whole]
            own = [ids[row] for row in asked]
            found = self.gallery.nearest(np.stack([vector for _, vector in whole]), own, self.k)
            shares = self.gallery.recall(found, [labels[row] for row in asked], own)
            for row, share in zip(asked, shares.tolist(), strict=True):
                if np.isnan(share):
                    self._fail(f"the gallery holds no other item of {labels[row]!r}, the label of {ids[row]!r}")
                else:
                    recalls[row] = share
        return [recalls[first[keys[row]]] for row in rows]

    def _embed(self, photos: Sequence[PhotoRef], texts: Sequence[str]) -> list[np.ndarray | None]:
        """Vectors of photos with their texts; None for a pair that the student cannot embed."""
        if not photos:
            return []
        try:
            squares = self._squares(photos)
            return list(encode_items(self.student, images=squares, texts=texts, batch_size=self.batch_size))
        except Exception as error:  # whatever one sample makes a decoder, a tokenizer or the device raise
            if len(photos) == 1:
                self._fail(" ".join(str(error).split()) or type(error).__name__)
                return [None]
            alone = [self._embed([photo], [text]) for photo, text in zip(photos, texts, strict=True)]
            return [vector for (vector,) in alone]

    def _squares(self, photos: Sequence[PhotoRef]) -> list[Image.Image]:
        """The photos as the student sees them, each opened once."""
        keys = [id(photo) if isinstance(photo, Image.Image) else photo for photo in photos]
        squares = {key: load_square(photo, self.side) for key, photo in dict(zip(keys, photos, strict=True)).items()}
        return [squares[key] for key in keys]

    def _fail(self, reason: str) -> None:
        """Keeps the reason; the first one is said aloud."""
        if not self.failures:
            logger.warning("the reward of an answer could not be computed, it is left out and counted: %s", reason)
        self.failures[reason] += 1


def check_depth(k: int, items: int, gallery: str = "the gallery") -> None:
    """Refuses a k that a gallery cannot fill.

    Raises:
        FieldmarkError: it is not between 1 and the number of items.
    """
    if not 1 <= k <= items:
        raise FieldmarkError(f"k is {k} and {gallery} holds {items} items; give a k of 1 to {items}, or add items")


def answer_block(answer: str) -> str:
    """What a valid answer says between its answer tags."""
    return answer.partition("<answer>")[2].partition("</answer>")[0].strip()


def _text(completion: Any) -> str:
    """What a completion says: a text, or the last message of a conversation."""
    content = completion if isinstance(completion, str) else completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
