"""What other libraries cost beside the same plain gradient: Captum, pytorch-grad-cam, and lxt in a venv of its own.

lxt 2.1 doesn't import with transformers 5. It runs in a venv with transformers 4.52, which takes everything else, torch
first of all, from the environment that made it:

    python tests/benchmarks/peers.py --setup .venv-lxt

lxt patches transformers' classes and is meant to stay. So that it can alternate with unpatched passes of the same model
in one process, what it replaced (five attributes) is noted and put in place around its own passes only; in that venv
speed.py has this file time plain gradient, libra_grad and lxt in turn.
"""

import argparse
import importlib
import json
import os
import subprocess
import venv
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

from cases import CASES, QUICK_CASES, Case
from measuring import Effort, Pass, compare, print_rows, print_skipped

ROOT = Path(__file__).resolve().parents[2]
LXT_VENV = ROOT / ".venv-lxt"
LXT_NEEDS = ["transformers==4.52.*", "tqdm"]


# ---- Captum and pytorch-grad-cam, on a ViT that classifies one image ----


def vision_peers(case: Case) -> dict[str, tuple[str, str, Callable[[], Pass]]]:
    """Name of a row -> the package to import, the one to install, and what makes the pass."""
    return {
        "Captum InputXGradient": ("captum", "captum", lambda: input_x_gradient(case)),
        "Captum IntegratedGradients, 50 steps": ("captum", "captum", lambda: integrated_gradients(case)),
        "pytorch-grad-cam GradCAM": ("pytorch_grad_cam", "grad-cam", lambda: grad_cam(case)),
    }


def compare_vision_peers(case: Case, effort: Effort) -> None:
    for name, (package, distribution, build) in vision_peers(case).items():
        if find_spec(package) is None:
            print_skipped(name, f"not installed: pip install {distribution}")
            continue
        # Fifty steps are fifty passes, which smooth out what disturbs a single one.
        pairs = max(2, effort.pairs // 5) if "50 steps" in name else effort.pairs
        passes = {"plain": plain(case), name: build()}
        print_rows(compare(passes, replace(effort, pairs=pairs)))


def plain(case: Case) -> Pass:
    import torch

    return lambda: case.explain(torch.autograd.grad)


def input_x_gradient(case: Case) -> Pass:
    from captum.attr import InputXGradient

    return lambda: InputXGradient(case.model).attribute(case.inputs, target=0)


def integrated_gradients(case: Case) -> Pass:
    """In chunks of ten (1.2 GB on a ViT-B); all fifty steps at once, Captum's default, take five times the memory."""
    from captum.attr import IntegratedGradients

    chunk = 10 * len(case.inputs)
    return lambda: IntegratedGradients(case.model).attribute(
        case.inputs, target=0, n_steps=50, internal_batch_size=chunk
    )


def grad_cam(case: Case) -> Pass:
    """As its documentation has it for ViTs: the last block's first norm, patches laid out as a grid."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    height, width = case.model.patch_embed.grid_size
    targets = [ClassifierOutputTarget(0)] * len(case.inputs)

    def grid(tokens):
        return tokens[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def run():
        """Its hooks must not stay for the plain passes, nor what it leaves in .grad; removal is cheap."""
        with GradCAM(case.model, [case.model.blocks[-1].norm1], reshape_transform=grid) as cam:
            maps = cam(case.inputs, targets)
        case.model.zero_grad()
        case.inputs.grad = None
        return maps

    return run


# ---- lxt, on a Llama ----


class Patch:
    """What a function replaced in some classes and modules: taken out at once, put in place for as long as wanted."""

    def __init__(self, targets: list, patch: Callable[[], None]) -> None:
        before = [dict(vars(target)) for target in targets]
        patch()
        self.replaced = [
            (target, name, old[name], new)
            for target, old in zip(targets, before, strict=True)
            for name, new in vars(target).items()
            if name in old and old[name] is not new
        ]
        self.take_out()

    def take_out(self) -> None:
        for target, name, old, _ in self.replaced:
            setattr(target, name, old)

    @contextmanager
    def in_place(self):
        for target, name, _, new in self.replaced:
            setattr(target, name, new)
        try:
            yield
        finally:
            self.take_out()


def attn_lrp_patch() -> Patch:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lxt misses zennit, which it uses for vision models only
        efficient = importlib.import_module("lxt.efficient")
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    targets = list(importlib.import_module("lxt.efficient.models").get_default_map(llama))
    return Patch(targets, lambda: efficient.monkey_patch(llama))


def lxt_passes(case: Case) -> dict[str, Pass]:
    import torch

    from libragrad_minimal import ATTN_LRP, libra_grad

    patch = attn_lrp_patch()

    def patched():
        with patch.in_place():
            return case.explain(torch.autograd.grad)

    passes = {
        "plain": plain(case),
        "libra_grad, transformers 4.52": lambda: case.explain(libra_grad),
        "libra_grad, ATTN_LRP": lambda: case.explain(libra_grad, rules=ATTN_LRP),
        "lxt AttnLRP": patched,
    }
    # The patch is in place where it should be, and nowhere else: both give the same method, and plain isn't it.
    (plain_gradient,), (ours,), (theirs,) = passes["plain"](), passes["libra_grad, ATTN_LRP"](), patched()
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() <= 1e-4 * scale, "lxt and libra_grad with ATTN_LRP disagree"
    assert (plain_gradient - theirs).abs().max() > 1e-3 * scale, "lxt's patch changes nothing"
    return passes


def compare_lxt(label: str, frozen: bool, threads: int, effort: Effort) -> None:
    """What runs in lxt's venv; see run_lxt."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    case = (CASES | QUICK_CASES)[label](effort.device)
    case.freeze(frozen)
    print_rows(compare(lxt_passes(case), effort))


def run_lxt(folder: Path, label: str, frozen: bool, threads: int, effort: Effort) -> None:
    """Has the venv's own Python print the rows of one case."""
    python = venv_python(folder)
    if not python.exists():
        here = Path(__file__).relative_to(ROOT)
        print_skipped("lxt AttnLRP", f"no venv in {folder}: python {here} --setup {folder}")
        return
    order = dict(label=label, frozen=frozen, threads=threads, effort=asdict(effort))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    run = subprocess.run([python, __file__, "--compare", json.dumps(order)], env=environment)
    if run.returncode:
        print_skipped("lxt AttnLRP", f"{python} failed; what it said is on stderr")


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def set_up(folder: Path) -> None:
    """A venv with lxt and its transformers. The link to what is installed here comes last on its path and is laid last,
    so that its own packages win and pip doesn't see ours."""
    import torch

    venv.create(folder, with_pip=True, clear=True)
    python = [venv_python(folder), "-I"]  # without what PYTHONPATH adds
    pip = [*python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *LXT_NEEDS], check=True)
    subprocess.run([*pip, "--no-deps", "lxt==2.1"], check=True)  # most of what it asks for isn't used with a Llama
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([*python, "-c", purelib], check=True, capture_output=True, text=True).stdout.strip()
    beside = Path(torch.__file__).parents[1]
    (Path(packages) / "beside.pth").write_text(f"{beside}\n", encoding="utf-8")
    # If it can't be imported, that had better show now than in a benchmark.
    subprocess.run([*python, "-W", "ignore", "-c", "import lxt.efficient"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--setup", type=Path, metavar="FOLDER", help="make the venv for lxt, anew if it exists")
    what.add_argument("--compare", help=argparse.SUPPRESS)  # how run_lxt calls this file
    options = parser.parse_args()
    if options.setup:
        return set_up(options.setup)
    order = json.loads(options.compare)
    compare_lxt(**(order | {"effort": Effort(**order["effort"])}))


if __name__ == "__main__":
    main()
