"""Every notebook is executed, clean, readable and self-consistent; and each of these checks can fail."""

import ast
import base64
import io
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
import numpy
import pytest
from notebook_functions import DEFINITIONS, without_magics
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["repository"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOK_METADATA = {"accelerator", "colab", "kernelspec", "language_info"}
CELL_METADATA = {"tags", "cellView", "jupyter"}
ROUNDED = r'base64,|title="[+-][\d.]+e-'  # in HTML, what the next version of a package may round otherwise
WIDEST = 540  # pixels of a picture: 6.5 inches at 80 dots each, and what is written beside the axes


def colab_badges(text: str) -> list[str]:
    return re.findall(r"https://colab\.research\.google\.com/github/[^\s)\"'>]+", text)


def colab_address(path: Path, root: Path = ROOT) -> str:
    owner_and_name = REPOSITORY.removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{owner_and_name}/blob/main/{path.relative_to(root).as_posix()}"


def missing_files(markdown: str, folder: Path) -> list[str]:
    """Links and pictures of a Markdown text that name a file which isn't there."""
    targets = re.findall(r"\]\(([^)\s]+)", markdown) + re.findall(r"(?:src|href)=[\"']([^\"']+)", markdown)
    local = [t for t in targets if not re.match(r"[a-z]+:", t) and not t.startswith("#")]
    return [t for t in local if not (folder / t.split("#")[0]).exists()]


def problems(path: Path, root: Path = ROOT) -> list[str]:
    """All that is wrong with a notebook file, in words; empty for a good one."""
    found = []
    if path.stat().st_size >= 3_000_000:
        found.append(f"{path.stat().st_size / 1e6:.1f} MB, at most 3")
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        found.append(f"not valid nbformat: {error.message}")
    found += metadata_problems(notebook) + run_problems(notebook) + text_problems(notebook, path, root)
    return found + page_problems(notebook)


def metadata_problems(notebook: nbformat.NotebookNode) -> list[str]:
    found = []
    if extra := set(notebook.metadata) - NOTEBOOK_METADATA:
        found.append(f"notebook metadata {sorted(extra)}")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("kernelspec isn't python3")
    if extra := {key for cell in notebook.cells for key in cell.metadata} - CELL_METADATA:
        found.append(f"cell metadata {sorted(extra)}")
    return found


def run_problems(notebook: nbformat.NotebookNode) -> list[str]:
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"execution counts are {counts}, not 1 to {len(code)} in order")
    outputs = [output for cell in code for output in cell.outputs]
    if any(output.output_type == "error" for output in outputs):
        found.append("an error in the outputs")
    if any(output.get("name") == "stderr" for output in outputs):
        found.append("stderr in the outputs")
    return found


def text_problems(notebook: nbformat.NotebookNode, path: Path, root: Path) -> list[str]:
    found = []
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    markdown = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    lengths = [len(source.splitlines()) for source in code] or [0]
    median, long = numpy.percentile(lengths, [50, 90])
    if median > 12 or long > 30 or max(lengths) > 60:
        found.append(f"code cells of median {median:g}, 90th percentile {long:g}, longest {max(lengths)} lines")
    share = 1 - len(code) / max(1, len(notebook.cells))
    if not 0.45 <= share <= 0.70:
        found.append(f"{share:.0%} of the cells are markdown, 45 to 70 % wanted")
    if not notebook.cells or colab_address(path, root) not in colab_badges(notebook.cells[0].source):
        found.append("the first cell lacks this notebook's own Colab badge")
    if wrong := set(colab_badges(markdown)) - {colab_address(other, root) for other in path.parent.glob("*.ipynb")}:
        found.append(f"Colab badges that lead nowhere: {sorted(wrong)}")
    if missing := missing_files(markdown, path.parent):
        found.append(f"links to missing files: {missing}")
    everything = "\n".join(code)
    if re.search(r"pip install[^\n]*[\s\"'](torch|numpy)(?![\w-])", everything):
        found.append("installs torch or numpy: Colab has its own, and breaks when they are swapped")
    if wrong := set(re.findall(r"https://github\.com/libragrad/[\w-]+", everything)) - {REPOSITORY}:
        found.append(f"fetches from {sorted(wrong)}, the repository is {REPOSITORY}")
    if re.search(r"^.*\S.*#\s*NBVAL_", everything, re.MULTILINE):
        found.append("an NBVAL_ marker that isn't a line of its own, which nbval ignores")
    return found


def page_problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What makes it hard to read, to see, or to compare with another version."""
    found = []
    if numbered := [cell.id for cell in notebook.cells if re.fullmatch(r"[a-z]+-\d+[a-z]?", cell.get("id", ""))]:
        found.append(f"cell ids that count, {numbered[:3]}: they clash when two people insert cells")
    if long := [line for cell in notebook.cells if cell.cell_type == "markdown" for line in unwrapped(cell.source)]:
        found.append(f"{len(long)} lines of text over 120 characters, such as {long[0][:60]!r}")
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                if not output.metadata.get("image/png", {}).get("alt"):
                    found.append(f"cell {cell.id} shows a picture without alt text: show(figure, alt) gives it one")
                stored = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                if stored.mode != "P":
                    found.append(f"cell {cell.id} keeps a picture in more than 256 colours: show(figure, alt) does not")
                if stored.width > WIDEST:
                    found.append(
                        f"cell {cell.id} shows {stored.width} pixels in a row: at {WIDEST} a phone can still be read"
                    )
            page = output.get("data", {}).get("text/html", "")
            if re.search(ROUNDED, page) and "# NBVAL_IGNORE_OUTPUT\n" not in cell.source:
                found.append(f"cell {cell.id} compares pixels or rounding in its HTML: # NBVAL_IGNORE_OUTPUT")
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    minutes = len(text.split()) / 200 + len(code.split()) / 100
    for told in re.findall(r"\*\*Time:\*\* (\d+) minutes", text):
        if abs(int(told) - minutes) > 8:
            found.append(f"says {told} minutes; 200 words of text and 100 of code a minute make {minutes:.0f}")
    return found


def unwrapped(markdown: str) -> Iterable[str]:
    """Lines over 120 characters that could be broken: not of tables, code or formulas on lines of their own."""
    without_blocks = re.sub(r"```.*?```|\$\$.*?\$\$", "", markdown, flags=re.DOTALL)
    return [
        line
        for line in without_blocks.splitlines()
        if len(line) > 120 and not line.lstrip().startswith(("|", "#", "![", "[![", "<summary")) and "](" not in line
    ]


def definitions(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The functions and classes of a notebook's top level, each as its syntax tree: layout and comments don't count."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for statement in ast.parse(without_magics(cell.source)).body:
                if isinstance(statement, DEFINITIONS):
                    found[statement.name] = ast.dump(statement)
    return found


def variants(notebooks: dict[str, nbformat.NotebookNode]) -> dict[str, list[str]]:
    """Names under which notebooks define different things -> in which notebooks."""
    seen: dict[str, dict[str, str]] = {}
    for stem, notebook in notebooks.items():
        for name, tree in definitions(notebook).items():
            seen.setdefault(name, {})[stem] = tree
    return {name: sorted(places) for name, places in seen.items() if len(set(places.values())) > 1}


def set_up(notebook: nbformat.NotebookNode) -> str:
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


def read_all() -> dict[str, nbformat.NotebookNode]:
    return {path.stem: nbformat.read(path, as_version=nbformat.NO_CONVERT) for path in NOTEBOOKS}


def test_one_name_means_one_thing_in_all_notebooks():
    assert variants(read_all()) == {}


def test_all_notebooks_begin_with_the_same_set_up():
    first, *others = read_all().values()
    for other in others:
        assert set_up(other) == set_up(first)


def test_a_name_that_means_two_things_is_found_out():
    def notebook(*sources):
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])

    same = notebook("def f(x):\n    return x  # a comment\n", "%matplotlib inline\nclass C:\n    pass")
    other = notebook("def f(x): return x", "class C:\n    y = 1", "def only_here(): ...")
    assert variants({"a": same, "b": same}) == {}
    assert variants({"a": same, "b": other}) == {"C": ["a", "b"]}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_well_formed(path):
    assert problems(path) == []


# --- each check fails on a notebook that deserves it ---


@pytest.fixture
def good(tmp_path):
    """A small notebook without a fault, and where to write it."""
    path = tmp_path / "notebooks" / "good.ipynb"
    path.parent.mkdir()
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    badge = f"[Open in Colab]({colab_address(path, tmp_path)})"
    output = nbformat.v4.new_output("stream", name="stdout", text="2\n")
    notebook.cells = [
        nbformat.v4.new_markdown_cell(f"# Good\n{badge}"),
        nbformat.v4.new_code_cell("x = 1", execution_count=1),
        nbformat.v4.new_markdown_cell("Twice that is two, see [this notebook](good.ipynb)."),
        nbformat.v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(2 * x)", execution_count=2, outputs=[output]),
    ]
    return notebook, path


def break_metadata(notebook):
    notebook.metadata["widgets"] = {}


def break_kernel(notebook):
    notebook.metadata.kernelspec["name"] = "my-environment"


def break_cell_metadata(notebook):
    notebook.cells[1].metadata["execution"] = {"iopub.execute_input": "2026-01-01"}


def break_schema(notebook):
    notebook.cells[1].outputs = [nbformat.from_dict({"output_type": "stream", "text": "a stream without a name"})]


def break_never_run(notebook):
    notebook.cells[1].execution_count = None


def break_order(notebook):
    notebook.cells[1].execution_count, notebook.cells[3].execution_count = 2, 1


def break_error(notebook):
    notebook.cells[3].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])]


def break_stderr(notebook):
    notebook.cells[3].outputs[0].name = "stderr"


def break_longest(notebook):
    notebook.cells[1].source = "x = 1\n" * 61


def break_median(notebook):
    for cell in (notebook.cells[1], notebook.cells[3]):
        cell.source = "x = 1\n" * 13


def break_prose(notebook):
    notebook.cells += [nbformat.v4.new_code_cell("x = 1", execution_count=n) for n in (3, 4)]


def break_badge(notebook):
    notebook.cells[0].source = notebook.cells[0].source.replace("good.ipynb", "other.ipynb")


def break_owner(notebook):
    notebook.cells[2].source = colab_badges(notebook.cells[0].source)[0].replace("libragrad/", "somebody/", 1)


def break_link(notebook):
    notebook.cells[2].source = "![a figure](missing.png)"


def break_install(notebook):
    notebook.cells[1].source = '%pip install -q "torch>=2"'


def break_clone(notebook):
    notebook.cells[1].source = "!git clone https://github.com/libragrad/another-name"


def break_marker(notebook):
    notebook.cells[1].source = "x = 1  # NBVAL_IGNORE_OUTPUT"


def break_ids(notebook):
    notebook.cells[1].id = "cell-07"


def break_wrapping(notebook):
    notebook.cells[2].source += "\n\n" + "word " * 40


def picture(mode, width=2):
    buffer = io.BytesIO()
    Image.new(mode, (width, 2)).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def break_alt(notebook):
    notebook.cells[1].outputs = [nbformat.v4.new_output("display_data", {"image/png": picture("P")})]


def break_colours(notebook):
    metadata = {"image/png": {"alt": "black"}}
    notebook.cells[1].outputs = [
        nbformat.v4.new_output("display_data", {"image/png": picture("RGB")}, metadata=metadata)
    ]


def break_pixels(notebook):
    page = '<img src="data:image/png;base64,AAAA">'
    notebook.cells[1].outputs = [nbformat.v4.new_output("display_data", {"text/html": page})]


def break_width(notebook):
    metadata = {"image/png": {"alt": "black"}}
    wide = {"image/png": picture("P", 800)}
    notebook.cells[1].outputs = [nbformat.v4.new_output("display_data", wide, metadata=metadata)]


def break_time(notebook):
    notebook.cells[2].source += "\n\n**Time:** 20 minutes"


def break_size(notebook):
    notebook.cells[0].source += " " * 3_000_000


BREAKS = {
    break_metadata: "notebook metadata ['widgets']",
    break_kernel: "kernelspec",
    break_cell_metadata: "cell metadata ['execution']",
    break_schema: "not valid nbformat",
    break_never_run: "execution counts are [None, 2]",
    break_order: "execution counts are [2, 1]",
    break_error: "an error",
    break_stderr: "stderr",
    break_longest: "longest 61",
    break_median: "median 13",
    break_prose: "33% of the cells",
    break_badge: "own Colab badge",
    break_owner: "lead nowhere",
    break_link: "missing.png",
    break_install: "installs torch",
    break_clone: "fetches from",
    break_marker: "NBVAL_ marker",
    break_ids: "cell-07",
    break_wrapping: "over 120 characters",
    break_alt: "without alt text",
    break_colours: "256 colours",
    break_pixels: "compares pixels",
    break_width: "800 pixels",
    break_time: "says 20 minutes",
    break_size: "MB",
}


def test_a_good_notebook_has_no_problems(good, tmp_path):
    notebook, path = good
    nbformat.write(notebook, path)
    assert problems(path, tmp_path) == []


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda function: function.__name__)
def test_a_broken_notebook_is_found_out(break_it, good, tmp_path):
    notebook, path = good
    break_it(notebook)
    path.write_text(nbformat.v4.writes_json(notebook), encoding="utf-8")
    assert any(BREAKS[break_it] in problem for problem in problems(path, tmp_path))


@pytest.mark.parametrize("printed, exit_code", [("2\n", 0), ("3\n", 1)])
def test_pytest_compares_what_notebooks_print(printed, exit_code, good):
    """The repository's own pytest settings pass a notebook whose outputs are true and fail one whose aren't."""
    notebook, path = good
    notebook.cells[3].outputs[0].text = printed
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", path.parent, "-n0", path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=path.parent)
    assert run.returncode == exit_code, run.stdout + run.stderr
