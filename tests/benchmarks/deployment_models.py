"""The models of the deployment benchmark: packed with given widths, in PyTorch and as files for ONNX Runtime.

Speed depends on widths and not on weights: nothing is trained or searched here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import hq_plugin
from hq_plugin import HybridPolicy, LayerBits, torch_ao
from hq_plugin.integrations.onnxruntime.causal import CausalForward, causal_inputs
from hq_plugin.integrations.onnxruntime.sessions import open_session
from hq_plugin.nn import packed_modules
from hq_plugin.sites import Site, find_sites

#: SmolLM2's widths in turn: just below 4 effective bits with steps and zero points.
_TURN = {0: 8, 2: 2, 4: 2, 6: 2, 8: 2, 10: 2}
#: No 8-bit layers: with the embeddings at 4 bits, and steps and zero points counted, 3.38 bits in the mean.
_SMALL_TURN = {0: 2, 2: 2, 4: 2, 5: 2, 6: 2, 8: 2, 10: 2}


@torch.no_grad()
def packed(model: nn.Module, bits: Callable[[Site], LayerBits], **x: Tensor) -> nn.Module:
    """A packed model whose widths are given, with ranges of activations from `x`."""
    args, kwargs = ((x["x"],), {}) if "x" in x else ((), x)
    size = next(iter(x.values())).shape[0]
    sites = find_sites(model, lambda made: made(*args, **kwargs), size)
    policy = HybridPolicy({site.name: bits(site) for site in sites})
    prepared = torch_ao.prepare(model, policy, whole_zero_points=True).eval()
    prepared(*args, **kwargs)
    return torch_ao.convert(prepared)


def alternating(first: int, second: int) -> Callable[[Site], LayerBits]:
    """A hybrid of two widths of weights; inputs have 8 bits."""
    turn = [0]

    def bits(site: Site) -> LayerBits:
        turn[0] += 1
        return LayerBits(first if turn[0] % 2 else second, 8 if site.quantizes_input else 16)

    return bits


def mixed(small: bool = False) -> Callable[[Site], LayerBits]:
    """A hybrid of 2, 4 and 8 bits for SmolLM2, 4 bits for its embeddings and head; groups of 64."""
    turn = [0]

    def bits(site: Site) -> LayerBits:
        if site.name in ("lm_head", "model.embed_tokens"):
            return LayerBits(4, 16, 64)
        turn[0] += 1
        return LayerBits((_SMALL_TURN if small else _TURN).get(turn[0] % 11, 4), 16, 64)

    return bits


def language_models(*widths: Callable[[Site], LayerBits]) -> list[Any]:
    """Float SmolLM2, and packed ones."""
    from tests.benchmarks.language import smollm2

    model, _ = smollm2()
    ids = torch.arange(16).view(2, 8)
    return [model, *(packed(model, bits, input_ids=ids) for bits in widths)]


def tiny_language_model() -> list[Any]:
    """A float model of SmolLM2's class with two small layers, and a packed one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    return [model, packed(model, mixed(small=True), input_ids=torch.arange(16).view(2, 8))]


def effective_bits(model: nn.Module) -> float:
    """Bits of a packed weight in the mean, steps and zero points counted; tied weights count once."""
    layers = {layer.weight_packed.data_ptr(): layer for layer in packed_modules(model).values()}
    stored = sum(
        buffer.numel() * buffer.element_size()
        for layer in layers.values()
        for name, buffer in layer.named_buffers(recurse=False)
        if name.startswith("weight_")
    )
    return 8 * stored / sum(torch.Size(layer.weight_shape).numel() for layer in layers.values())


def session(path: Path) -> onnxruntime.InferenceSession:
    """Opens a file with as many threads as torch has."""
    return open_session(path, torch.get_num_threads())


def float_session(model: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Opens a float model in ONNX Runtime, written by torch's own exporter; the sizes of a batch stay free."""
    if kwargs:
        free: Any = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        shapes: Any = dict.fromkeys(kwargs, free)
    else:
        shapes = tuple({0: torch.export.Dim.AUTO} for _ in args)
    program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(path)
    return session(path)


def float_causal_session(model: nn.Module, path: Path) -> Any:
    """Opens a float language model in ONNX Runtime, with a cache of keys and values."""
    kwargs, shapes = causal_inputs(model)
    program = torch.onnx.export(
        CausalForward(model), (), kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    assert program is not None
    program.save(path, external_data=True)
    return session(path)


def hybrid_session(model: nn.Module, path: Path, inputs: Any = None) -> Any:
    """Opens a packed model in ONNX Runtime."""
    hq_plugin.export(model, path, inputs)
    return session(path)
