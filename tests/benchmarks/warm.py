"""Imports and runs once what every case of `coverage.py` needs; the server that forks the cases preloads it.

Most of the time of a tiny model would go into imports otherwise: many modules are imported at their first use.
"""

import tempfile
import warnings
from pathlib import Path

import onnxruntime  # noqa: F401
import torch
import transformers

import hq_plugin as hq
from tests.benchmarks.architectures import transformers_model
from tests.benchmarks.coverage import BUDGET, OPTIONS

warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
model, inputs = transformers_model("sequence-classification", "bert")
small = hq.quantize(model, BUDGET, [inputs(seed) for seed in range(3)], **OPTIONS)  # type: ignore[arg-type]
with tempfile.TemporaryDirectory() as place:
    hq.save(small, Path(place) / "model")
    small.save_pretrained(Path(place) / "folder")  # type: ignore[operator]
    type(small).from_pretrained(Path(place) / "folder")  # type: ignore[attr-defined]
