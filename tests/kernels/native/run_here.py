"""Runs pytest on the package in the working directory, past an editable install of another copy."""

import os
import sys


def main():
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
    sys.path.insert(0, os.getcwd())
    import pytest

    from fqt_jax.kernels import _native

    assert os.path.samefile(os.path.dirname(_native.__file__), "fqt_jax/kernels"), _native.__file__
    return pytest.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
