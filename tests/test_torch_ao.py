import copy
import random

import pytest
import timm
import torch
import torch.ao.quantization as tq
from torch import Tensor, nn
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.ao.quantization.observer import ObserverBase
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from hq_plugin import Config, HQWarning, HybridPolicy, LayerBits, ModelError, PolicyError, torch_ao
from hq_plugin.metaquantnet import ActivationSteps, MetaQuantNet
from hq_plugin.nn import packed_modules
from hq_plugin.packing import unpack_bits
from hq_plugin.qat_layers import qat_layers
from hq_plugin.quantization import weight_range
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace
from hq_plugin.weight_blocks import Kind
from tests.conftest import SITES


def random_policy(model: nn.Module, x: Tensor, seed: int = 0) -> HybridPolicy:
    rng = random.Random(seed)
    table = find_sites(model, lambda m: m(x), len(x))
    return HybridPolicy(
        {
            s.name: LayerBits(rng.randint(1, 8), rng.choice([2, 4, 8, 16]) if s.quantizes_input else 16)
            for s in table
        }
    )


def train_a_little(prepared: nn.Module, x: Tensor, steps: int = 3) -> nn.Module:
    prepared.train()
    prepared(x)
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    return prepared.eval()


def check_converted(prepared: nn.Module, x: Tensor) -> nn.Module:
    converted = torch_ao.convert(prepared)
    with torch.no_grad():
        expected, found = prepared(x), converted(x)
    assert torch.isfinite(expected).all()
    assert float((expected - found).abs().max()) <= 1e-5 * float(expected.max() - expected.min())
    for module in packed_modules(converted).values():
        integers = unpack_bits(module.weight_packed, module.bits.weight, module.weight_shape)
        low, high = weight_range(module.bits.weight)
        assert low <= int(integers.min())
        assert int(integers.max()) <= high
    return converted


@pytest.mark.parametrize("bits", range(1, 9))
def test_grouped_weights_convert_exactly(bits: int) -> None:
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    policy = HybridPolicy({"0": LayerBits(bits, 16, 16), "1": LayerBits(bits, 8, 32), "3": LayerBits(bits, 16)})
    prepared = train_a_little(torch_ao.prepare(model, policy), torch.randint(20, (6, 5)))
    converted = check_converted(prepared, torch.randint(20, (6, 5)))
    assert packed_modules(converted)["1"].bits == LayerBits(bits, 8, 32)
    assert packed_modules(converted)["1"].weight_zero.shape == (64 * 32 // 32 * 5 // 8,)
    moved = copy.deepcopy(converted).to(torch.float64)
    assert torch.equal(moved[1].weight, converted[1].weight.double())


def test_a_group_size_that_does_not_fit() -> None:
    with pytest.raises(PolicyError, match="group size must divide"):
        torch_ao.convert(torch_ao.prepare(nn.Linear(30, 4), HybridPolicy({"": LayerBits(4, 16, 16)})))


@pytest.mark.parametrize("seed", range(8))
def test_converted_equals_prepared(tiny: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(16, 1, 8, 8)
    policy = random_policy(tiny, x, seed)
    prepared = train_a_little(torch_ao.prepare(tiny, policy), x)
    converted = check_converted(prepared, x)
    assert {name: module.bits for name, module in packed_modules(converted).items()} == dict(policy)
    assert not any(isinstance(module, FakeQuantizeBase) for module in converted.modules())
    assert not converted.training


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        "mobilenetv3_small_050",
        "mobilevit_xxs",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("tf_efficientnet_lite0", "nf_regnet_b0", "levit_128s")),
    ],
)
def test_timm_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name)
    x = torch.randn(4, 3, 64, 64) if name != "levit_128s" else torch.randn(2, 3, 224, 224)
    policy = HybridPolicy(
        {
            n: LayerBits(b.weight + 1 if b.weight < 3 else b.weight, 8 if b.activation < 8 else b.activation)
            for n, b in random_policy(model.eval(), x).items()
        }
    )
    prepared = torch_ao.prepare(model, policy)
    prepared.train()
    for _ in range(12):  # enough for the running statistics of a random network to be sensible
        prepared(x)
    check_converted(prepared.eval(), x)


@pytest.mark.parametrize("activation", range(2, 9))
def test_dynamic_activations_convert_exactly(activation: int) -> None:
    torch.manual_seed(activation)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    policy = HybridPolicy({"0": LayerBits(3, activation, 16, True), "2": LayerBits(4, activation, dynamic=True)})
    prepared = train_a_little(torch_ao.prepare(model, policy), torch.randn(6, 5, 32))
    x = torch.randn(4, 7, 32)
    converted = check_converted(prepared, x)
    assert {name: module.bits for name, module in packed_modules(converted).items()} == dict(policy)
    assert not any("activation" in name for name in converted.state_dict())
    # A token's result does not hang on the tokens beside it.
    torch.testing.assert_close(converted(x)[:1, :1], converted(x[:1, :1]))
    quantizer = prepared[0].activation_fake_quant
    assert quantizer.is_dynamic
    with pytest.raises(ModelError, match="dynamic"):
        quantizer.calculate_qparams()
    with torch.no_grad(), torch_ao.float_forward(prepared):
        torch.testing.assert_close(quantizer(x), x)


def test_graph_mode_takes_no_dynamic_activations() -> None:
    with pytest.raises(PolicyError, match="graph mode"):
        torch_ao.get_qconfig_mapping(HybridPolicy({"fc": LayerBits(4, 8, dynamic=True)}))


def test_the_float_model_is_not_changed(tiny: nn.Module) -> None:
    before = copy.deepcopy(tiny.state_dict())
    x = torch.randn(4, 1, 8, 8)
    train_a_little(torch_ao.prepare(tiny, random_policy(tiny, x)), x)
    assert all(torch.equal(before[name], value) for name, value in tiny.state_dict().items())
    assert type(tiny.stem) is nn.Conv2d


def test_they_are_torch_ao_subclasses(tiny: nn.Module) -> None:
    prepared = torch_ao.prepare(tiny, random_policy(tiny, torch.randn(2, 1, 8, 8)))
    layer = prepared.stem
    assert isinstance(layer.weight_fake_quant, FakeQuantizeBase)
    assert isinstance(layer.activation_fake_quant, FakeQuantizeBase)
    assert isinstance(layer.activation_fake_quant.activation_post_process, ObserverBase)


@pytest.mark.parametrize("shape", [(128, 8, 28, 28), (128, 16, 16, 16), (4, 32, 112, 112), (64, 65, 64), (7, 3)])
def test_ranges_are_those_of_all_places(shape: tuple[int, ...]) -> None:
    """Pictures have background at their borders, and tokens a class token before them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    x[..., 0] = 0.0
    observer, everything = (torch_ao.ActivationObserver(samples=n) for n in (8192, x.numel()))
    observer(x)
    everything(x)
    assert observer.values[0].numel() <= 8192
    assert len(everything.values[0]) == x.numel()
    for bits in (4, 8):
        assert observer.qparams(bits)[0] == pytest.approx(everything.qparams(bits)[0], rel=0.25)
        assert observer.qparams(bits)[1] == everything.qparams(bits)[1] == 0


def test_torch_ao_switches_work(tiny: nn.Module) -> None:
    x = torch.randn(4, 1, 8, 8)
    prepared = torch_ao.prepare(tiny, HybridPolicy(dict.fromkeys(SITES, LayerBits(2, 2)))).eval()
    quantized = prepared(x)
    prepared.apply(tq.disable_fake_quant)
    torch.testing.assert_close(prepared(x), tiny(x))
    prepared.apply(tq.enable_fake_quant)
    assert torch.equal(prepared(x), quantized)
    assert not torch.allclose(quantized, tiny(x))


def test_deepcopy_and_state_dict_of_a_prepared_model(tiny: nn.Module) -> None:
    x = torch.randn(4, 1, 8, 8)
    policy = random_policy(tiny, x)
    prepared = train_a_little(torch_ao.prepare(tiny, policy), x)
    again = torch_ao.prepare(tiny, policy).eval()
    again.load_state_dict(prepared.state_dict())
    for other in (copy.deepcopy(prepared), again):
        assert torch.equal(other.eval()(x), prepared(x))


def test_a_zero_gamma_is_no_problem(tiny: nn.Module) -> None:
    nn.init.zeros_(tiny.bn2.weight)
    x = torch.randn(4, 1, 8, 8)
    check_converted(train_a_little(torch_ao.prepare(tiny, random_policy(tiny, x)), x, steps=1), x)


def test_duplicate_references_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.middle = nn.Linear(8, 8)
            self.also = self.middle
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.also(self.middle(self.embed(ids))))

    ids = torch.randint(20, (4, 6))
    policy = HybridPolicy({"embed": LayerBits(3), "head": LayerBits(3, 8), "middle": LayerBits(2, 8)})
    prepared = train_a_little(torch_ao.prepare(Tied(), policy), ids)
    assert prepared.also is prepared.middle
    assert prepared.head._parameters["weight"] is prepared.embed._parameters["weight"]
    converted = check_converted(prepared, ids)
    assert converted.also is converted.middle
    assert converted.head.weight_packed is converted.embed.weight_packed
    for other in (LayerBits(4, 8), LayerBits(3, 8, 4)):
        with pytest.raises(PolicyError, match=rf"'head' a weight of {other.weight} bits .* and another layer"):
            torch_ao.prepare(Tied(), HybridPolicy({**policy, "head": other}))
    with pytest.raises(PolicyError, match="input of 'embed' 8 bits, but an Embedding takes indices"):
        torch_ao.prepare(Tied(), HybridPolicy({**policy, "embed": LayerBits(3, 8)}))


def test_what_a_quantized_layer_holds_is_left_alone() -> None:
    class Holding(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.norm, self.inner, self.act = nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(self.norm(x)) + self.inner(x))

    x = torch.randn(64, 8)
    model = nn.Sequential(Holding(), nn.Linear(8, 4)).eval()
    prepared = torch_ao.prepare(model, HybridPolicy({"0": LayerBits(3, 4), "1": LayerBits(8, 8)}))
    assert set(qat_layers(prepared)) == {"0", "1"}
    converted = check_converted(train_a_little(prepared, x), x)
    assert set(packed_modules(converted)) == {"0", "1"}
    both = torch_ao.prepare(model, HybridPolicy({"0": LayerBits(3, 4), "0.inner": LayerBits(2, 8)}))
    both(x)
    packed = packed_modules(check_converted(both.eval(), x))
    assert {name: layer.bits.weight for name, layer in packed.items()} == {"0": 3, "0.inner": 2}


def test_the_model_itself_may_be_the_layer() -> None:
    x = torch.randn(4, 6)
    prepared = torch_ao.prepare(nn.Linear(6, 3), HybridPolicy({"": LayerBits(3, 8)}))
    check_converted(train_a_little(prepared, x), x)


def test_mode_is_kept(tiny: nn.Module) -> None:
    policy = random_policy(tiny, torch.randn(2, 1, 8, 8))
    assert not torch_ao.prepare(tiny, policy).training
    assert torch_ao.prepare(tiny.train(), policy).stem.training


def test_a_policy_for_another_model(tiny: nn.Module) -> None:
    with pytest.raises(PolicyError, match="another model"):
        torch_ao.prepare(tiny, HybridPolicy({"layer1.conv": LayerBits(3)}))
    with pytest.raises(PolicyError, match="BatchNorm2d"):
        torch_ao.prepare(tiny, HybridPolicy({"bn1": LayerBits(3)}))


def test_a_model_that_never_ran_has_no_steps(tiny: nn.Module) -> None:
    x = torch.randn(4, 1, 8, 8)
    prepared = torch_ao.prepare(tiny, random_policy(tiny, x, 3))
    for layer in qat_layers(prepared).values():
        layer.activation_fake_quant.bits = 8  # type: ignore[union-attr]
        layer.activation_fake_quant.steps = ActivationSteps((8,))  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"inputs of .* have no steps yet"):
        torch_ao.convert(prepared)
    prepared(x)
    check_converted(prepared.eval(), x)


def test_a_layer_that_never_ran_is_named() -> None:
    class Bypassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    prepared = torch_ao.prepare(Bypassed().eval(), HybridPolicy({"used": LayerBits(4, 8), "idle": LayerBits(4, 8)}))
    prepared(torch.randn(3, 4))
    with pytest.warns(HQWarning, match="never ran idle"):
        torch_ao.convert(prepared)


def test_what_cannot_be_prepared(tiny: nn.Module) -> None:
    x = torch.randn(4, 1, 8, 8)
    policy = random_policy(tiny, x)
    prepared = torch_ao.prepare(tiny, policy)
    prepared(x)
    for model in (prepared, torch_ao.convert(prepared)):
        with pytest.raises(ModelError, match="prepared or packed already"):
            torch_ao.prepare(model, policy)
    with pytest.raises(PolicyError, match="takes a HybridPolicy, not a dict"):
        torch_ao.prepare(tiny, {"conv1": (3, 8)})  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_graph_mode_folds_what_follows_a_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).train()
    mapping = torch_ao.get_qconfig_mapping(HybridPolicy({"0": LayerBits(4, 8), "2": LayerBits(4, 8)}))
    x = torch.randn(32, 6)
    prepared = train_a_little(prepare_qat_fx(model, mapping, (x,)), x)
    assert set(packed_modules(check_converted(prepared, x))) == {"0", "2"}


@pytest.mark.filterwarnings("ignore")
def test_what_graph_mode_made_and_nobody_can_pack_is_named() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2, 3)).train()
    mapping = torch_ao.get_qconfig_mapping(HybridPolicy({"0": LayerBits(4, 8), "2": LayerBits(4, 8)}))
    x = torch.randn(4, 1, 3, 3, 3)
    prepared = train_a_little(prepare_qat_fx(model, mapping, (x,)), x)
    with pytest.raises(ModelError, match=r"0 cannot be packed: torch.ao made a Conv3d"):
        torch_ao.convert(prepared)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm1d(3)], ids=["plain", "batchnorm"])
def test_graph_mode_of_one_dimension(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(18, 4)).train()
    policy = HybridPolicy({"0": LayerBits(4, 8), "4": LayerBits(4, 8)})
    x = torch.randn(6, 2, 8)
    prepared = prepare_qat_fx(copy.deepcopy(model), torch_ao.get_qconfig_mapping(policy), (x,))
    converted = check_converted(train_a_little(prepared, x), x)
    assert len(packed_modules(converted)) == 2


def test_convert_wants_a_prepared_model(tiny: nn.Module) -> None:
    with pytest.raises(ModelError, match="prepare"):
        torch_ao.convert(tiny)


@pytest.mark.filterwarnings("ignore")
def test_graph_mode(tiny: nn.Module) -> None:
    """A user's own FX loop: our QConfigMapping, torch.ao's prepare, our convert."""
    torch.manual_seed(0)
    x = torch.randn(16, 1, 8, 8)
    policy = HybridPolicy({name: LayerBits(bits, 8) for name, bits in zip(SITES, (4, 3, 2, 5), strict=True)})
    mapping = torch_ao.get_qconfig_mapping(policy)
    prepared = prepare_qat_fx(tiny.train(), mapping, (x,))
    quantizers = [m for m in prepared.modules() if isinstance(m, torch_ao.HybridWeightFakeQuantize)]
    assert [quantizer.bits for quantizer in quantizers] == [4, 3, 2, 5]
    train_a_little(prepared, x)
    converted = check_converted(prepared, x)
    assert sorted(m.bits.weight for m in packed_modules(converted).values()) == [2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["dense", "low_rank", "table"])
@pytest.mark.parametrize("group_size", [0, 16])
def test_a_lookup_quantizes_only_the_rows_that_it_needs(
    kind: Kind, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(50, 32, padding_idx=3)
    table = find_sites(model, lambda m: m(torch.tensor([[1]])), 1)
    config = Config(block=kind, group_size=group_size, weight_bits=(3,))
    space = SearchSpace.build(table, config)
    meta = MetaQuantNet(space, {"": model.weight}, config)
    prepared = torch_ao.prepare(model, space.policy(space.top), metaquantnet=meta)
    for parameter in prepared.weight_fake_quant.block.parameters():
        nn.init.uniform_(parameter, -2.0, -1.0)
    ids = torch.tensor([[7, 3, 7], [0, 3, 49]])
    found = []
    for rows_only in (True, False):
        if not rows_only:
            monkeypatch.setattr(torch_ao.HybridWeightFakeQuantize, "lookup", lambda *_: None)
        prepared.zero_grad()
        output = prepared(ids)
        (output * torch.arange(32)).sum().backward()
        found.append((output.detach(), [p.grad.clone() for p in prepared.parameters() if p.grad is not None]))
    assert torch.equal(found[0][0], found[1][0])
    assert len(found[0][1]) == len(found[1][1]) >= 2
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other)


def test_a_layer_may_be_called_with_what_is_no_tensor() -> None:
    class Positions(nn.Embedding):
        def forward(self, shape: torch.Size) -> Tensor:
            return super().forward(torch.arange(shape[1]))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.head = Positions(16, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.positions(x.shape))

    x = torch.randn(2, 5, 8)
    model = Model().eval()
    packed = torch_ao.convert(torch_ao.prepare(model, HybridPolicy({"positions": LayerBits(8)})))
    torch.testing.assert_close(packed(x), model(x), atol=0.05, rtol=0.05)


class TwoWays(nn.Module):
    """An expert that is asked for, and one that nobody chose yet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.way = nn.Linear(8, 8), nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = (self.first, self.second)[self.way](x)
        return found


def test_a_layer_that_calibration_did_not_reach_calibrates_itself_when_it_runs() -> None:
    torch.manual_seed(0)
    model, x = TwoWays().eval(), 0.01 * torch.randn(64, 8)
    prepared = torch_ao.prepare(model, HybridPolicy({"first": LayerBits(8, 8), "second": LayerBits(8, 8)}))
    with torch_ao.calibrate(prepared):
        prepared(x)
    with pytest.warns(HQWarning, match="never ran second: the steps of their inputs are made up"):
        torch_ao.convert(copy.deepcopy(prepared))
    prepared.way = model.way = 1
    prepared(x[:0])  # sees nothing either
    error = (prepared(x) - model(x)).norm() / model(x).norm()
    assert error < 0.02
    torch_ao.convert(prepared)


def test_parameters_that_are_no_floats_stay_as_they_are(tiny: nn.Module) -> None:
    tiny.places = nn.Parameter(torch.arange(3), requires_grad=False)
    prepared = torch_ao.prepare(tiny, random_policy(tiny, torch.randn(16, 1, 8, 8)))
    torch_ao.set_trainable(prepared, True)
    assert not prepared.places.requires_grad
    assert prepared.stem._parameters["weight"].requires_grad


def test_weights_that_are_kept_fit_the_precision_that_runs() -> None:
    prepared = torch_ao.prepare(nn.Sequential(nn.Linear(8, 4)), HybridPolicy({"0": LayerBits(3)})).eval()
    x = torch.randn(5, 8)
    wanted = prepared(x)
    with torch.no_grad(), torch_ao.cached_weights(prepared):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                assert prepared(x).dtype == torch.bfloat16
            assert torch.equal(prepared(x), wanted)
