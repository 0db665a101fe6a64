"""Two processes fine-tune with BatchNorm: `torchrun --nproc_per_node 2 -m tests.distributed.normalised OUT`."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

from hq_plugin import Config
from hq_plugin.data import prepare_data
from hq_plugin.distillation import loss_function
from hq_plugin.distribution import processes
from hq_plugin.rates import Rates
from hq_plugin.training import Task, train


def main(out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 10)
    model = nn.Sequential(*layers)
    batches = [(torch.randn(31, 1, 8, 8), None) for _ in range(6)]  # whose shares differ by one sample
    batches.append((torch.randn(3, 1, 8, 8), None))  # of which one process would have a single one
    for x, _ in batches:
        model(x)
    model.eval()
    data = prepare_data(batches, model, Config(effort="smoke"))
    report = {}
    for name, by in (("near", 0.001), ("far", 1.0)):
        student = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(by * torch.randn_like(parameter))
        loss = loss_function("kl", torch.randn(2, 10))
        job = Task("test", student, model, data, loss, 20, Rates(1e-3, 1e-3), batch_statistics=None)
        train(job)
        report[name] = {
            "history": job.history,
            "state": {key: value.tolist() for key, value in student.state_dict().items()},
        }
    (out / f"{processes()[0]}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
