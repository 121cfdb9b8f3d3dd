"""The documentation does what it says: its code runs, its commands parse, its links lead somewhere.

In a page, ``<!-- run -->`` before a Python block has it run here, in one namespace a page; ``<!-- output -->`` before a
text block after it is compared with what was printed. Every Python block of docs/ is run or says why it is not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))])
PAGES = [page for page in PAGES if page.is_file()]

BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^\n]*?) -->\n+)?^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
SHELLS = {"bash", "sh", "shell", "console"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Mark, language and text of each fenced block."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield found["mark"] or "", found["language"], found["body"]


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each ``epsanet`` command in a shell block, and of those in the text that have flags."""
    lines = [
        line
        for _, language, body in blocks(page)
        if language in SHELLS
        for line in body.replace("\\\n", " ").splitlines()
    ]
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    lines += [code for code in re.findall(r"`(epsanet [^`\n]+)`", text) if " --" in code]
    for line in lines:
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        if words[:1] == ["epsanet"]:
            yield words[1:]


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = [page for page in PAGES if any(mark == "run" for mark, _, _ in blocks(page))]
CALLED = [page for page in PAGES if any(commands(page))]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # in Lightning
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's advice
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for mark, language, body in blocks(page):
        if mark == "run":
            assert language == "python", f"marked to be run, but {language}:\n{body}"
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream):
                exec(compile(body, name_of(page), "exec"), namespace)
            printed = stream.getvalue()
        elif mark == "output":
            assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in body.splitlines()]


@pytest.mark.parametrize("page", [page for page in PAGES if page.is_relative_to(DOCS)], ids=name_of)
def test_python_in_the_documentation_is_run_or_says_why_not(page: Path) -> None:
    unmarked = [
        body
        for mark, language, body in blocks(page)
        if language == "python" and not mark.startswith(("run", "not run:"))
    ]
    assert unmarked == []


@pytest.mark.parametrize("page", CALLED, ids=name_of)
def test_every_command_of_a_page_parses(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from epsanet import cli
    from epsanet.tasks.config import recipe_path

    monkeypatch.chdir(tmp_path)
    parsed: list[str] = []

    def record(name: str, _: dict[str, Any]) -> int:
        parsed.append(name)
        return 0

    for name in cli.COMMANDS:
        monkeypatch.setattr(import_module(f"epsanet.cli.{name}"), "run", functools.partial(record, name))
    for words in commands(page):
        if set(words) & {"--help", "--version"} or words[0] not in cli.COMMANDS:
            assert words[0] in {*cli.COMMANDS, "--help", "--version"}, words
            continue
        for before, word in zip(["", *words], words, strict=False):  # files that the user would have
            recipe = (
                Path(word) if word.endswith(".yaml") else Path(word) / "config.yaml" if before == "--resume" else None
            )
            if recipe is not None:
                recipe.parent.mkdir(parents=True, exist_ok=True)
                recipe.write_text(recipe_path("digits").read_text(encoding="utf-8"), encoding="utf-8")
        before_this = len(parsed)
        assert cli.main(words) == 0, f"epsanet {shlex.join(words)}"
        assert parsed[before_this:] == ([] if "--print_config" in words else [words[0]])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_of_a_page_exist(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`\n]*`", "", text)
    targets = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'(?:src|srcset|href)="([^"]+)"', text)]
    for target in targets:
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        place = page.parent / target.partition("#")[0]
        assert place.exists(), f"{name_of(page)} points to {target}"


def test_the_tables_are_those_of_the_networks(costs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = tables()
    monkeypatch.setattr(module, "counted", lambda: tuple(costs))
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert module.filled(text) == text, f"{name_of(page)} is old; run python docs/tables.py"


def test_the_checks_above_find_what_they_look_for() -> None:
    assert {"docs/networks.md", "docs/tutorials/backbone.md"} <= {name_of(page) for page in RUN}
    assert "docs/commands.md" in {name_of(page) for page in CALLED}
    assert "<!-- table: costs -->" in (DOCS / "networks.md").read_text(encoding="utf-8")
