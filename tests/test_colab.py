"""The notebooks' set-up cell in an environment like Colab's: fresh, with what Colab has and without what it lacks."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = "https://github.com/libragrad/libragrad-minimal"
# Of what we use, Colab has no more than this not (googlecolab/backend-info, pip-freeze.gpu.txt of June 2026).
LACKING = {"open_clip_torch", "ftfy", "gguf", "libragrad_minimal"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="Colab is a Linux, and links need rights on Windows"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="there is no repository to clone"),
]


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder of links to the installed packages that Colab has, outside of any environment: pip adds, and can't
    change them."""
    folder = tmp_path_factory.mktemp("packages")
    lacking = set()
    for name in LACKING:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        lacking |= {file.parts[0] for file in files}
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name not in lacking:
            (folder / entry.name).symlink_to(entry)
    return folder


class Colab:
    """A machine of Colab's: its Python with its packages, its disk, and the repository where GitHub is."""

    def __init__(self, folder: Path, packages: Path, repository: str):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "python"], check=True)
        (stub := folder / "stub" / "google" / "colab").mkdir(parents=True)
        (stub / "__init__.py").touch()
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = folder / "python" / "lib" / version / "site-packages"
        (site / "colab.pth").write_text(f"{packages}\n{folder / 'stub'}\n")
        self.content = folder / "content"
        self.content.mkdir()
        self.python, self.repository = folder / "python" / "bin" / "python", repository

    def run(self, code: str, **environment: str) -> subprocess.CompletedProcess:
        git = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{self.repository}.insteadOf"}
        git["GIT_CONFIG_VALUE_0"] = REPOSITORY
        everything = {**os.environ, **git, **environment}
        everything.pop("PYTHONPATH", None)
        command = [self.python, "-c", f"import google.colab\n{code}"]
        return subprocess.run(command, env=everything, cwd=self.content, capture_output=True, text=True)

    def cell(self, notebook: nbformat.NotebookNode) -> str:
        source = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
        assert source.count('"/content/') == 1
        return source.replace('"/content/', f'"{self.content}/')

    def versions(self) -> dict[str, str]:
        code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
        return json.loads(self.run(code).stdout)


def imports(notebook: nbformat.NotebookNode) -> str:
    """The import statements of all its cells."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    tree = ast.parse("\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in code.splitlines()))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(ast.unparse(node) for node in found if "google.colab" not in ast.unparse(node))


@pytest.fixture
def needs_pypi(packages):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", packages.parent, "open_clip_torch"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("PyPI can't be reached, and the cell installs what Colab lacks from there")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_set_up_cell_installs_what_is_missing_and_nothing_else(path, tmp_path, packages, needs_pypi):
    colab = Colab(tmp_path, packages, ROOT.as_uri())
    notebook = nbformat.read(path, as_version=4)
    before = colab.versions()
    assert before.keys() >= {"torch", "numpy", "timm", "transformers"} and before.keys().isdisjoint(LACKING)

    cell = colab.cell(notebook)
    done = colab.run(cell)
    assert done.returncode == 0, done.stderr
    assert (colab.content / "libragrad-minimal" / "libragrad_minimal" / "__init__.py").exists()
    after = colab.versions()
    assert {name: after.get(name) for name in before} == before
    assert {"open_clip_torch"} <= after.keys() - before.keys() <= LACKING

    # Once more, in this kernel and in the next: nothing is fetched, and all that the notebook imports is there.
    done = colab.run(f"{cell}\n{cell}\n{imports(notebook)}", PIP_NO_INDEX="1", GIT_ALLOW_PROTOCOL="none")
    assert done.returncode == 0, done.stderr
    assert colab.versions() == after


def test_a_clone_that_fails_stops_the_cell(tmp_path, packages):
    colab = Colab(tmp_path, packages, (tmp_path / "nowhere").as_uri())
    done = colab.run(colab.cell(nbformat.read(NOTEBOOKS[0], as_version=4)) + "\nprint('went on')")
    assert done.returncode != 0 and done.stdout == ""
    assert "not appear to be a git repository" in done.stderr and "CalledProcessError" in done.stderr.splitlines()[-1]
    assert list(colab.content.iterdir()) == []


class Hub(ThreadingHTTPServer):
    """In place of the hub: it tells how large its models are and hands out none, or refuses to."""

    def __init__(self, refuses: bool):
        super().__init__(("127.0.0.1", 0), Answer)
        self.refuses = refuses
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        clips = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        names = clips if "CLIP" in self.path else ["model.safetensors"]
        about = {"id": "a/b", "siblings": [{"rfilename": name, "size": 1_720_000_000} for name in names]}
        about["safetensors"] = {"parameters": {"F32": 430_000_000}, "total": 430_000_000}
        status, headers = 200, {}
        if self.server.refuses:
            about, status, headers = {"error": "log in"}, 401, {"X-Error-Code": "GatedRepo"}
        elif not self.path.startswith("/api/models/"):
            about, status, headers = {}, 404, {"X-Error-Code": "EntryNotFound"}
        content = json.dumps(about).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *about):
        pass


LOADING = {  # what the cell loads without a GPU, and what is said to be smaller
    "01_llama3_token_attribution": ("HuggingFaceTB/SmolLM2-135M-Instruct", "llama"),
    "02_clip_text_prompted_regions": ("ViT-B-16/laion2b_s34b_b88k", "clip"),
    "03_vit_class_discrimination": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "vit"),
}
NO_MEMORY = """
import open_clip, timm, torch, transformers
from libragrad_minimal import models

def filled(*names, **options):
    raise torch.OutOfMemoryError("CUDA out of memory.\\nTried to allocate 3 GiB.")

models.config_of_weights = transformers.AutoTokenizer.from_pretrained = lambda *names, **options: None
open_clip.create_model_and_transforms = timm.create_model = filled
transformers.AutoModelForCausalLM.from_pretrained = filled
"""


@pytest.mark.parametrize("refuses", [True, False], ids=["401", "no memory"])
@pytest.mark.parametrize("stem", LOADING)
def test_the_cell_that_loads_a_model_ends_in_one_sentence(stem, refuses, tmp_path):
    """With the libraries' own ways of asking the hub, and what they make of its answer."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert "load_pretrained(" in code[2]
    code = ["import os", "IN_COLAB = True", code[1], *([] if refuses else [NO_MEMORY]), code[2]]
    hub = Hub(refuses)
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    settings |= {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LIBRAGRAD"))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(code)], env=environment | settings, capture_output=True, text=True
        )
    finally:
        hub.shutdown()
    name, kind = LOADING[stem]
    *before, last = done.stderr.splitlines()
    if refuses:
        assert last.startswith(f"OSError: the hub answered 401 to {name}") and "hf auth login" in last
        assert last.endswith(f'open to all is load_demo("{kind}")')
    else:
        told = [line for line in before if line.startswith(f"{name}: 1.7 GB to download, once; in memory its weights")]
        assert len(told) == 1, done.stderr
        assert last.endswith(
            f"{name} doesn't fit: there isn't enough memory; the next smaller choice is load_demo(\"{kind}\")"
        )
