"""What a measurement ran on: processor, versions, threads, memory, and the rate of its fp32 dot."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import resource
import sys
import time
from typing import Any

_PACKAGES = ("fqt-jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch")
_STATUS = pathlib.Path("/proc/self/status")


def available_cpus() -> int:
    """Number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_cpus(n: int) -> None:
    """Confines this process to ``n`` of its processors.

    The thread pools of XLA, OpenBLAS and OpenMP are sized once, so call it before they are
    imported.
    """
    if n < available_cpus():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n])


def describe() -> dict[str, Any]:
    """Processor, memory, system, versions and date.

    ``device`` is what JAX computes on, ``isas`` the instruction sets that each library uses here.
    """
    import jax

    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cpus": available_cpus(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "isas": _instruction_sets(),
        "device": f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _instruction_sets() -> dict[str, str]:
    from fqt_jax.kernels import native

    isas = {"fqt_jax": native.instruction_set() or "none"}
    with contextlib.suppress(ImportError):
        import torch

        isas["torch"] = torch.backends.cpu.get_cpu_capability()
    return isas


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def dot_rate(size: int = 2048, repeats: int = 5) -> float:
    """Best rate of a square fp32 matrix product here, in G multiply-adds/s.

    On the CPU the better of NumPy's BLAS and XLA's dot; elsewhere XLA's at full fp32 precision.
    """
    import jax
    import numpy as np

    a = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    x = jax.device_put(a)
    dot = jax.jit(lambda v: jax.lax.dot(v, v, precision="highest"))
    runs = [lambda: dot(x).block_until_ready()]
    if jax.default_backend() == "cpu":
        runs.append(lambda: a @ a)
    best = float("inf")
    for run in runs:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
    return size**3 / best / 1e9


def reset_peak_rss() -> bool:
    """Starts the peak of resident memory anew, if the system can (Linux)."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """Peak of this process's resident memory in bytes, since its start or the last reset."""
    # getrusage would also count what the parent held when it started this process.
    with contextlib.suppress(OSError):
        return _status_kib("VmHWM") * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_kib(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} does not tell {name}")
