import json
import pathlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments import process
from experiments.cli import UserError
from experiments.runs import folders
from experiments.runs.config import RunConfig

pytestmark = pytest.mark.usefixtures("own_folder")


def test_folders_of_the_same_second_are_several():
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: folders.run_folder(RunConfig(), "finetune"), range(16)))
    assert len(set(found)) == 16
    assert all(folder.name.startswith("finetune-digits-resnet18-fqt1-20") for folder in found)


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", "config.json.partial")])
def test_what_a_kill_left_of_a_folder_blocks_nothing(left):
    out = pathlib.Path("run")
    out.mkdir()
    for name in left:
        (out / name).write_text("{")
    config = RunConfig(out=out, seed=3)
    assert folders.run_folder(config, "finetune") == out
    assert json.loads((out / "config.json").read_text())["seed"] == 3
    with pytest.raises(UserError, match="the folder run exists already: choose another one"):
        folders.run_folder(config, "finetune")


def test_a_folder_is_refused_before_the_work_and_none_is_left():
    pathlib.Path("theirs/run").mkdir(parents=True)
    pathlib.Path("theirs/run/x").touch()
    with pytest.raises(UserError, match="the folder theirs/run exists already"):
        folders.check_can_start(RunConfig(out=pathlib.Path("theirs/run")))
    with pytest.raises(UserError, match="x exists already and is not a folder"):
        folders.check_can_start(RunConfig(out=pathlib.Path("theirs/run/x")))
    for out in (None, pathlib.Path("theirs/new/run"), pathlib.Path("a/b")):
        folders.check_can_start(RunConfig(out=out))
    assert [str(path) for path in sorted(pathlib.Path().rglob("*"))] == [
        "theirs",
        "theirs/run",
        "theirs/run/x",
    ]


def test_folders_of_results_are_not_overwritten():
    out = pathlib.Path("results")
    assert folders.output_folder(out, "kind") == out
    assert folders.output_folder(out, "kind") == out  # a kill may have left it empty
    (out / "results.json").touch()
    with pytest.raises(UserError, match=r"the folder results exists already: choose another one\."):
        folders.output_folder(out, "kind")


def test_what_is_no_folder_is_named():
    pathlib.Path("file").touch()
    with pytest.raises(UserError, match="file exists already and is not a folder"):
        folders.output_folder(pathlib.Path("file"), "kind")
    pathlib.Path("runs").symlink_to("gone")
    with pytest.raises(UserError, match="runs is not a folder"):
        folders.output_folder(None, "kind")


def begin(error: Exception, *, saved: bool) -> None:
    with folders.starting(RunConfig(out=pathlib.Path("run")), "finetune") as folder:
        assert (folder / "config.json").exists()
        if saved:
            (folder / "checkpoints/step_00000001").mkdir(parents=True)
        raise error


def test_a_run_that_fails_before_its_first_checkpoint_leaves_no_folder():
    with pytest.raises(ValueError, match="wrong"):
        begin(ValueError("wrong"), saved=False)
    assert not pathlib.Path("run").exists()
    with pytest.raises(ValueError, match="wrong"):
        begin(ValueError("wrong"), saved=True)
    assert pathlib.Path("run/checkpoints/step_00000001").exists()


def test_a_run_that_is_stopped_keeps_its_folder():
    with pytest.raises(process.Interrupted):
        begin(process.Interrupted("stopped"), saved=False)
    assert pathlib.Path("run/config.json").exists()


def test_a_run_that_is_going_on_is_not_started_or_continued_again():
    config = RunConfig(out=pathlib.Path("run"))
    with folders.starting(config, "finetune") as folder:
        with (
            pytest.raises(UserError, match=r"run exists already: .*, or continue .*--resume run"),
            folders.starting(config, "finetune"),
        ):
            pass
        with (
            pytest.raises(UserError, match="run is in use by another process"),
            folders.continuing(folder, "finetune"),
        ):
            pass


def test_files_are_written_whole():
    path = pathlib.Path("file.json")
    folders.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        folders.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in pathlib.Path().iterdir()] == ["file.json"]
