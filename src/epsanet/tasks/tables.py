"""Results of images written as they come: CSV, JSON or Parquet, whole or not at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from epsanet._files import atomic_file
from epsanet.data.sources import require

__all__ = ["OUTPUT_SUFFIXES", "PARQUET_ROWS", "Table", "check_output", "write_table"]

OUTPUT_SUFFIXES = (".csv", ".json", ".parquet")
PARQUET_ROWS = 1024
"""Rows of a row group of Parquet: what is kept in memory before it is written."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Table(Generic[T]):
    """How a result becomes rows of a table, or an entry of a JSON list."""

    columns: Mapping[str, type[str] | type[float]]
    """Names, and what they hold; anything may be lacking."""
    rows: Callable[[T], list[dict[str, Any]]]
    """Of a result, for CSV and Parquet; with every column."""
    entry: Callable[[T], dict[str, Any]]
    """Of a result, for JSON."""


def check_output(path: str | Path) -> None:
    """Find out whether a file can be written, before the work that is to be written.

    Raises:
        ValueError: for another suffix than .csv, .json and .parquet, a folder of that name, or when the library for
            Parquet is missing.
    """
    suffix = Path(path).suffix
    if suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"{path} is no format that can be written; end it in {', '.join(OUTPUT_SUFFIXES)}")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; choose another --output")
    if suffix == ".parquet":
        require("pyarrow", "data")


def write_table(path: str | Path, results: Iterable[T], table: Table[T]) -> Iterator[T]:
    """Write results as they come, and pass them on.

    Args:
        path: ends in .csv, .json or .parquet.
        results: to write.
        table: how.

    Raises:
        ValueError: as ``check_output``.
    """
    check_output(path)
    path = Path(path)
    writers: dict[str, Callable[[Path, Iterable[T], Table[T]], Iterator[T]]] = {
        ".csv": _write_csv,
        ".json": _write_json,
        ".parquet": _write_parquet,
    }
    return writers[path.suffix](path, results, table)


def _write_csv(path: Path, results: Iterable[T], table: Table[T]) -> Iterator[T]:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table.columns)
        writer.writeheader()
        for result in results:
            writer.writerows(table.rows(result))
            yield result


def _write_json(path: Path, results: Iterable[T], table: Table[T]) -> Iterator[T]:
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        separator = "[\n"
        for result in results:
            file.write(separator + json.dumps(table.entry(result), ensure_ascii=False))
            separator = ",\n"
            yield result
        file.write("\n]\n" if separator == ",\n" else "[]\n")


def _write_parquet(path: Path, results: Iterable[T], table: Table[T]) -> Iterator[T]:
    import pyarrow
    from pyarrow import parquet

    types = {str: pyarrow.string(), float: pyarrow.float32()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in table.columns.items()])
    with atomic_file(path) as temporary, parquet.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
        waiting: list[dict[str, Any]] = []
        for result in results:
            waiting.extend(table.rows(result))
            while len(waiting) >= PARQUET_ROWS:
                writer.write_table(pyarrow.Table.from_pylist(waiting[:PARQUET_ROWS], schema))
                del waiting[:PARQUET_ROWS]
            yield result
        if waiting:
            writer.write_table(pyarrow.Table.from_pylist(waiting, schema))
