"""Profiles of the property tests: ``fixed`` for every run of the suite, ``fuzz`` for ``make fuzz``."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

# A suite that draws at random passes or fails by luck, and one with deadlines by the load of the machine.
STEADY: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("fixed", derandomize=True, **STEADY)
settings.register_profile("fuzz", derandomize=False, **STEADY)
settings.load_profile("fixed")
