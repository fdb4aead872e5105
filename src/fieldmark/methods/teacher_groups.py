"""What a teacher itself does on groups of two photos and two captions: group scores and modality gap.

MAPLE (arXiv 2506.06970, Table 6) compares its students' gap with that of the multimodal LLM they learn from: what the
cosine is for a student, the alignment score is for a teacher (`teacher.align`, and `teacher.inside` for two texts and
two photos). The gap is measured on some of the groups, for it takes 8 N^2 questions; for the same reason the paper
takes 100 of Winoground's 400.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fieldmark.data.captions import Group
from fieldmark.data.photos import open_photo
from fieldmark.evaluation.groups import group_hits, group_scores, group_scores_by_category
from fieldmark.evaluation.modality_gap import ModalityGap, gap_of_scores
from fieldmark.evaluation.uncertainty import bootstrap_intervals
from fieldmark.progress import JobProgress
from fieldmark.teacher.align import Aligner
from fieldmark.teacher.inside import photo_scores, text_questions, text_scores
from fieldmark.teacher.labels import alignment_cache, check_texts, label_alignment
from fieldmark.teacher.model import Teacher, VisualTokens

logger = logging.getLogger(__name__)

MATCHED = "matched_"
_PHOTOS_AT_ONCE, _TEXTS_AT_ONCE = 16, 64


@dataclass(frozen=True)
class TeacherGroups:
    """What a teacher does on groups.

    Attributes:
        scores: [G, 2, 2] alignment scores (0..1) of photo i and caption t at [g, i, t].
        metrics: `text_score`, `image_score`, `group_score`, `n_groups`; with a gap `gap_dist`, `gap_disc`, `gap_ratio`,
            those of the pairs inside groups alone as `matched_gap_...`, `n_gap_groups`.
        intervals: 95 % bootstrap interval over groups of each group score.
        by_category: group scores of each category.
        answers: the words that its chats go on with, and their token ids.
        gap: distributions behind the modality gap; None where it was left out.
        gap_rows: the groups it was measured on.
    """

    scores: np.ndarray
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    by_category: dict[str, dict[str, float]]
    answers: dict[str, int]
    gap: ModalityGap | None = None
    gap_rows: list[int] = field(default_factory=list)


def measure_teacher(
    teacher: Teacher,
    groups: Sequence[Group],
    *,
    gap_groups: int,
    resolution: int | None = None,
    seed: int = 0,
) -> TeacherGroups:
    """Group scores of a teacher, ties wrong as for students, and its modality gap; with progress bars.

    Args:
        teacher: the frozen teacher; it is where it was when this returns.
        groups: one or more.
        gap_groups: N groups at most that the gap is measured on, 8 N^2 questions; below 2 leaves it out.
        resolution: side in pixels the photos are resized to, None for the teacher's usual one.
        seed: chooses these groups.

    Raises:
        FieldmarkError: a photo cannot be read, the teacher cannot be asked about a caption, or a score is no number.
    """
    rows = gap_rows(len(groups), gap_groups, seed)
    if len(groups) < 2 <= gap_groups:
        logger.warning("the teacher's modality gap is left out: one group alone has no other to be compared with")
    chosen = [groups[row] for row in rows]
    answers, questions = check_groups(teacher, groups, gap_groups=gap_groups, resolution=resolution, seed=seed)
    with on_accelerator(teacher):
        with tempfile.TemporaryDirectory() as folder:
            scores = score_groups(teacher, groups, Path(folder) / "alignment.parquet", resolution)
        tables = _tables(teacher, chosen, questions, resolution) if chosen else None
    metrics, gap = group_scores(scores), None
    if tables is not None:
        gap = gap_of_scores(tables)
        matched = gap_of_scores(tables, matched_only=True).metrics
        metrics |= gap.metrics | {f"{MATCHED}{name}": value for name, value in matched.items()}
        metrics["n_gap_groups"] = len(rows)
    categories = group_scores_by_category(scores, [group.category for group in groups])
    return TeacherGroups(scores, metrics, bootstrap_intervals(group_hits(scores)), categories, answers, gap, rows)


def check_groups(
    teacher: Teacher, groups: Sequence[Group], *, gap_groups: int, resolution: int | None = None, seed: int = 0
) -> tuple[dict[str, int], list[list[int]]]:
    """Refuses, before hours of work, captions that the teacher cannot be asked about, alone or two of them together.

    Arguments are those of `measure_teacher`.

    Returns:
        The teacher's answers (`Aligner.answers`), and the gap's questions about two captions each.

    Raises:
        FieldmarkError: the first photo cannot be read, or the teacher cannot be asked about a caption.
    """
    captions = [text for group in groups for text in group.captions]
    answers = check_texts(teacher, groups[0].image_0, captions, resolution=resolution)
    chosen = [groups[row] for row in gap_rows(len(groups), gap_groups, seed)]
    return answers, _text_questions(teacher, chosen) if chosen else []


def gap_rows(groups: int, count: int, seed: int = 0) -> list[int]:
    """The groups that a gap is measured on: `count` of them drawn by seed, all where there are fewer, ascending.

    None where one or none is left: it would have no other to be compared with.
    """
    rows = np.random.default_rng(seed).permutation(groups)[: max(count, 0)]
    return sorted(rows.tolist()) if len(rows) > 1 else []


def score_groups(teacher: Teacher, groups: Sequence[Group], path: Path, resolution: int | None) -> np.ndarray:
    """[G, 2, 2] the teacher's score of photo i with caption t of each group, asked for once a file."""
    photos = [photo for group in groups for photo in group.images]
    texts = [list(group.captions) for group in groups for _ in (0, 1)]
    if not photos:
        return np.zeros((0, 2, 2))
    with (
        JobProgress("alignment of test groups", len(photos)) as job,
        alignment_cache(path, teacher, resolution) as cache,
    ):
        scores = label_alignment(teacher, photos, texts, cache, resolution=resolution, progress=job.update)
    return np.array(scores, dtype=np.float64).reshape(-1, 2, 2)


@contextmanager
def on_accelerator(teacher: Teacher) -> Iterator[None]:
    """The teacher on the accelerator, where there is one, and back where it was."""
    before = teacher.device
    teacher.model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    try:
        yield
    finally:
        teacher.model.to(before)  # type: ignore[arg-type]


def _text_questions(teacher: Teacher, groups: Sequence[Group]) -> list[list[int]]:
    """Questions about captions 0 with one another, row by row, then about captions 1."""
    sets = [[group.captions[side] for group in groups] for side in (0, 1)]
    return text_questions(teacher, ((one, other) for texts in sets for one in texts for other in texts))


@torch.no_grad()
def _tables(
    teacher: Teacher, groups: Sequence[Group], questions: Sequence[Sequence[int]], resolution: int | None
) -> dict[str, np.ndarray]:
    """[N, N] alignment scores by name, for `gap_of_scores`. The tokens of all 2N photos are kept meanwhile."""
    count = len(groups)
    texts = [group.captions[side] for side in (0, 1) for group in groups]
    photos = [group.images[side] for side in (0, 1) for group in groups]
    with JobProgress("alignment of all pairs", 8 * count**2) as job:
        visual = _visual(teacher, photos, resolution)
        aligner = Aligner(teacher, visual.tokens.shape[1])
        across, done = np.empty((2 * count, 2 * count)), 0
        order = sorted(range(2 * count), key=lambda text: len(texts[text]))
        for photo in range(2 * count):
            for start in range(0, len(order), _TEXTS_AT_ONCE):
                chunk = order[start : start + _TEXTS_AT_ONCE]
                asked = aligner.scores(visual[photo : photo + 1], [[texts[text] for text in chunk]])
                across[chunk, photo] = asked[0].cpu().numpy()
                done += len(chunk)
                job.update(done)
        between = text_scores(aligner, questions, progress=lambda n: job.update(done + n))
        done += len(questions)
        pairs = [(side + one, side + other) for side in (0, count) for one in range(count) for other in range(count)]
        alike = photo_scores(aligner, visual, pairs, progress=lambda n: job.update(done + n))
    tables = {
        f"T{a}I{b}": across[a * count : (a + 1) * count, b * count : (b + 1) * count] for a in (0, 1) for b in (0, 1)
    }
    for kind, scores in (("T", between), ("I", alike)):
        sides = scores.double().numpy().reshape(2, count, count)
        tables |= {f"{kind}{side}{kind}{side}": sides[side] for side in (0, 1)}
    return tables


def _visual(teacher: Teacher, photos: Sequence[str], resolution: int | None) -> VisualTokens:
    """Tokens of all photos."""
    parts = [
        teacher.visual_tokens([open_photo(photo) for photo in photos[start : start + _PHOTOS_AT_ONCE]], resolution)
        for start in range(0, len(photos), _PHOTOS_AT_ONCE)
    ]
    features = zip(*(part.deepstack for part in parts), strict=True)
    return VisualTokens(torch.cat([part.tokens for part in parts]), tuple(map(torch.cat, map(list, features))))
