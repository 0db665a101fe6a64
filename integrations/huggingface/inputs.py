"""What users of transformers have as data: which kind it is, text as tokens, text that a model writes itself.

Rows of tensors, pictures and sounds are `rows.py`.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PreTrainedModel

from hq_plugin.config import Config
from hq_plugin.data import RERANK_FACTOR
from hq_plugin.errors import DataError, HQWarning
from hq_plugin.integrations.huggingface import rows
from hq_plugin.modes import in_eval_mode
from hq_plugin.precision import autocast
from hq_plugin.seeding import seeded

#: Most sequences that a causal model writes itself, by effort.
_WRITTEN = {"smoke": 8, "fast": 128, "balanced": 384, "best": 2048}
#: Sequences that are written at once.
_AT_ONCE = 32
#: Rows of a stream that are read for each sequence that is needed: texts are shorter than sequences.
_STREAMED = 8
#: Main input of a model, to what makes it, as pipelines call that.
PROCESSORS = {
    "input_ids": "tokenizer",
    "pixel_values": "image_processor",
    "input_values": "feature_extractor",
    "input_features": "feature_extractor",
}
#: Fields in which rows of a data set keep their text.
TEXT_FIELDS = ("text", "content", "sentence")
#: The same of pairs of texts. A causal model reads both as one.
PAIR_FIELDS = (
    *(("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "context")),
    *(("query", "passage"), ("prompt", "completion")),
)


def takes_text(model: PreTrainedModel) -> bool:
    """Returns whether the model's main input is token ids."""
    return model.main_input_name == "input_ids"


def batches(model: PreTrainedModel, data: Any, config: Config) -> Any:
    """Turns what users of transformers have into a Dataset; leaves batches of tensors as they are.

    Args:
        model: The float model.
        data: Strings, a tokenizer's output, pictures, sounds, rows of a data set with any of these, batches,
            or None. Of a stream as much is read as is needed.
        config: Gives processor, sequence length, effort and seed.

    Raises:
        DataError: Text without a tokenizer, pictures or sounds without a processor, or sequences longer than
            the model takes.
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
        return rows.Rows({"input_ids": written(model, config, min(_WRITTEN[config.effort], _needed(config)))})
    if isinstance(data, Mapping) and data and all(hasattr(part, "column_names") for part in data.values()):
        raise DataError(f"data is several data sets: pass one of them, data[{next(iter(data))!r}].")
    if isinstance(data, Mapping) and not isinstance(data, Tensor):
        return rows.from_encoding(model, data)
    if isinstance(data, (DataLoader, Tensor, str, bytes)) or not isinstance(data, Iterable):
        return data
    if iter(data) is data:
        return data  # the core says what is wrong with it
    first = next(iter(data), None)
    samples = data if isinstance(data, Sized) else itertools.islice(data, _STREAMED * _needed(config))
    if isinstance(first, Mapping) and rows.is_row(model, first):
        return rows.from_rows(model, list(samples))
    if takes_text(model) and _text_of(first) is not None:
        texts, labels = _apart(samples, _text_in)
        tokens = _tokenized(model, texts, config)
        if _writes(model):  # whose samples are cut from all texts
            share = config.self_written
            return rows.Rows({"input_ids": _with_written(model, tokens["input_ids"], config)} if share else tokens)
        return rows.Rows({**tokens, **labels})
    field = rows.media_field(first)

    def media(row: Any) -> Any:
        return row if field is None else row[field]

    if rows.is_picture(media(first)):
        pictures, labels = _apart(samples, media)
        return rows.Rows({**rows.from_pictures(pictures, config.processor).tensors, **labels})
    if not takes_text(model) and rows.is_sound(media(first)):
        sounds, labels = _apart(samples, media)
        return rows.Rows({**rows.from_sounds(model, sounds, config.processor).tensors, **labels})
    return data


def _apart(samples: Iterable[Any], content: Callable[[Any], Any]) -> tuple[list[Any], dict[str, Tensor]]:
    """Returns the contents of samples, which are read once, and their labels, int64, where all have one."""
    pairs = [(content(row), rows.label_of(row)) for row in samples]
    labels = [label for _, label in pairs if label is not None]
    return [made for made, _ in pairs], {"labels": torch.tensor(labels)} if len(labels) == len(pairs) else {}


def _text_of(row: Any) -> Any:
    """Returns a text, a pair of texts, or the messages of a chat; None where there is none."""
    if isinstance(row, str):
        return row
    if isinstance(row, (tuple, list)):
        return tuple(row) if len(row) == 2 and all(isinstance(text, str) for text in row) else None
    if not isinstance(row, Mapping):
        return None
    for names in PAIR_FIELDS:
        if all(isinstance(row.get(name), str) for name in names):
            return tuple(row[name] for name in names)
    messages = row.get("messages")
    if isinstance(messages, (tuple, list)) and messages and isinstance(messages[0], Mapping):
        return list(messages)
    return next((row[name] for name in TEXT_FIELDS if isinstance(row.get(name), str)), None)


def _text_in(row: Any) -> Any:
    """Returns the text of a row among rows of text.

    Raises:
        DataError: It has none.
    """
    text = _text_of(row)
    if text is None:
        told = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(
            f"A row has no text, as the first one has: {told}. Texts are strings, pairs of strings, or rows with "
            f"{', '.join(TEXT_FIELDS)} or messages in them. Leave it out."
        )
    return text


def _written_out(text: Any, read: Any) -> str:
    """Returns what a causal model reads of a text, a pair or a chat."""
    if isinstance(text, list):
        try:
            return str(read.apply_chat_template(text, tokenize=False))
        except (ValueError, AttributeError) as error:
            raise DataError(f"data is chats, and the tokenizer cannot write them: {error}") from error
    return text if isinstance(text, str) else "".join(text)


def _writes(model: PreTrainedModel) -> bool:
    return takes_text(model) and model.can_generate() and not model.config.is_encoder_decoder


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
            return transformers.AutoTokenizer.from_pretrained(origin)
        except Exception:  # not found, offline, or without a tokenizer: all the same here
            pass
    raise DataError(
        "data is text, and there is no tokenizer to read it with"
        + (f" ({origin!r} has none that can be loaded)" if origin else "")
        + ". Pass it: hq_plugin.quantize(model, budget, data=texts, processor=tokenizer)."
    )


def _tokenized(model: PreTrainedModel, texts: Sequence[Any], config: Config) -> dict[str, Tensor]:
    """Tokenizes: one stream cut into samples for causal models, one padded sample a text for others."""
    read = tokenizer(model, config)
    length = config.sequence_length or 128
    most = rows.positions(model)
    if most is not None and length > most:
        raise DataError(f"sequence_length={length} is longer than the {most} tokens that the model takes.")
    if _writes(model):
        end = [read.eos_token_id] if getattr(read, "eos_token_id", None) is not None else []
        written_out = (_written_out(text, read) for text in texts)
        stream = list(itertools.chain.from_iterable([*read(text)["input_ids"], *end] for text in written_out))
        count = len(stream) // length
        if count == 0:
            raise DataError(
                f"The text has {len(stream)} tokens, less than one sample of {length}. Pass more text, or a "
                "smaller sequence_length."
            )
        return {"input_ids": torch.tensor(stream[: count * length]).view(count, length)}
    if getattr(read, "pad_token", None) is None:
        read = copy.deepcopy(read)  # the user's is as it was
        read.pad_token = read.eos_token
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    if any(isinstance(text, tuple) for text in texts):
        if not all(isinstance(text, tuple) for text in texts):
            raise DataError("Some rows are pairs of texts, and some are not. Give rows of one kind.")
        encoded = dict(read([a for a, _ in texts], [b for _, b in texts], **options))
    else:
        encoded = dict(read([_written_out(text, read) for text in texts], **options))
    if model.config.is_encoder_decoder:
        encoded["decoder_input_ids"] = rows.shifted(model, encoded["input_ids"])
    return encoded


def _needed(config: Config) -> int:
    """Returns how many sequences all stages see, those that are held out counted."""
    steps = config.steps
    return (steps.meta + steps.finetune) * (config.batch_size or 1) + steps.holdout * RERANK_FACTOR


def _with_written(model: PreTrainedModel, ids: Tensor, config: Config) -> Tensor:
    """Puts text that the model writes itself beside the user's, in the share that `self_written` says.

    The share is of what training sees, and writing takes long: of a few hundred sequences at most there are so many
    (`_WRITTEN`). Of the user's, evenly spaced ones are kept, as many as make up the rest.
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
    length = min(length or config.sequence_length or 256, rows.positions(model) or 1 << 30)
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
    with seeded(config.seed), _without_settings(writer), in_eval_mode(writer):
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
                pad_token_id=start,
            )
            made.append(out[:, :length].cpu())
    return torch.cat(made)


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """Takes a model's own settings away: they may forbid tokens, and an end-of-text token would end a sequence."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


def example(model: PreTrainedModel) -> dict[str, Any]:
    """Returns keyword inputs for two samples."""
    parameter = next(model.parameters())
    config = model.config
    length = min(16, rows.positions(model) or 16)
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
    if model.main_input_name == "input_values" and rows.reads_spectrograms(model):
        spectrum = (2, config.max_length, config.num_mel_bins)
        return {"input_values": torch.randn(spectrum, dtype=parameter.dtype, device=parameter.device)}
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
