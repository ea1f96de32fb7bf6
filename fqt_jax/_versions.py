"""Versions of jaxlib that must not be used as they come, and the warning about them."""

from __future__ import annotations

import os
import warnings

import jaxlib

# What each does wrong. The requirements in pyproject.toml exclude the same versions of jax, which
# are the only ones that take these versions of jaxlib.
DEFECTS = {
    "0.10.2": (
        "computes some sums wrongly on CPUs without an error, and crashes on others "
        "(jax-ml/jax#39103, #39257 and #40412)"
    ),
    "0.11.0": "crashes on some sums over arrays of many axes on CPUs (jax-ml/jax#39257)",
}

_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
"""With an empty value, XLA leaves out the part that these defects are in."""


def warn_of_defects() -> None:
    """Warns, once for each call, of an installed jaxlib that is defective and was not mended.

    The line that the warning names is the one that imports the caller's module.
    """
    version = jaxlib.__version__
    if version not in DEFECTS or _mended(os.environ.get("XLA_FLAGS", "")):
        return
    others = ",".join(f"!={defective}" for defective in DEFECTS)
    warnings.warn(
        f"jaxlib {version} {DEFECTS[version]}. Install another: pip install 'jax{others}'. "
        f"Or set XLA_FLAGS={_FLAG} in the environment before Python starts.",
        RuntimeWarning,
        stacklevel=3,
    )


def _mended(xla_flags: str) -> bool:
    given = [flag for flag in xla_flags.split() if flag.startswith(_FLAG)]
    return bool(given) and given[-1] == _FLAG
