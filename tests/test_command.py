import pathlib
import subprocess
import sys

import pytest

import fqt_jax
from fqt_jax import _command

ROOT = pathlib.Path(__file__).parents[1]


def test_every_experiment_is_a_command():
    entries = {
        path.stem
        for path in ROOT.glob("experiments/*.py")
        if "cli.run(" in path.read_text() and path.stem != "cli"
    }
    found = _command.experiments(ROOT / "experiments")
    assert set(found) == entries >= {"finetune", "export", "predict"}
    assert all(line.endswith(".") for line in found.values())
    text = _command.usage(found)
    assert all(f"  {name} " in text for name in entries)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], None, "usage: fqt COMMAND [OPTIONS]"),
        (["--version"], None, fqt_jax.__version__),
        (["finetone"], 2, "error: unknown command 'finetone'; known: ablate, "),
    ],
)
def test_the_command_says_what_there_is(monkeypatch, capsys, arguments, status, text):
    monkeypatch.setattr(sys, "argv", ["fqt", *arguments])
    if status is None:
        _command.main()
    else:
        with pytest.raises(SystemExit) as stop:
            _command.main()
        assert stop.value.code == status
    printed = capsys.readouterr()
    assert (printed.err if status else printed.out).startswith(text)


def test_a_command_runs_its_experiment(tmp_path):
    code = "from fqt_jax._command import main; main()"
    command = [sys.executable, "-c", code, "finetune", "--recipe", "nope"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown recipe 'nope'")
    assert not list(tmp_path.iterdir())
