"""What share of a RAR step the rewards take.

    uv run python benchmarks/rar.py --teacher RUN/model --student RUN/model --data aviary:4 --steps 5

Trains for a few steps in a temporary folder and prints, of the steps after the first, the median share of the reward
and the median seconds, with what a step was made of. The goal is a share of 0.1 at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from fieldmark.methods.rar import RarConfig, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="cold-started generator")
    parser.add_argument("--student", required=True, help="student of photos with texts")
    parser.add_argument("--data", default="aviary:4")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = train(
            RarConfig(
                out=f"{folder}/run",
                data=given.data,
                teacher=given.teacher,
                student=given.student,
                queries_per_step=given.queries,
                max_new_tokens=given.max_new_tokens,
                precision=given.precision,
                max_steps=given.steps,
                eval_items=1,
                patience_invalid=given.steps + 1,
            )
        )
        lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines][1:]
    names = ("reward_share", "seconds", "completions/mean_length", "invalid", "reward")
    print(json.dumps(vars(given) | {name: round(statistics.median(one[name] for one in steps), 4) for name in names}))


if __name__ == "__main__":
    main()
