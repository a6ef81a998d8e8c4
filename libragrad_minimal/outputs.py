"""Where results are written: every place is checked before the work, and nothing that is there is written over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

KINDS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".pdf", ".svg")  # of figures


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
        writable(path.parent)


def writable(folder: Path) -> None:
    """Raises OSError if no file could be written into a folder, which needn't be there yet."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"can't write into {folder}: {error.strerror or error} ({there})") from error


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
