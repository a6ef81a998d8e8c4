"""Does it tell the truth? Every method and rule set on a data set, measured picture by picture into one tidy table.

    python -m libragrad_minimal benchmark --model vit --data scenes:200 -o measured

Work is cut into batches that don't depend on each other; each leaves a file of its own, written beside and renamed. So
a run that was killed goes on where it was, and several processes or machines that share the folder do every n-th batch
each: `accelerate launch --num_processes 4 -m libragrad_minimal benchmark ...` (on CPUs with `--multi_gpu`, which is how
accelerate starts several processes at all). Whoever finds all batches done writes the table.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pandas as pd
import torch
from tqdm import tqdm

from .batches import Settings, check_methods, measured, subject
from .examples import Example, open_data
from .files import only_one, whole_file
from .models import DEMOS, LoadedModel, kind_of, load_demo, load_pretrained

KEYS = ["example", "method", "rules", "protocol", "metric"]

# ---- a run -----------------------------------------------------------------------------------------------------------


def run(settings: Settings, folder: Path, device_map: str | None = None) -> Path | None:
    """Measure what isn't measured yet; the table's path, or None while other processes still work.

    Args:
        settings: what to measure.
        folder: for the table and the parts it is put together from; made if it isn't there.
        device_map: "auto" spreads a language model over all devices (transformers and accelerate do it).
    Raises:
        ValueError: settings that don't fit, another run's folder, a method that this model can't have; each before
            anything is measured. BlockingIOError: this part of the work is being done by another process.
    """
    settings.check()
    number, of, device = place_among_processes()
    of_model = subject(load(settings.model, device, device_map))
    examples = spread(open_data(settings.data, of_model.loaded), settings.count)
    settings = settings.for_data(examples)
    batches = [examples[start : start + settings.batch] for start in range(0, len(examples), settings.batch)]
    asked = described(settings, examples)
    refuse_other_run(folder, asked)
    mine = [index for index in range(number, len(batches), of) if not part(folder, index).exists()]
    if mine:
        check_methods(of_model, examples, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder / f"process {number}"), one_thread_each() as threads:
        with whole_file(folder / "settings.json") as beside:
            beside.write_text(json.dumps(asked, indent=1), encoding="utf-8")
        on_a_cpu = device.type == "cpu" and device_map is None
        settings = replace(settings, threads=(settings.threads or threads) if on_a_cpu else 1)
        for index in tqdm(mine, f"{settings.data} ({number + 1} of {of})" if of > 1 else settings.data, disable=None):
            torch.manual_seed(settings.seed + index)
            write(measured(of_model, batches[index], settings).assign(**versions()), part(folder, index))
    if not all(part(folder, index).exists() for index in range(len(batches))):
        return None
    return put_together(folder, settings, len(batches))


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Inside, no operation is split among threads: their number would show in its last digits. Yields that number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def place_among_processes() -> tuple[int, int, torch.device]:
    """Which process of how many this is, as accelerate and torchrun say it, and its device."""
    number, of, local = (int(os.environ.get(name, default)) for name, default in PLACE.items())
    if torch.cuda.is_available():
        return number, of, torch.device("cuda", local % torch.cuda.device_count())
    return number, of, torch.device("cpu")


PLACE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def load(name: str, device: torch.device, device_map: str | None = None) -> LoadedModel:
    """A demo by its kind, or a public model by its library's name for it."""
    if device_map is not None and name in DEMOS:
        raise ValueError(f"device_map spreads language models over devices; the demo {name} is too small for that")
    loaded = load_demo(name) if name in DEMOS else load_pretrained(kind_of(name), name, device_map)
    if device_map is None:
        loaded.model.to(device)
    loaded.model.requires_grad_(False)
    return loaded


def spread(examples: Sequence[Example], count: int | None) -> list[Example]:
    """`count` of them at equal distances, since data sets are sorted by class."""
    if count is None or count >= len(examples):
        return list(examples)
    return [examples[place * len(examples) // count] for place in range(count)]


def described(settings: Settings, examples: Sequence[Example]) -> dict[str, Any]:
    """What a folder's settings.json says, as JSON gives it back."""
    named = "\n".join(example.name for example in examples)
    told = asdict(settings) | {"examples": len(examples), "names": crc32(named.encode())}
    del told["threads"]  # another machine may have more
    return json.loads(json.dumps(told))


def refuse_other_run(folder: Path, asked: dict[str, Any]) -> None:
    file = folder / "settings.json"
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name in asked if there.get(name) != asked[name]]
        if different:
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(different)}; there "
                f"{', '.join(str(there.get(name)) for name in different)}): choose another folder, or remove it"
            )
    elif folder.exists() and (not folder.is_dir() or not all(map(is_left_behind, folder.iterdir()))):
        raise ValueError(f"{folder} isn't empty and holds no run of this benchmark: choose another folder")


def is_left_behind(file: Path) -> bool:
    """By a run that was killed before it had said what it measures."""
    return file.suffix in (".lock", ".unfinished")


def part(folder: Path, index: int) -> Path:
    return folder / "parts" / f"{index:05d}.parquet"


def write(table: pd.DataFrame, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    with whole_file(file) as beside:
        table.to_parquet(beside, index=False)


def put_together(folder: Path, settings: Settings, batches: int) -> Path:
    """One table of all parts, with the settings in columns beside the versions that measured each."""
    rows = pd.concat([pd.read_parquet(part(folder, index)) for index in range(batches)], ignore_index=True)
    about = {
        name: str(value) for name, value in asdict(settings).items() if name in ("model", "data", "target", "seed")
    }
    for name, value in (about | {"explained": settings.explain}).items():
        rows[name] = pd.Categorical([value] * len(rows), [value])
    for name in versions():
        noted = rows[name].fillna("") if name in rows else ""  # our first version didn't note them with each part
        rows[name] = pd.Series(noted, rows.index).astype("category")
    for name in KEYS:
        rows[name] = rows[name].astype("category")
    write(rows, folder / "table.parquet")
    return folder / "table.parquet"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    named = {"timm": "timm", "transformers": "transformers", "open_clip": "open_clip_torch"}
    found = {name: version(distribution) for name, distribution in named.items()}
    return found | {
        "torch": torch.__version__,
        "libragrad_minimal": version("libragrad_minimal"),
        "python": platform.python_version(),
    }


# ---- what came out ---------------------------------------------------------------------------------------------------


def read_table(folder: Path) -> pd.DataFrame:
    file = folder / "table.parquet"
    if not file.is_file():
        raise ValueError(f"{folder} holds no table of a finished benchmark")
    return pd.read_parquet(file)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard error and number of examples for each method, rules, protocol and metric."""
    values = table[table["metric"] != "skipped"].astype({"value": float})
    grouped = values.groupby(KEYS[1:], observed=True, sort=False)["value"]
    return grouped.agg(mean="mean", error="sem", examples="count").reset_index()


def skipped(table: pd.DataFrame) -> list[str]:
    return table.loc[table["metric"] == "skipped", "note"].tolist()


def compared(first: pd.DataFrame, second: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Paired differences, first less second, over the examples that both have: mean, standard error, number, and how
    many standard errors the mean is away from zero."""
    pairs = first.merge(second, on=["example", *by], suffixes=("", " of the second"))
    pairs["difference"] = pairs["value"].astype(float) - pairs["value of the second"].astype(float)
    grouped = pairs.groupby(list(by), observed=True, sort=False)["difference"]
    result = grouped.agg(difference="mean", error="sem", examples="count").reset_index()
    return result.assign(**{"in standard errors": result["difference"].abs() / result["error"]})


def compare(first: str, second: str, folder: Path) -> pd.DataFrame:
    """Two runs of one table, "FullGrad+ libra" and "FullGrad+ plain"; or the tables of two folders."""
    if Path(first).is_dir() and Path(second).is_dir():
        tables = [read_table(Path(name)) for name in (first, second)]
        first_values, second_values = (table[table["metric"] != "skipped"] for table in tables)
        return compared(first_values, second_values, KEYS[1:])
    table = read_table(folder)
    return compared(chosen(table, first), chosen(table, second), ["protocol", "metric"])


def chosen(table: pd.DataFrame, run: str) -> pd.DataFrame:
    names = (table["method"].astype(str) + " " + table["rules"].astype(str)).str.strip()
    if not (names == run).any():
        known = ", ".join(name for name in names.unique() if name)
        raise ValueError(f"the table has no run {run!r}; it has {known}")
    return table[(names == run) & (table["metric"] != "skipped")]
