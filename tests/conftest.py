"""Settings that all tests share."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# ignored in a shell's background job, and so by the children that tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: processes share the cores here

import pytest
from hypothesis import HealthCheck, settings

from sliplm.examples import cache_dir
from sliplm.shares.keysource import find

# the tests' own key file, never the user's; it stays, for the split models in the cache.  Not in a fixture:
# test modules copy the environment when they are imported
os.environ["SLIPLM_KEY_FILE"] = str(cache_dir() / "tests" / "key")
find(None, new=True)  # here, so that no test is warned of a new one

# the ledger of splits is on, and each test and each module's fixture begins with an empty one: they split the
# same few models under one key.  Whoever splits one twice says `i_know`, as a user would
LEDGER = Path(tempfile.mkdtemp(prefix="slip-ledger-"))
os.environ["SLIPLM_LEDGER"] = str(LEDGER)
atexit.register(shutil.rmtree, LEDGER, ignore_errors=True)


# what lasts beside it: anchors of pools, and who was caught lying
STATE = Path(tempfile.mkdtemp(prefix="slip-state-"))
os.environ["SLIPLM_STATE"] = str(STATE)
atexit.register(shutil.rmtree, STATE, ignore_errors=True)


@pytest.fixture(autouse=True)
def empty_ledger() -> Iterator[None]:
    """Forget the splits of the module's fixtures, and then those of the test."""
    shutil.rmtree(LEDGER, ignore_errors=True)
    (STATE / "quarantine.json").unlink(missing_ok=True)
    yield
    shutil.rmtree(LEDGER, ignore_errors=True)


# compiled loops take a second at their first call; examples stay the same from run to run
settings.register_profile(
    "sliplm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sliplm")
