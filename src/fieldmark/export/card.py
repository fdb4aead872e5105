"""`README.md` of an export: a model card. What it says comes from the run and the measurements; nothing is invented."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from fieldmark.evaluation.runs import COMPARED_PRODUCTS, Group
from fieldmark.export.provenance import Provenance
from fieldmark.export.snippets import snippets

LIBRARIES = {"onnx": "onnx", "openvino": "openvino", "sentence-transformers": "sentence-transformers"}
METHODS = {
    "metric": "a metric loss alone, with {loss}",
    "saga": "SAGA ([arXiv 2606.15134](https://arxiv.org/abs/2606.15134)): a metric loss ({loss}), and the judgements "
    "and attention of a frozen multimodal LLM on pairs of photos, {teacher}",
    "maple": "MAPLE ([arXiv 2506.06970](https://arxiv.org/abs/2506.06970)): a contrastive loss and the preferences of "
    "a frozen multimodal LLM among hard candidates, {teacher}",
    "agcl": "AGCL, the embedder of AFMRL ([arXiv 2604.20135](https://arxiv.org/abs/2604.20135)): attributes weight its "
    "negatives",
    "afmrl": "AFMRL ([arXiv 2604.20135](https://arxiv.org/abs/2604.20135)): an embedder and an attribute generator "
    "that improve each other, {teacher}",
}
MEANING = {
    "recall@1": "share of queries whose nearest item is of their class",
    "recall@4": "share of queries with an item of their class among the nearest four",
    "map@r": "mean average precision at R, R being the items of the query's class",
    "nmi": "k-means against the classes, normalised mutual information",
    "i2t_recall@1": "share of photos whose nearest text is their own",
    "t2i_recall@1": "share of texts whose nearest photo is their own",
    "text_score": "share of groups in which each photo prefers its text",
    "image_score": "share of groups in which each text prefers its photo",
    "group_score": "share of groups with both",
    "gap_ratio": "distance of photos and texts as wholes, relative to their spread",
    "instance_recall@1": "share of queries whose nearest item is the same product",
    "enriched_instance_recall@1": "the same, with attributes in the query",
    "instance_ndcg@10": "nDCG of the ten nearest products",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the run and the measurements.

    Attributes:
        name: of the model; the export's folder.
        kind: `onnx`, `openvino` or `sentence-transformers`.
        network: architecture of the tower or model, such as `qwen3_vl_vision`.
        pooling: how tokens become a vector, or None where the network says it itself.
        parameters: number of weights.
        texts: whether it embeds texts.
    """

    name: str
    kind: str
    network: str
    pooling: str | None
    parameters: int
    texts: bool


def write_card(facts: CardFacts, about: Mapping[str, Any], provenance: Provenance) -> str:
    """The card's text.

    Args:
        facts: what is exported.
        about: the content of `export.json`.
        provenance: where it comes from.
    """
    parts = [
        f"---\n{_front_matter(facts, provenance)}\n---",
        f"# {facts.name}\n\n{_summary(facts, about)}",
        f"## Use\n\n{snippets(facts.kind, about)}",
        f"## Training\n\n{_training(provenance)}",
        f"## Results\n\n{_results(provenance)}",
        f"## The export, checked\n\n{_checked(about)}",
        f"## Limits\n\n{_limits(facts, about, provenance)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: CardFacts, provenance: Provenance) -> str:
    group = provenance.group
    tags = ["fieldmark", "image-retrieval", "metric-learning", "embeddings", *([group.method] if group else [])]
    if facts.texts:
        tags.append("image-text-retrieval")
    base, data = provenance.hub_id(provenance.base), provenance.hub_id(provenance.data)
    results = [] if group is None else _eval_results(group, provenance)
    card = ModelCardData(
        library_name=LIBRARIES[facts.kind],
        pipeline_tag="feature-extraction" if facts.texts else "image-feature-extraction",
        tags=tags,
        base_model=base,
        datasets=[data] if data else None,
        metrics=[result.metric_type for result in results] or None,
        model_name=facts.name,
        eval_results=results or None,
    )
    values = {key: value for key, value in card.to_dict().items() if value is not None and key != "model_name"}
    written = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120).rstrip()
    return f"# license: not stated; choose one that the licences of the base model and of the photos allow\n{written}"


def _eval_results(group: Group, provenance: Provenance) -> list[EvalResult]:
    """The metrics after training, means over the seeds."""
    data = provenance.data or ""
    found = []
    for metric in group.compared:
        mean, _ = group.spread("after", metric)
        if mean is not None:
            found.append(
                EvalResult(
                    task_type="image-retrieval",
                    task_name="Retrieval",
                    dataset_type=provenance.hub_id(data) or provenance.shown(data).partition(":")[0],
                    dataset_name=provenance.shown(data),
                    dataset_split="test",
                    metric_type=metric.replace("@", "_at_"),
                    metric_name=metric,
                    metric_value=round(mean, 4),
                )
            )
    return found


def _summary(facts: CardFacts, about: Mapping[str, Any]) -> str:
    what = "photos and texts" if facts.texts else "photos"
    pooling = f", {facts.pooling} pooling" if facts.pooling else ""
    return (
        f"Embeds {what} as {about['embedding']['dim']} numbers of length 1, so that what belongs together lies close: "
        f"search by dot product. `{facts.network}`{pooling}, {facts.parameters / 1e6:.1f} M parameters; a student of "
        "Fieldmark, exported."
    )


def _training(provenance: Provenance) -> str:
    group = provenance.group
    if group is None:
        return (
            "Unknown: the model was exported from a folder without its run. Neither its base model, its data, its "
            "method nor its metrics are known here."
        )
    settings = provenance.settings()
    names = {"loss": str(settings.get("loss", "")).replace("_", " "), "teacher": _teacher(provenance)}
    how = METHODS.get(group.method, f"`{group.method}`").format(**names)
    base, data = provenance.base, provenance.data
    rows = [
        ("Method", how),
        ("Base", _named(provenance, base) if base else "unknown"),
        ("Data", f"{_named(provenance, data)}, its train split" if data else "unknown"),
        ("Length", group.steps),
        (
            "Seed",
            ", ".join(str(run.seed) for run in group.runs) + " (the first is this model's)" * (len(group.runs) > 1),
        ),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    written = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120).rstrip()
    return (
        f"| | |\n| --- | --- |\n{table}\n\n<details><summary>All settings</summary>\n\n```yaml\n{written}\n```\n\n"
        "</details>"
    )


def _teacher(provenance: Provenance) -> str:
    assert provenance.group is not None
    name = provenance.group.settings.get("teacher")
    return f"asked of {_named(provenance, name)}" if name else "see the settings"


def _named(provenance: Provenance, name: str | None) -> str:
    """A model or catalogue in words: a link where it lies on the hub, else a name and what is known of it."""
    assert name is not None
    known, shown = provenance.hub_id(name), f"`{provenance.shown(name)}`"
    if known:
        return f"[{known}](https://huggingface.co/{known})"
    if name.partition(":")[0] == "aviary":
        return f"{shown} (birds drawn by Fieldmark)"
    if name.endswith("fieldmark/teacher/embedded"):
        return "the small multimodal LLM that ships with Fieldmark"
    return f"{shown} (not on the hub)"


def _results(provenance: Provenance) -> str:
    group = provenance.group
    if group is None:
        return "Unknown; measure it on photos of your own: `fieldmark evaluate MODEL --data photos`."
    seeds = len(group.runs)
    rows = []
    for metric in group.compared:
        before, after = (_mean(group.spread(when, metric)) for when in ("before", "after"))
        bounds = provenance.intervals.get("after", {}).get(metric)
        interval = f"{bounds[0]:.3f} – {bounds[1]:.3f}" if bounds else ""
        if after:
            rows.append(f"| {metric} | {before} | {after} | {interval} | {MEANING[metric]} |")
    counts = group.runs[0].after
    sizes = [
        f"{int(counts[name]):,} {what}" for name, what in (
            ("n_queries", "queries"), ("n_gallery", "in the gallery"), ("n_images", "photos"), ("n_texts", "texts"),
        ) if name in counts
    ]  # fmt: skip
    spread = (
        f"Mean ± sample standard deviation over {seeds} seeds; the interval is that of this model alone."
        if seeds > 1
        else "One seed: how much another one would differ is not known (`fieldmark export --runs` states it)."
    )
    measured = "products" if group.compared == COMPARED_PRODUCTS else "test split"
    head = "| metric | before training | after | 95 % over queries | |\n| --- | --- | --- | --- | --- |\n"
    where = f"Measured on the {measured} of the data above" + (f" ({', '.join(sizes)})" if sizes else "")
    return f"{where}, by exact search. {spread}\n\n{head}" + "\n".join(rows)


def _mean(found: tuple[float | None, float | None]) -> str:
    mean, std = found
    if mean is None:
        return ""
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"


def _checked(about: Mapping[str, Any]) -> str:
    check = about["check"]
    lines = [
        f"Largest difference of a number of the embedding from the PyTorch student ({check['precision']}), by "
        f"{check['runtime']}: {check['photos']['largest_difference']:.1e} on {check['photos']['count']} photos of "
        f"`{check['photos']['source']}`"
    ]
    if "texts" in check:
        lines[0] += f", {check['texts']['largest_difference']:.1e} on {check['texts']['count']} texts"
    lines[0] += f" (allowed: {check['tolerance']:g})."
    if "whole_photos" in check:
        whole = check["whole_photos"]
        found = (
            f"differs by up to {whole['largest_difference']:.1e} on the {whole['count']} of them that have another size"
            if whole["count"]
            else "how much that changes was not measured, since all of them have that size already"
        )
        lines.append(
            "For this the photos were resized to the student's square by Pillow, as Fieldmark does. The folder resizes "
            f"photos by its own processor; {found}."
        )
    variants = about.get("variants")
    if variants:
        rows = "\n".join(
            f"| {one['name']} | {one['dim']} | {one['recall@1']:.4f} | {one['interval'][0]:.3f} – "
            f"{one['interval'][1]:.3f} | {one['loss_points']:.2f} |"
            for one in variants["measured"]
        )
        lines.append(
            f"Recall@1 of {variants['queries']:,} queries on the test photos of `{variants['source']}`, exact; shorter "
            "vectors are the first numbers, normalised again. Loss in percentage points.\n\n"
            f"| weights | numbers | Recall@1 | 95 % over queries | loss |\n| --- | --- | --- | --- | --- |\n{rows}"
        )
    int8 = about.get("int8")
    if int8:
        lines.append(
            f"`{int8['file']}` ({int8['method']} quantisation): {int8['megabytes']:.1f} MB against "
            f"{int8['megabytes_float32']:.1f}; {int8['milliseconds_per_photo']:.2f} ms a photo against "
            f"{int8['milliseconds_per_photo_float32']:.2f} (threads: {int8['threads']}, batches of "
            f"{int8['batch_size']}, without decoding), on the machine that exported it."
        )
    return "\n\n".join(lines)


def _limits(facts: CardFacts, about: Mapping[str, Any], provenance: Provenance) -> str:
    side = about["preprocessing"]["width"]
    lines = [
        f"A photo is seen as a whole, squeezed to {side} x {side} pixels: small details of large photos are lost.",
        "It orders items by likeness; a distance is no probability, and the nearest item may be wrong. Set a threshold "
        "on your own photos.",
    ]
    if provenance.group is None:
        lines.append("Neither what it was trained on nor how well it does is known; measure it before you rely on it.")
    else:
        lines.append(
            "The results hold for photos like those it was measured on; other subjects, cameras and countries were not "
            "measured, nor was bias."
        )
    if facts.texts:
        lines.append("Texts of other languages or kinds than those of the training data were not measured.")
    return "\n".join(f"- {line}" for line in lines)
