"""What is in a Markdown page: its snippets, commands and links."""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import io
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it begins in, and whether the block before
    it ends right above it.
    """

    language: str
    text: str
    line: int
    follows: bool

    @property
    def is_output(self) -> bool:
        return self.follows and self.language in ("", "text")


def blocks(page: pathlib.Path) -> list[Block]:
    found, end = [], None
    text = page.read_text()
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.M | re.S):
        follows = end is not None and not text[end : match.start()].strip()
        line = text.count("\n", 0, match.start(2))
        found.append(Block(match[1], match[2], line, follows))
        end = match.end()
    return found


def has_snippets(page: pathlib.Path) -> bool:
    return any(block.language == "python" for block in blocks(page))


def run_snippets(page: pathlib.Path) -> None:
    """Executes the Python blocks of a page in one namespace; the block after one is its output."""
    found = blocks(page)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language != "python":
            continue
        code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        wanted = after.text if after is not None and after.is_output else ""
        given = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())
        same = doctest.OutputChecker().check_output(wanted, given, doctest.ELLIPSIS)
        assert same, f"{page}, line {block.line}: printed\n{given}\nand not\n{wanted}"


def commands(page: pathlib.Path) -> Iterator[list[str]]:
    """The shell commands of a page, as the shell splits them."""
    text = page.read_text()
    for block in blocks(page):
        if block.language == "bash":
            yield from split(block.text)
    for span in re.findall(r"`((?:python -m|make|pip) [^`]+)`", re.sub(r"```.*?```", "", text)):
        if "NAME" not in span:
            yield from split(span.replace("\n", " "))


def split(script: str) -> Iterator[list[str]]:
    """What a shell makes of a script whose commands are all python, make or pip."""
    note = "".join(
        f"{name}() {{ printf '%s\\0' {name} \"$@\"; printf '\\036'; }}\n"
        for name in ("python", "make", "pip")
    )
    shell = shutil.which("bash")
    assert shell is not None
    done = subprocess.run(
        [shell, "-euc", note + script],
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stderr}"
    for command in done.stdout.split("\036")[:-1]:
        yield command.split("\0")[:-1]


def links(page: pathlib.Path) -> list[str]:
    """Where a page's links and pictures lead, those to other sites left out."""
    found = re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    )
    return [target for target in found if not target.startswith(("http:", "https:"))]


def paths(page: pathlib.Path) -> list[str]:
    """Paths of the repository that a page names."""
    found = re.findall(r"`((?:fqt_jax|experiments|tests|docs)/[^`\s]*)`", page.read_text())
    return [path for path in found if "NAME" not in path]
