"""What the processes of a test run: `torchrun --nproc_per_node 2 -m tests.distributed.job OUT [DIES]`.

With DIES, the last process is killed when it computes its loss for the DIES-th time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin.distillation import kl_divergence
from hq_plugin.distribution import processes


class Plain(nn.Module):
    """A network without BatchNorm, whose statistics would be those of a part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(32, 10)
        self.body = nn.Sequential(nn.Flatten(1), nn.Linear(512, 32), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(torch.relu(self.conv(x))))


class Loss:
    """KL divergence, until the process dies of it."""

    def __init__(self, dies: int) -> None:
        self.left = dies if os.environ.get("RANK") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1) else 0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return kl_divergence(student, teacher)


def main(out: Path, dies: int = 0) -> None:
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
        loss=Loss(dies),
        checkpoint_dir=out / "checkpoint",
        checkpoint_seconds=0,
    )
    hq.save(small, out / "model")
    result: hq.Result = small.hq  # type: ignore[assignment]
    rank = processes()[0]
    report = {
        "policy": result.policy.to_json(),
        "scores": [record["score"] for record in result.history["search"]],
        "searched": [record["policy"] for record in result.history["search"]],
        "sensitivities": result.to_json()["sensitivities"],
        "meta": [record["loss"] for record in result.history["meta_training"]],
        "finetune": [record["loss"] for record in result.history["finetune"]],
        "output": small(data[0][0]).tolist(),
    }
    (out / f"{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
