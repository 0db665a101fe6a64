"""What `save_pretrained` and `push_to_hub` of a packed model write beside transformers' own files.

A model card, a checksum and the report's data. The tensors are `quantizer.py`'s matter.
"""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hq_plugin.compact import write_beside
from hq_plugin.distribution import is_first
from hq_plugin.integrations.huggingface.card import card
from hq_plugin.integrations.huggingface.integrity import add_checksum
from hq_plugin.nn import check_unedited, packed_modules
from hq_plugin.result import Result

if TYPE_CHECKING:
    # Imported while transformers still is: see `quantizer.py`.
    from transformers import PreTrainedModel

#: What transformers writes into the model card of a new repository.
_EMPTY_CARD = "This model card has been automatically generated."


def bind(model: PreTrainedModel) -> None:
    """Makes a packed model write what is ours when it is saved or pushed."""
    # Bound methods, and not a subclass: the model keeps its class, and a deep copy binds to the copy.
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        base: Any = type(model)
        model.__class__ = _with_dtype(base)
    model.save_pretrained = types.MethodType(_save_pretrained, model)
    model._upload_modified_files = types.MethodType(_upload_modified_files, model)


@functools.cache
def _with_dtype(base: Any) -> Any:
    """Returns a subclass, of the same name, of models in which every parameter is packed.

    transformers takes a model's dtype from its parameters, of which there are none left.
    """

    def dtype(self: nn.Module) -> torch.dtype:
        return next(layer.weight_dtype for layer in packed_modules(self).values())

    content = {"dtype": property(dtype), "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), content)


def _save_pretrained(self: PreTrainedModel, save_directory: Any, **options: Any) -> None:
    """As `PreTrainedModel.save_pretrained`, with card, checksum and report; of several processes the first alone.

    Raises:
        ModelError: Dequantized weights were edited, as merging an adapter does: the packed ones lack it.
    """
    check_unedited(self)
    options.setdefault("is_main_process", is_first())
    options.setdefault("save_original_format", not _is_stored_otherwise(self))
    type(self).save_pretrained(self, save_directory, **options)
    if options["is_main_process"]:
        add_checksum(Path(save_directory))
        _write_card(self, save_directory)
        _write_report(self, save_directory)


def _is_stored_otherwise(model: PreTrainedModel) -> bool:
    """Whether transformers joins or splits this model's weights when it saves, which packed ones do not bear."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(entry, WeightConverter) for entry in get_model_conversion_mapping(model))


def _upload_modified_files(self: PreTrainedModel, working_dir: Any, *args: Any, **options: Any) -> Any:
    """As `PreTrainedModel._upload_modified_files`, with our card where transformers put an empty one."""
    page = Path(working_dir) / "README.md"
    if not page.exists() or _EMPTY_CARD in page.read_text(encoding="utf-8"):
        _write_card(self, working_dir)
    # `save_pretrained(push_to_hub=True)` uploads before it returns to us.
    add_checksum(Path(working_dir))
    _write_report(self, working_dir)
    return type(self)._upload_modified_files(self, working_dir, *args, **options)


def _write_card(model: PreTrainedModel, directory: Any) -> None:
    config: Any = model.config.quantization_config
    page = card(type(model).__name__, getattr(model.config, "_name_or_path", ""), config)
    (Path(directory) / "README.md").write_text(page, encoding="utf-8")


def _write_report(model: PreTrainedModel, directory: Any) -> None:
    result = getattr(model, "hq", None)
    if isinstance(result, Result):
        write_beside(result, directory)


__all__ = ["bind"]
