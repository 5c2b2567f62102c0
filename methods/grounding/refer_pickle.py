"""Reads the pickles in which RefCOCO and its relatives are published, without letting them run anything.

They hold lists, dictionaries, strings and numbers only, for which a pickle names no class. So every name is refused.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, NoReturn

from methods.data.base import DataError


class _PlainUnpickler(pickle.Unpickler):
    """Knows no class and no function, so nothing in the file can be called."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(
            f"it names {module_name}.{global_name}, and only lists, dictionaries, strings and numbers are read"
        )


def read_plain_pickle(content: bytes, where: str) -> Any:
    """Lists, dictionaries, strings and numbers from a pickle of any protocol.

    Strings written by Python 2 come back as the UTF-8 that they were. Raises DataError, with the reason, for
    anything else.
    """
    try:
        value = _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle fails in a dozen ways
        raise DataError(
            f"{where} was not read: {error}. If it comes from the authors of the data set, download it again"
        ) from error
    return _as_utf8(value, where)


def _as_utf8(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return _repaired(value)
    if isinstance(value, dict):
        return {_as_utf8(key, where): _as_utf8(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_utf8(item, where) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise DataError(
        f"{where} holds a {type(value).__name__}; only lists, dictionaries, strings and numbers are read"
    )


def _repaired(text: str) -> str:
    """Bytes of UTF-8 that were read as one character each, as the characters that they are."""
    try:
        return text.encode("latin1").decode("utf-8")
    except UnicodeError:  # it is text already, or was never UTF-8
        return text
