"""Experiments: one module for each question, run as ``python -m experiments.NAME``."""

import sys

# Python's mark for a module run by -m while it is still being looked for: only then is the process
# ours. This is before the imports of JAX, so that Ctrl-C ends these cleanly too.
if sys.argv[:1] == ["-m"]:
    from experiments import process

    process.install()
