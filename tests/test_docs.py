"""The pages for users: links lead somewhere, commands and programs are what the program takes."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from pathlib import Path

import pytest

from comfy_continual_lora import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md", "workflows/*.md", "web/docs/*.md")
    for page in ROOT.glob(pattern)
)
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^()\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).strip().replace(" ", "-") for one in headings}


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in LINK.findall(_text(page)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(_text(file))):
            dead.append(link)
    return dead


def commands(text: str) -> list[list[str]]:
    """The words of every command of ours in a page's blocks, as a shell splits them."""
    found = []
    for language, block in BLOCK.findall(text):
        if language != "sh":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for one in re.sub(r" > \S+", "", line).split("&&"):
                words = shlex.split(one, comments=True)
                if words and words[0].endswith("continual-lora"):
                    found.append(words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert not dead_links(page)


def test_a_dead_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One, two\n[a](#one-two) [b](#three) [c](gone.md) [d](https://x.org/y)")
    assert dead_links(page) == ["#three", "gone.md"]


@pytest.mark.parametrize("page", GUIDES, ids=_name)
def test_every_command_is_one_that_the_program_takes(page: Path) -> None:
    for words in commands(_text(page)):
        cli.parser().parse_args(words)  # SystemExit, with the reason on stderr


def test_commands_are_found() -> None:
    found = commands(_text(ROOT / "README.md"))
    assert ["demo"] in found
    assert {words[0] for words in found} >= {"learn", "draw", "export"}
    assert commands("```sh\npip x && continual-lora a \\\n  --b 'c d'  # e\n```") == [
        ["a", "--b", "c d"]
    ]


def flags() -> set[str]:
    """Every flag of every command."""
    parsers = [cli.parser()]
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    return {flag for one in parsers for action in one._actions for flag in action.option_strings}


@pytest.mark.parametrize("page", GUIDES, ids=_name)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    of_others = {"--api", "--api-auth", "--depth"}  # the web UI's, git's
    assert set(re.findall(r"--[a-z][\w-]+", _prose(page))) <= flags() | of_others


def _prose(page: Path) -> str:
    """The page without its blocks and links."""
    return LINK.sub("]", BLOCK.sub("", _text(page)))


@pytest.mark.parametrize("page", GUIDES, ids=_name)
def test_every_program_is_python(page: Path) -> None:
    for language, block in BLOCK.findall(_text(page)):
        if language == "python":
            ast.parse(block)


def test_the_readme_fits_its_first_hour() -> None:
    """What does not have to be read before the first picture is a page of docs/."""
    assert len(_text(ROOT / "README.md").split()) < 1500
