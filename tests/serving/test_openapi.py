"""Requests made from the server's own description, by schemathesis; `make test-openapi`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import httpx2 as httpx
import pytest

from served import Running

SCHEMATHESIS = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or shutil.which(
    "schemathesis"
)

pytestmark = pytest.mark.skipif(
    SCHEMATHESIS is None,
    reason="schemathesis is not installed: make test-openapi has an environment with it",
)

EXAMPLES = 40  # requests of each kind and operation
UNSAID = "positive_data_acceptance"
"""Left out: a schema cannot say that `top_logprobs` want `logprobs`, that a prompt is not empty, or fits."""


def key(running: Running, client: str) -> dict[str, str]:
    """The header that shows a client's key."""
    return {"Authorization": f"Bearer {running.keys[client]}"}


def run(running: Running, client: str, folder: Path, *options: str) -> int:
    """schemathesis with a client's key; its exit status."""
    description = folder / "openapi.json"
    description.write_bytes(
        httpx.get(f"{running.server.root}/openapi.json", headers=key(running, "alice")).content
    )
    found = subprocess.run(
        [
            str(SCHEMATHESIS), "run", str(description), "--url", running.server.root,
            *chain.from_iterable(("-H", f"{name}: {value}") for name, value in key(running, client).items()),
            "--exclude-checks", UNSAID,
            "--max-examples", str(EXAMPLES), "--continue-on-failure", "--generation-deterministic",
            "--suppress-health-check", "all", "--request-timeout", "60", *options,
        ],
        cwd=folder, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    print(found.stdout[-8000:])  # seen where this fails
    assert "generated" in found.stdout
    return found.returncode


@pytest.mark.timeout(1800)
def test_every_answer_is_one_that_the_description_has(running: Running, tmp_path: Path) -> None:
    """No 500, no status or body that is not described, nothing malformed is taken; and the server lives."""
    assert run(running, "alice", tmp_path, "--exclude-path", "/metrics") == 0
    assert run(running, "graph", tmp_path, "--include-path", "/metrics") == 0
    asked = {"model": running.server.name, "prompt": "a", "max_tokens": 1, "temperature": 0}
    url = f"{running.server.url}/completions"
    answer = httpx.post(url, headers=key(running, "alice"), json=asked, timeout=60)
    assert answer.status_code == 200
