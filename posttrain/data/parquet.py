"""Parquet rows as the same Python values that JSON lines give, read in batches within one row group at a time.

Large, dictionary and plain column types read the same. Batches never cross row groups, since nested dictionary columns
cannot be joined over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.bad_rows import BadRows
from posttrain.data.strict_json import RowError, check_surrogates
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.data.shards import Span, Wanted

PARQUET_BATCH = 64


def parquet_rows(path: Path, on_bad: str, bad: BadRows, wanted: Wanted, span: Span | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a parquet file as (row number from 1, dict), one batch in memory; see `read_shard`."""
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return
    number = span.before if span else 0
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=False) as table:
            for group in range(*span[:2]) if span else range(table.num_row_groups):
                for batch in table.iter_batches(batch_size=PARQUET_BATCH, row_groups=[group]):
                    if wanted.over:
                        return
                    numbers = wanted.upto(number + 1, number + batch.num_rows)
                    if len(numbers) == batch.num_rows:
                        yield from _batch_rows(batch, numbers, path, on_bad, bad)
                    elif numbers:
                        some = batch.take(pyarrow.array([at - number - 1 for at in numbers]))
                        yield from _batch_rows(some, numbers, path, on_bad, bad)
                    number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"damaged or unreadable parquet after row {number}: {error}", where=str(path), fix="fetch or write it again"
        ) from None


def _batch_rows(batch: Any, numbers: Sequence[int], path: Path, on_bad: str, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in zip(numbers, _to_rows(batch), strict=True):
        try:
            row = {name: plain(value) for name, value in row.items()}
            check_surrogates(row)
        except RowError as error:
            bad.take(error, f"{path}:{number}", on_bad)
        else:
            yield number, row


def _to_rows(batch: Any) -> list[dict[str, Any]]:
    import pyarrow

    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except (UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(f"a column cannot be read as rows: {error}") from None


def plain(value: Any) -> Any:
    """A column value as JSON has it: dates as ISO text, bytes as UTF-8 text, decimals as text.

    Unset fields of a struct are dropped: a struct column holds every field for every row, with null where a row never
    had it, and only by dropping them do rows read the same from parquet as from JSON lines.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise RowError("not UTF-8", "a binary column is not UTF-8 text", "drop the column or decode it") from None
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        raise RowError("not finite", f"a column holds {value}", "write null or a finite number")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
