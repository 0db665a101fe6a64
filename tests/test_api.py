"""`hq_plugin.quantize` on models and data of many kinds, with a handful of steps."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hq_plugin as hq
from hq_plugin import BudgetError, Config, ConfigError, DataError, HQWarning, LayerBits, ModelError, TrainingError
from hq_plugin.nn import packed_modules
from hq_plugin.session import Session
from tests.conftest import SITES, TinyNet, digits_batches

SMOKE = Config(effort="smoke", meta_steps=3, finetune_steps=2, search_evaluations=6, holdout=32)


def test_the_model_is_not_changed_and_the_result_fits_in_its_place(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    before = copy.deepcopy(trained.state_dict())
    small = hq.quantize(trained, "3bit", batches, config=SMOKE)
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    assert all(p.requires_grad for p in trained.parameters())
    assert not hasattr(trained, "hq")
    assert type(small) is type(trained)
    assert list(packed_modules(small)) == SITES
    assert small(batches[0][0]).shape == (64, 10)
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize(
    "data",
    [
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=32),
        lambda x, y: TensorDataset(x),
        lambda x, y: [x[:64], x[64:128], x[128:]],
        lambda x, y: [(x[:64], y[:64]), (x[64:], y[64:])],
        lambda x, y: [{"x": x[:64], "labels": y[:64]}, {"x": x[64:], "labels": y[64:]}],
    ],
)
def test_data_of_every_kind(trained: nn.Module, batches, data) -> None:  # type: ignore[no-untyped-def]
    x, y = (torch.cat(part)[:192] for part in zip(*batches, strict=True))
    assert hq.quantize(trained, "3bit", data(x, y), config=SMOKE).hq.effective_bits <= 3


def test_the_same_seed_gives_the_same_bytes(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    one, same, other = (hq.quantize(trained, "3bit", batches, config=SMOKE, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(one[n].shape != other[n].shape or not torch.equal(one[n], other[n]) for n in one)


def test_without_data_it_works_and_says_that_real_data_does_better(trained: nn.Module) -> None:
    with pytest.warns(HQWarning, match="Real data"):
        small = hq.quantize(trained, "3bit", config=SMOKE)
    assert small.hq.effective_bits <= 3


@pytest.mark.parametrize("block", ["dense", "low_rank", "table", "auto"])
def test_every_block(trained: nn.Module, batches, block: str) -> None:  # type: ignore[no-untyped-def]
    assert hq.quantize(trained, "3bit", batches, config=SMOKE, block=block).hq.used["weight_bits"] >= 0.97


def test_binary_weights_when_asked_for(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    small = hq.quantize(trained, "1.8bit", batches, config=SMOKE, weight_bits=(1, 2, 4))
    assert 1 in {bits.weight for bits in small.hq.policy.values()}
    assert small.hq.effective_bits <= 1.8


def test_float_activations(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    small = hq.quantize(trained, "3bit", batches, config=SMOKE, activation_bits=16)
    assert {bits.activation for bits in small.hq.policy.values()} == {16}


def test_a_bitops_budget_searches_activations(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    small = hq.quantize(trained, "0.4MBitOps", batches, config=SMOKE)
    assert small.hq.bitops <= 0.4e6
    assert min(bits.activation for bits in small.hq.policy.values()) < 8


def test_retraining_from_the_float_weights(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    assert hq.quantize(trained, "3bit", batches, config=SMOKE, finetune_from="float").hq.effective_bits <= 3


def test_pinned_grouped_and_excluded(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    small = hq.quantize(
        trained, "4.5bit", batches, config=SMOKE, pinned={"head": (3, 16)}, groups=(("*wise",),), exclude=("stem",)
    )
    policy = small.hq.policy
    assert policy["head"] == LayerBits(3, 16)
    assert policy["depthwise"] == policy["pointwise"]
    assert type(small.stem) is nn.Conv2d
    assert any("excluded" in layer["reason"] for layer in small.hq.float_layers)


def test_other_outputs_than_class_scores(batches) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))
    small = hq.quantize(model, "4bit", [x for x, _ in batches], config=SMOKE)
    assert small.hq.accuracy is None
    assert small.hq.agreement is None
    assert 0 <= small.hq.kl < 1


def test_a_model_that_is_one_layer() -> None:
    x = torch.randn(60, 6)
    small = hq.quantize(nn.Linear(6, 4), "8bit", list(x.split(10)), config=SMOKE, weight_bits=(2, 3, 4, 5))
    torch.testing.assert_close(small(x).shape, (60, 4))


def test_duplicates_and_tied_weights_end_to_end() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.middle = nn.Linear(8, 8)
            self.also = self.middle
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.also(self.middle(self.embed(ids)))).mean(1))

    ids = torch.randint(20, (120, 6))
    small = hq.quantize(Tied(), "5bit", list(ids.split(20)), config=SMOKE)
    assert small.also is small.middle
    assert small.head.weight_packed is small.embed.weight_packed
    assert small.hq.policy["embed"].weight == small.hq.policy["head"].weight


class Bypass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.read = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.used(x), self.read.weight, self.read.bias)


def test_a_weight_that_is_read_around_its_layer_is_quantized() -> None:
    model, x = Bypass(), torch.randn(60, 8)
    small = hq.quantize(model, "5bit", list(x.split(10)), config=SMOKE)
    assert list(packed_modules(small)) == ["used", "read"]
    assert small.hq.policy["read"].activation == 16
    assert small.hq.float_layers == []
    assert float((small(x) - model(x)).norm() / model(x).norm()) < 0.5


@pytest.mark.parametrize(
    ("budget", "says"),
    [("much", "cannot be read"), ("1bit", "cannot be met"), ("-1bit", "positive"), ("90B", "stay float")],
)
def test_bad_budgets_before_any_training(trained: nn.Module, batches, budget: str, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BudgetError, match=says):
        hq.quantize(trained, budget, batches, effort="best")


def test_batches_of_one_sample_that_batchnorm_cannot_take_are_told() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).eval()
    with pytest.raises(DataError, match=r"batch of one sample has no variance.*two or more"):
        hq.quantize(model, "4bit", [torch.randn(1, 8) for _ in range(16)], config=SMOKE)


def test_other_bad_input(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        hq.quantize("resnet18", "3bit", batches)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="nothing to quantize"):
        hq.quantize(nn.Sequential(nn.LayerNorm(8)), "3bit", [torch.randn(4, 8)], config=SMOKE)
    with pytest.raises(DataError, match=r"cannot run on a batch.*\(4, 3\)"):
        hq.quantize(trained, "3bit", [torch.randn(4, 3)], config=SMOKE)
    with pytest.raises(DataError, match=r"cannot run on a batch.*\(64, 7\)"):
        hq.quantize(trained, "3bit", [batches[0][0], torch.randn(64, 7)], config=SMOKE)
    with pytest.raises(DataError, match="empty"):
        hq.quantize(trained, "3bit", [], config=SMOKE)
    with pytest.raises(ConfigError, match="no option"):
        hq.quantize(trained, "3bit", batches, epochs=3)
    with pytest.raises(TrainingError, match="step 0"):
        hq.quantize(trained, "3bit", batches, config=SMOKE, loss=lambda s, t: s.sum() * float("nan"))


def test_no_data_and_no_way_to_guess() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            left, right = pair
            return self.layer(left + right)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is made up, and so nothing is said of it
        with pytest.raises(DataError, match="cannot be found out"):
            hq.quantize(Strange(), "5bit", config=SMOKE)


def test_importing_is_light() -> None:
    import subprocess
    import sys

    heavy = ("timm", "transformers", "typer", "torchvision", "matplotlib")
    code = f"import sys, hq_plugin; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_tiny_net_has_the_sites() -> None:
    assert set(SITES) <= {name for name, _ in TinyNet().named_modules()}


def test_meta_training_for_a_main_budget_trains_near_it_and_serves_others(trained: nn.Module) -> None:
    with pytest.raises(BudgetError, match="smallest"):
        hq.meta_train(trained, digits_batches(), budget="0.5bit", effort="smoke")
    session = hq.meta_train(trained, digits_batches(), budget="3bit", effort="smoke")
    assert session.quantize("3bit").hq.effective_bits <= 3  # type: ignore[union-attr]
    assert session.quantize("5bit").hq.effective_bits <= 5  # type: ignore[union-attr]


def test_what_is_no_float_model_is_named(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    small = hq.quantize(trained, "3bit", batches, config=SMOKE)
    half = copy.deepcopy(trained).half()
    script = torch.jit.trace(trained, batches[0][0])
    for model, said in (
        ("resnet18", "Build it first"),
        (TinyNet, "Make one"),
        (trained.state_dict(), "the network itself"),
        (small, "quantized already"),
        (half, "float16.*model.float"),
        (script, "TorchScript"),
    ):
        with pytest.raises(ModelError, match=said):
            hq.quantize(model, "3bit", batches, config=SMOKE)  # type: ignore[arg-type]


def test_compiled_and_parallel_models_are_taken_out(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    for held in (torch.compile(trained), nn.DataParallel(trained)):
        small = hq.quantize(held, "3bit", batches, config=SMOKE)  # type: ignore[arg-type]
        assert type(small) is type(trained)
        assert list(small.hq.policy) == SITES


def test_a_budget_that_pins_rule_out_names_them(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BudgetError, match=r"head has 8 bits at least \(pinned"):
        hq.quantize(trained, "2.2bit", batches, config=SMOKE, pinned={"head": 8})
    with pytest.raises(BudgetError, match="allow 1-bit weights"):
        hq.quantize(trained, "1.9bit", batches, config=SMOKE)


def test_little_data_warns(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    x = batches[0][0]
    with pytest.warns(HQWarning, match="Nothing could be held out"):
        hq.quantize(trained, "3bit", [x], config=SMOKE)
    with pytest.warns(HQWarning, match="Only 4 samples are held out"):
        hq.quantize(trained, "3bit", list(x[:16].split(4)), config=SMOKE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pinned": ["head"]}, "must map"),
        ({"seed": -1}, "at least 0"),
        ({"seed": "a"}, "whole number"),
        ({"seed": 2**32}, "below"),
        ({"processor": "llm"}, "AutoTokenizer"),
        ({"weight_bit": 3}, "Did you mean 'weight_bits'"),
        ({"loss": lambda student, teacher: student}, "one number"),
    ],
)
def test_options_that_cannot_be(trained: nn.Module, batches, options, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=said):
        hq.quantize(trained, "3bit", batches, **{"effort": "smoke", **options})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_code_may_call_it(mode, trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    expected = hq.quantize(trained, "4bit", batches, config=SMOKE)
    with mode():
        small = hq.quantize(trained, "4bit", batches, config=SMOKE)
        found = small(batches[0][0])
    torch.testing.assert_close(found, expected(batches[0][0]), rtol=0, atol=0)


def test_without_data_it_works_there_as_well(trained: nn.Module) -> None:
    with torch.no_grad(), pytest.warns(HQWarning, match="No data"):
        assert hq.quantize(trained, "4bit", config=SMOKE).hq.kl >= 0  # type: ignore[union-attr]


def test_models_and_options_of_a_wrong_kind(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError, match="meta device, without weights"):
        hq.quantize(TinyNet().to("meta"), "4bit", batches, config=SMOKE)
    with pytest.raises(ConfigError, match="config is a dict, not a Config"):
        hq.quantize(trained, "4bit", batches, config={"seed": 1})  # type: ignore[arg-type]


def test_eval_fn_is_tried_before_any_work(trained: nn.Module, batches, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(Session, "create", lambda *_, **__: pytest.fail("it worked first"))

    def broken(model: nn.Module) -> float:
        raise KeyError("top1")

    with pytest.raises(KeyError, match="top1"):
        hq.quantize(trained, "4bit", batches, config=SMOKE, eval_fn=broken)
    for wrong, says in ((3, "must be a function"), (lambda model: {"a": 1}, "returned a dict")):
        with pytest.raises(ConfigError, match=says):
            hq.quantize(trained, "4bit", batches, config=SMOKE, eval_fn=wrong)  # type: ignore[arg-type]


def test_eval_fn_measures_float_model_baselines_and_result(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    modes = []

    def metric(model: nn.Module) -> torch.Tensor:
        modes.append(model.training)
        model.train()
        with torch.no_grad():
            return model.eval()(batches[0][0]).abs().mean() if len(modes) < 99 else torch.tensor(0.0)

    trained.train()
    small = hq.quantize(trained, "4bit", batches, config=SMOKE, eval_fn=metric)  # type: ignore[arg-type]
    assert trained.training
    assert not small.training
    assert not any(modes)
    trained.eval()
    result: hq.Result = small.hq  # type: ignore[assignment]
    assert result.float_metric == pytest.approx(float(metric(trained)))
    assert result.metric == pytest.approx(float(metric(small)))
    assert set(result.baselines) >= {"searched", "dynamic_programming"}
    found = [baseline.metric for baseline in result.baselines.values()]
    assert all(value is not None and value != result.float_metric for value in found)


def test_a_result_survives_its_eval_fn(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    def picky(model: nn.Module) -> float:
        if packed_modules(model):
            raise ValueError("no packed layers, please")
        return 1.0

    with pytest.warns(HQWarning, match="eval_fn failed on the result.*no packed layers"):
        small = hq.quantize(trained, "4bit", batches, config=SMOKE, eval_fn=picky)
    result: hq.Result = small.hq  # type: ignore[assignment]
    assert (result.metric, result.float_metric) == (None, 1.0)


@pytest.mark.parametrize("shown", [None, True, False])
def test_what_takes_less_than_half_a_minute_is_silent(shown, trained, batches, capfd) -> None:  # type: ignore[no-untyped-def]
    hq.quantize(trained, "4bit", batches, config=SMOKE, progress=shown)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("fine-tuning" in err) == (shown is True), "bars where they are asked for, without a terminal none"


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("exclude", [(), ("0",)])
def test_embeddings_that_do_more(options: dict[str, Any], exclude: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 16, **options), nn.Linear(16, 4)).eval()
    data = [torch.randint(40, (16, 3)) for _ in range(4)]
    small = hq.quantize(model, "6bit", data, effort="smoke", progress=False, exclude=exclude)
    assert (small(data[0]) - model(data[0])).abs().max() < 0.5
    assert model[0].sparse == options.get("sparse", False)


def test_models_that_cannot_be_copied_or_compared_say_what_to_do() -> None:
    data = [torch.randn(16, 8) for _ in range(4)]
    normed = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(8, 4)))
    normed(data[0])
    with pytest.raises(ModelError, match=r"parametrizations\.weight_norm"):
        hq.quantize(normed, "4bit", data, effort="smoke")
    with pytest.raises(ModelError, match="uninitialised"):
        hq.quantize(nn.Sequential(nn.LazyLinear(4)), "4bit", data, effort="smoke")

    class Picks(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = super().forward(x)
            return {"boxes": y[y[:, 0] > 0.3]}

    torch.manual_seed(0)
    with pytest.raises(ModelError, match="hangs on the values"):
        hq.quantize(Picks(8, 4), "4bit", data, effort="smoke", progress=False)
