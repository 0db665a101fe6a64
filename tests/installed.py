"""Run by the Python of an environment in which the wheel is installed: `python installed.py SITE_PACKAGES`."""

import importlib
import pkgutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import hq_plugin
import hq_plugin.integrations

site_packages = Path(sys.argv[1]).resolve()
assert site_packages in Path(hq_plugin.__file__).resolve().parents, hq_plugin.__file__
assert site_packages in Path(hq_plugin.integrations.__path__[0]).resolve().parents, hq_plugin.integrations.__path__

for module in pkgutil.walk_packages(hq_plugin.__path__, "hq_plugin."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()
data = [torch.randn(8, 1, 8, 8) for _ in range(4)]
small = hq_plugin.quantize(model, "4bit", data, effort="smoke", progress=False)
with tempfile.TemporaryDirectory() as folder:
    again = hq_plugin.load(hq_plugin.save(small, Path(folder) / "small"), model)
assert torch.equal(small(data[0]), again(data[0]))
