"""Links within the repository lead to a file that is there and to a heading that it has. (The others: weekly.yml.)"""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("data/*.md"), *ROOT.glob("notebooks/*.md"), *ROOT.glob("notebooks/*.ipynb")]


def text_of(path: Path) -> str:
    """A page's Markdown without its blocks of code."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Of a page's headings: as GitHub makes them, and of notebooks as Jupyter does."""
    headings = re.findall(r"^#+ (.+?)\s*$", text_of(path), re.MULTILINE)
    if path.suffix == ".ipynb":
        return {heading.replace(" ", "-") for heading in headings}
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    text = text_of(page)
    targets = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=[\"']([^\"']+)", text)
    found = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_within_the_repository_lead_somewhere(page):
    assert broken_links(page) == []


def test_broken_links_are_found_out(tmp_path):
    (tmp_path / "b.md").write_text("# Here, there\n```\n# not a heading\n```\n[back](a.md)")
    (tmp_path / "a.md").write_text(
        "[x](missing.md) [y](b.md#gone) [z](b.md#here-there) [c](b.md#not-a-heading) [w](https://example.org)\n"
        "![p](no.png) <img src='no2.png'> [own](#nowhere) `[code](no3.md)`"
    )
    assert broken_links(tmp_path / "a.md") == [
        "missing.md",
        "b.md#gone",
        "b.md#not-a-heading",
        "no.png",
        "#nowhere",
        "no2.png",
    ]
    assert broken_links(tmp_path / "b.md") == []
