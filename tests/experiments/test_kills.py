import pathlib

import pytest

from tests.experiments import kills


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.usefixtures("relaxed_promotion")
def test_killed_runs_end_as_unbroken_ones(tmp_path):
    kills.check(tmp_path, kills=3, seed=0)
