"""Language models with a cache: keys and values of earlier tokens go in and come out as tensors."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def is_causal(model: nn.Module) -> bool:
    """Whether a model is a decoder of transformers that generates from a cache of keys and values alone."""
    config: Any = getattr(model, "config", None)
    generates = getattr(model, "can_generate", None)
    if (
        not callable(generates)
        or not generates()
        or getattr(config, "num_hidden_layers", None) is None
        or getattr(config, "is_encoder_decoder", False)
    ):
        return False
    from transformers import DynamicCache

    # State-space layers (Mamba) keep states of another kind.
    layers = DynamicCache(config=config.get_text_config()).layers
    return all(hasattr(layer, "keys") and hasattr(layer, "values") for layer in layers)


class CausalForward(nn.Module):
    """A decoder as a function of tensors.

    Args:
        model: A causal language model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.cache = _cache_name(model)
        self.positions = _has_absolute_positions(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Runs the model on new tokens.

        Args:
            input_ids: `[batch, new]`.
            attention_mask: `[batch, earlier + new]`.
            past: Keys and values of each layer in turn, `[batch, heads, earlier, head size]`.

        Returns:
            Logits `[batch, new, tokens]`, and keys and values like `past`, for `earlier + new` tokens.
        """
        from transformers import DynamicCache

        made: Any = self.model
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        named: dict[str, Any] = {self.cache: cache}
        if self.positions:  # else counted from the cache's length, padding on the left included
            named["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = made(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **named)
        return output.logits, *_tensors(output[self.cache])


def _has_absolute_positions(model: nn.Module) -> bool:
    """Whether positions are looked up, as in GPT-2; rotated ones count by their differences alone."""
    made: Any = model
    config = made.config.get_text_config()
    rotates = any(
        getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta", "rotary_dim")
    )
    return not rotates and "position_ids" in inspect.signature(model.forward).parameters


def _cache_name(model: nn.Module) -> str:
    """Returns what a model calls its cache: renamed in transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _tensors(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def causal_inputs(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns example inputs for `CausalForward`, and which of their sizes stay free."""
    made: Any = model
    batch, new, earlier = 2, 3, 5
    ids = torch.arange(batch * earlier).view(batch, earlier) % made.config.get_text_config().vocab_size
    output = made(input_ids=ids, use_cache=True)
    past = _tensors(output[_cache_name(model)])
    dim = torch.export.Dim
    rows, tokens, before = dim("batch", max=65536), dim("sequence", max=1 << 20), dim("past", min=0, max=1 << 20)
    kwargs = {
        "input_ids": ids[:, :new],
        "attention_mask": torch.ones(batch, earlier + new, dtype=torch.long),
        "past": past,
    }
    shapes = {
        "input_ids": {0: rows, 1: tokens},
        "attention_mask": {0: rows, 1: dim.AUTO},
        "past": [{0: rows, 2: before} for _ in past],
    }
    return kwargs, shapes


def generate(session: Any, input_ids: Any, new_tokens: int, stop: int | None = None) -> Any:
    """Generates greedily with an exported model, onnxruntime and numpy alone.

    Args:
        session: `onnxruntime.InferenceSession` of a model that was exported with a cache.
        input_ids: Integer array `[batch, length]`, without padding.
        new_tokens: How many tokens to add.
        stop: Token after which a batch of one ends.

    Returns:
        int64 array `[batch, length + added]`.
    """
    import numpy as np

    ids = np.asarray(input_ids, dtype=np.int64)
    caches = [entry for entry in session.get_inputs() if entry.name not in ("input_ids", "attention_mask")]
    past = [np.zeros((len(ids), entry.shape[1], 0, entry.shape[3]), dtype=np.float32) for entry in caches]
    new = ids
    for _ in range(new_tokens):
        feed = {"input_ids": new, "attention_mask": np.ones_like(ids)}
        feed |= {entry.name: value for entry, value in zip(caches, past, strict=True)}
        logits, *past = session.run(None, feed)
        new = logits[:, -1].argmax(-1)[:, None].astype(np.int64)
        ids = np.concatenate([ids, new], axis=1)
        if stop is not None and len(ids) == 1 and int(new[0, 0]) == stop:
            break
    return ids
