"""The README, pyproject.toml and environment.yml tell one story, and it is the repository's."""

import ast
import re
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from test_notebooks import NOTEBOOKS, PROJECT, REPOSITORY, ROOT, colab_address, colab_badges, missing_files
from transformers import LlamaConfig, LlamaForCausalLM

EXTRAS = PROJECT["optional-dependencies"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DISTRIBUTION_OF = {
    "PIL": "pillow",
    "open_clip": "open-clip-torch",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}
DISTRIBUTION_OF |= {"bs4": "beautifulsoup4", "pytorch_grad_cam": "grad-cam", "yaml": "pyyaml"}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def commands(readme: str) -> list[str]:
    """The lines of the README's shell blocks."""
    return "".join(re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)).splitlines()


def absent_arguments(command: str) -> list[str]:
    """Files, folders and extras that a command names and the repository doesn't have."""
    words = [word.strip("'\"") for word in command.split()]
    paths = [word for word in words if re.fullmatch(r"(?!\.venv)[\w*-][\w.*/-]*(/[\w.*-]*|\.(py|toml|yml))", word)]
    extras = [extra for word in words for listed in re.findall(r"^\.\[(.+)\]$", word) for extra in listed.split(",")]
    return [path for path in paths if not list(ROOT.glob(path))] + [extra for extra in extras if extra not in EXTRAS]


STANDARD = {*sys.stdlib_module_names, "tomllib"}  # the last since Python 3.11, and tomli before


def imports(source: str) -> set[str]:
    """Top-level names of the packages a piece of Python imports."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    dotted = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.split(".")[0] for name in plain | dotted} - STANDARD


def declared(requirements: list[str]) -> set[str]:
    return {canonical(Requirement(requirement).name) for requirement in requirements}


def undeclared(source: str, requirements: list[str]) -> set[str]:
    """What a piece of Python imports without the requirements (or the repository) providing it."""
    ours = {"libragrad_minimal", "google"}  # google.colab exists in Colab only
    ours |= {
        path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("[dt]*/*.py"), *ROOT.glob("tests/benchmarks/*.py")]
    }  # data/ and tests/
    used = {canonical(DISTRIBUTION_OF.get(name, name)) for name in imports(source) - ours}
    return used - declared(requirements)


def test_readme_links_exist():
    assert missing_files(README, ROOT) == []
    assert missing_files("[a](missing.md) [b](https://example.org) [c](#here)", ROOT) == ["missing.md"]


def test_readme_table_lists_exactly_the_notebooks():
    expected = [path.relative_to(ROOT).as_posix() for path in NOTEBOOKS]
    assert re.findall(r"^\| \[[^\]]+\]\((notebooks/[^)]+)\)", README, re.MULTILINE) == expected


def test_readme_badges_are_the_notebooks_own():
    assert colab_badges(README.replace("https://colab.research.google.com/assets/", "")) == [
        colab_address(path) for path in NOTEBOOKS
    ]


def test_every_address_of_this_project_is_the_one_in_pyproject():
    texts = [README, (ROOT / "CITATION.cff").read_text(encoding="utf-8")]
    found = {address for text in texts for address in re.findall(r"https://github\.com/libragrad/[\w-]+", text)}
    assert found == {REPOSITORY}


def test_readme_commands_name_what_exists():
    assert len(commands(README)) >= 2
    assert {command: absent_arguments(command) for command in commands(README) if absent_arguments(command)} == {}


def test_absent_arguments_are_found_out():
    assert absent_arguments(
        "pip install -e '.[notebooks,tests]' && jupyter lab notebook/ && python tests/speed.py"
    ) == [
        "notebook/",
        "tests/speed.py",
        "tests",
    ]


def two_commands() -> list[str]:
    (section,) = re.findall(r"^## Two commands\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    return commands(section)


def test_there_are_exactly_two_commands_and_they_set_themselves_up():
    assert two_commands() == ["python3 run.py notebooks", "python3 run.py test"]


def test_ci_runs_the_readmes_test_command():
    (pattern,) = re.findall(r"grep -m1 '(.+)' README.md", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    first = next(line for line in README.splitlines() if re.search(pattern, line))
    assert first == two_commands()[1]


EXAMPLES = [line for line in commands(README) if line.startswith(".venv/bin/libragrad ")]


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_command_lines_examples_run_as_printed(line, shared, tmp_path, monkeypatch, capsys):
    """In a folder that has a photo.jpg. The real CLIP and Llama can't be had here: the demo models stand in."""
    from libragrad_minimal import cli, commands
    from libragrad_minimal.photographs import draw_collage

    def loaded(kind, name):
        assert name == commands.REAL[kind]
        return load_pretrained(kind, name) if kind == "vit" else commands.load_demo(kind)

    load_pretrained = commands.load_pretrained
    monkeypatch.setattr(commands, "load_pretrained", loaded)
    monkeypatch.chdir(tmp_path)
    draw_collage(1, ["cat", "coffee"]).image.save("photo.jpg")
    assert cli.main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2, "the photograph, and what was made of it"


def test_the_command_line_is_shown_for_pictures_prompts_and_texts():
    assert [shlex.split(line)[1] for line in EXAMPLES] == ["demo", "image", "clip", "text"]
    assert PROJECT["scripts"] == {"libragrad": "libragrad_minimal.__main__:main"}


def test_conda_users_get_the_same_dependencies():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"] == [
        f"python{PROJECT['requires-python']}",
        "pip",
        {"pip": ["-e .[notebooks,test]"]},
    ]


def test_dependencies_have_lower_bounds_only():
    everything = PROJECT["dependencies"] + EXTRAS["notebooks"] + EXTRAS["test"]
    operators = {spec.operator for requirement in everything for spec in Requirement(requirement).specifier}
    assert operators == {">="}
    assert all(Requirement(requirement).specifier for requirement in everything)


@pytest.mark.parametrize("folder", ["libragrad_minimal", "data", "notebooks", "tests"])
def test_every_import_is_declared(folder):
    requirements = PROJECT["dependencies"] + EXTRAS["notebooks"] + EXTRAS["treated"]
    requirements += EXTRAS["test"] if folder == "tests" else []
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / folder).glob("**/*.py")]
    for path in (ROOT / folder).glob("*.ipynb"):
        code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        sources += [re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE) for source in code]
    assert set().union(*(undeclared(source, requirements) for source in sources)) == set()


def test_an_undeclared_import_is_found_out():
    source = "import os\nimport torch.nn\nfrom captum import attr\nimport PIL"
    assert undeclared(source, PROJECT["dependencies"] + EXTRAS["notebooks"]) == {"captum"}


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_snippet_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(SNIPPETS[0], names)
    assert names["found"].completeness_error < 1e-4 * names["found"].output
    assert Path("cat.png").stat().st_size > 1000


def test_readme_example_runs_and_its_scores_sum_to_the_logit():
    example = SNIPPETS[1]
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    names = {"model": LlamaForCausalLM(config).double().eval(), "token": 7}
    names["embeddings"] = torch.randn(1, 5, 32, dtype=torch.float64)
    exec(example, names)
    assert names["scores"].shape == (1, 5)
    # A Llama has no biases. Its norms compute in float32, whatever the model's own precision.
    torch.testing.assert_close(names["scores"].sum(), names["logit"], rtol=1e-6, atol=0)


GITHUB = """body {margin: 16px; font: 16px/1.5 sans-serif; overflow-wrap: break-word}
img {max-width: 100%} pre {overflow: auto}
table {display: block; width: max-content; max-width: 100%; overflow: auto; border-collapse: collapse}
th, td {padding: 6px 13px; border: 1px solid}"""  # what matters here of github-markdown-css 5.9


@pytest.mark.slow
def test_pictures_are_large_enough_on_githubs_page_on_a_phone(browser, tmp_path):
    nbconvert = pytest.importorskip("nbconvert.filters")
    body = nbconvert.markdown2html(README)
    head = f'<meta charset="utf-8"><base href="{ROOT.as_uri()}/"><style>{GITHUB}</style>'
    (tmp_path / "readme.html").write_text(f"<!doctype html>{head}{body}", encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto((tmp_path / "readme.html").as_uri(), wait_until="load")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    shown = page.evaluate("[...document.images].filter(i => i.src.startsWith('file')).map(i => [i.src, i.clientWidth])")
    page.close()
    assert len(shown) == README.count("](data/") and min(width for _, width in shown) >= 100, shown
