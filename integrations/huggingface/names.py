"""Names of packed weights in a file, as transformers' loader takes them.

A pattern for each layer, as transformers has it for other renamings, would be tried on every tensor of the file:
time that grows with the square of the layers. Imported only once transformers is.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers.core_model_loading import WeightRenaming


class StoredNames(WeightRenaming):
    """Renames tensors by their whole names.

    Args:
        names: Names in the file, and those in the model.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        # What the base class does with patterns is not used.
        super().__init__(next(iter(names), ""), next(iter(names.values()), ""))
        self.names = dict(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Returns the new name, and the old one if it was renamed."""
        if source_key not in self.names:
            return source_key, None
        self._was_used = True
        return self.names[source_key], source_key

    def reverse_transform(self) -> StoredNames:
        """Returns the renaming back, for saving."""
        return StoredNames({new: old for old, new in self.names.items()})
