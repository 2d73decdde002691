"""Tables and notes, as Markdown or on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Table:
    """A title and rows of text, the first of them the header."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def markdown(parts: Iterable[Table | str]) -> str:
    """Tables, and notes as items of a list."""
    lines: list[str] = []
    for part in parts:
        if isinstance(part, Table):
            lines += ["", *_table_lines(part), ""]
        else:
            lines.append(f"- {_escaped(part)}")
    return "\n".join(lines).rstrip() + "\n"


def print_parts(parts: Iterable[Table | str], console: Console) -> None:
    """The same with rich."""
    from rich.table import Table as RichTable
    from rich.text import Text

    for part in parts:
        if not isinstance(part, Table):
            console.print(Text(part))
            continue
        table = RichTable(title=Text(part.title, "bold"), title_justify="left")
        for number, name in enumerate(part.header):
            table.add_column(Text(name), justify="right" if number else "left")
        for row in part.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)


def rich_console(out: TextIO) -> Console:
    """Where tables are printed; model names are never taken for markup."""
    from rich.console import Console

    return Console(file=out, markup=False, highlight=False, emoji=False)


def _table_lines(table: Table) -> list[str]:
    lines = [f"**{_escaped(table.title)}**", ""] if table.title else []
    lines.append("| " + " | ".join(table.header) + " |")
    lines.append("|---" + "|---:" * (len(table.header) - 1) + "|")
    lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in table.rows]
    return lines


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
