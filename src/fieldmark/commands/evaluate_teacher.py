"""`fieldmark evaluate --teacher`: what a teacher itself does on the groups that a student is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fieldmark.commands.arguments import check_owned, positive
from fieldmark.commands.console import interval, number, print_table
from fieldmark.commands.labelling import answers_line, say
from fieldmark.errors import FieldmarkError

if TYPE_CHECKING:
    from fieldmark.data.captions import Group
    from fieldmark.evaluation.multimodal import MultimodalEvaluation
    from fieldmark.methods.teacher_groups import TeacherGroups
    from fieldmark.teacher.model import Teacher

SCORES = ("text_score", "image_score", "group_score")
GAPS = ("gap_dist", "gap_disc", "gap_ratio", "matched_gap_dist", "matched_gap_disc", "matched_gap_ratio")
SAMPLED = "sampled_"


@dataclass(kw_only=True)
class TeacherOptions:
    """A teacher to measure beside the student.

    Attributes:
        teacher: folder or hub id of a multimodal LLM: its alignment scores of the groups are measured beside the
            student's cosines.
        teacher_groups: its modality gap is measured on N groups at most, drawn by a fixed seed, and takes 8 N^2
            questions. 0 leaves it out.
        teacher_dtype: its precision.
        teacher_resolution: side in pixels its photos are resized to; null is its usual one.
    """

    teacher: str | None = None
    teacher_groups: int = 50
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    teacher_resolution: int | None = None


def check_teacher(options: TeacherOptions) -> None:
    """Refuses numbers that no measurement could have."""
    if options.teacher_groups < 0 or options.teacher_groups == 1:
        raise FieldmarkError(
            f"--teacher_groups was given {options.teacher_groups}; expected 2 or more, or 0 to leave the gap out."
        )
    if options.teacher_resolution is not None:
        positive("teacher_resolution", options.teacher_resolution)
    check_owned(options, "teacher", ("teacher_groups", "teacher_dtype", "teacher_resolution"))


def open_teacher(options: TeacherOptions, groups: Sequence[Group], data: str) -> Teacher | None:
    """The teacher, which can be asked about the groups; it is not asked yet. None where none was given.

    Raises:
        FieldmarkError: there are no groups, or the teacher cannot be loaded or asked about them.
    """
    if options.teacher is None:
        return None
    if not groups:
        raise FieldmarkError(
            f"--teacher was given, but {data} has no two items with titles that differ in one attribute; give groups "
            "by --groups FILE, or leave it out."
        )
    import torch

    from fieldmark.methods.teacher_groups import check_groups
    from fieldmark.teacher.model import Teacher

    teacher = Teacher.load(options.teacher, dtype=getattr(torch, options.teacher_dtype))
    check_groups(teacher, groups, gap_groups=options.teacher_groups, resolution=options.teacher_resolution)
    return teacher


def ask_teacher(options: TeacherOptions, teacher: Teacher, groups: Sequence[Group]) -> TeacherGroups:
    """Group scores and modality gap of the teacher that `open_teacher` gave."""
    from fieldmark.methods.teacher_groups import measure_teacher

    return measure_teacher(teacher, groups, gap_groups=options.teacher_groups, resolution=options.teacher_resolution)


def sampled_gap(found: TeacherGroups, student: MultimodalEvaluation) -> dict[str, float]:
    """The student's gap on the groups that the teacher's was measured on, as `sampled_gap_...`.

    That of the pairs inside groups alone is called `sampled_matched_gap_...`.
    """
    from fieldmark.evaluation.modality_gap import modality_gap
    from fieldmark.methods.teacher_groups import MATCHED

    if not found.gap_rows or student.group_photos is None or student.group_texts is None:
        return {}
    photos, texts = student.group_photos[found.gap_rows], student.group_texts[found.gap_rows]
    sides = texts[:, 0], texts[:, 1], photos[:, 0], photos[:, 1]
    gap, matched = (modality_gap(*sides, matched_only=only).metrics for only in (False, True))
    both = gap | {f"{MATCHED}{name}": value for name, value in matched.items()}
    return {f"{SAMPLED}{name}": value for name, value in both.items()}


def teacher_as_json(options: TeacherOptions, found: TeacherGroups) -> dict[str, Any]:
    """What `--json` prints of a teacher."""
    return {
        "teacher": options.teacher,
        **{f"teacher_{name}": value for name, value in found.metrics.items()},
        "teacher_intervals": found.intervals,
        "teacher_groups_by_category": found.by_category,
        "teacher_answers": found.answers,
    }


def print_teacher(options: TeacherOptions, found: TeacherGroups, student: Mapping[str, float]) -> None:
    """The teacher's numbers beside the student's, then its scores of each category."""
    count = int(found.metrics["n_groups"])
    rows = [
        (name, number(student.get(name)), number(found.metrics[name]), interval(found.intervals[name]))
        for name in SCORES
    ]
    if found.gap is not None:
        rows += [(name, number(student.get(f"{SAMPLED}{name}")), number(found.metrics[name]), "") for name in GAPS]
    gap = f"; gap on {len(found.gap_rows)} of them" if found.gap is not None else ""
    title = f"teacher {options.teacher} beside the student on {count} groups{gap}"
    print_table(title, ("metric", "student", "teacher", "95 % interval of the teacher's"), rows)
    say(answers_line(found.answers))
    print_categories("groups by category, teacher", found.by_category)


def print_categories(title: str, categories: Mapping[str, Mapping[str, float]]) -> None:
    """Group scores of each category; nothing where there are none."""
    names = (*SCORES, "n_groups")
    rows = [(name, *(number(scores[key], key) for key in names)) for name, scores in categories.items()]
    if rows:
        print_table(title, ("category", *names), rows)
