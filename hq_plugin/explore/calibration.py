"""Calibrates distances that additive sensitivities predict to those that a session's searches measured.

Sensitivities are measured in the float model, rounded; policies run on weights that were meta-trained. What is
measured differs from what is predicted by a factor that changes slowly along the front.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Predictions within this factor of one another are taken together, and at least so many of them; all together
#: where there are no more.
_FACTOR, _LEAST = 2.0, 5


class Calibration:
    """Maps predicted distances to expected ones: through the medians of what was measured, on logarithmic scales.

    Between the medians it interpolates, and never falls where predictions rise; beyond them the nearest one's
    factor holds. Without enough that was measured it changes nothing.

    Args:
        predicted: Distances that were predicted.
        measured: What was measured of the same policies.

    Attributes:
        policies: How many policies it rests on; 0 where it changes nothing.
    """

    def __init__(self, predicted: Sequence[float], measured: Sequence[float]) -> None:
        pairs = np.array(
            [(p, m) for p, m in zip(predicted, measured, strict=True) if p > 0 and 0 < m < np.inf]
        ).reshape(-1, 2)
        logs = np.log(pairs)
        bins = np.floor(logs[:, 0] / np.log(_FACTOR))
        kept = [logs[bins == number] for number in np.unique(bins)]
        kept = [part for part in kept if len(part) >= _LEAST] or [logs] * (len(logs) >= _LEAST)
        self.policies = sum(map(len, kept))
        medians = np.array([np.median(part, axis=0) for part in kept]).reshape(-1, 2)
        self._at, self._to = medians[:, 0], np.maximum.accumulate(medians[:, 1])

    def __call__(self, predicted: float) -> float:
        """Returns the distance to expect where `predicted` is predicted."""
        if not self.policies or predicted <= 0:
            return predicted
        at = float(np.log(predicted))
        inside = float(np.clip(at, self._at[0], self._at[-1]))
        return float(np.exp(np.interp(inside, self._at, self._to) + at - inside))
