"""Where results are written: every place is checked before the work, and nothing that is there is written over."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from .files import whole_file

KINDS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".pdf", ".svg")  # of figures
HTML = (".html", ".htm")


def places(named: str, sources: Sequence[str], kinds: Sequence[str], suffix: str) -> list[Path]:
    """The files that a name means: the file of this name, or one for each source in the folder of this name.

    Args:
        named: a folder's is that of one that is there, ends in a slash, or has no extension.
        sources: what the files in a folder are named after.
        kinds: the extensions that a file may have.
        suffix: the extension of files in a folder.
    Raises:
        ValueError: no name, or one file's for several sources.
    """
    path = Path(named).expanduser()
    if named.strip() in ("", "-") or path.name.lower() in kinds:
        raise ValueError(
            f"{named!r} is no name to write to: give a file's, such as {sources[0]}{suffix}, or a folder's"
        )
    if path.is_dir() or named.endswith(("/", os.sep)) or not path.suffix:
        return one_each(sources, path, suffix)
    if len(sources) == 1:
        return [path]
    if path.suffix.lower() in kinds:
        raise ValueError(f"{len(sources)} pictures can't all be written to {path}: name a folder, {path.stem}")
    return one_each(sources, path, suffix)


def checked(paths: Iterable[Path], kinds: Sequence[str], overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raises if one of these files can't be written, or may not be.

    Args:
        paths: of the files.
        kinds: the extensions that they may have, in small letters with the dot; capitals will do.
        overwrite: may they be there already?
        inputs: files that are read; they count as being there, by whatever path.
    Raises:
        ValueError: another extension. FileExistsError: it is there already, or an input. OSError: its folder can't be
            written to, or it is a folder itself.
    """
    read = {path.resolve() for path in inputs}
    for path in paths:
        if path.suffix.lower() not in kinds:
            raise ValueError(f"can't write {path}: choose a name that ends in {', '.join(kinds)}")
        if path.is_dir():
            raise IsADirectoryError(f"can't write {path}: it is a folder")
        if path.resolve() in read and not overwrite:
            raise FileExistsError(f"{path} is the input itself: choose another name, or --overwrite it")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} is there already: choose another name with -o, or --overwrite it")
        writable(path)


def writable(path: Path) -> None:
    """Raises OSError if no file could be written to `path`, the folders of which needn't be there yet."""
    whole, there = path.resolve(), None
    try:
        there = next(parent for parent in whole.parents if parent.exists())
        with TemporaryDirectory(dir=there) as trial:  # else names that are too long would show after the work
            place = Path(trial) / whole.relative_to(there)
            place.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(place) as beside:
                beside.touch()
    except OSError as error:
        where = f" ({there})" if there else ""
        raise OSError(f"can't write {path}: {error.strerror or error}{where}") from error


def one_each(sources: Sequence[str], folder: Path, suffix: str) -> list[Path]:
    """A file in `folder` for each source, named after it; a number tells those apart that are named alike."""
    taken: set[str] = set()
    result = []
    for source in sources:
        stem = Path(source.partition("?")[0] if "://" in source else source).stem or "picture"
        name, number = stem, 1
        while name.lower() in taken:  # some file systems don't tell capitals from small letters
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        result.append(folder / f"{name}{suffix}")
    return result
