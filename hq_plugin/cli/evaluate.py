"""`hq-plugin evaluate`: the accuracy, or of a language model the perplexity, of a saved model and its float one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hq_plugin.cli.data import load_data
from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import Source, load_saved, load_trained_model
from hq_plugin.cli.options import DATA, AsJson, Checkpoint, Debug, ModelArgs, Pretrained, Saved, Skeleton
from hq_plugin.cli.output import say, say_json
from hq_plugin.errors import ConfigError


def evaluate(
    directory: Saved,
    data: Annotated[str, typer.Option(help=DATA)],
    model: Skeleton = None,
    model_arg: ModelArgs = None,
    float_model: Annotated[
        str | None, typer.Option("--float", help="The float model with its weights, to be measured as well.")
    ] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure the accuracy or the perplexity of a saved model.

    Labelled data gives the accuracy, text the perplexity of a language model. Of digits and fashion-mnist the
    test part is taken, which quantize does not use. With --float the float model is measured on the same data.

    \b
    Examples:
      hq-plugin evaluate small --data validation/
      hq-plugin evaluate small --data validation/ --float resnet18 --pretrained
      hq-plugin evaluate llm --data other_book.txt
      hq-plugin evaluate small --model my_project:model --data my_project:test_batches --json
    """
    with one_line_errors(debug):
        if float_model is None and (checkpoint is not None or pretrained):
            raise ConfigError("--checkpoint and --pretrained give weights to the float model: name it by --float.")
        source = load_saved(directory, model, model_arg)
        name, value, count, unit = _measure(source, data)
        found = {name: value}
        if float_model is not None:
            float_source = load_trained_model(float_model, model_arg, checkpoint, pretrained, None)
            found[f"float_{name}"] = _measure(float_source, data)[1]
        if as_json:
            say_json({**found, unit: count})
        else:
            for what, value in found.items():
                say(f"{what.replace('_', ' ')} {value:.4f} on {count} {unit}")


def _measure(source: Source, data: str) -> tuple[str, float, int, str]:
    """Returns what was measured, its value, and on how many of what."""
    from hq_plugin.evaluation import accuracy, perplexity

    raw: Any = load_data(data, source, test=True)
    samples, config = source.batches(raw), source.config()
    texts = isinstance(raw, list) and raw and isinstance(raw[0], str)
    causal = texts and source.is_hugging_face and source.model.can_generate()
    writes_text = causal and not source.model.config.is_encoder_decoder  # whose decoder reads shifted text
    measure, name, unit = (perplexity, "perplexity", "tokens") if writes_text else (accuracy, "accuracy", "samples")
    return name, *measure(source.model, samples, config), unit
