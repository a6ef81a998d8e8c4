"""The tests on three sets of packages, each in an environment of its own; what follows `--` goes to pytest.

.venv/bin/nox -s lowest -- -m "not slow"    # one of them: colab, newest, lowest

Each downloads about 3 GB, most of it PyTorch with CUDA; UV_TORCH_BACKEND=cpu leaves that out.
"""

import nox

EVERYTHING = ".[notebooks,test]"
# What Colab had installed in August 2026, of what we use.
COLAB = (
    "torch==2.11.* torchvision==0.26.* transformers==5.15.* timm==1.0.28 numpy==2.1.* matplotlib==3.10.* "
    "ipython==7.34.* ipywidgets==7.7.1"
).split()
PIP = ["--seed"]  # in the environment, which uv leaves out: some tests install with it

nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True


@nox.session(python="3.13", venv_params=PIP)
def colab(session: nox.Session) -> None:
    """What notebooks meet in Colab."""
    tested(session, COLAB)


@nox.session(python="3.13", venv_params=PIP)
def newest(session: nox.Session) -> None:
    """What `pip install` gives today."""
    tested(session, [])


@nox.session(python="3.10", venv_params=PIP)
def lowest(session: nox.Session) -> None:
    """The oldest of everything that pyproject.toml allows."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    bounds = [*project["dependencies"], *extras["notebooks"], *extras["test"]]
    tested(session, [bound.replace(">=", "==") for bound in bounds])


def tested(session: nox.Session, pins: list[str]) -> None:
    session.install("-e", EVERYTHING, *pins)
    session.run("pytest", *session.posargs)
