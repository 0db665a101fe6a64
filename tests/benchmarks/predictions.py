"""How far the predictions of `hq-plugin explore` can be believed: `python -m tests.benchmarks.predictions`.

The small ResNet of the demo on digits, one session, one search a budget. For each budget: how well predictions
order the policies that its search scored, and how far they are off, by a median factor: as sensitivities give them,
calibrated on the searches of the other budgets, and on all. Two minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from scipy.stats import spearmanr
from torch.utils.data import TensorDataset

import hq_plugin
from hq_plugin.explore.calibration import Calibration
from hq_plugin.findings import predicted_loss
from hq_plugin.integrations.timm.demo import _train_float
from hq_plugin.integrations.timm.demo_data import built_in

BUDGETS = ("2.2bit", "2.5bit", "3bit", "4bit", "2.5bit + 10MBitOps")


def main() -> None:
    """Prints a table."""
    x, y, *_ = built_in("digits")
    options = {"effort": "fast", "activation_bits": (3, 4, 6, 8), "progress": False}
    session = hq_plugin.meta_train(_train_float(x, y, 16, False), TensorDataset(x, y), **options)
    searches: dict[str, tuple[list[float], list[float]]] = {}
    for budget in BUDGETS:
        before = len(session.scored)
        session.search(budget)
        found = session.scored[before:]
        predicted = [predicted_loss(session.sensitivities, scored.genome) for scored in found]
        searches[budget] = predicted, [scored.score for scored in found]

    def together(budgets: Sequence[str]) -> tuple[list[float], list[float]]:
        predicted, measured = zip(*(searches[budget] for budget in budgets), strict=True)
        return list(chain(*predicted)), list(chain(*measured))

    everywhere = Calibration(*together(BUDGETS))
    print("| budget | measured, median | rank correlation | as it is | calibrated on the others | on all |")
    print("|---|---|---|---|---|---|")
    for budget, (predicted, measured) in searches.items():
        others = Calibration(*together([other for other in BUDGETS if other != budget]))
        factors = [
            float(np.median([scale(p) / m for p, m in zip(predicted, measured, strict=True)]))
            for scale in (float, others, everywhere)
        ]
        shown = " | ".join(f"× {factor:.2f}" for factor in factors)
        order = spearmanr(predicted, measured).statistic
        print(f"| {budget} | {np.median(measured):.2g} | {order:.2f} | {shown} |")
    everything = together(BUDGETS)
    print(f"rank correlation over all {len(everything[0])}: {spearmanr(*everything).statistic:.2f}")


if __name__ == "__main__":
    main()
