"""The README and the documentation say what is so: snippets, commands, links and the map."""

import contextlib
import dataclasses
import io
import pathlib
import re
import runpy
import subprocess
import tomllib
import warnings

import pytest
import yaml

import fqt_jax
from experiments import cli
from experiments.runs.finetuning import FinetuneConfig
from experiments.sweeps.specs import parse
from experiments.sweeps.sweep import SweepConfig
from fqt_jax.kernels import dispatch
from tests import pages
from tests.pages import PAGES, README, ROOT

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
WITH_SNIPPETS = [
    pytest.param(page, marks=[pytest.mark.slow] * (page.name == "quickstart.md"))
    for page in PAGES
    if pages.has_snippets(page)
]


@pytest.mark.usefixtures("relaxed_promotion", "own_folder")
@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.name)
def test_snippets_run_and_print_what_stands_below_them(page, monkeypatch):
    # A page may register kernels.
    monkeypatch.setattr(dispatch, "_IMPLEMENTATIONS", dict(dispatch._IMPLEMENTATIONS))
    pages.run_snippets(page)


@pytest.fixture
def parse_options(monkeypatch, tmp_path):
    """Parses the options of an entry point, as it does, and checks what a sweep is over."""
    (tmp_path / "runs/NAME").mkdir(parents=True)
    (tmp_path / "runs/NAME/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)

    def parse_options(module: str, options: list[str]) -> None:
        configs = []

        def stand_in(main, config_type):
            with contextlib.redirect_stderr(io.StringIO()) as complaint:
                try:
                    configs.append(cli.parse(config_type, options))
                except SystemExit:
                    pytest.fail(f"{module} does not take {options}: {complaint.getvalue()}")

        monkeypatch.setattr(cli, "run", stand_in)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        (config,) = configs
        if isinstance(config, SweepConfig):
            for axis in ("dataset", "model", "recipe", "optimizer"):
                for point in getattr(config, f"{axis}s", ()):
                    parse(axis, point)

    return parse_options


@every_page
def test_commands_are_accepted(page, parse_options):
    rules = re.findall(r"^([a-z0-9 -]+):", (ROOT / "Makefile").read_text(), re.M)
    targets = " ".join(rules).split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for program, *arguments in pages.commands(page):
        if program == "make":
            assert arguments[0] in targets
        elif program == "pip":
            assert arguments[0] == "install"
            for extra in re.findall(r"\[(.*)\]", arguments[1]):
                assert extra in project["optional-dependencies"]
        else:
            assert arguments[0] == "-m"
            parse_options(arguments[1], arguments[2:])


def test_a_wrong_command_is_found(tmp_path, parse_options):
    page = tmp_path / "page.md"
    page.write_text(
        "Try `python -m experiments.speed --width\n0.5`.\n\n```bash\n"
        'python -m experiments.tables \\\n    --seeds $(for s in 3 4; do echo "$s"; done)\n```\n'
    )
    assert list(pages.commands(page)) == [
        ["python", "-m", "experiments.tables", "--seeds", "3", "4"],
        ["python", "-m", "experiments.speed", "--width", "0.5"],
    ]
    with pytest.raises(pytest.fail.Exception, match="--heigth"):
        parse_options("experiments.speed", ["--heigth", "3"])
    with pytest.raises(cli.UserError, match="unknown option 'bit'"):
        parse_options("experiments.tables", ["--recipes", "fqt1:bit=3"])
    page.write_text("```bash\nrm -r runs\n```\n")
    with pytest.raises(AssertionError, match="rm"):
        list(pages.commands(page))


def test_output_that_differs_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```\n1\n```\n\n```python\nprint(2)\n```\n")
    with pytest.raises(AssertionError, match=r"line 9: printed\n2"):
        pages.run_snippets(page)


@every_page
def test_links_and_paths_lead_somewhere(page):
    for target in pages.links(page):
        path = target.partition("#")[0]
        assert not path or (page.parent / path).exists(), target
    for path in pages.paths(page):
        assert (ROOT / path).exists(), path


@every_page
def test_no_line_is_taken_for_a_comment(page):
    assert not re.search(r"^%", page.read_text(), re.M)  # MyST would leave it out


def test_contributing_names_sources_that_exist():
    names = re.findall(r"`([\w.]+\.(?:cc|h|inc|txt))`", (ROOT / "docs/contributing.md").read_text())
    assert names
    for name in names:
        assert "NAME" in name or (ROOT / "fqt_jax/kernels/csrc" / name).exists(), name


def test_the_readme_is_short_with_one_table_and_one_picture():
    text = README.read_text()
    assert len(text.split()) <= 900
    assert len(re.findall(r"^\|[-|]+\|$", text, re.M)) == 1
    assert text.count("![") == 1


def the_map(page: pathlib.Path) -> str:
    text = page.read_text()
    return next(
        b.text
        for b in pages.blocks(page)
        if b.line > text[: text.index("## Where things are")].count("\n")
    )


def test_the_map_of_files_matches_the_tree():
    top = ""
    named: set[str] = set()
    for indent, name in re.findall(r"^( *)(\w+/)", the_map(README), re.M):
        top = top if indent else name
        path = top + name if indent else name
        assert (ROOT / path).is_dir(), path
        named.add(path)
    packages = {f"fqt_jax/{path.parent.name}/" for path in ROOT.glob("fqt_jax/*/__init__.py")}
    assert {path for path in named if path.startswith("fqt_jax/")} - {"fqt_jax/"} == packages


def test_the_map_names_every_experiment():
    entries = {
        path.stem for path in ROOT.glob("experiments/*.py") if "cli.run(" in path.read_text()
    }
    (line,) = re.findall(r"experiments\.NAME: (.*?)^\w", the_map(README), re.M | re.S)
    assert set(re.findall(r"\w+", line)) == entries


def test_the_map_of_contributing_matches_the_tree():
    library, experiments = the_map(ROOT / "docs/contributing.md").split("\nexperiments/")
    lines = re.findall(r"^  (\S.*?)(?:  .*)?$", library, re.M)
    names = {name for line in lines for name in line.split(", ")}
    found = {path.stem for path in ROOT.glob("fqt_jax/[!_]*.py")}
    found |= {f"{path.parent.name}/" for path in ROOT.glob("fqt_jax/*/__init__.py")}
    assert names == found
    folders = {f"{path.parent.name}/" for path in ROOT.glob("experiments/*/__init__.py")}
    assert set(re.findall(r"^  (\S.*)", experiments, re.M)[0].split(", ")) == folders


def test_no_page_waits_for_figures():
    for page in PAGES:
        assert "FIGURES-HERE" not in page.read_text(), page


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == fqt_jax.__version__
    assert citation["license"] == project["license"]


def test_the_jobset_is_one_that_kubernetes_would_take():
    """Its structure, and what its parts say of each other; no cluster is asked."""
    job_set = yaml.safe_load((ROOT / "docs/jobset.yaml").read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, spec = job_set["metadata"]["name"], job_set["spec"]
    assert set(spec) <= {"network", "failurePolicy", "replicatedJobs", "successPolicy"}
    (workers,) = spec["replicatedJobs"]
    assert (set(workers), workers["replicas"]) == ({"name", "replicas", "template"}, 1)
    job = workers["template"]["spec"]
    assert job["parallelism"] == job["completions"] > 1
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    *shell, script = container["command"]
    assert shell == ["/bin/sh", "-c"]
    (port,) = container["ports"]
    address = f"{name}-{workers['name']}-0-0.{pod['subdomain']}:{port['containerPort']}"
    assert pod["subdomain"] == name
    assert f"--coordinator {address}" in script
    assert f"--processes {job['parallelism']} " in script
    subprocess.run([*shell[:1], "-n", "-c", script], check=True)
    options = re.findall(r"--([a-z-]+)", script)
    known = {field.name.replace("_", "-") for field in dataclasses.fields(FinetuneConfig)}
    assert set(options) <= known
