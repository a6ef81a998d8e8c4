"""Lift the functions a notebook defines, so that tests can check them without running its experiments.

notebook = functions_of(NOTEBOOKS / "00_balanced_gradients.ipynb")
notebook.layer_norm(x)
"""

import ast
import json
import linecache
from pathlib import Path
from types import ModuleType

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
LIFTED = (ast.Import, ast.ImportFrom, *DEFINITIONS)


def functions_of(notebook_path: str | Path, **assigned: object) -> ModuleType:
    """A module holding what the top level of the notebook's code cells imports and defines; nothing else of them runs.

    A function that reads a value assigned in the notebook needs it set on the returned module first, and one that has
    such a value as a default needs it here.
    """
    path = Path(notebook_path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    module = ModuleType(path.stem)
    vars(module).update(assigned)
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            _lift(without_magics("".join(cell["source"])), f"{path.name}[cell {number}]", module)
    return module


def _lift(source: str, filename: str, module: ModuleType) -> None:
    wanted = [statement for statement in ast.parse(source, filename).body if isinstance(statement, LIFTED)]
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # so that tracebacks show it
    exec(compile(ast.Module(wanted, type_ignores=[]), filename, "exec"), module.__dict__)  # noqa: S102 our own notebooks


def without_magics(source: str) -> str:
    """A cell's source as plain Python: magics become `pass`, cells of other interpreters nothing."""
    lines = source.splitlines()
    if lines and lines[0].startswith("%%"):
        return ""  # the whole cell belongs to another interpreter
    # `pass` keeps a block whose only line is a magic (`if in_colab: !pip install ...`) parseable
    return "\n".join(_magic_to_pass(line) for line in lines)


def _magic_to_pass(line: str) -> str:
    code = line.lstrip()
    return line[: len(line) - len(code)] + "pass" if code.startswith(("%", "!")) else line
