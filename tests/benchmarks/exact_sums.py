"""What ONNX Runtime does to sums of 8-bit weights times 8-bit inputs on this machine, and what exact ones cost.

python -m tests.benchmarks.exact_sums

x86 processors without VNNI add pairs of products in 16 bits, and clip what does not fit, unless a session asks for
exact sums. Weights of 7 bits fit. On other processors all of it is exact. Prints how far outputs of layers with
random weights are off, and times EfficientNet-Lite0 with weights of 4 and 8, and of 4 and 7 bits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hq_plugin
from hq_plugin.integrations.onnxruntime.sessions import open_session
from hq_plugin.policy import LayerBits
from hq_plugin.timing import machine
from tests.benchmarks.deployment import compare
from tests.benchmarks.deployment_models import alternating, float_session, packed
from tests.benchmarks.packaged import lite0

#: Two layers each, of many products a sum.
LAYERS = {
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)), (8, 64, 12, 12)),
    "linear layers": (lambda: nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64)), (8, 512)),
}


def plain_session(path: Path) -> onnxruntime.InferenceSession:
    """Opens a file as people do who set nothing."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, x: torch.Tensor) -> torch.Tensor:
    """Runs a file with one input on a batch."""
    (entry,) = session.get_inputs()
    return torch.as_tensor(session.run(None, {entry.name: x.numpy()})[0])


def errors(folder: Path) -> Table:
    """Returns by how much outputs are off, as a share of their norm."""
    table = Table("layers", "weights", "as it is", "exact sums")
    for name, (make, shape) in LAYERS.items():
        for bits in (7, 8):
            torch.manual_seed(0)
            x = torch.randn(shape)
            small = packed(make().eval(), lambda site, bits=bits: LayerBits(bits, 8), x=x)  # type: ignore[misc]
            hq_plugin.export(small, folder / "layers.onnx", x, accuracy_level=1)
            wanted = small(x)
            opened = plain_session(folder / "layers.onnx"), open_session(folder / "layers.onnx", 1)
            off = [float((run(session, x) - wanted).norm() / wanted.norm()) for session in opened]
            table.add_row(name, f"{bits} bits", *(f"{share:.2%}" for share in off))
    return table


def speeds(folder: Path) -> Table:
    """Returns how fast EfficientNet-Lite0 is at batch 1 against ONNX Runtime's float model."""
    model, x = lite0(), torch.randn(1, 3, 224, 224)
    few = torch.randn(2, 3, 224, 224)
    sessions = {"float": float_session(model, folder / "float.onnx", (few,), {})}
    for bits in (8, 7):
        hq_plugin.export(packed(model, alternating(4, bits), x=few), folder / "hybrid.onnx", few)
        sessions[f"4 and {bits} bits, exact sums"] = open_session(folder / "hybrid.onnx", torch.get_num_threads())
        sessions[f"4 and {bits} bits, as it is"] = plain_session(folder / "hybrid.onnx")
    found = compare({name: lambda session=session: run(session, x) for name, session in sessions.items()})  # type: ignore[misc]
    table = Table("EfficientNet-Lite0, batch 1", "ms", "times as fast as float")
    for name, milliseconds in found["ms"].items():
        table.add_row(name, f"{milliseconds:.2f}", f"{found['times']['float'][name]:.2f}")
    return table


def main() -> None:
    """Prints both tables."""
    console = Console()
    console.print(machine())
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        console.print(errors(Path(place)))
        console.print(speeds(Path(place)))


if __name__ == "__main__":
    torch.manual_seed(0)
    np.random.seed(0)
    main()
