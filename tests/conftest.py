"""Settings that all tests share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does, before torch is loaded

from hypothesis import HealthCheck, settings

from sliplm.examples import cache_dir

# the tests' own key file, never the user's; it stays, for the split models in the cache.  Not in a fixture:
# test modules copy the environment when they are imported
os.environ["SLIPLM_KEY_FILE"] = str(cache_dir() / "tests" / "key")

# compiled loops take a second at their first call; examples stay the same from run to run
settings.register_profile(
    "sliplm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sliplm")
