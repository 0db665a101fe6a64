"""Tensors of packed layers, as transformers' loader takes them from a file.

It would make a renaming for each of them, with a regular expression that is compiled each time: half the time of
loading. And a pattern for each layer, as transformers has it for other renamings, would be tried on every tensor:
time that grows with the square of the layers. Imported only once transformers is.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

#: What transformers knows the tensors by; a pattern that no name of a tensor matches.
_PATTERN = "<packed>"


class _Unchanged(ConversionOps):
    """An operation, since transformers wants one."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Returns what it was given."""
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        """Itself."""
        return self


class StoredTensors(WeightConverter):
    """Takes tensors from a file as they are, and renames them by their whole names.

    Args:
        names: Names in the file, and those in the model.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__([_PATTERN], [_PATTERN], operations=[_Unchanged()])
        self.names = dict(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Returns the new name, and the pattern if the tensor is one of these."""
        if source_key not in self.names:
            return source_key, None
        self._was_used = True
        return self.names[source_key], _PATTERN

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredTensors:
        """Returns one that collects tensors of its own, as the loader wants one for each tensor of the model."""
        copied = copy.copy(self)
        copied.collected_tensors = defaultdict(list)
        copied.layer_targets = defaultdict(set)
        return copied

    def convert(self, layer_name: str, *_: Any, **__: Any) -> dict[str, list[Tensor]]:
        """Returns the tensor under its name in the model."""
        (tensors,) = self.materialize_tensors().values()
        return {layer_name: tensors}

    def reverse_transform(self) -> StoredTensors:
        """Returns the renaming back, for saving."""
        return StoredTensors({new: old for old, new in self.names.items()})
