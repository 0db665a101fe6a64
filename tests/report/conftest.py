"""What the tests of reports share: a small result that was really made, and one with as many layers as wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin.result import Sensitivity
from tests.browser import Page, browser

Many = Callable[[int], hq.Result]


@pytest.fixture(scope="session")
def result(trained: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> hq.Result:
    options = {"meta_steps": 8, "finetune_steps": 4, "search_evaluations": 24}
    small = hq.quantize(trained, "3bit", batches, effort="smoke", activation_bits=(4, 8), **options)
    found: hq.Result = small.hq
    return found


@pytest.fixture(scope="session")
def many(result: hq.Result) -> Many:
    """Makes results with n layers, which have long names, several sizes and every width."""

    def make(count: int) -> hq.Result:
        kinds = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (16, 64), "mlp.down_proj": (64, 192)}
        named = [(f"model.layers.{n // 3}.{kind}", kinds[kind]) for n in range(count) for kind in [[*kinds][n % 3]]]
        layers = [
            replace(
                result.layers[n % 4],
                name=name,
                kind="linear",
                shape=shape,
                weight_bits=1 + n % 8,
                size=300 * (n + 1),
            )
            for n, (name, shape) in enumerate(named)
        ]
        bits = tuple(range(1, 9))
        sensitivities = [
            Sensitivity((layer.name,), bits, tuple(0.3 * 4.0 ** (1 - b - n % 3) for b in bits), (4, 8), (0.02, 0.0))
            for n, layer in enumerate(layers)
        ]
        policy = hq.HybridPolicy(
            {layer.name: hq.LayerBits(layer.weight_bits, layer.activation_bits) for layer in layers}
        )
        return replace(result, policy=policy, layers=layers, sensitivities=sensitivities)

    return make


@pytest.fixture(scope="session")
def page() -> Iterator[Page]:
    """The page of one browser for all tests."""
    with browser() as opened:
        yield opened
