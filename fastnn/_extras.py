"""Libraries that only the application needs (``pip install 'fastnn[app]'``), imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any


class MissingLibraryError(ImportError):
    """A feature was used whose library is not installed; the message says how to install it."""


def require(module: str, feature: str) -> Any:
    """Import ``module``, or raise :class:`MissingLibraryError` naming the ``feature`` that wanted it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingLibraryError(f"{feature} needs fastnn[app]: pip install 'fastnn[app]' ({error})") from error
