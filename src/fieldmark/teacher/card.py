"""The card of a teacher that `build-teacher` made: how it was made, and how it did."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fieldmark.teacher.compare import Domain
from fieldmark.teacher.model import Teacher


def write_card(
    out: Path,
    config: Any,
    skills: Sequence[str],
    domain: Domain,
    teacher: Teacher,
    results: Mapping[str, Any],
    *,
    minutes: float,
    known: Collection[str] = (),
) -> None:
    """Writes `README.md` and `card.json`.

    Args:
        out: the teacher's folder.
        config: settings of the build.
        skills: what it learned.
        domain: wording of its comparison.
        teacher: the teacher.
        results: examinations: `test` and `train` of the verdicts, `titles` of the alignment scores.
        minutes: time the build took.
        known: the student's splits whose classes the teacher has seen.
    """
    settings = {key: value for key, value in asdict(config).items() if key not in ("out", "resume")}
    parameters = sum(p.numel() for p in teacher.model.parameters())
    names = {"test": "unseen_test_classes", "train": "student_training_pairs", "titles": "test_titles"}
    card = {
        "settings": settings,
        "skills": list(skills),
        "domain": domain.name,
        "model_type": teacher.model_type,
        "parameters": parameters,
        "minutes": round(minutes, 1),
        **{names[part]: result.as_dict() for part, result in results.items()},
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    tower = f"{config.tower_steps} steps" if config.tower is None else f"`{config.tower}` as it is, a projector fitted"
    if config.start is not None:
        tower = "as in the teacher it started from, whose language model learned on"
    classes, examined = "classes that no student trains on or is tested on", "classes it has never seen"
    if known:
        classes = "its train rows, which a student trains on too"
        seen = " and ".join(split for split in ("train", "test") if split in known)
        examined = f"the student's classes (those of its {seen} rows it has seen while it was made)"
    parts = [
        f"""# A small teacher, built by `fieldmark build-teacher`

{parameters / 1e6:.1f} M parameters, {teacher.model_type}, made from the teacher part of
`{Path(config.data.split(":")[0]).name}` ({classes}); tower:
{tower}, language: {config.language_steps} steps. It answers {_questions(skills, domain)},
and knows nothing else.
"""
    ]
    if "test" in results:
        verdicts, training = results["test"].as_dict(), results["train"].as_dict()
        rows = "\n".join(f"| {_words(name)} | {value} | {training[name]} |" for name, value in verdicts.items())
        parts.append(
            f"""Verdicts, on {examined}: {config.exam_pairs} balanced pairs, 8 rollouts each at temperature 0.7,
top-p 0.95. *Look-alikes*: test classes, the different half are the nearest classes by attributes. *Training pairs*: the
student's training classes, different ones drawn at random, as SAGA draws them.

| | look-alikes | training pairs |
| --- | --- | --- |
{rows}
"""
        )
    if "titles" in results:
        rows = "\n".join(f"| {_words(name)} | {value} |" for name, value in results["titles"].as_dict().items())
        parts.append(
            f"""Alignment scores of titles, on the test part: an item's own title against itself with one value
exchanged, and against the title of an item with other attributes.

| | |
| --- | --- |
{rows}
"""
        )
    (out / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _questions(skills: Sequence[str], domain: Domain) -> str:
    asked = {
        "compare": f"one question about two photos, in the wording of the domain `{domain.name}`",
        "align": "one about a photo and a text (does it fit?)",
    }
    return " and ".join(asked[skill] for skill in skills)


def _words(name: str) -> str:
    return name.replace("_", " ")
