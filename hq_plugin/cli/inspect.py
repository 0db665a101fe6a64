"""`hq-plugin inspect`: what a saved model consists of."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hq_plugin.budget import format_bytes
from hq_plugin.cli.data import load_data
from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import example_inputs, is_pretrained, load_saved
from hq_plugin.cli.options import DATA, AsJson, Debug, ModelArgs, Saved, Skeleton
from hq_plugin.cli.output import print_result, print_table, say, say_json
from hq_plugin.cli.references import integration

if TYPE_CHECKING:
    from hq_plugin.artifact import SavedModel


def inspect(
    directory: Saved,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Measure which kernel each layer runs fastest on, here.")
    ] = False,
    model: Skeleton = None,
    data: Annotated[str | None, typer.Option(help=f"For --kernels: example inputs. {DATA}")] = None,
    model_arg: ModelArgs = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the layers of a saved model, and what stays float.

    \b
    Examples:
      hq-plugin inspect small
      hq-plugin inspect small --json | jq '.sites[] | [.name, .bits]'
      hq-plugin inspect small --kernels
    """
    from hq_plugin.artifact import read_info

    with one_line_errors(debug):
        if kernels:
            source = load_saved(directory, model, model_arg)
            _kernels(source.model, example_inputs(source, load_data(data, source, test=True)), as_json)
            return
        if is_pretrained(directory):
            info = integration("huggingface.folder", f"{directory} holds a Hugging Face model").read_info(directory)
        else:
            info = read_info(directory)
        _show(info, as_json)


def _kernels(loaded: Any, inputs: Any, as_json: bool) -> None:
    from hq_plugin.kernels import choose_kernels
    from hq_plugin.nn.kernels import REFERENCE
    from hq_plugin.timing import machine

    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    choices = choose_kernels(loaded, *args, **kwargs)
    if as_json:
        say_json({"machine": machine(), "layers": {name: asdict(choice) for name, choice in choices.items()}})
        return
    rows = []
    for name, choice in choices.items():
        cells = [name]
        for part in (choice, choice.one_row):
            best, own = ("", "") if part is None else (part.kernel, REFERENCE)
            also = " + BatchNorm" if part is not None and part.folded else ""
            cells += [
                best + also,
                *("" if part is None else f"{part.milliseconds[kernel]:.3f}" for kernel in (best, own)),
            ]
        rows.append(tuple(cells))
    print_table(("layer", "kernel", "ms", f"ms {REFERENCE}", "for one row", "ms", f"ms {REFERENCE}"), rows)
    say(machine())


def _show(info: SavedModel, as_json: bool) -> None:
    if as_json:
        sites = [{**asdict(site), "bits": str(site.bits)} for site in info.sites]
        result = None if info.result is None else {**info.result.to_json(), "history": None}
        architecture = info.architecture
        say_json({"sites": sites, "architecture": architecture, "file_bytes": info.file_bytes, "result": result})
        return
    rows = [
        (site.name, site.type_name, "×".join(map(str, site.shape)), str(site.bits), format_bytes(site.size))
        for site in info.sites
    ]
    print_table(("layer", "type", "weight", "bits", "bytes"), rows)
    if info.result is not None:
        for layer in info.result.float_layers:
            say(f"stays float: {layer['name'] or '(root)'} ({layer['parameters']} parameters): {layer['reason']}")
        print_result(info.result)
    say(f"tensor file: {format_bytes(info.file_bytes)}")
