"""Measures hq_plugin against its claims and its rivals; writes docs/benchmarks/matrix.md.

python -m tests.benchmarks --fast                      # at most 20 minutes on 2 cores
python -m tests.benchmarks                             # everything: days on 2 cores, and resumable
python -m tests.benchmarks --models resnet20 vit --budgets 2.5bit 3bit --seeds 0 --steps 100
python -m tests.benchmarks --models cifar10 --data ~/data/cifar10
python -m tests.benchmarks --claims search front tau   # the claims of the paper in place of the matrix
python -m tests.benchmarks --page                      # only writes the page anew from the rows
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from tests.benchmarks.matrix import claims, page
from tests.benchmarks.matrix.methods import METHODS
from tests.benchmarks.matrix.rank_correlation import POLICIES, TAU_STEPS
from tests.benchmarks.matrix.run import Plan, run, told


def main() -> None:
    """Reads the options, measures, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="resnet20, mobilenetv3, vit, ... (see matrix/tasks.py)")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--budgets", nargs="+", help="such as 2.5bit or 250KB")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--steps", type=int, help="training steps of every method")
    parser.add_argument("--fast", action="store_true", help="one network, one budget, one seed, few steps")
    parser.add_argument("--retry", action="store_true", help="measure failed rows again")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 or ImageNet")
    parser.add_argument("--claims", nargs="+", choices=tuple(claims.CLAIMS))
    parser.add_argument("--finetune", type=int, default=TAU_STEPS, help="steps of a policy of `tau`")
    parser.add_argument("--policies", type=int, default=POLICIES, help="policies of each pool of `tau`")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    plan = Plan(
        options.models,
        options.methods,
        options.budgets,
        options.seeds,
        options.steps,
        options.fast,
        options.retry,
        options.data,
    )
    if options.claims:
        for row in claims.run(plan, options.claims, options.finetune, options.policies):
            print(claims.told(row), flush=True)
            page.write()
    elif not options.page:
        for row in run(plan):
            print(told(row), flush=True)
            page.write()
    page.write()
    print(f"{page.PAGE} is written.")


if __name__ == "__main__":
    main()
