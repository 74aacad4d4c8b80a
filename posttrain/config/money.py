"""Amounts of money or of time, as a recipe writes them, and the prices of devices in conf/prices.yaml."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Any

from posttrain.config.paths import shipped
from posttrain.errors import nearest

HOURS = "hours"
SIGNS = {"$": "USD", "€": "EUR", "£": "GBP"}
LENGTHS = {"second": 1 / 3600, "sec": 1 / 3600, "s": 1 / 3600, "minute": 1 / 60, "min": 1 / 60, "m": 1 / 60} | {
    "hour": 1.0, "hr": 1.0, "h": 1.0, "day": 24.0, "d": 24.0,
}  # fmt: skip
"""Hours by the unit of a time."""
CURRENCIES = {"dollar": "USD", "euro": "EUR", "pound": "GBP"}
"""Currency by its English name, which a message mends."""
EXAMPLES = "Write money with its currency in three letters, such as 5 USD, or a time, such as 2 hours or 90 minutes"


@dataclass(frozen=True, kw_only=True)
class Amount:
    """An amount of money, or of time."""

    value: float
    """Money, or hours."""
    unit: str
    """A currency in three letters, or HOURS."""

    @property
    def is_time(self) -> bool:
        """True for hours."""
        return self.unit == HOURS

    def __str__(self) -> str:
        if not self.is_time:
            return f"{self.value:,.2f} {self.unit}"
        for name, hours in (("hours", 1.0), ("minutes", 1 / 60)):
            if self.value >= hours:
                return f"{self.value / hours:,.3g} {name}"
        return f"{self.value * 3600:,.3g} seconds"


def amount(text: Any) -> Amount | None:
    """Return the amount that a text names, above 0; None for any other."""
    words = re.findall(r"[\d.,_]+|[^\W\d_]+|[$€£]", str(text))
    if len(words) != 2 or "".join(words) != re.sub(r"\s", "", str(text)):
        return None
    number, unit = sorted(words, key=lambda word: not word[0].isdigit() and word[0] not in ".,")
    try:
        value = float(number.replace(",", "").replace("_", ""))
    except ValueError:
        return None
    if not isfinite(value) or value <= 0:
        return None
    length = LENGTHS.get(unit.lower().removesuffix("s") or unit.lower()) or LENGTHS.get(unit.lower())
    if length is not None:
        return Amount(value=value * length, unit=HOURS)
    currency = SIGNS.get(unit, unit)
    return Amount(value=value, unit=currency.upper()) if re.fullmatch(r"[A-Za-z]{3}", currency) else None


def mended(text: Any) -> str:
    """Return the fix of a text that is no amount: the one most like it, where its number can be read, and examples."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([^\W\d_]*)\s*", str(text))
    units = {**CURRENCIES, **{f"{name}s": unit for name, unit in CURRENCIES.items()}}
    units |= {name: name for name in ("hours", "minutes", "seconds", "days")}
    close = nearest(found[2].lower(), units) if found else None
    if found and found[2].lower() in units:
        close = found[2].lower()
    return f"Did you mean {found[1]} {units[close]}? {EXAMPLES}" if found and close else EXAMPLES


@cache
def prices() -> dict[str, Any]:
    """Return the table of prices that ships."""
    import yaml

    found: dict[str, Any] = yaml.safe_load((shipped("conf") / "prices.yaml").read_text(encoding="utf-8"))
    return found


def price_of(gpu: str | None, cores: int) -> Amount | None:
    """Return the price of one hour of a GPU by its name, or of a CPU by its cores; None for an unknown GPU."""
    table = prices()
    if gpu is None:
        return Amount(value=table["cpu_core"] * cores, unit=table["currency"])
    found = next((price for name, price in table["gpus"].items() if name in gpu), None)
    return None if found is None else Amount(value=found, unit=table["currency"])
