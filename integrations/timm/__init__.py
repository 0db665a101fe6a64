"""timm models: input shapes, normalisation, and rebuilding a saved model from its name.

`hq_plugin.quantize(timm.create_model(...), ...)` needs no call from here. `load(directory)` rebuilds a
saved model from its name alone, `transform(model)` gives the preprocessing it was trained with, and
`ImageFolder(folder, model)` reads images with it.
"""

from hq_plugin.integrations.timm.adapter import ADAPTER, create_model, data_config, load, transform
from hq_plugin.integrations.timm.images import ImageFolder

__all__ = ["ADAPTER", "ImageFolder", "create_model", "data_config", "load", "transform"]
