"""What `pip install` brings: a wheel with the library and the demo models, which needs torch, numpy and tqdm alone."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import distributions, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from test_notebooks import PROJECT, ROOT

import libragrad_minimal
import libragrad_minimal.cli as cli
from libragrad_minimal.models import DEMOS


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture
def installed(wheel, tmp_path) -> Path:
    """A folder that holds what the wheel holds, to stand first on Python's path."""
    ZipFile(wheel).extractall(tmp_path / "installed")
    return tmp_path / "installed"


def python(installed: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=installed.parent, env=environment, capture_output=True, text=True
    )


def installed_with(requirements: list[str]) -> set[str]:
    """The distributions that pip installs for these requirements, by their canonical names."""
    found: set[str] = set()
    waiting = [Requirement(requirement) for requirement in requirements]
    while waiting:
        name = waiting.pop().name.lower().replace("_", "-")
        if name not in found:
            found.add(name)
            needed = map(Requirement, requires(name) or [])
            waiting += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def take_away_extras(installed: Path) -> None:
    """Make every package unimportable that the library alone doesn't install."""
    there = installed_with(PROJECT["dependencies"])
    needed: set[str] = {"libragrad_minimal", *sys.stdlib_module_names}
    extra: set[str] = set()
    for distribution in distributions():
        kept = distribution.metadata["Name"].lower().replace("_", "-") in there
        modules = (file.parts[0].split(".")[0] for file in distribution.files or [] if file.suffix in (".py", ".so"))
        (needed if kept else extra).update(filter(None, modules))  # none is below "..", where commands lie
    absent = extra - needed
    assert {"PIL", "matplotlib", "timm", "transformers"} <= absent and absent.isdisjoint({"torch", "numpy", "tqdm"})
    # None is how Python itself marks what can't be imported, also for those who ask find_spec.
    (installed / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({sorted(absent)}))\n")


def test_the_wheel_holds_the_library_and_the_demo_models_and_nothing_else(wheel):
    library = [path.relative_to(ROOT).as_posix() for path in (ROOT / "libragrad_minimal").glob("**/*.py")]
    demos = [f"demo_{kind}{suffix}" for kind in DEMOS for suffix in (".safetensors", ".md")]
    data = [
        f"libragrad_minimal/data/{name}"
        for name in [*demos, "circuit_pairs.json", "evidence_questions.json", "prompts.json"]
    ]
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {*library, "libragrad_minimal/py.typed", *data}
    (scripts,) = (name for name in ZipFile(wheel).namelist() if name.endswith("/entry_points.txt"))
    assert b"libragrad = libragrad_minimal.__main__:main" in ZipFile(wheel).read(scripts)


BARE = """
import torch
from torch import nn
from libragrad_minimal import METHODS, attribute, libra_grad
from libragrad_minimal.metrics import deletion, occlude_patches

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        layers = [nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True) for _ in "12"]
        self.blocks = nn.ModuleList(layers)

    def forward(self, pictures):
        tokens = self.patches(pictures).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))

model, pictures = Model().eval(), torch.randn(2, 3, 16, 16, requires_grad=True)
(gradient,) = libra_grad(model(pictures)[:, 1], pictures)
assert gradient.shape == pictures.shape and gradient.any()
results = {method: attribute(model, pictures.detach(), 1, method) for method in METHODS}
assert results["FullGrad"].completeness_error.max() < 1e-5
deletion(model, pictures.detach(), {name: result.scores for name, result in results.items()}, occlude_patches)
"""


def test_the_library_needs_torch_numpy_and_tqdm_alone(installed):
    take_away_extras(installed)
    done = python(installed, "-c", BARE)
    assert done.returncode == 0, done.stderr


def test_the_command_line_without_its_extra_says_so_in_one_sentence(installed):
    take_away_extras(installed)
    done = python(installed, "-m", "libragrad_minimal", "image", "photo.jpg")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "needs click" in line and "pip install 'libragrad_minimal[notebooks]'" in line


@pytest.mark.parametrize(
    "package, arguments",
    [
        ("timm", ["audit", "vit"]),
        ("open_clip", ["audit", "clip"]),
        ("transformers", ["text", "Ben has a red kite.", "--model", "demo"]),
    ],
)
def test_a_command_whose_models_come_from_an_absent_library_says_so(package, arguments, monkeypatch, capsys):
    for name in {package, *(name for name in sys.modules if name.startswith(f"{package}."))}:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"needs {package}" in line and "pip install 'libragrad_minimal[notebooks]'" in line


def test_the_package_has_its_names_and_imports_what_they_need_when_asked():
    ask = """
import pickle, sys
import libragrad_minimal
assert not hasattr(libragrad_minimal, "attributes") and "torch" not in sys.modules
from libragrad_minimal import LIBRA
assert pickle.loads(pickle.dumps(LIBRA)) == LIBRA and "libragrad_minimal.attribution" not in sys.modules
before = set(dir())
from libragrad_minimal import *
assert set(libragrad_minimal.__all__) <= set(dir()) and set(libragrad_minimal.__all__) <= set(dir(libragrad_minimal))
assert pickle.loads(pickle.dumps(attribute)) is attribute is libragrad_minimal.attribution.attribute
assert isinstance(METHODS, dict) and libragrad_minimal.Rules is libragrad_minimal.engine.Rules
"""
    subprocess.run([sys.executable, "-c", ask], cwd=ROOT, check=True)


def test_type_checkers_see_each_name_where_it_is():
    """They read the imports that Python itself passes over."""
    tree = ast.parse((ROOT / "libragrad_minimal" / "__init__.py").read_text(encoding="utf-8"))
    (shown,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    homes = {alias.name: f"libragrad_minimal.{node.module}" for node in shown.body for alias in node.names}
    assert set(homes) == set(libragrad_minimal.__all__)
    for name, home in homes.items():
        assert getattr(libragrad_minimal, name) is getattr(import_module(home), name)


COMPLETE = """
import importlib, pathlib, pkgutil, sys
import torch
import libragrad_minimal
from libragrad_minimal import attribute, libra_grad

home = pathlib.Path(sys.argv[1])
modules = [libragrad_minimal] + [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(libragrad_minimal.__path__, "libragrad_minimal.")
]
assert all(home in pathlib.Path(module.__file__).parents for module in modules)

from libragrad_minimal.models import DATA, VITS, load_demo

assert home in DATA.parents
for kind in ("clip", *VITS):
    loaded, pictures = load_demo(kind), torch.randn(1, 3, 64, 64, requires_grad=True)
    answer = loaded.model.encode_image(pictures) if kind == "clip" else loaded.model(pictures)
    assert libra_grad(answer[:, 0], pictures)[0].any()
llama = load_demo("llama")
words = llama.tokenizer("Ben has a red kite.", return_tensors="pt")["input_ids"]
assert attribute(llama.model, words, 5).completeness_error.max() < 1e-3
"""


@pytest.mark.slow
def test_every_module_of_a_wheel_imports_and_its_demo_models_work(installed):
    done = python(installed, "-c", COMPLETE, str(installed))
    assert done.returncode == 0, done.stderr
