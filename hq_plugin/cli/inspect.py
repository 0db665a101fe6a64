"""`hq-plugin inspect`: what a saved model consists of."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from hq_plugin.budget import format_bytes
from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import load_saved
from hq_plugin.cli.options import DATA, MODEL, AsJson, Debug, Saved
from hq_plugin.cli.output import print_result, print_table


def inspect(
    directory: Saved,
    kernels: Annotated[bool, typer.Option(help="Measure which kernel each layer runs fastest on, here.")] = False,
    model: Annotated[
        str | None, typer.Option(help=f"For --kernels. {MODEL} Not needed for timm and Hugging Face models.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"For --kernels: example inputs. {DATA}")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the layers of a saved model: widths, shapes, bytes, and what stays float."""
    from hq_plugin.artifact import read_info

    with one_line_errors(debug):
        info = read_info(directory)
        if kernels:
            _print_kernels(*load_saved(directory, model, [], data))
            return
    if as_json:
        sites = [{**dataclasses.asdict(site), "bits": str(site.bits)} for site in info.sites]
        print(json.dumps({"sites": sites, "architecture": info.architecture, "file_bytes": info.file_bytes}))
        return
    rows = [
        (site.name, site.type_name, "×".join(map(str, site.shape)), str(site.bits), format_bytes(site.size))
        for site in info.sites
    ]
    print_table(("layer", "type", "weight", "bits", "bytes"), rows)
    if info.result is not None:
        for layer in info.result.float_layers:
            print(f"stays float: {layer['name'] or '(root)'} ({layer['parameters']} parameters): {layer['reason']}")
        print_result(info.result)
    print(f"tensor file: {format_bytes(info.file_bytes)}")


def _print_kernels(loaded: Any, inputs: Any) -> None:
    from hq_plugin.kernels import REFERENCE, choose_kernels, machine

    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    rows = [
        (name, choice.kernel, f"{choice.milliseconds[choice.kernel]:.3f}", f"{choice.milliseconds[REFERENCE]:.3f}")
        for name, choice in choose_kernels(loaded, *args, **kwargs).items()
    ]
    print_table(("layer", "kernel", "ms", f"ms {REFERENCE}"), rows)
    print(machine())
