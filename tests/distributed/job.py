"""What the processes of a test run: `torchrun --nproc_per_node 2 -m tests.distributed.job OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin.distribution import processes


class Plain(nn.Module):
    """A network without BatchNorm, whose statistics would be those of a part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(512, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(self.conv(x)).flatten(1))))


def main(out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Plain().eval()
    data = [(torch.randn(30, 1, 8, 8), torch.randint(10, (30,))) for _ in range(6)]
    small = hq.quantize(
        model,
        "3.5bit",
        data,
        effort="smoke",
        meta_steps=8,
        finetune_steps=6,
        search_evaluations=20,
        progress=False,
        activation_bits=(4, 8),
    )
    hq.save(small, out / "model")
    result: hq.Result = small.hq  # type: ignore[assignment]
    rank = processes()[0]
    report = {
        "policy": result.policy.to_json(),
        "scores": [record["score"] for record in result.history["search"]],
        "searched": [record["policy"] for record in result.history["search"]],
        "meta": [record["loss"] for record in result.history["meta_training"]],
        "finetune": [record["loss"] for record in result.history["finetune"]],
        "output": small(data[0][0]).tolist(),
    }
    (out / f"{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
