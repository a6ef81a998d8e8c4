"""Everything that is stored here, with its SHA-256, the command that made it, and the versions it was made with.

python data/manifest.py    # after a file was made anew: takes its sum, and the versions installed here, into the list

The list is data/manifest.csv; tests/test_manifest.py holds the files against it. A checkpoint's card has its sum, too.
"""

import csv
import hashlib
import re
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIST = FOLDER / "manifest.csv"
KINDS = {".safetensors", ".npz", ".parquet", ".csv", ".json", ".png"}
BY_HAND = "written by hand"
LIBRARIES = ("torch", "timm", "transformers", "open_clip_torch")


def stored() -> list[str]:
    """The names of all files that a command made, or somebody wrote."""
    return sorted(path.name for path in FOLDER.iterdir() if path.suffix in KINDS and path != LIST)


def read() -> dict[str, dict[str, str]]:
    """File -> its row: file, sha256, command, made with."""
    with LIST.open(encoding="utf-8", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def sha256(name: str) -> str:
    return hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()


def renew() -> list[str]:
    """Take into the list what has changed; returns the files of which it isn't known which command made them."""
    rows, here = read(), {name: sha256(name) for name in stored()}
    versions = f"{date.today()}: " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    for name, digest in here.items():
        row = rows.setdefault(name, {"file": name, "sha256": "", "command": "", "made with": ""})
        if row["sha256"] != digest:
            row |= {"sha256": digest, "made with": "" if row["command"] == BY_HAND else versions}
            print(f"{name}: {row['made with'] or BY_HAND}")
            state_in_card(name, digest)
    with LIST.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["file", "sha256", "command", "made with"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in here)
    return [name for name in here if not rows[name]["command"]]


def state_in_card(name: str, digest: str) -> None:
    card = (FOLDER / name).with_suffix(".md")
    if card.exists():
        text = card.read_text(encoding="utf-8")
        card.write_text(re.sub(r"(SHA-256\*\*: `)\w+", rf"\g<1>{digest}", text), encoding="utf-8")


if __name__ == "__main__":
    if unknown := renew():
        sys.exit(f"Say in {LIST.name} which command makes {', '.join(unknown)}, or '{BY_HAND}'.")
