"""What `save_pretrained` and `push_to_hub` of a packed model write beside transformers' own files.

A model card, a checksum and the report's data. The tensors are `quantizer.py`'s matter.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hq_plugin.compact import REPORT_FILE, write_beside
from hq_plugin.distribution import is_first
from hq_plugin.errors import ModelError
from hq_plugin.integrations.huggingface.card import card, is_unedited
from hq_plugin.integrations.huggingface.integrity import add_checksum
from hq_plugin.nn import check_unedited, packed_modules
from hq_plugin.result import Result
from hq_plugin.storage import write_text

if TYPE_CHECKING:
    # Imported while transformers still is: see `quantizer.py`.
    from transformers import PreTrainedModel

#: What transformers writes into the model card of a new repository.
_EMPTY_CARD = "This model card has been automatically generated."


def bind(model: PreTrainedModel) -> None:
    """Makes a packed model write what is ours when it is saved or pushed."""
    # No subclass: the model keeps its class. A copy, or what was pickled, binds to the copy.
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        base: Any = type(model)
        model.__class__ = _with_dtype(base)
    model.save_pretrained = functools.partial(_save_pretrained, model)  # type: ignore[method-assign]
    model._upload_modified_files = functools.partial(_upload_modified_files, model)  # type: ignore[method-assign]


@functools.cache
def _with_dtype(base: Any) -> Any:
    """Returns a subclass, of the same name, of models in which every parameter is packed.

    transformers takes a model's dtype from its parameters, of which there are none left.
    """

    def dtype(self: nn.Module) -> torch.dtype:
        return next(layer.weight_dtype for layer in packed_modules(self).values())

    def reduced(self: nn.Module, protocol: Any) -> Any:
        return _empty, (base,), self.__dict__

    own = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__reduce_ex__": reduced}
    content = {"dtype": property(dtype), **own}
    return type(base.__name__, (base,), content)


def _empty(base: Any) -> Any:
    made = _with_dtype(base)
    return made.__new__(made)


def _save_pretrained(
    self: PreTrainedModel, save_directory: Any, is_main_process: bool | None = None, *args: Any, **options: Any
) -> None:
    """As `PreTrainedModel.save_pretrained`, with card, checksum and report; of several processes the first alone.

    Raises:
        ModelError: Dequantized weights were edited, as merging an adapter does: the packed ones lack it.
    """
    check_unedited(self)
    if wrapped := next((name for name in packed_modules(self) if name.endswith(".base_layer")), None):
        raise ModelError(
            f"An adapter is around {wrapped.removesuffix('.base_layer')!r}: save the PeftModel, which writes the "
            "adapter, and the packed model before it is given one, or after unload()."
        )
    main = is_first() if is_main_process is None else is_main_process
    options.setdefault("save_original_format", not _is_stored_otherwise(self))
    config = Path(save_directory) / "config.json"
    earlier = config.read_bytes() if config.is_file() else None
    type(self).save_pretrained(self, save_directory, main, *args, **options)
    if main:
        add_checksum(Path(save_directory))
        if _card_is_ours(Path(save_directory)):
            _write_card(self, save_directory)
        if not _write_report(self, save_directory) and config.read_bytes() != earlier:
            # The report of what was saved here before. One loaded from here is the same, by its checksum.
            (Path(save_directory) / REPORT_FILE).unlink(missing_ok=True)


def _is_stored_otherwise(model: PreTrainedModel) -> bool:
    """Whether transformers joins or splits this model's weights when it saves, which packed ones do not bear."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(model))


def _upload_modified_files(self: PreTrainedModel, working_dir: Any, *args: Any, **options: Any) -> Any:
    """As `PreTrainedModel._upload_modified_files`, with our card where transformers put an empty one."""
    if _card_is_ours(Path(working_dir)):
        _write_card(self, working_dir)
    # `save_pretrained(push_to_hub=True)` uploads before it returns to us.
    add_checksum(Path(working_dir))
    _write_report(self, working_dir)
    return type(self)._upload_modified_files(self, working_dir, *args, **options)


def _card_is_ours(directory: Path) -> bool:
    """Whether a model card may be written: there is none, or it is an empty one, or an earlier one of ours."""
    page = directory / "README.md"
    if not page.exists():
        return True
    text = page.read_text(encoding="utf-8", errors="replace")
    return _EMPTY_CARD in text or is_unedited(text)


def _write_card(model: PreTrainedModel, directory: Any) -> None:
    config: Any = model.config.quantization_config
    page = card(type(model).__name__, getattr(model.config, "_name_or_path", ""), config)
    write_text(Path(directory) / "README.md", page)


def _write_report(model: PreTrainedModel, directory: Any) -> bool:
    """Writes the model's report, if it has one, and returns whether it has."""
    result = getattr(model, "hq", None)
    if isinstance(result, Result):
        write_beside(result, directory)
    return isinstance(result, Result)


__all__ = ["bind"]
