"""Run all tests in two processes side by side, which two cores finish sooner than one process would.

    python tests/side_by_side.py

What the first says is seen as it comes, what the second says when the first is done.  The exit status is that
of whichever fails.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
FIRST = (  # half the time
    "arithmetic", "cli", "fuzz", "masks", "network", "parties", "protocol", "security", "shares",
)  # fmt: skip


def halves() -> tuple[list[str], list[str]]:
    """The folders of FIRST, and all other folders and files with tests."""
    found = sorted(path for path in TESTS.iterdir() if path.is_dir() or path.match("test_*.py"))
    first = [str(path) for path in found if path.name in FIRST]
    return first, [str(path) for path in found if path.name not in FIRST and path.name != "__pycache__"]


def main() -> int:
    """Run both; their worst exit status."""
    pytest = [sys.executable, "-m", "pytest"]
    first, second = halves()
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen([*pytest, *second], stdout=said, stderr=subprocess.STDOUT) as other:
            try:
                status = subprocess.run([*pytest, *first], check=False).returncode
                other.wait()
            except BaseException:
                other.terminate()
                raise
        said.seek(0)
        sys.stdout.write(said.read())
    return max(abs(status), abs(other.returncode))


if __name__ == "__main__":
    sys.exit(main())
