"""What this machine is, what can run on it, and what is set up wrong."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

GIB = 1024**3
QUICKSTART_GIB = 6.0
SHARED_MEMORY_GIB = 0.25
CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
# Hub id and parameters in billions, tower included, as their model cards state them.
PUBLISHED_TEACHERS = (
    ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", 2.2),
    ("Qwen/Qwen3-VL-2B-Instruct", 2.1),
    ("Qwen/Qwen2.5-VL-3B-Instruct", 3.8),
    ("Qwen/Qwen3-VL-4B-Instruct", 4.4),
    ("Qwen/Qwen2.5-VL-7B-Instruct", 8.3),
    ("OpenGVLab/InternVL3_5-8B-HF", 8.5),
    ("Qwen/Qwen3-VL-8B-Instruct", 8.8),
    ("Qwen/Qwen3-VL-32B-Instruct", 33.4),
)
SHOWN_PACKAGES = (
    "fieldmark", "torch", "torchvision", "transformers", "sentence-transformers", "accelerate", "datasets",
    "pytorch-metric-learning", "scikit-learn", "pillow", "numpy", "safetensors", "tokenizers",
    "lancedb", "fastapi", "uvicorn", "httpx2", "python-multipart", "prometheus-client", "filelock",  # extra `search`
)  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A place to compute: name, memory in GiB, and how it computes in bfloat16 (`native`, `emulated`)."""

    kind: str
    name: str
    memory_gib: float
    bf16: str


def inspect_machine() -> dict[str, Any]:
    """Versions, devices, memory, threads, what can run here, and the problems found (a list of sentences)."""
    import torch

    cores, memory = usable_cores(), usable_memory_gib()
    devices = find_devices(memory)
    threads = torch.get_num_threads()
    problems = [
        *package_problems(metadata.requires("fieldmark") or []),
        *machine_problems(cores, threads, memory, devices, shared_memory_gib()),
    ]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in SHOWN_PACKAGES if (version := installed(name)) is not None},
        "devices": [asdict(device) for device in devices],
        "cores": cores,
        "threads": threads,
        "memory_gib": round(memory, 1),
        "can_run": what_can_run(memory, devices),
        "problems": problems,
    }


def installed(name: str) -> str | None:
    """Version of an installed package, None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def usable_cores() -> int:
    """Processor cores this process may use: its affinity, and the container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words = _words(CGROUP / "cpu.max") or _words(CGROUP / "cpu/cpu.cfs_quota_us") + _words(
        CGROUP / "cpu/cpu.cfs_period_us"
    )
    limited = len(words) == 2 and all(word.isdigit() for word in words)
    return max(1, min(affinity, round(int(words[0]) / int(words[1])))) if limited else affinity


def usable_memory_gib() -> float:
    """Memory this process may use: the machine's, and the container's limit."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    words = _words(CGROUP / "memory.max") or _words(CGROUP / "memory/memory.limit_in_bytes")
    limit = int(words[0]) if words and words[0].isdigit() else physical
    return min(physical, limit) / GIB


def shared_memory_gib() -> float | None:
    """Size of /dev/shm, through which worker processes hand over photos; None where there is none."""
    if not Path("/dev/shm").is_dir():
        return None
    state = os.statvfs("/dev/shm")
    return state.f_blocks * state.f_frsize / GIB


def find_devices(memory_gib: float) -> list[Device]:
    """The processor, and the accelerators that torch can use."""
    import torch

    flags = set(_words(CPUINFO))
    native = "native" if flags & {"amx_bf16", "avx512_bf16", "bf16"} else "emulated"
    devices = [Device("cpu", processor_name(), round(memory_gib, 1), native)]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            how = "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated"
            devices.append(Device(f"cuda:{index}", card.name, round(card.total_memory / GIB, 1), how))
    elif torch.backends.mps.is_available():
        devices.append(Device("mps", "Apple GPU", round(memory_gib, 1), "native"))
    return devices


def processor_name() -> str:
    """The processor's model where the system tells it, else its architecture."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def what_can_run(memory_gib: float, devices: list[Device]) -> dict[str, Any]:
    """`quickstart`: whether the memory suffices. `teacher_billions`: parameters of the largest frozen teacher, in
    billions, whose weights in `precision` take half of the best device's memory; the other half is for activations.
    `teachers`: the published ones no larger than that."""
    best = max((device for device in devices if device.kind != "cpu"), key=lambda d: d.memory_gib, default=devices[0])
    bf16 = best.kind != "cpu" and best.bf16 == "native"
    billions = round(best.memory_gib * GIB / 2 / (2 if bf16 else 4) / 1e9, 1)
    return {
        "quickstart": memory_gib >= QUICKSTART_GIB,
        "device": best.kind,
        "precision": "bf16" if bf16 else "fp32",
        "teacher_billions": billions,
        "teachers": [name for name, size in PUBLISHED_TEACHERS if size <= billions],
    }


def package_problems(requirements: list[str]) -> list[str]:
    """What is missing or too old of fieldmark's own requirements."""
    from packaging.requirements import Requirement

    problems = []
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = installed(wanted.name)
        if version is None:
            problems.append(f"{wanted.name} is not installed; fieldmark needs {wanted}: run `uv sync`.")
        elif not wanted.specifier.contains(version, prereleases=True):
            problems.append(f"{wanted.name} is {version}; fieldmark needs {wanted.specifier}: run `uv sync`.")
    return problems


def machine_problems(
    cores: int, threads: int, memory_gib: float, devices: list[Device], shared_gib: float | None
) -> list[str]:
    """What makes training fail or crawl here, each with its remedy."""
    problems = []
    if threads > cores:
        problems.append(f"torch uses {threads} threads on {cores} cores; set OMP_NUM_THREADS={cores}.")
    if memory_gib < QUICKSTART_GIB:
        problems.append(f"{memory_gib:.1f} GiB of memory; the quickstart may need {QUICKSTART_GIB:g} GiB.")
    if len(devices) == 1 and Path("/dev/nvidia0").exists():
        problems.append(
            "There is an NVIDIA card that torch cannot use; update its driver or install a CUDA build of torch."
        )
    if shared_gib is not None and shared_gib < SHARED_MEMORY_GIB:
        problems.append(
            f"/dev/shm holds {shared_gib:.2f} GiB, too little for worker processes; keep --workers 0, or "
            "start the container with --shm-size 1g."
        )
    if sys.platform == "win32":
        problems.append("Windows is not tested; use WSL.")
    return problems


def _words(path: Path) -> list[str]:
    """The words of a small text file, none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
