"""Arguments and options that several commands share, with their help. Nothing here does anything."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

MODEL = (
    "A timm model (resnet18 or timm:resnet18), a Hugging Face folder (path/ or hf:name), or module:function that "
    "returns a float model."
)
DATA = (
    "A folder of images, a text file (one text a line, or paragraphs between blank lines), an .npz file (arrays x "
    "and y, or named as the model's inputs), module:function that returns batches or a Dataset, digits, or "
    "fashion-mnist."
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
Skeleton = Annotated[
    str | None,
    typer.Option("--model", help="The float model; only for a saved model that does not know its architecture."),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Float weights, a .safetensors file."),
]
ModelArgs = Annotated[
    list[str] | None, typer.Option("--model-arg", help="An argument for the model, num_classes=10; repeatable.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Let timm download pretrained weights.")]
EffortOption = Annotated[
    Effort | None, typer.Option("--effort", help="How long it may take; balanced unless said otherwise.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random; 0 unless said otherwise.")]
WeightBits = Annotated[str | None, typer.Option(help="Widths for weights, such as 2,3,4,8.")]
ActivationBits = Annotated[str | None, typer.Option(help="Widths for activations; 16 is float.")]
TargetOption = Annotated[Target | None, typer.Option("--target", help="Use widths that this runs fast.")]
CheckpointDir = Annotated[
    Path | None, typer.Option(help="Keep the state here; the same command, started again, goes on from it.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", help="Any other field of hq_plugin.Config, its value JSON, -o group_size=64; repeatable."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what was saved there before.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
