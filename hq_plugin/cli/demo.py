"""`hq-plugin demo`: the whole way on a small model and data that come with packages."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import check_out
from hq_plugin.cli.options import AsJson, Debug, Overwrite
from hq_plugin.cli.output import print_table, say_json
from hq_plugin.errors import ConfigError


class DemoData(StrEnum):
    """Data sets of the demo."""

    digits = "digits"
    fashion_mnist = "fashion-mnist"


def demo(
    data: Annotated[DemoData, typer.Option(help="Which data set.")] = DemoData.digits,
    out: Annotated[Path | None, typer.Option(help="Keep the quantized model in this directory.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train, quantize, save, load and compare a small model.

    It is a timm ResNet, at 2.5 bits with 4-bit activations.

    \b
    Examples:
      hq-plugin demo
      hq-plugin demo --data fashion-mnist --out small
    """
    with one_line_errors(debug):
        if out is not None:
            check_out(out, overwrite, "model", pretrained=False)
        try:
            module = importlib.import_module("hq_plugin.integrations.timm.demo")
        except ImportError as error:
            raise ConfigError(
                f"The demo needs timm and scikit-learn ({error}): pip install 'hq-plugin[demo]'"
            ) from error
        rows = module.run(data.value, out, overwrite=overwrite)
        if as_json:
            say_json([asdict(row) for row in rows])
            return
        print_table(
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
