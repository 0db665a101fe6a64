"""Hugging Face transformers: any `PreTrainedModel` or pipeline, by `hq_plugin.quantize`.

`import hq_plugin`, before or after transformers, registers the quantization method `hq` with it, so that
`from_pretrained` loads what `save_pretrained` of a quantized model wrote.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hq_plugin.integrations.huggingface.adapter import ADAPTER
    from hq_plugin.integrations.huggingface.quantizer import HqConfig, HqQuantizer

__all__ = ["ADAPTER", "HqConfig", "HqQuantizer"]


def __getattr__(name: str) -> Any:
    # Lazy, since `quantizer` is imported while transformers itself still is.
    if name == "ADAPTER":
        from hq_plugin.integrations.huggingface.adapter import ADAPTER

        return ADAPTER
    if name in ("HqConfig", "HqQuantizer"):
        from hq_plugin.integrations.huggingface import quantizer

        return getattr(quantizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
