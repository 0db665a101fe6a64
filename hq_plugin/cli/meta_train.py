"""`hq-plugin meta-train`: a float model in, a session out, which any number of budgets start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hq_plugin.cli.config import config_options
from hq_plugin.cli.data import load_data
from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import check_out, load_trained_model, source_arguments
from hq_plugin.cli.options import (
    ActivationBits,
    AsJson,
    Checkpoint,
    CheckpointDir,
    Data,
    Debug,
    EffortOption,
    Model,
    ModelArgs,
    Options,
    Overwrite,
    Pretrained,
    Seed,
    TargetOption,
    WeightBits,
)
from hq_plugin.cli.output import say, say_json


def meta_train(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the session.")],
    data: Data = None,
    checkpoint: Checkpoint = None,
    model_arg: ModelArgs = None,
    pretrained: Pretrained = False,
    effort: EffortOption = None,
    seed: Seed = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    target: TargetOption = None,
    checkpoint_dir: CheckpointDir = None,
    option: Options = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train the MetaQuantNet of a model once, for many budgets.

    \b
    Examples:
      hq-plugin meta-train my_project:model --data my_project:batches --out session
      hq-plugin quantize my_project:model 3bit --data my_project:batches --session session --out small
    """
    import hq_plugin

    with one_line_errors(debug, resumable=True):
        check_out(out, overwrite, "session")
        options = config_options(
            option,
            effort=effort,
            seed=seed,
            target=target,
            checkpoint_dir=checkpoint_dir,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
        )
        source = load_trained_model(model, model_arg, checkpoint, pretrained, seed)
        options |= {} if source.processor is None else {"processor": source.processor}
        session = hq_plugin.meta_train(source.model, load_data(data, source), **options)
        session.source = source_arguments(model, data, checkpoint, model_arg, pretrained, seed)
        session.save(out, overwrite=overwrite)
        loss = session.history[-1]["loss"] if session.history else None
        report = {"sites": len(session.space.table), "loss": loss, "seconds": session.seconds}
        if as_json:
            say_json(report)
            return
        took = [f"{stage.replace('_', '-')} {seconds:.1f} s" for stage, seconds in session.seconds.items()]
        last = [] if loss is None else [f"last loss {loss:.4f}"]
        say("; ".join([f"{report['sites']} layers", *last, *took]))
        say(f"saved to {out}")
