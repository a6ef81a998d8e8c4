"""The lifting helper runs imports and definitions of a notebook, and nothing else."""

import json

import pytest
from notebook_functions import functions_of


def write_notebook(path, *sources):
    cells = [{"cell_type": "code", "source": source.splitlines(True)} for source in sources]
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["not = code ("]}, *cells]}))
    return path


def test_lifts_definitions_across_cells_and_runs_nothing_else(tmp_path):
    notebook = functions_of(
        write_notebook(
            tmp_path / "small.ipynb",
            "import math\nraise RuntimeError('an experiment ran')",
            "def circle(radius):\n    return math.pi * square(radius)\n\narea = circle(1)",
            "def square(x):\n    return x * x",
        )
    )
    assert notebook.circle(2) == pytest.approx(12.566370614)
    assert not hasattr(notebook, "area")


def test_magics_are_skipped(tmp_path):
    notebook = functions_of(
        write_notebook(
            tmp_path / "magic.ipynb",
            "%matplotlib inline\nif True:\n    !pip install nothing\ndef one():\n    return 1",
            "%%bash\necho this is not python",
        )
    )
    assert notebook.one() == 1


def test_traceback_shows_the_cells_own_line(tmp_path):
    notebook = functions_of(write_notebook(tmp_path / "fails.ipynb", "def fail():\n    return 1 / 0  # this line"))
    with pytest.raises(ZeroDivisionError) as failure:
        notebook.fail()
    assert "this line" in str(failure.traceback[-1].statement)
    assert "fails.ipynb[cell 1]" in str(failure.traceback[-1].path)
