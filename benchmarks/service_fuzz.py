"""Thousands of right, wrong and hostile requests to the search service: no 5xx, errors in their form, bounded memory.

    uv run python benchmarks/service_fuzz.py --cases 10000
    uv run --with schemathesis python benchmarks/service_fuzz.py --cases 10000 --schemathesis

The requests are made from the service's own /openapi.json by `tests/helpers_fuzz.py`, of which the tests send some
hundred; the service runs over a store of 24 items and an untrained student. With `--schemathesis` the same service is
also given that many cases of Schemathesis, which checks each answer against the description.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fieldmark.commands.console import quiet_libraries
from fieldmark.search.service import create_app
from helpers_fuzz import Fuzz, operations
from helpers_service import Shop, served

CLIENTS = 8
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "unsupported_method",
)  # fmt: skip


def send(client: httpx2.Client, request: tuple[str, str, dict[str, Any]]) -> tuple[int, str | None]:
    """The status of an answer, and what is wrong with it."""
    method, path, given = request
    answer = client.request(method, path, **given)
    if answer.status_code >= 500:
        return answer.status_code, f"{method} {path} {str(given)[:300]}: {answer.text[:300]}"
    if answer.status_code != 200 and set(answer.json()["error"]) != {"message", "type"}:
        return answer.status_code, f"{method} {path}: {answer.text[:300]}"
    return answer.status_code, None


def fuzz(base: str, cases: int, seed: int) -> dict[str, Any]:
    """Sends the requests, some at a time."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with httpx2.Client(base_url=base, timeout=120) as client, ThreadPoolExecutor(CLIENTS) as pool:
        made = Fuzz(client.get("/openapi.json").json(), seed)
        found = list(pool.map(lambda request: send(client, request), [made.request() for _ in range(cases)]))
        alive = client.get("/healthz").status_code == 200
    return {
        "cases": cases,
        "statuses": dict(sorted(Counter(status for status, _ in found).items())),
        "wrong": [wrong for _, wrong in found if wrong],
        "alive": alive,
        "memory_growth_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024, 1),
    }


def schemathesis(base: str, cases: int, seed: int, folder: str) -> int:
    """Runs Schemathesis; its exit code is 0 where it found nothing."""
    program = shutil.which("schemathesis")
    if program is None:
        raise SystemExit("schemathesis is not installed; run this by `uv run --with schemathesis python ...`")
    count = len(operations(httpx2.get(f"{base}/openapi.json").json())) / 2  # half of them take too little to vary
    command = [program, "run", f"{base}/openapi.json", "--checks", ",".join(CHECKS), "--seed", str(seed)]
    limits = [
        "--max-examples",
        str(math.ceil(cases / count)),
        "--phases",
        "examples,coverage,fuzzing",
        "--continue-on-failure",
    ]
    limits += ["--workers", "1", "--request-timeout", "60"]  # in threads its parser met a SystemError of Python 3.11
    return subprocess.run([*command, *limits], cwd=folder, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=["photos", "texts"], default=["photos", "texts"])
    parser.add_argument("--schemathesis", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    failed = False
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            shop = Shop(Path(folder), kind)
            with served(create_app(shop.store, shop.student)) as base:
                result = fuzz(base, options.cases, options.seed)
                print(json.dumps({"student": kind, **result}, indent=2), flush=True)
                failed |= bool(result["wrong"]) or not result["alive"]
                if options.schemathesis:
                    failed |= schemathesis(base, options.cases, options.seed, folder) != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
