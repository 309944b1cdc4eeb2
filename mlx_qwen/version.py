"""Versions of this package and of others."""

from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def installed(package: str) -> str | None:
    """The version of a package by its name on PyPI; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
