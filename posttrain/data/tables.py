"""Readers of tables: Parquet, and cells separated by commas or tabs."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from posttrain.data.rows import BadRow, Found, bad_row
from posttrain.data.texts import LONGEST_LINE, decode, numbered_lines, too_long
from posttrain.data.unpacking import most_unpacked, reject_bomb
from posttrain.errors import BadInput, reject

ROWS_AT_ONCE = 64
"""Rows of Parquet in memory at a time: few, as each may hold a book."""
VALUE_BYTES = 8
"""Bytes counted for each value of a column of Parquet, which a run length can repeat at no cost."""


# --- Parquet ----------------------------------------------------------------------------------------------------------


def read_parquet(file: BinaryIO, place: str) -> Iterator[Found]:
    """Yield the rows of a table, without the fields that it filled with null.

    Raises BadInput when the file is damaged, or unpacks to more than ``most_unpacked``.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    most, size, index = most_unpacked(Path(file.name)), 0, 0
    try:
        with ParquetFile(file) as table:
            if _declared_size(table.metadata) > most:
                reject_bomb(place, most)
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
                # A dictionary repeats a value at the cost of a number: the table's head does not tell.
                size += sum(_plain(column).nbytes for column in batch.columns)
                if size > most:
                    reject_bomb(place, most)
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield f"{place}[{index}]", {f.name: drop_filled(row[f.name], f.type) for f in batch.schema}
                    index += 1
    except pyarrow.ArrowException as error:
        _reject_unsound(place, error)


def _reject_unsound(place: str, error: Exception) -> NoReturn:
    reject(place, f"is not a sound Parquet file: {str(error).splitlines()[0]}", "Copy or write it again")


def _plain(column: Any) -> Any:
    """Return a column with each of its values, not with numbers of those in a dictionary."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def _declared_size(head: Any) -> int:
    """Return the bytes of all values by the head of the table."""
    groups = (head.row_group(number) for number in range(head.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(max(column.total_uncompressed_size, VALUE_BYTES * column.num_values) for column in columns)


def check_table(path: Path, place: str) -> None:
    """Raise BadInput for a Parquet file without a sound head, which stands at its end: one that was cut has none."""
    import pyarrow
    from pyarrow.parquet import read_metadata

    try:
        read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        _reject_unsound(place, error)


def count_table_rows(path: Path) -> int | None:
    """Return the number of rows by the head of a table; None for a damaged one."""
    import pyarrow
    from pyarrow.parquet import read_metadata

    try:
        return int(read_metadata(path).num_rows)
    except pyarrow.ArrowException:
        return None


def drop_filled(value: Any, kind: Any) -> Any:
    """Return a value of a table without the fields that are null in its objects, at any depth.

    A column of objects has the keys of all its rows, null where a row lacks one. An entry of a list, of a map or of
    JSON is the row's own, even when it is null. ``kind`` is the Arrow type; when it is None, every object is a struct.
    """
    import pyarrow

    if isinstance(value, dict) and (kind is None or pyarrow.types.is_struct(kind)):
        kinds = {} if kind is None else {field.name: field.type for field in kind}
        return {key: drop_filled(item, kinds.get(key)) for key, item in value.items() if item is not None}
    if isinstance(value, dict) and pyarrow.types.is_map(kind):
        return {key: drop_filled(item, kind.item_type) for key, item in value.items()}
    if isinstance(value, list) and (kind is None or hasattr(kind, "value_type")):
        return [drop_filled(item, getattr(kind, "value_type", None)) for item in value]
    return value


# --- Cells ------------------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a file as text, for csv; a fault is kept and the line given as an empty one."""

    def __init__(self, file: BinaryIO, place: str) -> None:
        self._lines, self._place = numbered_lines(file), place
        self.last = 0
        """Number of the last line given."""
        self.fault: BadRow | None = None
        """The first line since ``take_fault`` that is no text."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.last, line = next(self._lines)
        try:
            if len(line) <= LONGEST_LINE:
                return decode(line, self._place, self.last)
            fault = too_long(f"{self._place}:{self.last}", "Put one record on a line")
        except BadInput as error:
            fault = bad_row(error, "encoding")
        self.fault = self.fault or fault
        return "\n"

    def take_fault(self) -> BadRow | None:
        """Return the kept fault, and forget it."""
        fault, self.fault = self.fault, None
        return fault


def _read_cells(file: BinaryIO, place: str, separator: str) -> Iterator[Found]:
    """Yield the rows of cells under the names of the first line; an empty cell is absent.

    Raises:
        BadInput: The first line cannot be read or names a column twice, or a quotation mark is never closed.
    """
    csv.field_size_limit(LONGEST_LINE)  # of the whole process; the default is 128 KiB
    lines = _Lines(file, place)
    rows = csv.reader(lines, delimiter=separator, strict=True)
    names: Sequence[str] | None = None
    while True:
        where = f"{place}:{lines.last + 1}"
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                reject(where, "a quotation mark opens a cell here and is never closed", "Close it, or double it")
            if names is None:
                reject(where, f"cannot be split into cells: {error}")
            yield BadRow(where=where, kind="cells", what=f"cannot be split into cells: {error}")
            continue
        fault = lines.take_fault()
        if names is None:
            names = _names(cells, where, fault, separator)
        elif fault is not None:
            yield fault
        elif len(cells) not in (0, len(names)):
            what = f"has {len(cells)} cells, but the first line names {len(names)} columns"
            yield BadRow(where=where, kind="cells", what=what, fix="Quote cells that hold the separator or a new line")
        elif any(cells):
            yield where, {name: cell for name, cell in zip(names, cells, strict=True) if cell}


def _names(cells: list[str], where: str, fault: BadRow | None, separator: str) -> list[str]:
    if fault is not None:
        raise BadInput(fault.problem())
    names = [cell.strip() for cell in cells]
    if repeated := [name for name in names if names.count(name) > 1]:
        reject(where, f"two columns have the name {repeated[0]!r}", "Give every column a name of its own")
    if not all(names):
        reject(where, "a column has no name", "The first line must name the columns")
    others = {",": ".csv", "\t": ".tsv", ";": ""}
    if len(names) == 1 and (found := next((other for other in others if other != separator and other in names[0]), "")):
        fix = f"Name the file {others[found]}" if others[found] else "Write it with commas"
        reject(where, f"names one column, {names[0]!r}: the cells seem to be separated by {found!r}", fix)
    return names


read_csv = partial(_read_cells, separator=",")
read_tsv = partial(_read_cells, separator="\t")
