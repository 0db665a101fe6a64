"""`hq-plugin quantize`: a float model in, a saved quantized one out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hq_plugin.cli.config import config_options
from hq_plugin.cli.data import load_data
from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.models import Source, check_out, load_trained_model, save_model
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
from hq_plugin.cli.output import print_result, say, say_json
from hq_plugin.cli.policies import space_of
from hq_plugin.errors import BudgetError, HQWarning, PolicyError


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for the quantized model.")],
    budget: Annotated[
        str | None,
        typer.Argument(help='"3bit", "250KB", "12%", "1.5GBitOps", "8ms", "50uJ", or several joined by +.'),
    ] = None,
    data: Data = None,
    session: Annotated[
        Path | None, typer.Option(help="A session from hq-plugin meta-train: nothing is meta-trained again.")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="Widths from a JSON file, {site: [weight, activation]}, in place of a budget."),
    ] = None,
    checkpoint: Checkpoint = None,
    model_arg: ModelArgs = None,
    pretrained: Pretrained = False,
    effort: EffortOption = None,
    seed: Seed = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    target: TargetOption = None,
    profile: Annotated[Path | None, typer.Option(help="Times of layers, from hq-plugin profile.")] = None,
    checkpoint_dir: CheckpointDir = None,
    option: Options = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Quantize a float model to a budget and save it.

    A Hugging Face model is saved as save_pretrained does; after import hq_plugin, pipeline(model=DIR) loads it.
    With --policy nothing is searched; without --session it is meta-trained for the widths of that file alone.

    \b
    Examples:
      hq-plugin quantize resnet18 12% --pretrained --data photographs/ --out small
      hq-plugin quantize llm/ 3.5bit --data book.txt --out small
      hq-plugin quantize my_project:model 3bit --data my_project:batches --out small
      hq-plugin quantize my_project:model 250KB+1GBitOps --data data.npz --effort fast --json --out small
      hq-plugin quantize my_project:model 2.5bit --session session --data data.npz --out smaller
      hq-plugin quantize my_project:model --policy policy.json --session session --data data.npz --out chosen
    """
    with one_line_errors(debug, resumable=True):
        check_out(out, overwrite, "model")
        if (budget is None) == (policy is None):
            raise BudgetError('Give a budget such as "3bit", or --policy, and not both.')
        if policy is not None and not policy.is_file():
            raise PolicyError(f"There is no policy file {policy}. hq-plugin explore SESSION writes one.")
        options = config_options(
            option,
            effort=effort,
            seed=seed,
            target=target,
            profile=profile,
            checkpoint_dir=checkpoint_dir,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
        )
        source = load_trained_model(model, model_arg, checkpoint, pretrained, seed)
        check_out(out, overwrite, "model", source.is_hugging_face)
        options |= {} if source.processor is None else {"processor": source.processor}
        packed = _quantize(source, budget, load_data(data, source), session, policy, options)
        save_model(packed, source.processor, out, overwrite)
        warn_if_larger(out, packed.hq)
        if as_json:
            say_json({**packed.hq.to_json(), "history": None})
        else:
            print_result(packed.hq)
            say(f"saved to {out}: {_file_bytes(out):,} bytes of tensors with their header")


def _file_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def warn_if_larger(directory: Path, result: Any) -> None:
    """Warns where a budget of bytes is kept, which counts tensors, and the file with its header is larger."""
    if "size" not in result.used:
        return
    written, limit = _file_bytes(directory), result.size / result.used["size"]
    room = int(limit - (written - result.size)) // 1000
    if written > limit and room > 0:
        warnings.warn(
            f"The budget counts tensors. Their file has {written:,} bytes, with its header {written - limit:,.0f} "
            f"more than the budget: for a file that keeps it, give {room}KB.",
            HQWarning,
            stacklevel=2,
        )


def _quantize(
    source: Source,
    budget: str | None,
    data: Any,
    session: Path | None,
    policy: Path | None,
    options: dict[str, Any],
) -> Any:
    import hq_plugin

    model = source.model
    if policy is None:
        wanted = cast(str, budget)
        if session is None:
            return hq_plugin.quantize(model, wanted, data, **options)
        return hq_plugin.load_session(session, model, data, **options).quantize(wanted)
    try:
        written = policy.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PolicyError(f"{policy} is not written in UTF-8 ({error}). Save it so.") from error
    widths = hq_plugin.HybridPolicy.from_json(written)
    if session is not None:
        return hq_plugin.load_session(session, model, data, **options).finetune(widths)
    return hq_plugin.meta_train(model, data, policy=widths, **space_of(widths, source, options)).finetune(widths)
