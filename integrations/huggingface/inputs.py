"""Text, pictures and a tokenizer's output as batches; text that a model writes itself."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, PreTrainedModel

from hq_plugin.config import Config
from hq_plugin.data import LABEL_KEYS, RERANK_FACTOR
from hq_plugin.errors import DataError, HQWarning
from hq_plugin.precision import autocast
from hq_plugin.training import seeded

#: Most sequences that a causal model writes itself, by effort.
_WRITTEN = {"smoke": 8, "fast": 128, "balanced": 384, "best": 2048}
#: Sequences that are written at once.
_AT_ONCE = 32
#: Fields in which rows of a data set keep their text.
TEXT_FIELDS = ("text", "content", "sentence")


class Rows(Dataset[dict[str, Tensor]]):
    """Samples as rows of tensors, which the core shuffles, splits and collates."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def takes_text(model: PreTrainedModel) -> bool:
    """Returns whether the model's main input is token ids."""
    return model.main_input_name == "input_ids"


def split_batch(raw: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Splits a batch for `Config.prepare_batch`: labels apart, and no cache of keys and values."""
    if isinstance(raw, Mapping):
        kwargs = {name: value for name, value in raw.items() if name not in LABEL_KEYS}
        label = next((raw[name] for name in LABEL_KEYS if isinstance(raw.get(name), Tensor)), None)
        if "input_ids" in kwargs:
            kwargs.setdefault("use_cache", False)
        return (), kwargs, label if label is not None and label.dim() == 1 else None
    if isinstance(raw, (tuple, list)):
        last = raw[-1]
        is_label = len(raw) == 2 and isinstance(last, Tensor) and last.dim() == 1 and not last.is_floating_point()
        return (tuple(raw[:-1]), {}, last) if is_label else (tuple(raw), {}, None)
    return (raw,), {}, None


def batches(model: PreTrainedModel, data: Any, config: Config) -> Any:
    """Turns what users of transformers have into a Dataset; leaves batches of tensors as they are.

    Args:
        model: The float model.
        data: Strings, rows with a text field, a tokenizer's output, pictures, batches, or None.
        config: Gives processor, sequence length, effort and seed.

    Raises:
        DataError: Text without a tokenizer, or sequences longer than the model takes.
    """
    if data is None:
        if not _writes(model):
            return None
        warnings.warn(
            "No data was given: the model writes its own calibration text. Text like that which it will see does "
            "better where there is much of it: pass data=[...].",
            HQWarning,
            stacklevel=4,
        )
        return Rows({"input_ids": written(model, config, min(_WRITTEN[config.effort], _needed(config)))})
    if isinstance(data, Mapping) and not isinstance(data, Tensor):
        return _from_encoding(model, data)
    if isinstance(data, (DataLoader, Tensor, str, bytes)) or not isinstance(data, Iterable):
        return data
    if iter(data) is data:
        return data  # the core says what is wrong with it
    first = next(iter(data), None)
    text = _text_of(first)
    if text is not None:
        tokens = _tokenized(model, [_text_of(row) or "" for row in data], config)
        if config.self_written and _writes(model):
            tokens = {"input_ids": _with_written(model, tokens["input_ids"], config)}
        return Rows(tokens)
    if type(first).__module__.startswith("PIL."):
        return Rows(_processed(list(data), config))
    if isinstance(first, Mapping):
        _check_length(model, first.get("input_ids"))
    return data


def _text_of(row: Any) -> str | None:
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        return next((row[name] for name in TEXT_FIELDS if isinstance(row.get(name), str)), None)
    return None


def _writes(model: PreTrainedModel) -> bool:
    return takes_text(model) and model.can_generate() and not model.config.is_encoder_decoder


def positions(model: PreTrainedModel) -> int | None:
    """Returns how many tokens a model takes, where its configuration bounds them."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _check_length(model: PreTrainedModel, ids: Any) -> None:
    most = positions(model)
    if isinstance(ids, Tensor) and ids.dim() >= 1 and most is not None and ids.shape[-1] > most:
        raise DataError(
            f"Sequences of {ids.shape[-1]} tokens are longer than the {most} that the model takes. Truncate them, "
            f"or pass text and sequence_length={most}."
        )


def _from_encoding(model: PreTrainedModel, encoding: Mapping[str, Any]) -> Rows:
    """Takes what a tokenizer or an image processor returned for all samples."""
    tensors = {}
    for name, value in encoding.items():
        try:
            tensors[name] = value if isinstance(value, Tensor) else torch.tensor(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{name!r} is not one tensor: its samples have several lengths. Tokenize with padding=True and "
                "return_tensors='pt', or pass the text itself."
            ) from error
    if not tensors or any(tensor.dim() == 0 for tensor in tensors.values()):
        raise DataError("data is a mapping without samples. Pass a tokenizer's output, or a list of batches.")
    _check_length(model, tensors.get("input_ids"))
    return Rows(tensors)


def tokenizer(model: PreTrainedModel, config: Config) -> Any:
    """Returns the tokenizer: the one given, or that of the folder the model came from.

    Raises:
        DataError: There is none.
    """
    if config.processor is not None:
        return config.processor
    origin = getattr(model.config, "_name_or_path", "")
    if origin:
        try:
            return AutoTokenizer.from_pretrained(origin)
        except Exception:  # not found, offline, or without a tokenizer: all the same here
            pass
    raise DataError(
        "data is text, and there is no tokenizer to read it with"
        + (f" ({origin!r} has none that can be loaded)" if origin else "")
        + ". Pass it: hq_plugin.quantize(model, budget, data=texts, processor=tokenizer)."
    )


def _tokenized(model: PreTrainedModel, texts: Sequence[str], config: Config) -> dict[str, Tensor]:
    """Tokenizes: one stream cut into samples for causal models, one padded sample a text for others."""
    read = tokenizer(model, config)
    length = config.sequence_length or 128
    most = positions(model)
    if most is not None and length > most:
        raise DataError(f"sequence_length={length} is longer than the {most} tokens that the model takes.")
    if _writes(model):
        end = [read.eos_token_id] if getattr(read, "eos_token_id", None) is not None else []
        stream = list(itertools.chain.from_iterable([*read(text)["input_ids"], *end] for text in texts))
        count = len(stream) // length
        if count == 0:
            raise DataError(
                f"The text has {len(stream)} tokens, less than one sample of {length}. Pass more text, or a "
                "smaller sequence_length."
            )
        return {"input_ids": torch.tensor(stream[: count * length]).view(count, length)}
    if getattr(read, "pad_token", None) is None:
        read.pad_token = read.eos_token
    encoded = dict(read(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"))
    if model.config.is_encoder_decoder:
        ids = encoded["input_ids"]
        start = getattr(model.config, "decoder_start_token_id", None) or 0
        encoded["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    return encoded


def _processed(pictures: list[Any], config: Config) -> dict[str, Tensor]:
    if config.processor is None:
        raise DataError(
            "data is pictures, and there is no image processor to read them with. Pass it: "
            "hq_plugin.quantize(model, budget, data=pictures, processor=image_processor)."
        )
    return dict(config.processor(images=pictures, return_tensors="pt"))


def _needed(config: Config) -> int:
    """Returns how many sequences all stages see, those that are held out counted."""
    steps = config.steps
    return (steps.meta + steps.finetune) * (config.batch_size or 1) + steps.holdout * RERANK_FACTOR


def _with_written(model: PreTrainedModel, ids: Tensor, config: Config) -> Tensor:
    """Puts text that the model writes itself beside the user's, in the share that `self_written` says.

    Of the user's sequences, evenly spaced ones are kept, as many as training sees, so that the share holds.
    """
    needed = _needed(config)
    count = min(_WRITTEN[config.effort], round(needed * (config.self_written or 0.0)))
    kept = min(len(ids), max(needed - count, 1))
    places = torch.linspace(0, len(ids) - 1, kept).round().long()
    return torch.cat([ids[places], written(model, config, count, length=ids.shape[1])])


@torch.no_grad()
def written(model: PreTrainedModel, config: Config, count: int, length: int | None = None) -> Tensor:
    """Lets a causal model write text, by sampling from its begin-of-text token.

    Text of the model's own distribution distils better than little text of another kind (LLM-QAT, Liu et
    al., arXiv:2305.17888).

    Args:
        model: The float model; it is not changed. With mixed precision a copy in that precision writes.
        config: Gives the seed and, where `length` is None, the sequence length.
        count: Sequences.
        length: Tokens of each.

    Returns:
        `[count, length]`.
    """
    length = min(length or config.sequence_length or 256, positions(model) or 1 << 30)
    settings = model.generation_config
    text = model.config.get_text_config()
    named = (settings.bos_token_id, text.bos_token_id, settings.eos_token_id)
    tokens = [token[0] if isinstance(token, list) else token for token in named]
    start = next((token for token in tokens if token is not None and token < text.vocab_size), 0)
    kind = next(model.parameters()).device
    with autocast():
        dtype = torch.get_autocast_dtype(kind.type) if torch.is_autocast_enabled(kind.type) else None
    writer: Any = model if dtype is None else copy.deepcopy(model).to(dtype=dtype)
    made = [torch.empty(0, length, dtype=torch.long)]
    with seeded(config.seed):
        for first in range(0, count, _AT_ONCE):
            ids = torch.full((min(_AT_ONCE, count - first), 1), start, device=kind)
            # Sequences go on after an end-of-text token: samples of one length need no padding.
            out = writer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=length - 1,
                min_new_tokens=length - 1,
                pad_token_id=start,
            )
            made.append(out[:, :length].cpu())
    return torch.cat(made)


def example(model: PreTrainedModel) -> dict[str, Any]:
    """Returns keyword inputs for two samples."""
    parameter = next(model.parameters())
    config = model.config
    length = min(16, positions(model) or 16)
    ids = torch.randint(config.get_text_config().vocab_size, (2, length)) if takes_text(model) else None
    if ids is not None:
        names = inspect.signature(model.forward).parameters
        made: dict[str, Any] = {"input_ids": ids.to(parameter.device)}
        if config.is_encoder_decoder and "decoder_input_ids" in names:
            made["decoder_input_ids"] = made["input_ids"]
        return made
    if model.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        shape = (2, getattr(vision, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, dtype=parameter.dtype, device=parameter.device)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 16_000, dtype=parameter.dtype, device=parameter.device)}
    if model.main_input_name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 50)
        spectrum = (2, getattr(config, "num_mel_bins", 80), frames)
        made = {"input_features": torch.randn(spectrum, dtype=parameter.dtype, device=parameter.device)}
        if config.is_encoder_decoder:
            made["decoder_input_ids"] = torch.zeros(2, 4, dtype=torch.long, device=parameter.device)
        return made
    raise DataError(
        f"No data was given, and {type(model).__name__} takes {model.main_input_name!r}. Pass data=[...]."
    )
