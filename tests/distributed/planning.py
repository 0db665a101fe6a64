"""What the processes of a test plan by: `torchrun --nproc_per_node 2 -m tests.distributed.planning OUT`.

Their processors need not round alike: here the second process's gradients are a little larger.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hq_plugin as hq
from hq_plugin.distribution import in_first, processes
from tests.distributed.job import Plain


class Rounds(torch.autograd.Function):
    """The identity, whose gradient differs between processes in its last bits."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * (1 + 1e-6 * processes()[0])


class Elsewhere(Plain):
    """A network on a processor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return Rounds.apply(super().forward(x))  # type: ignore[no-any-return]


def refuse() -> int:
    """What the first process fails at, none of the others goes on from."""
    raise hq.ConfigError(f"process {processes()[0]} cannot")


def main(out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Elsewhere().eval()
    data = [torch.randn(32, 1, 8, 8) for _ in range(6)]
    options = {"activation_bits": (4, 8), "meta_steps": 0, "holdout": 32, "progress": False}
    session = hq.meta_train(model, data, effort="fast", **options)
    assert session.second_order is not None
    session.baselines(hq.Budget(latency_ms=1e6, batch=2))
    assert session.costs.latency is not None
    found: dict[str, Any] = {
        "second_order": session.second_order.tolist(),
        "losses": session.losses.table.tolist(),
        "milliseconds": [session.costs.latency_rest, *session.costs.latency.flatten().tolist()],
    }
    found["first"] = in_first(lambda: processes()[0])
    try:
        in_first(refuse)
    except hq.ConfigError as error:
        found["refused"] = str(error)
    (out / f"{processes()[0]}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
