"""The three sets of packages are those that CI and the workflows ask for."""

import re
import sys
from pathlib import Path

import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = ROOT / ".github" / "workflows"


def sessions() -> dict[str, str]:
    """Name -> Python, of noxfile.py."""
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    return {name: python for python, name in re.findall(r'@nox\.session\(python="([\d.]+)".*\)\ndef (\w+)\(', text)}


def test_the_weekly_workflow_runs_them_all():
    job = yaml.safe_load((WORKFLOWS / "weekly.yml").read_text(encoding="utf-8"))["jobs"]["sets-of-packages"]
    assert set(job["strategy"]["matrix"]["session"]) == set(sessions())
    (pythons,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert set(pythons.split()) == set(sessions().values())


def test_ci_takes_the_others_in_turn():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    names, pythons = (re.search(rf"{what}=\((.+?)\)", text)[1].split() for what in ("sets", "pythons"))
    assert dict(zip(names, pythons, strict=True)) == {
        name: python for name, python in sessions().items() if name != "newest"
    }


def test_the_lowest_set_has_the_lowest_python_and_the_workflow_begins_with_it():
    assert PROJECT["requires-python"] == ">=" + sessions()["lowest"]
    matrix = yaml.safe_load((WORKFLOWS / "tests.yml").read_text(encoding="utf-8"))["jobs"]["tests"]["strategy"][
        "matrix"
    ]
    assert matrix["python-version"][0] == sessions()["lowest"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
