"""What each query of a run found: written, read back, compared over seeds and between trainings."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from PIL import Image

from fieldmark import cli
from fieldmark.commands.arguments import parse
from fieldmark.commands.evaluate import EvaluateOptions
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.comparison import group_queries, paired_groups
from fieldmark.evaluation.retrieval import retrieval_per_query
from fieldmark.evaluation.runs import group_runs, read_per_query, write_per_query
from fieldmark.evaluation.uncertainty import bootstrap_interval, paired_test
from helpers_cli import fails
from helpers_tiny import make_tiny_teacher

WHEN = ("before", "after")


@pytest.fixture(autouse=True)
def _quiet_machine():
    """Products this small take longer to share than to compute; commands quieten libraries for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    transformers.utils.logging.set_verbosity_warning()


# -- the file


def search(seed, roles=None):
    """A catalogue of 24 rows, and what its queries found before and after."""
    rng = np.random.default_rng(seed)
    ids, labels = [f"photo-{row}" for row in range(24)], [f"class{row % 5}" for row in range(23)] + ["alone"]
    found = {when: retrieval_per_query(rng.normal(size=(24, 4)), labels, roles=roles, k=2) for when in WHEN}
    return found, ids, labels


@pytest.mark.parametrize("roles", [None, [("query", "gallery", "both")[row % 3] for row in range(24)]])
def test_what_queries_found_is_read_back(tmp_path, roles):
    found, ids, labels = search(0, roles)
    write_per_query(tmp_path, found, ids, labels)
    assert pq.read_table(tmp_path / "per_query.parquet").column_names == [
        *("when", "item_id", "label", "counted", "first_hit", "average_precision", "nearest", "nearest_wrong")
    ]
    read = read_per_query(tmp_path)
    assert [*read] == ["before", "after"]
    for when, one in read.items():
        assert one.item_ids == [ids[row] for row in found[when].query]
        assert one.labels == [labels[row] for row in found[when].query]
        assert one.nearest == [ids[row] for row in found[when].neighbours[:, 0]]
        assert one.nearest_wrong == [ids[row] for row in found[when].nearest_wrong]
        for name in ("counted", "first_hit", "average_precision"):
            assert np.array_equal(getattr(one, name), getattr(found[when], name)), name
        values = found[when].values((1, 3))
        for metric in ("recall@1", "recall@3", "map@r"):
            assert np.array_equal(one.values(metric), values[metric])
    assert not read["before"].counted.all()
    with pytest.raises(FieldmarkError, match="'nmi' is not known per query"):
        read["before"].values("nmi")


def test_a_query_without_neighbour_has_none(tmp_path):
    found = retrieval_per_query(np.eye(3), ["a", "a", "a"], roles=["both", "query", "query"], k=1)
    write_per_query(tmp_path, dict.fromkeys(WHEN, found), ["x", "y", "z"], ["a", "a", "a"])
    read = read_per_query(tmp_path)["after"]
    assert read.nearest == [None, "x", "x"], "the only gallery photo does not find itself"
    assert read.nearest_wrong == [None, None, None]
    assert read.counted.tolist() == [False, True, True]


def test_an_older_run_and_a_broken_file_are_said(tmp_path):
    with pytest.raises(FieldmarkError, match=r"has no per_query.parquet: it is an older run"):
        read_per_query(tmp_path)
    (tmp_path / "per_query.parquet").write_bytes(b"PAR1")
    with pytest.raises(FieldmarkError, match="is broken"):
        read_per_query(tmp_path)
    found, ids, labels = search(0)
    write_per_query(tmp_path, {"before": found["before"]}, ids, labels)
    table = pq.read_table(tmp_path / "per_query.parquet")
    pq.write_table(table.drop_columns(["first_hit"]), tmp_path / "per_query.parquet")
    with pytest.raises(FieldmarkError, match="is broken"):
        read_per_query(tmp_path)


# -- groups of runs


def write_run(folder: Path, seed: int, method: str = "metric", shift: int = 0, queries: bool = True, flip=False) -> str:
    """A run of that seed: random vectors before, vectors closer to their class after."""
    folder.mkdir()
    settings = {
        "data": "d",
        "out": str(folder),
        "pooling": "mean",
        "loss": "proxy_anchor",
        "max_steps": 9,
        "seed": seed,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    ids, labels = [f"photo-{row + shift}" for row in range(40)], [f"class{row % 6}" for row in range(40)]
    rng = np.random.default_rng(10 * seed + len(method))
    before = rng.normal(size=(40, 6))
    after = before + (0.6 if method == "metric" else 1.5) * np.eye(6)[np.arange(40) % 6]
    if flip:
        before, after, ids, labels = before[::-1], after[::-1], ids[::-1], labels[::-1]
    found = {when: retrieval_per_query(rows, labels, k=1) for when, rows in zip(WHEN, (before, after), strict=True)}
    means = {when: one.metrics((1, 4)) | {"nmi": 0.5} for when, one in found.items()}
    text = json.dumps({"method": method, "seed": seed, **means})
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    if queries:
        write_per_query(folder, found, ids, labels)
    return str(folder)


def slow_values(runs, when, metric):
    """item_id -> mean over the runs."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for row in pq.read_table(Path(run) / "per_query.parquet").to_pylist():
            if row["when"] == when and row["counted"]:
                hit = row["average_precision"] if metric == "map@r" else row["first_hit"] <= int(metric[7:])
                values.setdefault(row["item_id"], []).append(float(hit))
    return {item: sum(one) / len(one) for item, one in sorted(values.items())}


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Three seeds of a control, in one of which the photos lie in another order, and two of SAGA."""
    controls = [write_run(tmp_path / f"control{seed}", seed, flip=seed == 1) for seed in range(3)]
    return controls + [write_run(tmp_path / f"saga{seed}", seed, "saga") for seed in range(2)]


def test_compare_gives_intervals_and_paired_tests(capsys, runs):
    assert cli.main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    members = runs[:3], runs[3:]
    for group, of_group in zip(found["groups"], members, strict=True):
        for when in WHEN:
            assert [*group["intervals"][when]] == ["recall@1", "recall@4", "map@r"]
            for metric, (low, high) in group["intervals"][when].items():
                values = list(slow_values(of_group, when, metric).values())
                assert (low, high) == pytest.approx(bootstrap_interval(values))
                assert low < group[when][metric]["mean"] < high
                assert np.mean(values) == pytest.approx(group[when][metric]["mean"]), "mean of queries and of seeds"
    assert found["runs_without_queries"] == []

    sides = [
        ((t["first"]["group"], t["first"]["when"]), (t["second"]["group"], t["second"]["when"]))
        for t in found["paired"]
    ]
    expected = [((0, "after"), (0, "before")), ((1, "after"), (1, "before")), ((0, "after"), (1, "after"))]
    assert sides == [side for side in expected for _ in range(2)]
    for test, (first, second) in zip(found["paired"], sides, strict=True):
        ours, theirs = (slow_values(members[group], when, test["metric"]) for group, when in (first, second))
        assert ours.keys() == theirs.keys()
        reference = paired_test(list(ours.values()), list(theirs.values()))
        assert (test["better"], test["worse"], test["same"]) == (reference.better, reference.worse, reference.same)
        assert test["p_value"] == pytest.approx(reference.p_value)
        assert test["difference"] == pytest.approx(reference.difference)
        assert test["interval"] == pytest.approx(reference.interval)
    assert {test["metric"] for test in found["paired"]} == {"recall@1", "map@r"}


def test_compare_prints_them(capsys, runs):
    assert cli.main(["compare", *runs]) == 0
    text = capsys.readouterr().out
    assert "the 95 % interval over queries" in text
    queries = group_queries(group_runs([Path(run) for run in runs[:3]])[0])
    assert queries is not None
    low, high = queries.intervals()["after"]["recall@1"]
    assert f"{low:.3f} – {high:.3f}" in text
    result = paired_groups([queries])[0].result
    tested = text[text.index("paired sign test") :]
    row = next(line for line in tested.splitlines() if line.startswith("│ metric"))
    cells = [cell.strip() for cell in row.split("│")]
    assert cells[3:6] == [str(result.better), str(result.worse), str(result.same)]
    assert f"{result.difference:+.3f}" in row
    assert "metric proxy_anchor, mean: after" in row
    sides = [line.split("│")[1].strip() for line in tested.splitlines() if "│ against" in line]
    assert sides == ["against before", "against before", "against saga proxy_anchor, mean"]
    assert "No " not in text


def test_an_older_run_is_named_and_the_rest_goes_on(capsys, runs, tmp_path):
    (Path(runs[1]) / "per_query.parquet").unlink()
    assert cli.main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs_without_queries"] == [runs[1]]
    assert found["groups"][0]["intervals"] is None
    assert found["groups"][1]["intervals"]["after"]
    assert [test["first"] for test in found["paired"]] == [{"group": 1, "when": "after"}] * 2
    assert cli.main(["compare", *runs]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("No ")]
    assert line == f"No intervals and no paired test for {runs[1]}, which has no per_query.parquet (older runs)."


def test_runs_of_products_are_compared_by_what_they_have(capsys, tmp_path):
    """A loop of stages has no loss, pooling or number of steps, and is measured on products."""
    found = {"instance_recall@1": 0.25, "instance_ndcg@10": 0.5, "i2t_recall@1": 0.125, "t2i_recall@1": 0.75}
    for seed in (0, 1):
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"data: shop.csv\nseed: {seed}\n", encoding="utf-8")
        after = {name: value + 0.125 * seed for name, value in found.items()}
        metrics = {"method": "afmrl", "seed": seed, "before": found, "after": after}
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert cli.main(["compare", str(tmp_path / "run-0"), str(tmp_path / "run-1")]) == 0
    said = capsys.readouterr()
    printed = " ".join((said.out + said.err).split())
    assert "all stages" in printed
    assert "0.312 ± 0.088" in printed  # 0.25 and 0.375
    assert "None" not in printed


def test_groups_on_other_queries_are_not_paired(capsys, runs, tmp_path):
    other = write_run(tmp_path / "other", 0, "afmrl", shift=1)
    assert cli.main(["compare", *runs[:3], other]) == 0
    text = capsys.readouterr().out
    assert "No paired test against afmrl proxy_anchor, mean, which was measured on other queries." in text
    assert text.count("against before") == 2
    changed = write_run(tmp_path / "changed", 5, shift=1)
    assert "the data changed between them" in fails(capsys, ["compare", *runs[:3], changed])


def test_compare_imports_no_torch(runs):
    code = (
        "import sys; from fieldmark.cli import main; code = main(sys.argv[1:]); "
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, "compare", *runs], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("set()")


# -- a real run


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A table of coloured photos with attributes, and a run on it."""
    root = tmp_path_factory.mktemp("house")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(8):
        colour = rng.integers(0, 256, 3)
        for photo in range(4):
            pixels = colour + rng.integers(-90, 90, 3) + rng.integers(-20, 20, (40, 60, 3))
            name = f"{number}-{photo}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / name)
            marks = {"attr_bill": ("deep", "thin")[number % 2], "attr_size": ("small", "large")[number // 2 % 2]}
            rows.append({"item_id": name, "image": name, "label": f"class{number}", **marks})
    with (root / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    make_tiny_teacher("qwen3_vl", root / "teacher")
    argv = ["train", "metric", "--data", str(root / "table.csv"), "--student", str(root / "teacher")]
    argv += ["--out", str(root / "run"), "--resolution", "64", "--max_steps", "2"]
    assert cli.main([*argv, "--classes_per_batch", "4", "--items_per_class", "2"]) == 0
    return root


def test_a_run_keeps_what_its_queries_found(house):
    metrics = json.loads((house / "run" / "metrics.json").read_text(encoding="utf-8"))
    read = read_per_query(house / "run")
    for when in WHEN:
        one = read[when]
        assert one.item_ids == [f"{number}-{photo}.png" for number in range(4, 8) for photo in range(4)]
        assert one.counted.all()
        for metric in ("recall@1", "recall@8", "map@r"):
            assert one.values(metric).mean() == pytest.approx(metrics[when][metric])
            assert metrics["intervals"][when][metric] == pytest.approx(bootstrap_interval(one.values(metric)))
        label_of = dict(zip(one.item_ids, one.labels, strict=True))
        for item, nearest, wrong, hit in zip(one.item_ids, one.nearest, one.nearest_wrong, one.first_hit, strict=True):
            assert label_of[wrong] != label_of[item]
            assert (nearest == wrong) == (hit != 1)
        assert set(metrics["intervals"][when]) == {
            *(f"recall@{k}" for k in (1, 2, 4, 8)),
            "map@r",
            "r_precision",
            "mrr",
        }


def test_evaluate_gives_intervals_pairs_and_recall_by_attributes(capsys, house):
    argv = ["evaluate", str(house / "run"), "--data", str(house / "table.csv"), "--ks", "1,3"]
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    after = read_per_query(house / "run")["after"]
    assert found["recall@3"] == pytest.approx(after.values("recall@3").mean())
    assert "recall@8" not in found
    assert [*found["intervals"]] == ["recall@1", "recall@3", "map@r", "r_precision", "mrr"]
    assert found["intervals"]["recall@1"] == pytest.approx(bootstrap_interval(after.values("recall@1")))
    missed = [item for item, hit in zip(after.item_ids, after.first_hit, strict=True) if hit != 1]
    assert missed, "too easy to tell anything"
    pairs = found["hardest_class_pairs"]
    assert sum(pair["count"] for pair in pairs) == len(missed)
    nearest = dict(zip(after.item_ids, after.nearest, strict=True))
    for pair in pairs:
        assert pair["queries"] == 8
        assert all(nearest[one["query"]] == one["nearest"] for one in pair["examples"])
        first, second = (int(name.removeprefix("class")) for name in pair["classes"])
        assert {name for name, *_ in pair["differing"]} == {
            name for name, half in (("bill", 1), ("size", 2)) if first // half % 2 != second // half % 2
        }
    by_number = found["recall_by_differing_attributes"]
    assert sum(row["n_queries"] for row in by_number) == 16
    assert sum(row["n_queries"] * row["recall@1"] for row in by_number) == pytest.approx(16 * found["recall@1"])
    assert all(0 <= value <= 1 for pair in found["intervals"].values() for value in pair)

    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    low, high = found["intervals"]["recall@1"]
    assert f"{low:.3f} – {high:.3f}" in text
    assert f"{' / '.join(pairs[0]['classes'])} " in text
    assert f"{pairs[0]['count']} of 8 queries" in text
    differing = next(pair["differing"] for pair in pairs if pair["differing"])
    assert ": ".join([differing[0][0], " / ".join(differing[0][1:])]) in text
    assert "recall@1 by the number of attributes" in text


@pytest.mark.parametrize(("given", "expected"), [(["--ks", "1,10,1000"], [1, 10, 1000]), (["--ks=5"], [5])])
def test_depths_are_a_list(given, expected):
    options = parse(EvaluateOptions, ["m", "--data", "d", *given], prog="p", description="d", positional=("model",))
    assert options.ks == expected


@pytest.mark.parametrize("given", [["--ks", "0"], ["--ks", "one"], ["--ks", "1.5"], ["--ks"], ["--ks", "[]"]])
def test_depths_that_are_none_are_refused(capsys, given):
    assert "--ks was given" in fails(capsys, ["evaluate", "m", "--data", "d", *given])


def test_math_of_the_sign_test_is_symmetric_over_groups(runs):
    groups = group_runs([Path(run) for run in runs])
    queries = [group_queries(group) for group in groups]
    there, back = paired_groups(queries)[-2].result, paired_groups(queries[::-1])[-2].result
    assert (there.better, there.worse, there.p_value) == (back.worse, back.better, back.p_value)
    assert math.isclose(there.difference, -back.difference)
