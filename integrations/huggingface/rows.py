"""Samples as rows of tensors: from tokenized rows, a processor's output, pictures and sounds.

What `datasets` gives, row by row, becomes one tensor a column here. How text becomes tokens is `inputs.py`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hq_plugin.batch import LABEL_KEYS, Split
from hq_plugin.errors import DataError
from hq_plugin.modes import in_eval_mode

#: Fields in which rows of a data set keep their picture or sound.
MEDIA_FIELDS = ("image", "img", "audio", "speech")
#: Dimensions of one sample of each main input; a batch has one more.
_DIMENSIONS = {"input_ids": 1, "pixel_values": 3, "input_values": 1, "input_features": 2, "spatial_shapes": 1}
#: Inputs `[samples, tokens]` that padding at the end is cut from, down to a multiple of so many tokens: kernels
#: like such lengths.
_BY_TOKEN = (
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask"),
    *("global_attention_mask", "langs", "bbox"),
)
_MULTIPLE = 8
#: What stands for padding in labels, in all of transformers.
IGNORED = -100
#: What an encoder-decoder writes of each sound, at most, in tokens.
_TRANSCRIPT = 32


class Rows(Dataset[dict[str, Tensor]]):
    """Samples as rows of tensors, which the core shuffles, splits and collates."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def splitter(model: PreTrainedModel) -> Callable[[Any], Split]:
    """Returns what `Config.prepare_batch` asks for: labels apart, and no cache of keys and values.

    Target texts become what the decoder reads. Sequences that are too long are refused. Texts are padded to the
    longest of the data set: a batch of shorter ones loses what all of them have of it.
    """

    known = inspect.signature(model.forward).parameters
    # Some classifiers say so themselves to the model inside, which must not hear it twice.
    caches = model.can_generate() or "use_cache" in known
    masks = "decoder_attention_mask" in known

    def split(raw: Any) -> Split:
        if isinstance(raw, Mapping):
            kwargs = {name: value for name, value in raw.items() if name not in LABEL_KEYS}
            label = next((raw[name] for name in LABEL_KEYS if isinstance(raw.get(name), Tensor)), None)
            if "input_ids" in kwargs:
                check_length(model, kwargs["input_ids"])
                if caches:
                    kwargs.setdefault("use_cache", False)
            if label is not None and label.dim() == 2 and _reads_labels(model):
                kwargs.setdefault("decoder_input_ids", _decoder_ids(model, label))
                if masks:
                    kwargs.setdefault("decoder_attention_mask", _decoder_mask(label))
            elif "input_ids" in kwargs and _reads_labels(model) and not any(n in kwargs for n in _DECODED):
                kwargs["decoder_input_ids"] = shifted(model, kwargs["input_ids"])
            return (), _trimmed(kwargs), label if label is not None and label.dim() == 1 else None
        if isinstance(raw, (tuple, list)):
            last = raw[-1]
            is_label = (
                len(raw) == 2 and isinstance(last, Tensor) and last.dim() == 1 and not last.is_floating_point()
            )
            return (tuple(raw[:-1]), {}, last) if is_label else (tuple(raw), {}, None)
        return (raw,), {}, None

    return split


def _trimmed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Cuts columns at the end that are padding in every sample; a decoder's copy of the text is cut alike.

    Nothing is cut where another input may have a value for each token: they would no longer fit.
    """
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.dim() != 2 or ids.shape != mask.shape:
        return kwargs
    columns = mask.any(0).nonzero()
    used = int(columns[-1]) + 1 if len(columns) else 0
    length = min(-(-used // _MULTIPLE) * _MULTIPLE, mask.shape[1])
    if length in (0, mask.shape[1]):
        return kwargs
    names = list(_BY_TOKEN)
    copied = kwargs.get("decoder_input_ids")
    if isinstance(copied, Tensor) and copied.shape == ids.shape and torch.equal(copied[:, 1:], ids[:, :-1]):
        names += ["decoder_input_ids", "decoder_attention_mask"]
    by_token = [name for name, value in kwargs.items() if getattr(value, "shape", ())[:2] == mask.shape]
    if any(name not in names and not name.startswith("decoder_") for name in by_token):
        return kwargs
    return {**kwargs, **{name: kwargs[name][:, :length] for name in by_token if name in names}}


def _reads_labels(model: PreTrainedModel) -> bool:
    """Whether the model has a decoder that reads its target text, shifted by one."""
    return bool(model.config.is_encoder_decoder) and hasattr(model, "prepare_decoder_input_ids_from_labels")


#: What a decoder reads, where it is given.
_DECODED = ("decoder_input_ids", "decoder_inputs_embeds")


def shifted(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Returns what a decoder reads that is to repeat a text `[samples, tokens]`: that, one token later."""
    start = getattr(model.config, "decoder_start_token_id", None) or 0
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


def _decoder_ids(model: Any, labels: Tensor) -> Tensor:
    ids: Tensor = model.prepare_decoder_input_ids_from_labels(labels)
    return ids


def _decoder_mask(labels: Tensor) -> Tensor:
    """Returns at which positions `[samples, tokens]` a decoder is to say something, by what it should: int64."""
    mask = (labels != IGNORED).long()
    mask[:, 0] = 1  # a decoder that attends to nothing gives no numbers
    return mask


def positions(model: PreTrainedModel) -> int | None:
    """Returns how many tokens a model takes, where its configuration bounds them."""
    config = model.config.get_text_config()
    if not getattr(config, "position_biased_input", True):
        return None  # DeBERTa without absolute positions: its bound is one of distances, which are clipped
    # T5 and its like have distances in buckets; files of theirs say n_positions all the same. MPNet has both.
    relative = hasattr(config, "relative_attention_num_buckets")
    for name in ("max_position_embeddings",) if relative else ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value - _reserved(model, value)
    return None


def _reserved(model: PreTrainedModel, rows: int) -> int:
    """Returns the positions that RoBERTa and its like keep for padding: theirs start behind its index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.padding_idx + 1 if module.padding_idx is not None and len(module.weight) == rows else 0
    return 0


def check_length(model: PreTrainedModel, ids: Any) -> None:
    """Refuses token ids `[..., tokens]` with more tokens than the model has positions.

    Raises:
        DataError: They are too long.
    """
    most = positions(model)
    if isinstance(ids, Tensor) and ids.dim() >= 1 and most is not None and ids.shape[-1] > most:
        raise DataError(
            f"Sequences of {ids.shape[-1]} tokens are longer than the {most} that the model takes. Truncate them, "
            f"or pass text and sequence_length={most}."
        )


def from_encoding(model: PreTrainedModel, encoding: Mapping[str, Any]) -> Rows:
    """Takes what a tokenizer or an image processor returned for all samples.

    Raises:
        DataError: It holds no samples, or samples of several lengths, or too long ones.
    """
    tensors = {}
    for name, value in encoding.items():
        try:
            tensors[name] = value if isinstance(value, Tensor) else torch.as_tensor(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{name!r} is not one tensor: its samples have several lengths. Tokenize with padding=True and "
                "return_tensors='pt', or pass the text itself."
            ) from error
    if not tensors or any(tensor.dim() == 0 for tensor in tensors.values()):
        raise DataError("data is a mapping without samples. Pass a tokenizer's output, or a list of batches.")
    check_length(model, tensors.get("input_ids"))
    return Rows(tensors)


def is_row(model: PreTrainedModel, first: Mapping[str, Any]) -> bool:
    """Returns whether a mapping is one sample of model inputs, and not a batch of them."""
    # Pictures in patches (SigLIP 2) have a dimension less; beside them is how many rows and columns they have.
    name = "spatial_shapes" if "spatial_shapes" in first else model.main_input_name
    wanted, value = _DIMENSIONS.get(name), first.get(name)
    if name == "input_values" and reads_spectrograms(model):
        wanted = 2
    if value is None or wanted is None:
        return False
    try:
        return torch.as_tensor(value).dim() == wanted
    except (ValueError, TypeError, RuntimeError):
        return False


def reads_spectrograms(model: PreTrainedModel) -> bool:
    """Whether `input_values` are spectrograms `[frames, bins]` in patches (AST), and not sounds `[samples]`."""
    return hasattr(model.config, "frequency_stride")


def from_rows(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Stacks samples of model inputs; sequences of several lengths are padded and masked.

    Columns that are no inputs of the model are dropped, but labels.

    Raises:
        DataError: A column is no input that can be stacked, or too long.
    """
    known = {*inspect.signature(model.forward).parameters, *LABEL_KEYS}
    columns = [name for name in rows[0] if name in known and not isinstance(rows[0][name], (str, type(None)))]
    blank = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    padding = {"input_ids": blank, "decoder_input_ids": blank, "labels": IGNORED}
    # By the lengths, since T5's decoder starts with the token that pads.
    masks = {model.main_input_name: "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
    tensors = {}
    for name in columns:
        try:
            values = [torch.as_tensor(row[name]) for row in rows]
            if values[0].dim() == 1 and len({len(value) for value in values}) > 1:
                fill = padding.get(name, 0)
                tensors[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
                if masks.get(name) in known.difference(columns):
                    kept = [torch.ones(len(value), dtype=torch.long) for value in values]
                    tensors[masks[name]] = nn.utils.rnn.pad_sequence(kept, batch_first=True)
            else:
                tensors[name] = torch.stack(values)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                f"The column {name!r} cannot be stacked into one tensor ({error}). Give every row the same inputs, "
                "or pass batches: a DataLoader, or a list of dicts of tensors."
            ) from error
    check_length(model, tensors.get("input_ids"))
    return Rows(tensors)


#: Modes of pictures that are made RGB.
_CONVERTED = ("1", "L", "LA", "P", "PA", "RGBA", "CMYK")


def from_pictures(pictures: list[Any], processor: Any) -> Rows:
    """Lets an image processor read pictures.

    Raises:
        DataError: There is no processor, or it reads no pictures.
    """
    if processor is None:
        raise DataError(
            "data is pictures, and there is no image processor to read them with. Pass it: "
            "hq_plugin.quantize(model, budget, data=pictures, processor=image_processor)."
        )
    if isinstance(processor, PreTrainedTokenizerBase):
        raise DataError(
            f"data is pictures, and processor= is a {type(processor).__name__}, which reads none. Pass the image "
            "processor, or the processor that holds it: transformers.AutoProcessor.from_pretrained(...)."
        )
    # Grey ones and those with an alpha channel among them: processors take what they get.
    coloured = [p.convert("RGB") if getattr(p, "mode", "RGB") in _CONVERTED else p for p in pictures]
    return Rows(dict(processor(images=coloured, return_tensors="pt")))


def from_sounds(model: PreTrainedModel, sounds: list[Any], processor: Any) -> Rows:
    """Lets a feature extractor read sounds; a decoder reads what the float model writes of them.

    Args:
        model: The float model.
        sounds: Each `[samples]`, an array `[1, samples]`, a list of floats, or a mapping with `array` and
            `sampling_rate`.
        processor: A feature extractor, or a processor that holds one.

    Raises:
        DataError: There is no processor, it reads no sounds, or a sound has another sampling rate than it reads.
    """
    extractor = getattr(processor, "feature_extractor", processor)
    if extractor is None:
        raise DataError(
            "data is sounds, and there is no feature extractor to read them with. Pass it: "
            "hq_plugin.quantize(model, budget, data=sounds, processor=feature_extractor)."
        )
    rate = getattr(extractor, "sampling_rate", None)
    if rate is None:
        raise DataError(
            f"data is sounds, and processor= is a {type(extractor).__name__}, which reads none. Pass the feature "
            "extractor, or the processor that holds it: transformers.AutoProcessor.from_pretrained(...)."
        )
    arrays = []
    for sound in sounds:
        if hasattr(sound, "keys") or hasattr(sound, "get_all_samples"):
            if sound["sampling_rate"] != rate:
                raise DataError(
                    f"A sound has {sound['sampling_rate']} samples a second; the feature extractor reads {rate}. "
                    f"Resample it: dataset.cast_column('audio', Audio(sampling_rate={rate}))."
                )
            sound = sound["array"]
        array = torch.as_tensor(sound).float()
        arrays.append((array[0] if array.dim() == 2 else array).numpy())
    # Spectrograms are padded to the length that the model was made for, which is the extractor's default.
    options = {"padding": True} if model.main_input_name == "input_values" else {}
    tensors = dict(extractor(arrays, sampling_rate=rate, return_tensors="pt", **options))
    if model.config.is_encoder_decoder and model.can_generate():
        tensors |= _transcripts(model, tensors[model.main_input_name])
    return Rows(tensors)


@torch.no_grad()
def _transcripts(model: Any, features: Tensor) -> dict[str, Tensor]:
    """Returns what a model writes of each sample, `[samples, tokens]`, and its mask where the decoder takes one."""
    device = next(model.parameters()).device
    end = model.generation_config.pad_token_id or 0
    most = min(_TRANSCRIPT, getattr(model.config, "max_target_positions", 2 * _TRANSCRIPT) // 2)
    made: list[Tensor] = []
    with in_eval_mode(model):
        for part in features.split(16):
            made += model.generate(part.to(device), max_new_tokens=most, do_sample=False).cpu()
    written = {"decoder_input_ids": nn.utils.rnn.pad_sequence(made, batch_first=True, padding_value=float(end))}
    last = model.generation_config.eos_token_id
    if last is not None and "decoder_attention_mask" in inspect.signature(model.forward).parameters:
        ended = torch.isin(written["decoder_input_ids"], torch.as_tensor(last))
        ended[:, 0] = False  # BART's and its like start with it
        written["decoder_attention_mask"] = (ended.cumsum(1) == 0).long()
    return written


def media_field(row: Any) -> str | None:
    """Returns the field in which a row of a data set keeps its picture or sound, or None."""
    if not isinstance(row, Mapping):
        return None
    return next((name for name in MEDIA_FIELDS if is_picture(row.get(name)) or is_sound(row.get(name))), None)


def label_of(row: Any) -> int | None:
    """Returns the class of a row of a data set, where a whole number names it."""
    if isinstance(row, Mapping):
        for name in LABEL_KEYS:
            value: Any = row.get(name)
            try:
                return operator.index(value)
            except (TypeError, RuntimeError):  # there is none, or it is something else
                continue
    return None


def is_picture(value: Any) -> bool:
    """Returns whether a value is a PIL image."""
    return type(value).__module__.startswith("PIL.")


def is_sound(value: Any) -> bool:
    """Returns whether a value is one sound: an array `[samples]`, or `{"array", "sampling_rate"}`."""
    if isinstance(value, Mapping):
        return "array" in value and "sampling_rate" in value
    if hasattr(value, "get_all_samples"):  # what `datasets` gives where torchcodec is installed
        return True
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], float)
    # torchaudio has a dimension of one channel before the samples; a tensor with one is a batch.
    mono = isinstance(value, np.ndarray) and value.ndim == 2 and len(value) == 1
    return mono or getattr(value, "ndim", None) == 1
