"""`hq-plugin`: quantize, inspect, evaluate and demo from the command line.

Results go to stdout, progress and errors to stderr. An error is one line with what to do, and exit code
2; `--debug` shows the traceback.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hq_plugin.budget import format_bytes, format_count
from hq_plugin.errors import ConfigError, DataError, HQError, ModelError

app = typer.Typer(
    help="Low-bit hybrid quantization of PyTorch models, searched and trained in one call.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = "A timm model (resnet18) or module:function that returns a float model."
_DATA = "module:function that returns batches or a Dataset, an .npz file with x (and y), digits, or fashion-mnist."


class Effort(StrEnum):
    """How long quantization may take."""

    smoke = "smoke"
    fast = "fast"
    balanced = "balanced"
    best = "best"


class DemoData(StrEnum):
    """Data sets of the demo."""

    digits = "digits"
    fashion_mnist = "fashion-mnist"


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Turns expected errors into one line on stderr and exit code 2."""
    try:
        yield
    except (HQError, OSError, ImportError) as error:
        if debug:
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from error


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    budget: Annotated[str, typer.Argument(help='"3bit", "250KB", "12%", "1.5GBitOps", or several joined by +.')],
    out: Annotated[Path, typer.Option(help="Directory for the quantized model.")],
    data: Annotated[str | None, typer.Option(help=_DATA)] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Float weights, a .safetensors file.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Let timm download pretrained weights.")] = False,
    effort: Annotated[Effort, typer.Option(help="How long it may take.")] = Effort.balanced,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    weight_bits: Annotated[str | None, typer.Option(help="Widths for weights, such as 2,3,4,8.")] = None,
    activation_bits: Annotated[str | None, typer.Option(help="Widths for activations; 16 is float.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model saved there before.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Quantize a float model to a budget and save it.

    Example: hq-plugin quantize my_project.models:resnet 3bit --data my_project.data:train --out small
    """
    import hq_plugin

    with _errors(debug):
        options: dict[str, Any] = {"effort": effort.value, "seed": seed}
        for name, text in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
            if text is not None:
                options[name] = _widths(name, text)
        float_model = _load_model(model, checkpoint, pretrained)
        packed = hq_plugin.quantize(float_model, budget, None if data is None else _load_data(data), **options)
        hq_plugin.save(packed, out, overwrite=overwrite)
        result = cast(hq_plugin.Result, packed.hq)
        if as_json:
            print(json.dumps({**result.to_json(), "history": None}))
        else:
            _print_result(result)
            print(f"saved to {out}")


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A directory that quantize or hq_plugin.save wrote.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the layers of a saved model: widths, shapes, bytes, and what stays float."""
    from hq_plugin.artifact import read_info

    with _errors(debug):
        info = read_info(directory)
    if as_json:
        sites = [{**dataclasses.asdict(site), "bits": str(site.bits)} for site in info.sites]
        print(json.dumps({"sites": sites, "architecture": info.architecture, "file_bytes": info.file_bytes}))
        return
    rows = [
        (site.name, site.type_name, "×".join(map(str, site.shape)), str(site.bits), format_bytes(site.size))
        for site in info.sites
    ]
    _print_table(("layer", "type", "weight", "bits", "bytes"), rows)
    if info.result is not None:
        for layer in info.result.float_layers:
            print(f"stays float: {layer['name'] or '(root)'} ({layer['parameters']} parameters): {layer['reason']}")
        _print_result(info.result)
    print(f"tensor file: {format_bytes(info.file_bytes)}")


@app.command()
def evaluate(
    directory: Annotated[Path, typer.Argument(help="A saved model.")],
    data: Annotated[str, typer.Option(help=_DATA)],
    model: Annotated[str | None, typer.Option(help=f"{_MODEL} Not needed for timm models.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure the accuracy of a saved model on labelled data."""
    import hq_plugin
    from hq_plugin.config import Config
    from hq_plugin.evaluation import accuracy

    with _errors(debug):
        skeleton = None if model is None else _load_model(model, None, False)
        loaded = hq_plugin.load(directory, skeleton)
        share, samples = accuracy(loaded, _load_data(data), Config())
    print(
        json.dumps({"accuracy": share, "samples": samples})
        if as_json
        else f"accuracy {share:.4f} on {samples} samples"
    )


@app.command()
def demo(
    data: Annotated[DemoData, typer.Option(help="Which data set.")] = DemoData.digits,
    out: Annotated[Path | None, typer.Option(help="Keep the quantized model in this directory.")] = None,
    debug: Debug = False,
) -> None:
    """Train a small timm ResNet, quantize it to 2.5 bits with 4-bit activations, save, load and compare."""
    with _errors(debug):
        try:
            module = importlib.import_module("hq_plugin.integrations.timm.demo")
        except ImportError as error:
            raise ConfigError(
                f"The demo needs timm and scikit-learn ({error}): pip install hq-plugin[demo]"
            ) from error
        rows = module.run(data.value, out)
    _print_table(
        ("model", "test accuracy", "effective bits", "bytes", "seconds"),
        [
            (
                row.name,
                f"{row.accuracy:.4f}",
                f"{row.bits:.3f}",
                f"{row.size:,}",
                f"{row.seconds:.1f}" if row.seconds else "",
            )
            for row in rows
        ],
    )


def _widths(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} {text!r} is no list of widths. Write 2,3,4,8.") from None


def _call(reference: str, what: str) -> Any:
    """Calls `module:function`; the current directory is importable, as for `python -m`."""
    module_name, _, function_name = reference.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what} {reference!r} cannot be imported: {error}. Write module:function.") from error
    return function()


def _load_model(reference: str, checkpoint: Path | None, pretrained: bool) -> Any:
    if ":" in reference:
        model = _call(reference, "model")
    else:
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise ConfigError(f"{reference!r} is a timm name, and timm is missing: pip install timm") from error
        if not timm.is_model(reference):
            close = ", ".join(timm.list_models(f"*{reference}*")[:5]) or "timm.list_models() shows all"
            raise ModelError(f"timm has no model {reference!r}. Close to it: {close}.")
        model = timm.create_model(reference, pretrained=pretrained)
    if checkpoint is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            model.load_state_dict(load_file(checkpoint))
        except (SafetensorError, RuntimeError) as error:
            raise ModelError(f"{checkpoint} does not fit {reference!r}: {error}") from error
    return model


def _load_data(reference: str) -> Any:
    import torch
    from torch.utils.data import TensorDataset

    if ":" in reference:
        return _call(reference, "data")
    if reference in ("digits", "fashion-mnist"):
        demo_data = importlib.import_module("hq_plugin.integrations.timm.demo_data")
        train_x, train_y, _, _ = demo_data.digits() if reference == "digits" else demo_data.fashion_mnist()
        return TensorDataset(train_x, train_y)
    path = Path(reference)
    if path.suffix != ".npz" or not path.exists():
        raise DataError(f"data {reference!r} is not there. Possible: {_DATA}")
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        if "x" not in arrays:
            raise DataError(f"{path} has no array x; it has {', '.join(arrays.files)}.")
        tensors = [torch.from_numpy(arrays[name]) for name in ("x", "y") if name in arrays]
    return TensorDataset(tensors[0].float(), *(labels.long() for labels in tensors[1:]))


def _print_result(result: Any) -> None:
    rows = [
        (
            name + (" (chosen)" if name == result.chosen else ""),
            f"{baseline.kl:.4f}",
            "" if baseline.accuracy is None else f"{baseline.accuracy:.4f}",
            f"{baseline.costs.weight_bits:.3f}",
            f"{baseline.costs.size:,}",
            format_count(baseline.costs.bitops),
        )
        for name, baseline in result.baselines.items()
    ]
    rows.append(
        (
            "fine-tuned",
            f"{result.kl:.4f}",
            "" if result.accuracy is None else f"{result.accuracy:.4f}",
            f"{result.effective_bits:.3f}",
            f"{result.size:,}",
            format_count(result.bitops),
        )
    )
    accuracy = "" if result.float_accuracy is None else f"{result.float_accuracy:.4f}"
    rows.append(("float", "0", accuracy, "32", f"{result.float_size:,}", ""))
    _print_table(("held-out data", "distance", "accuracy", "effective bits", "bytes", "BitOps"), rows)
    used = ", ".join(f"{share:.1%} of {name}" for name, share in result.used.items())
    print(f"budget {result.budget}: used {used or 'nothing'}")


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    # Wide enough for a pipe, where rich would assume 80 columns and cut names.
    console = Console()
    Console(width=console.width if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    app()
