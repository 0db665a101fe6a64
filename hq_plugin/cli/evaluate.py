"""`hq-plugin evaluate`: the accuracy of a saved model, or of a language model its perplexity."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hq_plugin.cli.data import load_data
from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import load_saved
from hq_plugin.cli.options import DATA, AsJson, Debug, ModelArgs, Saved, Skeleton
from hq_plugin.cli.output import say, say_json


def evaluate(
    directory: Saved,
    data: Annotated[str, typer.Option(help=DATA)],
    model: Skeleton = None,
    model_arg: ModelArgs = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure the accuracy or the perplexity of a saved model.

    Labelled data gives the accuracy, text the perplexity of a language model. Of digits and fashion-mnist the
    test part is taken, which quantize does not use.

    \b
    Examples:
      hq-plugin evaluate small --data validation/
      hq-plugin evaluate llm --data other_book.txt
      hq-plugin evaluate small --model my_project:model --data my_project:test_batches --json
    """
    from hq_plugin.evaluation import accuracy, perplexity

    with one_line_errors(debug):
        source = load_saved(directory, model, model_arg)
        raw: Any = load_data(data, source, test=True)
        samples, config = source.batches(raw), source.config()
        writes_text = isinstance(raw, list) and raw and isinstance(raw[0], str) and source.model.can_generate()
        measure, name = (perplexity, "perplexity") if writes_text else (accuracy, "accuracy")
        value, count = measure(source.model, samples, config)
        unit = "tokens" if writes_text else "samples"
        if as_json:
            say_json({name: value, unit: count})
        else:
            say(f"{name} {value:.4f} on {count} {unit}")
