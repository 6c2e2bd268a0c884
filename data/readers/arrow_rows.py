"""Rows of Arrow batches as dictionaries, without the nulls that a format with a schema adds.

In parquet and Arrow all structs of a column have the same fields. So a message without `tool_calls`, or a call without
one of the arguments that another call has, comes back with that field and null, and an explicit null cannot be told
from it. Such a field is dropped: it is absent. The keys of a map are data, not schema, so a map keeps its nulls.
"""

from typing import Any

import pyarrow as pa

from data.readers.rows import make_malformed

NO_PYTHON_VALUE = (ValueError, ArithmeticError, LookupError, pa.ArrowException)
"""Errors of values that Python cannot hold: text that is not UTF-8, a time of the year 30,000 or of an unknown zone."""


def read_batch(batch: pa.RecordBatch) -> list[dict]:
    """Return the rows of a batch, without null fields of structs.

    A row with a value that Python cannot hold is the record of a malformed row.
    """
    try:
        return _convert(batch)
    except NO_PYTHON_VALUE:
        return [_convert_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _convert_row(row: pa.RecordBatch) -> dict:
    try:
        return _convert(row)[0]
    except NO_PYTHON_VALUE as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "a value that Python cannot hold"
        return make_malformed(reason, str(error))


def _convert(batch: pa.RecordBatch) -> list[dict]:
    columns = [(field.name, field.type, _needs_change(field.type)) for field in batch.schema]
    rows = batch.to_pylist()
    for name, kind, changes in columns:
        if changes:
            for row in rows:
                row[name] = _drop_absent(row[name], kind)
    return rows


def _needs_change(kind: pa.DataType) -> bool:
    """Return whether a type holds a struct or a map at any depth."""
    if pa.types.is_dictionary(kind) or isinstance(kind, pa.BaseExtensionType):
        return _needs_change(_get_storage(kind))
    if _is_list(kind):
        return _needs_change(kind.value_type)
    return pa.types.is_struct(kind) or pa.types.is_map(kind)


def _drop_absent(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_dictionary(kind) or isinstance(kind, pa.BaseExtensionType):
        return _drop_absent(value, _get_storage(kind))
    if pa.types.is_struct(kind):
        return {
            field.name: _drop_absent(value[field.name], field.type) for field in kind if value[field.name] is not None
        }
    if pa.types.is_map(kind):  # pyarrow gives pairs
        return {key: _drop_absent(item, kind.item_type) for key, item in value}
    if _is_list(kind) and _needs_change(kind.value_type):
        return [_drop_absent(item, kind.value_type) for item in value]
    return value


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or any(
        check(kind)
        for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)
    )


def _get_storage(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind.storage_type
