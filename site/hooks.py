"""What MkDocs is told beyond its configuration: where the pages lie, and how formulas become MathML."""

import posixpath
import re
from pathlib import Path

from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = "https://github.com/libragrad/libragrad-minimal/blob/main/"
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(?!\s)([^$]+?)(?<!\s)\$", re.DOTALL)

# A prime is a raised stroke in itself. Raised once more, as an exponent, it shrinks to a dot.
PRIME = re.compile(r"<m(sub|)sup>(<mi>[^<]*</mi>)(<mi>[^<]*</mi>|)<mi>&#x02032;</mi></m\1sup>")


def on_files(files, config):
    """README is the first page; notebooks and pictures keep their places, so that links between them hold."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for path in sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/*.md"), *ROOT.glob("data/**/*.png")]):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


on_files.mkdocs_priority = 100  # before the plugin that reads the notebooks


def on_page_markdown(markdown, page, config, files):
    """Links to files that are no pages lead to the repository."""
    known = {file.src_uri for file in files} | {"README.md"}

    def elsewhere(link):
        target = link[1].split("#")[0]
        return link[0] if not target or ":" in target or target in known else f"]({ELSEWHERE}{link[1]})"

    return re.sub(r"\]\(([^)\s]+)\)", elsewhere, markdown)


def on_page_content(html, page, config, files):
    """Formulas between dollar signs become MathML, which every browser draws by itself; badges become words."""
    soup = BeautifulSoup(html, "html.parser")
    for badge in soup.find_all("img", src=re.compile("^https:")):
        badge.replace_with(badge["alt"])
    if page.file.src_uri.endswith(".ipynb"):
        for link in soup.find_all("a", href=True):
            link["href"] = from_notebook(link["href"])
        for image in soup.find_all("img", src=re.compile(r"^\.\./")):
            image["src"] = f"../{image['src']}"  # a page lies one folder deeper than its notebook
    for table in soup.find_all("table", class_=lambda name: not name or "dataframe" in name):
        table["class"] = "wide"
        for text in table.find_all(string=re.compile(" ± ")):
            whole = text.replace(" ± ", "\u00a0±\u00a0")
            whole = re.sub(r"(?<=\de)-(?=\d)", "\u2011", whole)
            text.replace_with(whole)  # a number and its error stay on one line, and 1.7e-06 whole
    for formula in soup.find_all(class_="arithmatex"):  # mkdocs-jupyter from 0.27 on has found them already
        marked = formula.get_text().strip()
        around = "$$" if marked.startswith("\\[") else "$"
        formula.replace_with(f"{around}{marked[2:-2].strip()}{around}")
    soup.smooth()
    for text in soup.find_all(string=FORMULA):
        if not {tag.name for tag in text.parents} & {"code", "pre", "script", "style", "svg"}:
            text.replace_with(BeautifulSoup(with_formulas(str(text)), "html.parser"))
    for wide in soup.select("pre, div.highlight-ipynb, table.wide, math[display=block]"):
        wide["tabindex"] = "0"  # what is wider than the screen can be scrolled by keys
    return str(soup)


def from_notebook(target):
    """Where a notebook's link leads: to another notebook's page, or to a file of the repository."""
    path, _, place = target.partition("#")
    if not path or ":" in path:
        return target
    if re.fullmatch(r"[\w-]+\.ipynb", path):
        return f"../{path.removesuffix('.ipynb')}/{'#' * bool(place)}{place}"
    return ELSEWHERE + posixpath.normpath(f"notebooks/{path}")


def on_post_page(output, page, config):
    """The theme's search is a dialog without a name, which readers of screens ask for; and mkdocs-jupyter from 0.27 on
    fetches MathJax from elsewhere, though no formula is left for it."""
    output = re.sub(r"<script data-mkdocs-jupyter-mathjax.*?</script>", "", output, flags=re.DOTALL)
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def with_formulas(text):
    def mathml(found):
        formula = (found[1] or found[2]).replace("\\langle", "⟨").replace("\\rangle", "⟩")  # which it doesn't know
        drawn = convert(formula, display="block" if found[1] else "inline")
        return PRIME.sub(
            lambda of: f"{of[1] and '<msub>'}<mrow>{of[2]}<mi>′</mi></mrow>{of[3]}{of[1] and '</msub>'}", drawn
        )

    pieces, end = [], 0
    for found in FORMULA.finditer(text):
        pieces += [escaped(text[end : found.start()]), mathml(found)]
        end = found.end()
    return "".join(pieces) + escaped(text[end:])


def escaped(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
