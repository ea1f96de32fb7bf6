"""The instruction sets that this machine does not have, emulated: no other test runs them."""

from __future__ import annotations

import pathlib
import platform
import shutil
import subprocess

import pytest

from fqt_jax.kernels import native

ROOT = pathlib.Path(__file__).parents[2]
HEADER = "#include <simde/x86/avx512.h>"


def supported() -> list[str]:
    if native.unavailable() is not None:
        return []
    from fqt_jax.kernels import _native

    return list(_native.supported_isas())


def why_not() -> str | None:
    if platform.machine() != "x86_64":
        return "they are emulated on x86-64"
    if not (shutil.which("g++") and shutil.which("make")):
        return "no C++ compiler, or no make"
    preprocess = ["g++", "-E", "-x", "c++", "-", "-o", "/dev/null"]
    found = subprocess.run(preprocess, input=HEADER, text=True, capture_output=True)
    return None if found.returncode == 0 else "no SIMDe (Debian: libsimde-dev)"


@pytest.mark.parametrize("isa", ["avx512", "vpopcnt", "amx"])
def test_kernels_agree_with_the_scalar_reference(isa):
    if isa in supported():
        pytest.skip("this machine has it: the other tests run it")
    if reason := why_not():
        pytest.skip(reason)
    run = subprocess.run(
        ["make", "-s", f"test-{isa}", "CASES=90"], cwd=ROOT, text=True, capture_output=True
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-2000:]
    assert f"{isa} kernels: 810 of 810 cases agree with the reference" in run.stdout
