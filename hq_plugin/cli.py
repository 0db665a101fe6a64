"""`hq-plugin`: quantize, inspect, evaluate and demo from the command line.

Results go to stdout; progress, warnings and errors to stderr. What a user can put right is one line with
what to do, and exit code 2; anything else has exit code 1. `--debug` shows the traceback of both.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hq_plugin.budget import format_bytes, format_count
from hq_plugin.errors import ArtifactError, ArtifactPathError, ConfigError, DataError, HQError, ModelError

app = typer.Typer(
    help="Low-bit hybrid quantization of PyTorch models, searched and trained in one call.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = "A timm model (resnet18 or timm:resnet18), or module:function that returns a float model."
_DATA = (
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


class DemoData(StrEnum):
    """Data sets of the demo."""

    digits = "digits"
    fashion_mnist = "fashion-mnist"


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Turns errors into one line on stderr and an exit code, and warnings into one line each."""
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = lambda message, *_: typer.secho(f"warning: {message}", fg="yellow", err=True)
        try:
            yield
        except typer.Exit:
            raise
        except Exception as error:
            if debug:
                raise
            expected = isinstance(error, (HQError, OSError))
            text = str(error) if expected else f"{type(error).__name__}: {error} (--debug shows the traceback)"
            typer.secho(f"error: {' '.join(text.split())}", fg="red", err=True)
            raise typer.Exit(2 if expected else 1) from error


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    budget: Annotated[
        str, typer.Argument(help='"3bit", "250KB", "12%", "1.5GBitOps", "8ms", or several joined by +.')
    ],
    out: Annotated[Path, typer.Option(help="Directory for the quantized model.")],
    data: Annotated[str | None, typer.Option(help=_DATA)] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Float weights, a .safetensors file.")] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option(help="An argument for the model, such as num_classes=10; repeatable.")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Let timm download pretrained weights.")] = False,
    effort: Annotated[Effort, typer.Option(help="How long it may take.")] = Effort.balanced,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    weight_bits: Annotated[str | None, typer.Option(help="Widths for weights, such as 2,3,4,8.")] = None,
    activation_bits: Annotated[str | None, typer.Option(help="Widths for activations; 16 is float.")] = None,
    target: Annotated[Target, typer.Option(help="Use widths that this runs fast.")] = Target.storage,
    profile: Annotated[Path | None, typer.Option(help="Times of layers, from hq-plugin profile.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model saved there before.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Quantize a float model to a budget and save it.

    Example: hq-plugin quantize my_project.models:resnet 3bit --data my_project.data:train --out small
    """
    import hq_plugin

    with _errors(debug):
        _check_out(out, overwrite)
        options: dict[str, Any] = {"effort": effort.value, "seed": seed, "target": target.value, "profile": profile}
        options |= _width_options(weight_bits, activation_bits)
        float_model = _load_model(model, model_arg or [], checkpoint, pretrained)
        batches = None if data is None else _load_data(data, float_model, test=False)
        packed = hq_plugin.quantize(float_model, budget, batches, **options)
        hq_plugin.save(packed, out, overwrite=overwrite)
        result = cast(hq_plugin.Result, packed.hq)
        if as_json:
            print(json.dumps({**result.to_json(), "history": None}))
        else:
            _print_result(result)
            print(f"saved to {out}")


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    out: Annotated[Path, typer.Option(help="The file, JSON.")],
    data: Annotated[str | None, typer.Option(help=_DATA)] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option(help="An argument for the model, such as num_classes=10; repeatable.")
    ] = None,
    target: Annotated[Target, typer.Option(help="What to measure.")] = Target.torch,
    batch: Annotated[int, typer.Option(help="Samples of a forward.")] = 1,
    weight_bits: Annotated[str | None, typer.Option(help="Widths for weights, such as 2,3,4,8.")] = None,
    activation_bits: Annotated[str | None, typer.Option(help="Widths for activations; 16 is float.")] = None,
    debug: Debug = False,
) -> None:
    """Measure how long each layer takes at each width on this machine, for budgets such as 8ms.

    Example: hq-plugin profile resnet18 --target onnxruntime --out laptop.json
    """
    import hq_plugin

    with _errors(debug):
        options = {"target": target.value, **_width_options(weight_bits, activation_bits)}
        float_model = _load_model(model, model_arg or [], None, False)
        batches = None if data is None else _load_data(data, float_model, test=False)
        measured = hq_plugin.profile(float_model, batches, batch=batch, **options)
        measured.save(out)
        for name, widths in measured.layers.items():
            fastest = {key: min(kernels.items(), key=lambda item: item[1]) for key, kernels in widths.items()}
            print("  ".join([name, *(f"{key}: {ms:.3f} ({kernel})" for key, (kernel, ms) in fastest.items())]))
        print(f"{measured.machine}; {measured.rest:.3f} ms of the model are no layer's; saved to {out}")


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="A saved model.")],
    out: Annotated[Path, typer.Option(help="The ONNX file.")],
    model: Annotated[
        str | None, typer.Option(help=f"{_MODEL} Not needed for timm and Hugging Face models.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"Gives the example inputs. {_DATA}")] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option(help="An argument for the model, such as num_classes=10; repeatable.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a saved model as an ONNX file for ONNX Runtime.

    Example: hq-plugin export small --out small.onnx
    """
    import hq_plugin

    with _errors(debug):
        loaded, inputs = _load_saved(directory, model, model_arg or [], data)
        print(hq_plugin.export(loaded, out, None if inputs is None else inputs))


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A directory that quantize or hq_plugin.save wrote.")],
    kernels: Annotated[bool, typer.Option(help="Measure which kernel each layer runs fastest on, here.")] = False,
    model: Annotated[
        str | None, typer.Option(help=f"For --kernels. {_MODEL} Not needed for timm and Hugging Face models.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"For --kernels: example inputs. {_DATA}")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the layers of a saved model: widths, shapes, bytes, and what stays float."""
    from hq_plugin.artifact import read_info

    with _errors(debug):
        info = read_info(directory)
        if kernels:
            _print_kernels(*_load_saved(directory, model, [], data))
            return
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
    model_arg: Annotated[
        list[str] | None, typer.Option(help="An argument for the model, such as num_classes=10; repeatable.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure the accuracy of a saved model on labelled data.

    Of digits and fashion-mnist the test part is taken, which quantize does not use.
    """
    import hq_plugin
    from hq_plugin.config import Config
    from hq_plugin.evaluation import accuracy

    with _errors(debug):
        skeleton = None if model is None else _load_model(model, model_arg or [], None, False)
        loaded = hq_plugin.load(directory, skeleton)
        share, samples = accuracy(loaded, _load_data(data, loaded, test=True), Config())
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
        ("model", "test accuracy", "KL to float", "effective bits", "bytes", "seconds"),
        [
            (
                row.name,
                f"{row.accuracy:.4f}",
                f"{row.kl:.4f}",
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


def _check_out(out: Path, overwrite: bool) -> None:
    """Finds out before the work, not after it, that the result would have no place."""
    from hq_plugin.artifact import read_info

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read_info(out)
    except ArtifactError as error:
        raise ArtifactPathError(f"{out} holds something else. Choose a new directory.") from error
    if not overwrite:
        raise ArtifactPathError(f"{out} holds a saved model. Give --overwrite or another directory.")


def _call(reference: str, what: str, arguments: dict[str, Any]) -> Any:
    """Calls `module:function`; the current directory is importable, as for `python -m`."""
    module_name, _, function_name = reference.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{what} {reference!r} cannot be imported: {error}. Write module:function.") from error
    if not callable(function):
        raise ConfigError(f"{what} {reference!r} is a {type(function).__name__}, not a function.")
    return function(**arguments)


def _timm(reason: str) -> Any:
    """Imports the timm integration, which only some references need."""
    try:
        return importlib.import_module("hq_plugin.integrations.timm")
    except ImportError as error:
        raise ConfigError(f"{reason}, and timm is missing ({error}): pip install 'hq-plugin[demo]'") from error


def _model_arguments(texts: Sequence[str]) -> dict[str, Any]:
    arguments = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--model-arg {text!r} is not name=value.")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def _load_model(reference: str, texts: Sequence[str], checkpoint: Path | None, pretrained: bool) -> Any:
    arguments = _model_arguments(texts)
    name = reference.removeprefix("timm:")
    if ":" in name:
        if pretrained:
            raise ConfigError(f"--pretrained is for timm models; {reference!r} loads its weights itself.")
        model = _call(name, "model", arguments)
    else:
        model = _timm(f"{reference!r} is a timm name").create_model(name, pretrained=pretrained, **arguments)
    if checkpoint is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            model.load_state_dict(load_file(checkpoint))
        except (SafetensorError, RuntimeError) as error:
            raise ModelError(f"{checkpoint} does not fit {reference!r}: {error}") from error
    return model


def _load_data(reference: str, model: Any, *, test: bool) -> Any:
    import torch
    from torch.utils.data import TensorDataset

    if reference in ("digits", "fashion-mnist"):
        _timm(f"data {reference!r} belongs to the demo")
        arrays = importlib.import_module("hq_plugin.integrations.timm.demo_data").built_in(reference)
        return TensorDataset(*(arrays[2:] if test else arrays[:2]))
    path = Path(reference)
    if path.is_dir():
        return _timm(f"{reference} is a folder of images, for timm models").ImageFolder(path, model)
    if path.suffix != ".npz" and ":" in reference:
        return _call(reference, "data", {})
    if path.suffix != ".npz" or not path.exists():
        raise DataError(f"data {reference!r} is not there. Possible: {_DATA}")
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in ("x", "y") if name in arrays}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no .npz file of numbers: {error}") from error
    if "x" not in found:
        raise DataError(f"{path} has no array x: the inputs, one a row.")
    if "y" in found and len(found["y"]) != len(found["x"]):
        raise DataError(f"{path} has {len(found['x'])} inputs in x, but {len(found['y'])} labels in y.")
    return TensorDataset(found["x"].float(), *(labels.long() for name, labels in found.items() if name == "y"))


def _load_saved(directory: Path, model: str | None, arguments: list[str], data: str | None) -> tuple[Any, Any]:
    """Returns a saved model, and example inputs for it as a tuple or dict, or None."""
    import hq_plugin
    from hq_plugin import adapters
    from hq_plugin.data import prepare_data

    skeleton = None if model is None else _load_model(model, arguments, None, False)
    loaded = hq_plugin.load(directory, skeleton)
    if data is not None:
        batch = prepare_data(_load_data(data, loaded, test=True), loaded, hq_plugin.Config().filled()).holdout[0]
        return loaded, batch.kwargs or batch.args
    adapter = adapters.find(loaded)
    if adapter is None:
        raise ConfigError("Example inputs are needed: give --data.")
    args, kwargs = adapter.example_inputs(loaded)
    return loaded, kwargs or args


def _print_kernels(loaded: Any, inputs: Any) -> None:
    from hq_plugin.kernels import choose_kernels
    from hq_plugin.nn.kernels import REFERENCE
    from hq_plugin.timing import machine

    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    rows = []
    for name, choice in choose_kernels(loaded, *args, **kwargs).items():
        cells = [name]
        for part in (choice, choice.one_row):
            best, own = ("", "") if part is None else (part.kernel, REFERENCE)
            cells += [best, *("" if part is None else f"{part.milliseconds[kernel]:.3f}" for kernel in (best, own))]
        rows.append(tuple(cells))
    _print_table(
        ("layer", "kernel", "ms", f"ms {REFERENCE}", "for one row", "ms", f"ms {REFERENCE}"),
        rows,
    )
    print(machine())


def _width_options(weight_bits: str | None, activation_bits: str | None) -> dict[str, Any]:
    given = (("weight_bits", weight_bits), ("activation_bits", activation_bits))
    return {name: _widths(name, text) for name, text in given if text is not None}


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
