"""How long a run takes at an estimated speed, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megagpt.planning.cost.performance import Estimate
from megagpt.utils import human_count

DAY_S = 86_400
HOUR_S = 3_600


@dataclass(frozen=True)
class Budget:
    """What is asked: the tokens of a run, and the price of a device's hour; None: not asked."""

    tokens: int | None = None
    per_device_hour: float | None = None

    def line(self, speed: Estimate | None, devices: int) -> str:
        """Return the days and the money at a speed as a line; empty if not asked."""
        if self.tokens is None and self.per_device_hour is not None:
            return "--cost: the length of the run in tokens is not known; give --tokens 1e9"
        if self.tokens is None or speed is None:
            return ""
        answer = f"{human_count(self.tokens)} tokens take {self._days(speed):.3g} days"
        if self.per_device_hour is None:
            return answer
        return (
            f"{answer} and cost {self._money(speed, devices):,.0f} at {self.per_device_hour:g} per "
            f"device and hour on {devices} devices, without evaluation, saves and failures"
        )

    def as_json(self, speed: Estimate | None, devices: int) -> dict[str, Any] | None:
        """Return tokens, days and money; None if not asked or unknown."""
        if self.tokens is None or speed is None:
            return None
        money = None if self.per_device_hour is None else self._money(speed, devices)
        return {"tokens": self.tokens, "days": self._days(speed), "money": money}

    def _days(self, speed: Estimate) -> float:
        assert self.tokens is not None  # asked
        return self.tokens / speed.tokens_per_s / DAY_S

    def _money(self, speed: Estimate, devices: int) -> float:
        assert self.per_device_hour is not None  # asked
        return self._days(speed) * DAY_S / HOUR_S * devices * self.per_device_hour
