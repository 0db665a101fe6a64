from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hq_plugin import HybridPolicy, LayerBits, torch_ao
from hq_plugin.batch import Batch
from hq_plugin.nn import with_split_tables
from hq_plugin.optimal_qparams import optimal_weight_qparams, optimal_weight_step
from hq_plugin.outer_products import _PLACES, convolved, gradient_products, input_products
from hq_plugin.quantization import dequantize_weight, quantize_weight, weight_range, weight_rows
from hq_plugin.rounding import _MARGIN, inside, inverse_factor, second_order_integers
from hq_plugin.sequential_rounding import start_from_good_integers


def correlated(samples: int = 512, inputs: int = 192) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(samples, 24) @ torch.randn(24, inputs) + 0.3 * torch.randn(samples, inputs)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [0, 32])
def test_the_output_comes_closer_than_by_rounding_to_the_nearest(bits: int, group_size: int) -> None:
    x = correlated()
    weight = torch.randn(40, 192)
    rows = weight_rows(weight, group_size)
    step, zero = optimal_weight_qparams(rows, bits) if group_size else (optimal_weight_step(rows, bits), None)
    integers = second_order_integers(
        weight[None], step, zero, bits, group_size, inverse_factor((x.T @ x / len(x))[None], 1.0)
    )[0]
    low, high = weight_range(bits)
    assert low <= int(integers.min()) <= int(integers.max()) <= high
    errors = []
    for found in (weight_rows(integers, group_size), quantize_weight(rows, step, bits, zero)):
        quantized = dequantize_weight(found, step, bits, zero).view_as(weight)
        errors.append(float((x @ (quantized - weight).T).square().mean()))
    assert errors[0] < 0.75 * errors[1]


def test_without_correlation_it_is_rounding_to_the_nearest() -> None:
    weight = torch.randn(8, 16)
    step = optimal_weight_step(weight, 3)
    assert torch.equal(
        second_order_integers(weight[None], step, None, 3, 0, inverse_factor(torch.eye(16)[None], 1.0))[0],
        quantize_weight(weight, step, 3),
    )


def test_a_singular_product_and_a_dead_input() -> None:
    x = torch.zeros(4, 16)
    x[:, :3] = 1.0
    weight = torch.randn(8, 16)
    step = optimal_weight_step(weight, 3)
    integers = second_order_integers(weight[None], step, None, 3, 0, inverse_factor((x.T @ x)[None], 1.0))[0]
    assert torch.equal(integers[:, 4:], quantize_weight(weight, step, 3)[:, 4:])


@pytest.mark.parametrize("bits", range(1, 9))
def test_moved_weights_round_to_their_integers_and_move_no_further(bits: int) -> None:
    torch.manual_seed(bits)
    rows = torch.randn(20, 32)
    step, zero = optimal_weight_qparams(rows, bits)
    nearest = quantize_weight(rows, step, bits, zero)
    low, high = weight_range(bits)
    other = (nearest + torch.randint(-1, 2, nearest.shape)).clamp(low, high).to(torch.int8)
    moved = inside(rows, other, step, zero, bits)
    assert torch.equal(quantize_weight(moved, step, bits, zero), other)
    kept = nearest == other
    assert float((moved - rows)[kept].abs().max()) <= (_MARGIN + 1e-3) * float(step.max())


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_a_network_starts_closer_to_float(transposed: bool) -> None:
    x = correlated(inputs=64)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8)).eval()
    if transposed:  # as files of other libraries store weights
        model[0].weight.data = model[0].weight.data.t().contiguous().t()
    policy = HybridPolicy({"0": LayerBits(3, 16, 16), "2": LayerBits(3, 8)})
    network = torch_ao.prepare(model, policy).eval()
    network(x)
    with torch.no_grad():
        before = float((network(x) - model(x)).square().mean())
        start_from_good_integers(network, model, [Batch((x,), {}, None, len(x))])
        after = float((network(x) - model(x)).square().mean())
    assert after < 0.8 * before


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("name", "share"), [("0", 0.7), ("2", 0.95), ("3", 0.7)])  # what is alike in one pixel
def test_a_convolutional_network_starts_closer_to_float(
    name: str, share: float, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    mixed = nn.Conv2d(3, 24, 1, bias=False)(torch.randn(512, 3, 9, 9)).detach()  # channels that say the same
    model = nn.Sequential(
        nn.Conv2d(24, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.Conv2d(16, 8, 1, groups=2)
    )
    model = model.eval().to(memory_format=memory_format)
    network = torch_ao.prepare(model, HybridPolicy({name: LayerBits(3, 16)})).eval()
    with torch.no_grad():
        before = float((network(mixed) - model(mixed)).square().mean())
        start_from_good_integers(network, model, [Batch((mixed,), {}, None, len(mixed))])
        after = float((network(mixed) - model(mixed)).square().mean())
    assert after < share * before


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 4, 3, padding="same", groups=4),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(4, 6, 5, stride=3, padding=2),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_what_a_convolution_multiplies(layer: nn.Conv1d | nn.Conv2d, batched: bool) -> None:
    x = torch.randn(4, *(8, 9)[: len(layer.kernel_size)])
    x = torch.stack([x, -x]) if batched else x
    vectors = convolved(x, layer)
    weight = layer.weight.view(layer.groups, -1, vectors.shape[-1])
    products = torch.einsum("gpi,goi->pgo", vectors, weight).flatten(1) + layer.bias
    expected = layer(x) if batched else layer(x)[None]
    torch.testing.assert_close(products, expected.movedim(1, -1).flatten(0, -2))


def test_a_convolution_of_nothing_multiplies_nothing() -> None:
    assert convolved(torch.zeros(0, 4, 5, 5), nn.Conv2d(4, 6, 3)).shape == (1, 0, 36)


def test_of_many_places_of_a_convolution_some_are_seen() -> None:
    layer = nn.Conv2d(1, 1, 1, bias=False)
    x = torch.arange(9.0 * 100 * 100).view(9, 1, 100, 100)
    seen = convolved(x, layer).flatten()
    assert len(seen) == _PLACES
    assert len(seen.unique()) == _PLACES
    for axis in (100, 100 * 100):  # of all rows and samples
        assert len((seen // axis).unique()) == 9 * 100 * 100 // axis
    assert len((seen % 100).unique()) == 100  # and of all columns


class Looks(nn.Module):
    """An embedding of which the network sees some directions more than others."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(60, 16), nn.Linear(16, 8)
        with torch.no_grad():
            self.head.weight[:, :4] *= 6

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids))


@pytest.mark.parametrize("parts", [0, 4])
def test_embeddings_are_rounded_by_what_the_network_minds(parts: int) -> None:
    torch.manual_seed(0)
    model = Looks().eval()
    ids = torch.arange(60).view(6, 10)  # of each row once, and of 20 rows alone in the batch that is seen
    names = [f"words.parts.{n}" for n in range(parts)] or ["words"]
    if parts:
        model = with_split_tables(model, names, by_use={"words": torch.randperm(60)})
    network = torch_ao.prepare(model, HybridPolicy({name: LayerBits(2, 16) for name in names})).eval()
    batch = Batch((ids[:2],), {}, None, 2)
    products = gradient_products(network, names, [batch])
    assert set(products) == {"words"}
    with torch.no_grad():
        expected = model.head.weight.T @ model.head.weight  # type: ignore[union-attr, operator]
        nearest = float((network(ids) - model(ids)).square().mean())
        start_from_good_integers(network, model, [batch])
        after = float((network(ids) - model(ids)).square().mean())
    alike = torch.corrcoef(torch.stack([products["words"].flatten(), expected.flatten()]))[0, 1]
    assert alike > 0.8
    assert after < 0.95 * nearest


def test_an_embedding_that_a_layer_shares_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Looks()
    model.head = nn.Linear(16, 60)
    model.head.weight = model.words.weight
    policy = HybridPolicy({name: LayerBits(3, 16) for name in ("words", "head")})
    network = torch_ao.prepare(model.eval(), policy).eval()
    before = network.words.weight.detach().clone()  # type: ignore[operator, union-attr]
    start_from_good_integers(network, model, [Batch((torch.arange(60),), {}, None, 60)])
    assert torch.equal(network.words.weight, before)  # type: ignore[arg-type]


def test_input_products() -> None:
    x = correlated(samples=16, inputs=12)
    model = nn.Sequential(nn.Linear(12, 5))
    products = input_products(model, ["0"], [Batch((x[:8],), {}, None, 8), Batch((x[8:],), {}, None, 8)])
    torch.testing.assert_close(products["0"], (x.T @ x / 16)[None])


def test_inputs_that_are_not_finite_leave_their_layer_to_nearest_rounding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)).eval()
    x = torch.randn(32, 16)
    x[0, 0] = torch.nan
    batch = Batch((x,), {}, None, 32)
    assert input_products(model, ["0", "1"], [batch]) == {}
    network = torch_ao.prepare(model, HybridPolicy({"0": LayerBits(3, 16), "1": LayerBits(3, 16)})).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    start_from_good_integers(network, model, [batch])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_dead_inputs_do_not_raise_the_damping_of_small_ones() -> None:
    x = 0.01 * correlated(inputs=96)
    dead = torch.cat([x, torch.zeros(len(x), 32)], 1)
    weight = torch.randn(8, 128)
    step = optimal_weight_step(weight, 3)
    alone = second_order_integers(
        weight[None, :, :96], step, None, 3, 0, inverse_factor((x.T @ x / len(x))[None], 1.0)
    )
    found = second_order_integers(
        weight[None], step, None, 3, 0, inverse_factor((dead.T @ dead / len(x))[None], 1.0)
    )
    assert torch.equal(found[..., :96], alone)
    assert not torch.equal(alone[0], quantize_weight(weight[:, :96], step, 3))


def test_padding_is_no_input() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 5)

        def forward(self, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head(states)

    x = correlated(samples=6, inputs=12)
    padded = {"states": torch.stack([x[:4], torch.cat([x[4:], 99 + x[:2]])])}
    padded["attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    products = input_products(Tokens(), ["head"], [Batch((), padded, None, 2)])
    torch.testing.assert_close(products["head"], (x.T @ x / 6)[None])


def test_as_many_inputs_as_tokens_are_no_padding() -> None:
    class Pooled(nn.Module):
        """A pooler as BERT's, which reads the first token of each sample."""

        def __init__(self) -> None:
            super().__init__()
            self.pooler = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.pooler(x[:, 0])

    x, mask = torch.randn(5, 6, 6), torch.ones(5, 6, dtype=torch.long)
    mask[2, 3:] = 0
    products = input_products(Pooled(), ["pooler"], [Batch((), {"x": x, "attention_mask": mask}, None, 5)])
    torch.testing.assert_close(products["pooler"], (x[:, 0].T @ x[:, 0] / 5)[None])


class Sliced(nn.Linear):
    """Multiplies by a part of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight[:, : x.shape[-1]], self.bias)


class Listed(nn.Linear):
    """Takes a list."""

    def forward(self, parts: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return super().forward(torch.cat(parts, -1))


class ChannelsAtTheEnd(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Padding(nn.Conv2d):
    """Pads by itself, as timm's Conv2dSame."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (2, 2, 2, 2)))


class Pair(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids), 1  # type: ignore[return-value]


class Around(nn.Module):
    """Calls a layer in a way of its own."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.layer, x)


@pytest.mark.parametrize(
    ("layer", "x", "call"),
    [
        (Sliced(8, 8), torch.randn(16, 4), lambda layer, x: layer(x)),
        (Sliced(8, 8), torch.randn(16, 8), lambda layer, x: layer(x) + layer(x[:, :4])),
        (Listed(8, 8), torch.randn(16, 4), lambda layer, x: layer([x, x])),
        (ChannelsAtTheEnd(8, 8, 3, padding=1), torch.randn(16, 5, 6, 8), lambda layer, x: layer(x)),
        (Padding(8, 8, 5), torch.randn(16, 8, 1, 1), lambda layer, x: layer(x)),
        (Pair(20, 8), torch.arange(16), lambda layer, x: layer(x)[0]),
        (nn.Linear(8, 8), torch.randn(16, 8), lambda layer, x: x + layer(x[x[:, 0] > 99]).sum()),
        (nn.Conv1d(8, 8, 3), torch.randn(16, 8, 5), lambda layer, x: x + layer(x[:0]).sum()),
    ],
    ids=["a part", "two parts", "a list", "channels last", "pads itself", "a pair", "no token", "no sample"],
)
def test_a_layer_that_multiplies_in_a_way_of_its_own_or_nothing_stays_as_it_is(
    layer: nn.Module, x: torch.Tensor, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]
) -> None:
    model = Around(layer, call).eval()
    network = torch_ao.prepare(model, HybridPolicy({"layer": LayerBits(3, 16)})).eval()
    start_from_good_integers(network, model, [Batch((x,), {}, None, len(x))] * 2)
    assert torch.equal(network.layer._parameters["weight"], layer.weight)  # type: ignore[union-attr, arg-type]


class Twice(nn.Module):
    """Has two layers with one weight, each with inputs of its own."""

    def __init__(self, seen: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.seen = seen
        self.first, self.second = nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False)
        self.second.weight = self.first.weight

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(self.seen[0]), self.second(self.seen[1])])


def test_layers_that_share_a_weight_are_rounded_by_what_both_multiply() -> None:
    torch.manual_seed(0)
    model = Twice((torch.randn(512, 12) @ torch.randn(12, 64), torch.randn(512, 12) @ torch.randn(12, 64))).eval()
    policy = HybridPolicy({"first": LayerBits(3, 16), "second": LayerBits(3, 16)})
    network = torch_ao.prepare(model, policy).eval()
    batch = Batch((torch.zeros(1),), {}, None, 1)
    with torch.no_grad():
        target = batch.run(model)
        nearest = float((batch.run(network) - target).square().mean())
        start_from_good_integers(network, model, [batch])
        after = float((batch.run(network) - target).square().mean())
    assert network.first._parameters["weight"] is network.second._parameters["weight"]  # type: ignore[union-attr]
    assert after < 0.53 * nearest  # one rounded after the other: 0.58 to 0.63
