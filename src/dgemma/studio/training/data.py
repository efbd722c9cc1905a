"""Data that was given to the page: kept in folders, as `dgemma.train.data.conversations` reads them.

Works on: files. Knows nothing of: pages, tokens.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from dgemma.errors import DgemmaError
from dgemma.files import atomic_write, make_folder

TABLES = (".jsonl", ".json", ".parquet", ".csv")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif", ".mp4", ".webm", ".mov")
_MOST_CELL = 10_000_000  # characters of one cell of a CSV file


def safe_name(name: str) -> str:
    """A file's name without what could lead elsewhere; raises DgemmaError for a kind that training cannot read."""
    plain = re.sub(r"[^\w.-]+", "-", Path(name.replace("\\", "/")).name).lstrip(".-")
    suffix = Path(plain).suffix.lower()
    if not plain or suffix not in (*TABLES, *PICTURES):
        raise DgemmaError(f"{name}: training reads {', '.join(TABLES)}, and pictures that these name")
    return plain


def source_in(folder: Path) -> str:
    """What a recipe says of a folder of uploaded files: its only table, or the folder.

    A CSV file becomes JSONL. Raises DgemmaError where there is no table.
    """
    for path in sorted(folder.glob("*.csv")):
        rows_of_csv(path, path.with_suffix(".jsonl"))
        path.unlink()
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLES]
    if not tables:
        raise DgemmaError("there are pictures only: add the JSONL or CSV file that says what is asked about them")
    return str(tables[0] if len(tables) == 1 and tables[0].name != "metadata.jsonl" else folder)


def rows_of_csv(path: Path, out: Path) -> int:
    """Write a CSV file's rows as JSONL, empty cells left out; how many there are.

    Raises DgemmaError naming the line for what is no table in UTF-8.
    """
    count = 0
    csv.field_size_limit(_MOST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file, atomic_write(out) as beside, \
                beside.open("w", encoding="utf-8") as written:
            sample = file.read(8192)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=_delimiter(sample))
            for row in reader:
                if None in row:
                    raise DgemmaError(f"{path.name}, line {reader.line_num}: has more cells than the first line has "
                                      "names; texts with commas in them stand in quotes")
                written.write(json.dumps({name: cell for name, cell in row.items() if cell}, ensure_ascii=False) + "\n")
                count += 1
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DgemmaError(f"{path.name}: cannot be read as CSV in UTF-8 ({error})") from error
    return count


def new_folder(place: Path, name: str) -> Path:
    """A folder for the files of one upload, named after the first of them."""
    stem, number = Path(safe_name(name)).stem, 1
    while (folder := place / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return make_folder(folder)


def _delimiter(sample: str) -> str:
    """The character between cells: that which is most frequent in the first line."""
    first = sample.splitlines()[0] if sample else ""
    return max(",;\t", key=first.count)
