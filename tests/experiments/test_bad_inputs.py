"""What no one can mean is refused in words, before data are read or folders made."""

import pathlib

import pytest

from tests.experiments.bad_inputs import CASES, lines_of, make_files, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    make_files(path)
    return path


@pytest.fixture(autouse=True)
def _in_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("FQT_JAX_TRACEBACK", raising=False)


@pytest.mark.parametrize(("arguments", "expected"), CASES)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_is_refused_in_one_line(arguments, expected):
    before = sorted(pathlib.Path().rglob("*"))
    status, text = run(arguments)
    lines = lines_of(text)
    assert status == 2
    assert expected in " ".join(lines)
    assert "Traceback" not in text
    # The parser of options draws its errors as a frame of several lines.
    own = [line for line in lines if line.startswith("error: ")]
    assert own == lines or (not own and len(lines) > 1)
    assert sorted(pathlib.Path().rglob("*")) == before
