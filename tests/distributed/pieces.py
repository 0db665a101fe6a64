"""What a sharded shell is: `torchrun --nproc_per_node 2 -m tests.distributed.pieces OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hq_plugin.distribution import map_split, processes
from hq_plugin.errors import ModelError
from hq_plugin.sharding import in_pieces_like, placed, whole
from tests.distributed.sharded import shard


class Tied(nn.Module):
    """Has a weight that two layers share, BatchNorm, and a buffer that no state has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(30, 30), nn.BatchNorm1d(30), nn.Linear(30, 30)
        self.second.weight = self.first.weight
        self.block = nn.Sequential(nn.Linear(30, 30), nn.ReLU())
        self.register_buffer("shift", torch.ones(30), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.block(self.norm(self.first(x))) + self.shift)


class Scalar(nn.Module):
    """Has a parameter without a dimension, which FSDP does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


def main(out: Path) -> None:
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(8, 30)
    report: dict[str, object] = {}
    with torch.no_grad(), placed(model) as same:
        report["untouched without FSDP"] = same is model
    shard()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad(), placed(model) as shell:
        pieces = [p for p in shell.parameters() if isinstance(p, DTensor)]
        report["all in pieces"] = len(pieces) == len(list(model.parameters()))
        units = [name for name, part in shell.named_modules() if isinstance(part, FSDPModule)]
        report["units"] = units == ["", "block"]
        report["held"] = sum(p.to_local().numel() for p in pieces) / sum(p.numel() for p in model.parameters())
        report["same output"] = torch.allclose(shell(x), model(x), atol=1e-6)
        shell.reshard()  # type: ignore[operator]
        report["tied"] = shell.get_submodule("first").weight is shell.get_submodule("second").weight
        split = in_pieces_like(model.first.weight, shell.get_submodule("first").weight)
        report["there and back"] = torch.equal(whole(split), model.first.weight)
        shell.get_submodule("norm").running_mean.add_(1)  # type: ignore[operator]
        for p in shell.parameters():
            p.mul_(2)
    report["left alone"] = all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    with torch.no_grad(), placed(model, keep=True) as shell:
        shell.get_submodule("norm").running_mean.add_(1)  # type: ignore[operator]
        for p in shell.parameters():
            p.mul_(2)
    after = model.state_dict()
    report["kept"] = all(torch.equal(after[name], 2 * before[name]) for name, _ in model.named_parameters())
    report["kept buffers"] = torch.equal(after["norm.running_mean"], before["norm.running_mean"] + 1)
    # Three items over two processes: one does some of the others' again.
    calls: list[int] = []
    report["results"] = map_split(lambda item: calls.append(item) or 10 * item, [1, 2, 3], evenly=True)
    report["calls"] = len(calls)
    try:
        with placed(Scalar()):
            pass
    except ModelError as error:
        report["refused"] = str(error)
    (out / f"{processes()[0]}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
