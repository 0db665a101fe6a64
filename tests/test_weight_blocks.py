"""The blocks alone, without a network around them."""

import pytest
import torch
from torch import nn

from hq_plugin import Config, weight_blocks
from hq_plugin.optimal_qparams import optimal_weight_step
from hq_plugin.quantization import fake_quantize_weight
from hq_plugin.weight_blocks import Kind, build_block

WIDTHS = (1, 2, 4, 8)


@pytest.mark.parametrize("kind", ["dense", "low_rank", "table"])
@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 3, 3), (5, 1), (1, 9)])
class TestBlocks:
    def test_before_training_every_width_generates_the_pretrained_weight(self, kind, shape) -> None:  # type: ignore[no-untyped-def]
        weight = torch.randn(shape)
        block = build_block(kind, weight, WIDTHS, Config())
        for bits in WIDTHS:
            torch.testing.assert_close(block.weight(weight, bits), weight)
            rounded = fake_quantize_weight(weight, optimal_weight_step(weight, bits), bits)
            torch.testing.assert_close(block(weight, bits), rounded, rtol=1e-2, atol=1e-3)

    def test_every_parameter_learns(self, kind, shape) -> None:  # type: ignore[no-untyped-def]
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(shape))
        block = build_block(kind, weight, WIDTHS, Config())
        target = {bits: torch.randn(shape) for bits in WIDTHS}
        optimizer = torch.optim.Adam([weight, *block.parameters()], lr=1e-2)
        before = [p.detach().clone() for p in block.parameters()]

        def loss() -> torch.Tensor:
            return torch.stack([(block(weight, bits) - target[bits]).square().mean() for bits in WIDTHS]).mean()

        first = loss().item()
        for _ in range(60):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert loss().item() < first
        assert all(not torch.equal(old, new) for old, new in zip(before, block.parameters(), strict=True))


def test_networks_generate_another_weight_for_each_width() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    for kind in ("dense", "low_rank"):
        block = build_block(kind, weight, WIDTHS, Config())  # type: ignore[arg-type]
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
        generated = [block.weight(weight, bits) for bits in WIDTHS]
        assert all(not torch.equal(generated[0], other) for other in generated[1:])
    table = build_block("table", weight, WIDTHS, Config())
    assert all(table.weight(weight, bits) is weight for bits in WIDTHS)


def test_the_paper_s_block_has_its_last_bias_in_the_layer() -> None:
    block = build_block("dense", torch.randn(6, 4), WIDTHS, Config(hidden=5))
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes == {
        "log_step": (4 * 6,),
        "inner.weight": (5, 4),
        "inner.bias": (5,),
        "outer.weight": (24, 5),
    }


def test_an_unknown_width_is_refused() -> None:
    with pytest.raises(ValueError, match="not for 3"):
        build_block("table", torch.randn(2, 2), WIDTHS, Config()).step(3)


@pytest.mark.parametrize("kind", ["dense", "low_rank", "table"])
def test_a_large_weight_that_is_generated_again_has_the_same_gradients(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 64))
    block = build_block(kind, weight, (2, 4), Config(hidden=4), group_sizes=(0, 32))
    nn.init.normal_(block.log_step, -2, 0.1)
    found = []
    for least in (1, 1 << 30):
        monkeypatch.setattr(weight_blocks, "_REGENERATED", least)
        weight.grad = None
        block.zero_grad()
        block(weight, 4).square().sum().backward()
        found.append([p.grad for p in (weight, *block.parameters()) if p.grad is not None])
    assert len(found[0]) >= 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
