"""A module is tested in the file of its name, a notebook in that of its number, or in the one that is named here."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
ELSEWHERE = {  # a module without a file of its own -> the file whose tests call for it
    "__main__": "test_packaging.py",
    "added_constants": "test_attribution.py",
    "attention_methods": "test_methods.py",
    "attention_maps": "test_methods.py",
    "audits": "test_cli.py",
    "averaged": "test_methods.py",
    "batches": "test_benchmark.py",
    "beginnings": "test_circuits.py",
    "block_tokens": "test_circuits.py",
    "cams": "test_methods.py",
    "commands": "test_cli.py",
    "demo": "test_cli.py",
    "demo_vits": "test_models.py",
    "explanations": "test_cli.py",
    "gradient_methods": "test_methods.py",
    "small_timm": "test_sweep.py",
    "special_configs": "test_sweep.py",
    "hiding": "test_dropping.py",
    "hovering": "test_explorer.py",
    "made_inputs": "test_sweep.py",
    "outputs": "test_cli.py",
    "padding": "test_attribution.py",
    "pages": "test_cli.py",
    "parts": "test_circuits.py",
    "progress": "test_cli.py",
    "recording": "test_attribution.py",
    "report": "test_benchmark.py",
    "scores": "test_attribution.py",
    "sentences": "test_download.py",
    "shades": "test_pictures.py",
    "small_configs": "test_sweep.py",
    "treatments": "test_families.py",
    "zoo": "test_sweep.py",
    "engine/functions": "engine/test_observed.py",
    "engine/leaves": "engine/test_observed.py",
    "engine/nodes": "engine/test_operations.py",
    "engine/rewritten": "engine/test_observed.py",
}


def test_every_module_and_notebook_has_its_tests():
    package = ROOT / "libragrad_minimal"
    modules = [path.relative_to(package) for path in package.rglob("*.py") if path.name != "__init__.py"]
    own = {module.with_suffix("").as_posix(): module.with_name(f"test_{module.name}").as_posix() for module in modules}
    own |= {path.stem: f"test_notebook_{path.stem[:2]}.py" for path in ROOT.glob("notebooks/*.ipynb")}
    untested = {name: file for name, file in own.items() if not (TESTS / ELSEWHERE.get(name, file)).is_file()}
    assert not untested, "write these files, or name in ELSEWHERE the one that tests them"
    assert not set(ELSEWHERE) - set(own), "these modules are gone"
    assert not [name for name in ELSEWHERE if (TESTS / own[name]).is_file()], "these have a file of their own"
