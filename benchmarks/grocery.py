"""The grocery table of docs/results.md: SAGA and its controls on real shop photos, three seeds.

    uv run python benchmarks/grocery.py --data DIR --teacher TEACHER --out runs/grocery

Grocery protocol (27 teacher, 27 train, 27 test classes; queries from the test session, gallery from the others).
Every run starts from the same tower and sees the same batches; controls: Proxy Anchor and Potential Field, each with
mean and with attention pooling, and the first two also three times as long. Finished runs are kept, a killed table
goes on. Print it with `uv run fieldmark compare runs/grocery/*`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fieldmark.commands.console import quiet_libraries
from fieldmark.methods import metric, saga


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the Grocery Store Dataset")
    parser.add_argument("--teacher", required=True, help="what `fieldmark build-teacher` made of it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of the runs to do")
    parser.add_argument("--loss", default="proxy_anchor", help="metric loss under SAGA")
    parser.add_argument("--lambda_lm", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2, help="of this process; two of one thread each are faster")
    parser.add_argument("--tag", default="", help="name of a variant of the SAGA run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    shared: dict[str, Any] = {
        "data": f"grocery:{arguments.data}",
        "student": arguments.teacher,
        "classes_per_batch": 8,
        "items_per_class": 4,
        "learning_rate": 1e-4,
        "pooler_learning_rate": 1e-3,
    }
    controls = {
        f"{short}-{pooling}{'-long' if longer > 1 else ''}": {
            "loss": loss,
            "pooling": pooling,
            "max_steps": longer * arguments.steps,
        }
        for short, loss in (("pa", "proxy_anchor"), ("pf", "potential_field"))
        for pooling in ("mean", "attention")
        for longer in (1, 3)
        if longer == 1 or pooling == "attention"
    }
    name = f"saga{arguments.tag}"
    for seed in arguments.seeds:
        for run, options in {**controls, name: {}}.items():
            out = arguments.out / f"{run}-{seed}"
            if (arguments.only and run not in arguments.only) or (out / "metrics.json").exists():
                continue
            settings = {**shared, **options, "seed": seed, "out": str(out), "resume": out.exists()}
            if run != name:
                metric.train(metric.MetricConfig(**settings))
                continue
            settings |= {
                "teacher": arguments.teacher,
                "loss": arguments.loss,
                "max_steps": arguments.steps,
                "lambda_lm": arguments.lambda_lm,
                "max_new_tokens": 256,
                "target_pairs": 4,
                "max_micro_batches": 1,
            }
            saga.train(saga.SagaConfig(**settings))


if __name__ == "__main__":
    main()
