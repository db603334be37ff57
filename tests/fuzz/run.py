"""Run fuzz targets under atheris (libFuzzer), one after the other, each for a time; the last line is JSON.

    .venv/bin/pip install 'atheris>=3'          # CPython 3.11; `pip install -e '.[fuzz]'` does the same
    .venv/bin/python tests/fuzz/run.py --target protocol --seconds 600

A finding is written to tests/fuzz/corpus/<target>/, where every test run tries it again from then on.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
TARGETS = sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py"))


def seeds(name: str) -> list[bytes]:
    """The seeds that a target makes, and its corpus."""
    made: list[bytes] = importlib.import_module(f"fuzz_{name}").seeds()
    return made + [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


def child(name: str, seconds: int, work: Path) -> None:
    """Hand the process to libFuzzer; it does not come back."""
    import atheris  # type: ignore[import-not-found]

    for module in (
        "sliplm.arithmetic.kernels",
        "sliplm.shares.splitting",
    ):  # numba cannot compile what atheris instruments
        importlib.import_module(module)
    with atheris.instrument_imports(include=["sliplm"]):
        target = importlib.import_module(f"fuzz_{name}")
    for number, seed in enumerate(seeds(name)):
        (work / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={target.MAX_LEN}",
        f"-artifact_prefix={CORPUS}/{name}/",
    ]
    options += ["-print_final_stats=1", "-timeout=30", "-rss_limit_mb=4096", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *options, str(work)], target.target)
    atheris.Fuzz()


def run(name: str, seconds: int) -> dict[str, Any]:
    """Fuzz one target in a process of its own, and count."""
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    before = set((CORPUS / name).iterdir())
    with tempfile.TemporaryDirectory(prefix="sliplm-fuzz-") as work:
        command = [sys.executable, __file__, "--child", "--target", name, "--seconds", str(seconds)]
        done = subprocess.run(
            [*command, "--work", work], capture_output=True, text=True, errors="replace", check=False
        )
        last = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
    executed = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
    findings = sorted(path.name for path in set((CORPUS / name).iterdir()) - before)
    if done.returncode and not findings:
        sys.exit(f"{name}: the fuzzer ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    if findings:
        sys.stderr.write(done.stdout[-3000:] + done.stderr[-2000:])
    edges, features, kept = map(int, last[-1]) if last else (0, 0, 0)
    return {
        "target": name, "seconds": seconds, "executions": int(executed[-1]) if executed else None,
        "edges": edges, "features": features, "kept": kept, "findings": findings,
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS, action="append", help="may be repeated; all if left out")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent / "support")]
    if importlib.util.find_spec("atheris") is None:
        sys.exit("atheris is not installed: run `.venv/bin/pip install 'atheris>=3'` with Python 3.11")
    if given.child:
        child(given.target[0], given.seconds, given.work)
    results = []
    for name in given.target or TARGETS:
        results.append(run(name, given.seconds))
        print(json.dumps(results[-1]), flush=True)
    print(json.dumps({"targets": results, "findings": sum(len(result["findings"]) for result in results)}))
    sys.exit(any(result["findings"] for result in results))


if __name__ == "__main__":
    main()
