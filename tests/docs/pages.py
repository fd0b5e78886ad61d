"""The pages that people read, as data: their blocks of code, their headings, their links."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BOOK = ROOT / "docs/trouble.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
NOT_RUN = "Not run by the tests ("
"""How a paragraph begins that says, to the reader too, why the block below it is not run."""


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: Path
    language: str
    text: str
    is_run: bool
    """False where the paragraph above says that the tests do not run it."""

    @property
    def commands(self) -> tuple[str, ...]:
        """What is typed at a `$`, without comments."""
        typed = [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]
        return tuple(re.split(r"\s+#\s", line)[0].strip() for line in typed)


@cache
def blocks(page: Path, language: str = "") -> tuple[Block, ...]:
    """The blocks of a page, all or those of one language."""
    found, above, lines = [], "", iter(page.read_text().splitlines())
    for line in lines:
        if fence := re.fullmatch(r"```(\w*)", line):
            inner = []
            while (line := next(lines)) != "```":
                inner.append(line + "\n")
            found.append(Block(page, fence[1], "".join(inner), not above.startswith(NOT_RUN)))
            above = ""
        elif line:
            above = above or line
            if line.startswith(("#", "|", "* ")):
                above = ""
        else:
            above = above if above.startswith(NOT_RUN) else ""
    return tuple(block for block in found if block.language == (language or block.language))


@cache
def anchors(page: Path) -> frozenset[str]:
    """What can stand behind # in a link to a page, as GitHub makes it of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def links(page: Path) -> list[str]:
    """Where a page leads inside the project, relative to itself."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)


def tracked() -> list[str]:
    """The files of the project, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
