"""The tables between markers in README.md: ``<!-- benchmarks:avx2-training -->`` ... ``<!-- /benchmarks -->``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fastnn._files import atomic_path

README = Path(__file__).resolve().parent.parent / "README.md"
TABLES = ("avx512-training", "avx512-operators", "avx2-training", "avx2-operators", "gpu")

START = re.compile(r"<!-- benchmarks:([\w-]+) -->\n")
END = "<!-- /benchmarks -->"


class MarkerError(ValueError):
    """The README's markers are absent, unknown or not closed."""


def rewrite(text: str, tables: Mapping[str, str]) -> str:
    """`text` with the content of marked sections replaced by their tables; other sections stay.

    Raises:
        MarkerError: there is no section for one of the tables, one is not closed, or it is for a table that does not
            exist.
    """
    parts, position, found = [], 0, set()
    for start in START.finditer(text):
        name = start[1]
        end = text.find(END, start.end())
        following = START.search(text, start.end())
        if end < 0 or (following and following.start() < end):
            raise MarkerError(f"expected {END} after {start[0].strip()}, got none")
        if name not in TABLES:
            raise MarkerError(f"expected one of {', '.join(TABLES)} in {start[0].strip()}, got {name}")
        content = f"{tables[name].strip()}\n" if name in tables else text[start.end() : end]
        parts += [text[position : start.end()], content]
        position = end
        found.add(name)
    for name in tables:
        if name not in found:
            raise MarkerError(f"expected <!-- benchmarks:{name} --> and {END} around the table, got neither")
    return "".join([*parts, text[position:]])


def rewritten(readme: Path, tables: Mapping[str, str]) -> str:
    """What the file would hold; MarkerError, which names it, where its markers are wrong."""
    try:
        return rewrite(readme.read_text(encoding="utf-8"), tables)
    except MarkerError as error:
        raise MarkerError(f"{readme}: {error}") from error


def write_tables(readme: Path, tables: Mapping[str, str]) -> None:
    """Puts the tables into the file."""
    changed = rewritten(readme, tables)
    with atomic_path(readme) as temporary:
        temporary.write_text(changed, encoding="utf-8")
