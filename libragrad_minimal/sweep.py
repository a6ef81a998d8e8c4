"""Does it work on every model of a library? The engine's verdict and attribute()'s on each, in a table.

    python -m libragrad_minimal sweep timm --pattern "vit_tiny*"

Every model runs in a process of its own, bounded in memory and time, and its row is on disk before the next one's: a
sweep that is interrupted goes on where it was. zoo.py makes the models.
"""

from __future__ import annotations

import csv
import importlib.metadata
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from tqdm import tqdm

from .attribution import Attribution, attribute
from .engine import UnsupportedOperation, additive_constants, libra_grad, observed
from .families import Inputs, call, explains_picture_for_texts, name_of
from .files import only_one, whole_file
from .layout import first_tokens, layout_of
from .readout import chosen_rows, explained, kept_rows, rows_of_answer
from .small_timm import TOO_LARGE, twins
from .streams import find_streams, removed, topological
from .zoo import Case, NotBuilt, build

COLUMNS = (
    "model kind engine engine_detail engine_error attribute attribute_detail attribute_error grid seconds megabytes "
    "library torch libragrad_minimal"
).split()
DISTRIBUTIONS = {
    "timm": "timm",
    "transformers": "transformers",
    "open_clip": "open_clip_torch",
    "treated": "transformers",
}
IMPORTED_FIRST = {  # once for all processes: what takes seconds
    "timm": ["timm"],
    "transformers": ["transformers.models.auto.modeling_auto", "transformers.models.llava.modeling_llava"],
    "open_clip": ["open_clip"],
    "treated": ["transformers.models.auto.modeling_auto"],
}
COMPLETE, REFUSED, RAW, WRONG = "complete", "refused", "raw exception", "wrong"
INCOMPLETE = "incomplete, and says so"
NOT_BUILT = "not built"
SURE = 1e-3  # relative to the output
CORNER_CELLS = 5  # how many cells of a map are checked
MIXED_CELLS = 2  # how many of them may be off behind a whole tower, whose attention has mixed the patches


# ---- one model -------------------------------------------------------------------------------------------------------


def verdicts(library: str, name: str) -> dict[str, Any]:
    """One row, without versions: is libra_grad inside observed() complete, and attribute(FullGrad+)?"""
    started = time.perf_counter()
    try:
        case = build(library, name)
    except NotBuilt as error:
        return {"kind": name.split()[0] if " " in name else "", "engine": NOT_BUILT, "engine_detail": one_line(error)}
    row: dict[str, Any] = {"kind": case.kind}
    number: list[Tensor] = []
    for whose, judge in (("engine", judge_engine), ("attribute", judge_attribute)):
        try:
            row |= {f"{whose}{column}": value for column, value in judge(case, number).items()}
        except Exception as error:
            if out_of_memory(error):  # says nothing of the judge
                raise
            row |= {whose: REFUSED if is_refusal(error) else RAW, f"{whose}_detail": told(error)}
    row["grid"] = row.pop("attribute_grid", "")
    row["seconds"] = f"{time.perf_counter() - started:.1f}"
    return row


def judge_engine(case: Case, number: list[Tensor]) -> dict[str, Any]:
    """libra_grad inside observed(): do inputs and constants, times their gradients, add up to the output?"""
    output, error = incompleteness(case)
    number.append(output)
    if not error < SURE:  # is it rounding?
        with in_double(case) as double:
            error = incompleteness(double)[1]
    return {"": COMPLETE if error < SURE else WRONG, "_error": f"{error:.1e}"}


def incompleteness(case: Case) -> tuple[Tensor, float]:
    """The explained numbers (B,), and by how much the attributions of one of them miss it, relative to it."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1].clone()  # the model may change it in place

    inputs = Inputs(case.inputs)
    for name, tensor in inputs.tensors.items():
        if tensor.is_floating_point():
            inputs = inputs.replaced(name, leaf(tensor))
    embeddings = word_embeddings(case.model) if inputs.words is not None else []

    def embed(module, args, result):
        return leaf(result) if isinstance(result, Tensor) else (leaf(result[0]), *result[1:])

    hooks = (module.register_forward_hook(embed) for module in embeddings)
    with removed(hooks), observed():
        output = explained_number(case, inputs)
    first = output[0]
    below = set(topological([first.grad_fn])) if first.grad_fn is not None else set()
    leaves = [leaf for leaf in leaves if get_gradient_edge(leaf).node in below]
    if not leaves:
        raise ValueError("nothing that the model is given reaches its answer")
    constants = additive_constants(first, leaves)
    total = torch.zeros((), dtype=torch.float64)
    gradients = libra_grad(first, [*leaves, *constants], allow_unused=True)
    for tensor, gradient in zip([*leaves, *constants], gradients, strict=True):
        if gradient is not None:
            total += (tensor.detach().double() * gradient.double()).sum()
    whole = first.detach().double()
    return output.detach(), float((total - whole).abs() / whole.abs().clamp(min=1e-12))


def word_embeddings(model: Any) -> list[nn.Module]:
    """The modules that embed token ids with the weight that the model names; else every embedding."""
    try:
        named = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        named = getattr(model, "token_embedding", None)
    if not isinstance(named, nn.Module) or isinstance(named, nn.ModuleList):
        return [module for module in model.modules() if isinstance(module, nn.Embedding)]
    weight = getattr(named, "weight", None)
    tied = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is weight and m is not named]
    return [named, *tied]


def explained_number(case: Case, inputs: Inputs) -> Tensor:
    rows = chosen_rows(case.model, inputs, case.target, case.readout)
    kept, rows = kept_rows(case.model, inputs, rows)
    answer = call(case.model, inputs, kept)
    if rows is not None:
        number = None if kept is None else len(kept)
        rows = rows_of_answer(name_of(case.model), inputs, answer, case.readout, rows, number)
    target = case.target.to(answer_type(answer)) if isinstance(case.target, Tensor) else case.target
    return explained(case.model, answer, target, case.readout, rows, inputs.samples)


def answer_type(answer: Any) -> torch.dtype:
    return answer.dtype if isinstance(answer, Tensor) else torch.get_default_dtype()


@contextmanager
def in_double(case: Case) -> Iterator[Case]:
    """The case in double precision, in which what is left of an error isn't rounding."""
    target = in_precision(case.target, torch.float64) if isinstance(case.target, Tensor) else case.target
    try:
        yield replace(case, model=case.model.double(), inputs=in_precision(case.inputs, torch.float64), target=target)
    finally:
        case.model.float()


def in_precision(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    return {name: in_precision(value, dtype) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def judge_attribute(case: Case, number: list[Tensor]) -> dict[str, Any]:
    """attribute(FullGrad+): is the explained number the model's, are the scores complete, does the map lie right?"""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = attribute(case.model, case.inputs, case.target, readout=case.readout)
    error = relative_error(result)
    said = next((str(w.message) for w in told if "is not complete" in str(w.message)), "")
    if not error < SURE and not said:  # is it rounding, of scores that cancel?
        with in_double(case) as double:
            error = relative_error(attribute(double.model, double.inputs, double.target, readout=double.readout))
    row = {"": COMPLETE, "_error": f"{error:.1e}", "_grid": " x ".join(map(str, result.grid or ()))}
    if not error < SURE:
        row |= {"": INCOMPLETE if said else WRONG, "_detail": said or "incomplete, and doesn't say so"}
    if not result.scores.isfinite().all():
        row |= {"": WRONG, "_detail": "scores that aren't finite"}
    if number and not torch.allclose(number[0], result.output, rtol=1e-3, atol=1e-4):
        row |= {"": WRONG, "_detail": f"explains {result.output.tolist()}, and the model says {number[0].tolist()}"}
    if result.grid is not None and (fault := misplaced(case)):
        row |= {"": WRONG, "_detail": fault}
    return row


def relative_error(result: Attribution) -> float:
    return float((result.completeness_error / result.output.abs().clamp(min=1e-12)).max())


def misplaced(case: Case) -> str:
    """A fault of the map, found as one would by hand: change the pixels of one cell, see which token moves most. It may
    be the next one, where patches overlap."""
    inputs = Inputs(case.inputs, about_picture=explains_picture_for_texts(case.model))
    streams = find_streams(case.model, inputs)
    inputs = replace(inputs, about_picture=inputs.about_picture or streams.of_picture)
    name, start = inputs.picture, first_tokens(case.model, inputs, streams.blocks)
    layout = layout_of(case.model, inputs, streams.blocks, start)
    if name is None or layout.grid is None or layout.place is None and layout.picture is None:
        return ""
    picture = inputs.tensors[name]
    if len(layout.grid) != 2 or picture.dim() != 4:
        return ""
    rows, columns = layout.grid
    height, width = picture.shape[-2:]
    faults = []
    generator = torch.Generator().manual_seed(1)
    cells = [(0, columns - 1), (rows - 1, 0), (rows // 2, columns // 2), (rows // 3, 0), (0, columns // 3)]
    for row, column in cells[:CORNER_CELLS]:
        changed = picture.clone()
        part = changed[..., row * height // rows : max((row + 1) * height // rows, row * height // rows + 1), :]
        part = part[
            ..., column * width // columns : max((column + 1) * width // columns, column * width // columns + 1)
        ]
        part += 3 * torch.randn(part.shape, generator=generator).to(part)
        moved = first_tokens(case.model, inputs.replaced(name, changed), streams.blocks) - start
        felt = layout.pick(layout.axes.arrange(moved).norm(dim=-1))
        felt = felt if layout.picture is None else felt.gather(1, layout.picture)
        found = divmod(int(felt[0].argmax()), columns)
        if max(abs(found[0] - row), abs(found[1] - column)) > 1:
            faults.append(f"changing cell {(row, column)} of {rows} x {columns} moves {found}")
    few = layout.picture is not None and len(faults) <= MIXED_CELLS
    return "" if few else "; ".join(faults)


def is_refusal(error: Exception) -> bool:
    """Did this package refuse, in a sentence of its own? Not if it says that the model itself fails: it ran before."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    ours = place is not None and Path(place.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)
    return ours and error.__cause__ is None and isinstance(error, ValueError | UnsupportedOperation | ArithmeticError)


def told(error: Exception) -> str:
    text = one_line(error)
    return text if is_refusal(error) else f"{type(error).__name__}: {text}"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


# ---- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """What the process of one model may use."""

    seconds: float = 300
    gigabytes: float = 6


@dataclass
class Run:
    name: str
    process: Any
    answers: Connection
    until: float


def sweep(library: str, names: Sequence[str], path: Path, processes: int = 1, bounds: Bounds | None = None) -> None:
    """Appends a row for every model that has none yet in the table at `path`, of the versions installed.

    Raises:
        BlockingIOError: another sweep is at work on that table. FileExistsError: what is there is no table of a sweep.
    """
    with only_one(path):
        table = Table(path, library)
        left = [name for name in names if name not in table.done]
        same = twins([*table.judged, *left]) if library == "timm" else {}
        fill(table, library, [name for name in left if name not in same], processes, bounds or Bounds())
        too_large = {name for name, row in table.done.items() if TOO_LARGE in row.get("engine_detail", "")}
        fill(table, library, [name for name in left if same.get(name) in too_large], processes, bounds or Bounds())
        for name in set(left) - table.done.keys():
            table.add({"model": name} | row_of_twin(table.done[same[name]]))


def row_of_twin(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model that is another one but for its sizes, and so needs no verdict of its own."""
    if row["engine"] != NOT_BUILT:
        return {"kind": row["kind"], "engine": NOT_BUILT, "engine_detail": f"is {row['model']} but for its sizes"}
    return {name: row.get(name, "") for name in ("kind", "engine", "engine_detail")}


def fill(table: Table, library: str, left: list[str], processes: int, bounds: Bounds) -> None:
    processes_of_models = context(library)
    running: list[Run] = []
    with tqdm(total=len(left), desc=library, disable=None) as bar:
        try:
            while left or running:
                while left and len(running) < processes:
                    running.append(begun(processes_of_models, library, left.pop(0), bounds))
                bar.set_postfix_str(", ".join(run.name for run in running))
                soonest = min(run.until for run in running)
                wait([run.answers for run in running], timeout=max(0.0, min(1.0, soonest - time.monotonic())))
                for run in list(running):
                    row = outcome(run, bounds)
                    if row is not None:
                        running.remove(run)
                        table.add({"model": run.name} | row)
                        bar.update()
        finally:
            for run in running:
                run.process.kill()


def context(library: str) -> Any:
    """Processes that begin with everything imported, where the system can do that."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["__main__", __name__, *IMPORTED_FIRST[library]])
    return made


@contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Inside, Ctrl-C waits; processes that begin inside never hear of it: this one ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begun(processes: Any, library: str, name: str, bounds: Bounds) -> Run:
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=work, args=(library, name, bounds, theirs), daemon=True)
    with ctrl_c_later():
        process.start()
    theirs.close()
    return Run(name, process, ours, time.monotonic() + bounds.seconds)


def outcome(run: Run, bounds: Bounds) -> dict[str, Any] | None:
    """The row of a model that is done, or whose time is up; None while it works."""
    if not run.answers.poll():
        if time.monotonic() < run.until:
            return None
        run.process.kill()
        run.process.join()
        return {"engine": "not run", "engine_detail": f"took more than {bounds.seconds:g} s"}
    try:
        row = run.answers.recv()
    except EOFError:
        run.process.join()
        row = {"engine": "not run", "engine_detail": f"its process ended with status {run.process.exitcode}"}
    run.process.join()
    return row


def work(library: str, name: str, bounds: Bounds, answers: Connection) -> None:
    """What the process of one model does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a terminal tells all of a job: end without a word
    silence()
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limit_memory(bounds)
    try:
        row = verdicts(library, name)
    except Exception as error:  # the library's own, when it makes a model: a row must come of it all the same
        too_large = {"engine": "not run", "engine_detail": f"needs more than {bounds.gigabytes:g} GB"}
        row = too_large if out_of_memory(error) else not_made(error)
    answers.send(row | {"megabytes": megabytes()})


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "allocate memory" in str(error)


def not_made(error: Exception) -> dict[str, Any]:
    return {"engine": NOT_BUILT, "engine_detail": f"{type(error).__name__}: {one_line(error)}"}


def silence() -> None:
    """Libraries that speak of what they made."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def limit_memory(bounds: Bounds) -> None:
    """What a process allocates beyond this raises MemoryError; and it ends if the sweep itself was killed."""
    if sys.platform == "win32":
        return
    import resource

    most = held() + int(bounds.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    seconds = int(bounds.seconds) + 60
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def held() -> int:
    """Bytes of data that the process has already, of the libraries; 0 where the system doesn't tell."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmData")), 0)
    return 0


def megabytes() -> int | str:
    if sys.platform == "win32":
        return ""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform != "darwin" else 2**20)


# ---- the table -------------------------------------------------------------------------------------------------------


class Table:
    """A CSV file that grows by whole rows; half a row, of a sweep that was killed, is taken away."""

    def __init__(self, path: Path, library: str) -> None:
        self.path = path
        self.versions = {
            "library": f"{library} {version(DISTRIBUTIONS.get(library, 'transformers'))}",
            "torch": torch.__version__,
            "libragrad_minimal": version("libragrad_minimal"),
        }
        head, lines = ",".join(COLUMNS).encode(), path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and lines[0].rstrip() != head:
            raise FileExistsError(f"{path} is there already and is no table of a sweep: choose another name, -o")
        if not lines or not lines[-1].endswith(b"\n"):
            whole = b"".join(line for line in lines if line.endswith(b"\n"))
            with whole_file(path) as unfinished:
                unfinished.write_bytes(whole or head + b"\n")
        ours = (row for row in read(path) if row["library"] == self.versions["library"])
        self.done: dict[str, Mapping[str, Any]] = {row["model"]: row for row in ours}

    @property
    def judged(self) -> list[str]:
        """The models that have a row, those with a verdict first."""
        return sorted(self.done, key=lambda name: not self.done[name]["attribute"])

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n").writerow(row | self.versions)
            file.flush()
            os.fsync(file.fileno())
        self.done[row["model"]] = dict.fromkeys(COLUMNS, "") | row


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(rows: Iterable[dict[str, str]]) -> str:
    """How many of each kind: complete, refused, raw exceptions and wrong ones, of the models that could be made."""
    made = [row for row in rows if row["attribute"]]
    lines = [" " * 18 + "models  engine complete  attribute complete  refused  incomplete  raw  wrong"]
    for kind in [*sorted({row["kind"] for row in made}), "all"]:
        some = [row for row in made if kind in (row["kind"], "all")]
        engine, verdict = (Counter(row[column] for row in some) for column in ("engine", "attribute"))
        share = f"{verdict[COMPLETE]} ({verdict[COMPLETE] / max(len(some), 1):.0%})"
        others = f"{verdict[REFUSED]:9}{verdict[INCOMPLETE]:12}{verdict[RAW]:5}{verdict[WRONG]:7}"
        lines.append(f"{kind:18}{len(some):6}{engine[COMPLETE]:17}{share:>20}{others}")
    return "\n".join(lines)
