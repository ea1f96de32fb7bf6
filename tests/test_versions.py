"""The installed jaxlib is sound, and one that is not is excluded and warned of."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib
import warnings

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from fqt_jax import _versions

CURE = "--xla_cpu_experimental_ynn_fusion_type="

# Both kill the process on the versions that have the defect, or never return.
SUMS_OVER_MANY_AXES = """
import jax, jax.numpy as jnp

def log_likelihood(observed, table):
    total = jnp.sum(observed[..., None, None, None, None, None] * table, axis=2)
    return jnp.log(jnp.maximum(total, 1e-16))

table = jnp.ones((10, 4, 6, 9, 9, 9, 9, 9))
logs = jax.jit(log_likelihood)(jnp.ones((10, 4, 6)), table)
assert jnp.allclose(logs, jnp.log(6.0))

ones = jnp.ones((3, 1, 2, 2, 8, 8, 8))
assert (jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(ones, ones) == 2).all()
print("sound")
"""

IMPORT_UNDER_ANOTHER_VERSION = """
import jax, jaxlib
jaxlib.__version__ = "0.10.2"
import fqt_jax
import fqt_jax.training
"""


def _run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_sums_of_fused_products_are_right():
    # More rows than the 32,768 that defective versions get right: they lose the last one.
    x = np.zeros((32_769, 3), np.float32)
    x[:, 0] = np.arange(len(x))
    sums = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(x)
    np.testing.assert_allclose(sums, np.square(x[:, 0].astype(np.float64)), rtol=1e-6)


def test_sums_over_many_axes_do_not_crash():
    found = _run(SUMS_OVER_MANY_AXES)
    assert (found.returncode, found.stdout) == (0, "sound\n"), found.stderr


@pytest.mark.parametrize("version", _versions.DEFECTS)
@pytest.mark.parametrize("flags", [None, "", "--xla_foo=1", CURE + "dot", f"{CURE} {CURE}dot"])
def test_warns_of_a_defective_jaxlib(version, flags, monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", version)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if flags is not None:
        monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.warns(RuntimeWarning, match=rf"^jaxlib {re.escape(version)} .*{CURE} ") as found:
        _versions.warn_of_defects()
    assert len(found) == 1
    assert "\n" not in str(found[0].message)


@pytest.mark.parametrize(
    ("version", "flags"),
    [
        ("0.10.1", ""),
        ("0.11.1", ""),
        ("0.12.0.1", ""),
        ("0.10.2", CURE),
        ("0.11.0", f"--xla_foo=1 {CURE}"),
        ("0.10.2", f"{CURE}dot {CURE}"),
    ],
)
def test_says_nothing_of_a_sound_jaxlib(version, flags, monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", version)
    monkeypatch.setenv("XLA_FLAGS", flags)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _versions.warn_of_defects()


def test_import_warns_once():
    found = _run(IMPORT_UNDER_ANOTHER_VERSION, XLA_FLAGS="")
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("Warning") == 1
    assert found.stderr.startswith("<string>:4: RuntimeWarning: jaxlib 0.10.2 computes")


def test_requirements_exclude_the_versions_that_are_warned_of():
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
    (jax_requirement,) = (r for r in project["project"]["dependencies"] if r.startswith("jax"))
    assert set(re.findall(r"!=([\d.]+)", jax_requirement)) == set(_versions.DEFECTS)
