"""timm models: input shapes, normalisation, and rebuilding a saved model from its name.

`hq_plugin.quantize(timm.create_model(...), ...)` needs no call from here. `load(directory)` rebuilds a
saved model from its name alone, and `transform(model)` gives the preprocessing it was trained with.
"""

from hq_plugin.integrations.timm.adapter import ADAPTER, create_model, data_config, load, transform

__all__ = ["ADAPTER", "create_model", "data_config", "load", "transform"]
