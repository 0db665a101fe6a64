"""Arguments and options that several commands share, with their help. Nothing here does anything."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

MODEL = "A timm model (resnet18 or timm:resnet18), or module:function that returns a float model."
DATA = (
    "module:function that returns batches or a Dataset, an .npz file with x (and y), a folder of images (timm "
    "models), digits, or fashion-mnist."
)


class Effort(StrEnum):
    """How long quantization may take."""

    smoke = "smoke"
    fast = "fast"
    balanced = "balanced"
    best = "best"


class Target(StrEnum):
    """What a quantized model is for."""

    storage = "storage"
    torch = "torch"
    onnxruntime = "onnxruntime"


Model = Annotated[str, typer.Argument(help=MODEL)]
Saved = Annotated[Path, typer.Argument(help="A saved model.")]
Data = Annotated[str | None, typer.Option(help=DATA)]
ModelArgs = Annotated[
    list[str] | None, typer.Option("--model-arg", help="An argument for the model, num_classes=10; repeatable.")
]
WeightBits = Annotated[str | None, typer.Option(help="Widths for weights, such as 2,3,4,8.")]
ActivationBits = Annotated[str | None, typer.Option(help="Widths for activations; 16 is float.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
