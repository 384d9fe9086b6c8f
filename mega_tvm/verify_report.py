"""What a verification found, as data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mega_tvm.tolerances import Parity
from mega_tvm.tracing import Localization

SCHEMA = 1
ORACLE = "oracle"
STORED = "stored output"


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison.

    Parameters
    ----------
    case, entry : str
    against : str
        `ORACLE` or `STORED`.
    parity : Parity
    condition : float
        By how much both bounds were multiplied.
    reason : str
        Why, where that is not 1.
    """

    case: str
    entry: str
    against: str
    parity: Parity
    condition: float = 1.0
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A case that was left out."""

    case: str
    entry: str
    reason: str


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What a verification found.

    Parameters
    ----------
    settings : dict
    checks : tuple of Check
    skipped : tuple of Skipped
    localization : Localization or None
        Of the first check against the oracle that failed.
    """

    settings: dict[str, Any]
    checks: tuple[Check, ...]
    skipped: tuple[Skipped, ...]
    localization: Localization | None

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.parity.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-like values."""
        where = self.localization
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "settings": self.settings,
            "checks": [
                {
                    "case": check.case,
                    "entry": check.entry,
                    "against": check.against,
                    **_parity_dict(check.parity),
                    "condition": check.condition,
                    "reason": check.reason,
                }
                for check in self.checks
            ],
            "skipped": [dataclasses.asdict(skipped) for skipped in self.skipped],
            "localization": where
            and {
                "case": where.case,
                "entry": where.entry,
                "first_wrong": where.first_wrong,
                "message": where.message,
                "layers": [
                    {"layer": layer.name, "kernel": layer.kernel, **_parity_dict(layer.parity)}
                    for layer in where.layers
                ],
            },
        }


def _parity_dict(parity: Parity) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no infinity

    return {
        "ok": parity.ok,
        "finite": parity.finite,
        "max_abs": number(parity.max_abs),
        "max_abs_allowed": parity.bounds.max_abs,
        "relative_rms": number(parity.relative_rms),
        "relative_rms_allowed": parity.bounds.relative_rms,
        "worst": list(parity.worst),
        "actual": number(parity.actual),
        "expected": number(parity.expected),
    }
