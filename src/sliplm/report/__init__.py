"""Reports as one HTML file with pictures: `page` for the file, `figures` for the pictures.

May import `examples` and what is below it.  Begin with `page`.
They need jinja2, and matplotlib of the extra `report`; `need` says so before hours of work are spent.
"""

from __future__ import annotations

from importlib.util import find_spec

from sliplm.errors import ReportError

LIBRARIES = ("jinja2", "matplotlib")


def need(*modules: str) -> None:
    """Check that the libraries of a report, or `modules`, are installed.

    Raises:
        ReportError: one is missing.
    """
    missing = [name for name in modules or LIBRARIES if find_spec(name) is None]
    if missing:
        raise ReportError(
            f"a report needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed; in the clone: pip install -e '.[report]'"
        )
