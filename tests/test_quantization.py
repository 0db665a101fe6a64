import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hq_plugin import quantization
from hq_plugin.optimal_qparams import optimal_activation_qparams, optimal_weight_qparams, optimal_weight_step
from hq_plugin.quantization import (
    activation_range,
    dequantize_weight,
    fake_quantize_activation,
    fake_quantize_rows,
    fake_quantize_weight,
    quantize_weight,
    weight_range,
)
from hq_plugin.stored_qparams import load_step, load_zero, step_bytes, store_step, store_zero, stored_step


@given(bits=st.integers(1, 8), seed=st.integers(0, 2**31), scale=st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_fake_quantization_is_what_is_stored(bits: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator) * scale
    step = stored_step(torch.rand(5, generator=generator) * scale + 1e-9)
    integers = quantize_weight(weight, step, bits)
    low, high = weight_range(bits)
    assert int(integers.min()) >= low
    assert int(integers.max()) <= high
    assert torch.equal(fake_quantize_weight(weight, step, bits), dequantize_weight(integers, step, bits))


@given(logarithms=st.lists(st.floats(-36, 36), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_steps_are_stored_in_a_byte_each(logarithms: list[float]) -> None:
    step = torch.tensor(logarithms, dtype=torch.float32).exp()
    stored = store_step(step)
    assert (stored.dtype, len(stored)) == (torch.uint8, step_bytes(len(step)))
    assert torch.equal(load_step(stored), stored_step(step))
    assert torch.equal(stored_step(stored_step(step)), stored_step(step))
    near = step > step.max() * 2.0**-15
    assert torch.allclose(stored_step(step)[near], step[near], rtol=1 / 32, atol=0)
    assert (stored_step(step) > step.max() * 2.0**-17).all()


def test_steps_whose_gradients_pass() -> None:
    step = torch.tensor([0.013, 0.4, 1e-9], requires_grad=True)
    (stored_step(step) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert step.grad is not None
    assert step.grad.tolist() == [1.0, 2.0, 3.0]
    assert bool(stored_step(torch.tensor([0.5, float("nan")])).isnan()[1]), "what is not a number must be seen"


@given(stored=st.lists(st.integers(0, 255), min_size=2, max_size=20))
def test_any_bytes_are_steps(stored: list[int]) -> None:
    step = load_step(torch.tensor(stored, dtype=torch.uint8))
    assert len(step) == len(stored) - 1
    assert bool(((step > 0) & step.isfinite()).all())


@given(bits=st.integers(1, 8), seed=st.integers(0, 2**31), mean=st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_grouped_fake_quantization_is_what_is_stored(bits: int, seed: int, mean: float) -> None:
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) + mean
    step, zero = optimal_weight_qparams(rows, bits)
    assert torch.equal(load_zero(store_zero(zero, bits), bits), zero)
    assert torch.equal(stored_step(step), step)
    integers = quantize_weight(rows, step, bits, zero)
    low, high = weight_range(bits)
    assert low <= int(integers.min()) <= int(integers.max()) <= high
    assert torch.equal(fake_quantize_weight(rows, step, bits, zero), dequantize_weight(integers, step, bits, zero))


def test_zero_points_pay_where_a_group_is_not_symmetric() -> None:
    rows = torch.rand(32, 64, generator=torch.Generator().manual_seed(0))
    for bits in range(2, 9):
        step, zero = optimal_weight_qparams(rows, bits)
        affine = (fake_quantize_weight(rows, step, bits, zero) - rows).square().mean()
        symmetric = (fake_quantize_weight(rows, optimal_weight_step(rows, bits), bits) - rows).square().mean()
        assert affine < 0.35 * symmetric


@pytest.mark.parametrize(("bits", "most"), [(2, 0.0053), (3, 0.0015), (4, 0.00036)])
@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign_are_covered(bits: int, most: float, sign: int) -> None:
    weight = sign * (0.5 + torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) / 2)
    step, zero = optimal_weight_qparams(weight, bits)
    assert float((fake_quantize_weight(weight, step, bits, zero) - weight).square().mean()) < most


def test_importance_moves_the_error_away_from_what_matters() -> None:
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(32)
    importance[:4] = 100.0
    for search in (lambda i: (optimal_weight_step(rows, 3, i), None), lambda i: optimal_weight_qparams(rows, 3, i)):
        errors = []
        for given_importance in (None, importance):
            step, zero = search(given_importance)
            errors.append(float((fake_quantize_weight(rows, step, 3, zero) - rows)[:, :4].square().mean()))
        assert errors[1] < 0.8 * errors[0]


def test_gradients_of_grouped_weights_match_autograd_of_the_definition() -> None:
    torch.manual_seed(0)
    rows, upstream = torch.randn(4, 16, dtype=torch.double), torch.randn(4, 16, dtype=torch.double)
    step, zero = torch.rand(4, dtype=torch.double) * 0.3 + 0.2, torch.randn(4, dtype=torch.double) * 0.3
    gradients = []
    for own in (True, False):
        w, s, z = (t.clone().requires_grad_() for t in (rows, step, zero))
        if own:
            out = fake_quantize_weight(w, s, 3, z)
        else:
            v = w / s[:, None] + z[:, None]
            whole = v.round()
            inside = (whole >= -4) & (whole <= 3)
            integers = torch.where(inside, v + (whole - v).detach(), whole.clamp(-4, 3).detach())
            out = (integers - z[:, None]) * s[:, None]
        (out * upstream).sum().backward()
        gradients.append((w.grad, s.grad, z.grad))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference)


def test_half_way_values_agree() -> None:
    step = torch.tensor([0.5])
    weight = torch.arange(-9, 10).reshape(1, -1) * 0.25
    for bits in range(1, 9):
        stored = dequantize_weight(quantize_weight(weight, step, bits), step, bits)
        assert torch.equal(fake_quantize_weight(weight, step, bits), stored)


def test_binary_and_two_bit_levels_are_symmetric() -> None:
    step = torch.tensor([2.0])
    weight = torch.linspace(-9, 9, 101).reshape(1, -1)
    assert fake_quantize_weight(weight, step, 1).unique().tolist() == [-1.0, 1.0]
    assert fake_quantize_weight(weight, step, 2).unique().tolist() == [-3.0, -1.0, 1.0, 3.0]


def test_wider_is_closer() -> None:
    weight = torch.randn(16, 200, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in range(1, 9):
        step = optimal_weight_step(weight, bits)
        errors.append(float((fake_quantize_weight(weight, step, bits) - weight).square().mean()))
    assert errors == sorted(errors, reverse=True)
    # Max (1960) gives 0.1188 for the best uniform 4-level quantizer of a Gaussian.
    assert errors[1] == pytest.approx(0.1188, abs=0.01)


def test_weight_gradients_are_those_of_lsq() -> None:
    weight = torch.tensor([[0.2, 0.9, 5.0, -5.0]], requires_grad=True)
    step = torch.tensor([1.0], requires_grad=True)
    fake_quantize_weight(weight, step, 3).sum().backward()
    # Inside the range the weight's gradient passes, outside it is 0 (arXiv:1902.08153, eq. 5).
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    # round(v) - v inside, the limit outside (eq. 3): -0.2 + 0.1 + 3 - 4.
    assert step.grad is not None
    assert float(step.grad) == pytest.approx(-1.1, abs=1e-5)


@pytest.fixture(params=["numbers", "tensors"])
def steps_as(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How steps of inputs are read: on a CPU as numbers, elsewhere not at all; both run here."""
    if request.param == "tensors":
        monkeypatch.setattr(quantization, "_reads_numbers", lambda x: False)
    return str(request.param)


@pytest.mark.usefixtures("steps_as")
def test_activation_gradients_match_autograd_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, generator=generator)
    grad = torch.randn(3, 50, generator=generator)
    for bits in (2, 4, 8):
        results = []
        for function in (fake_quantize_activation, _reference):
            parts = [x.clone(), torch.tensor(0.11), torch.tensor(1.0)]
            parts = [part.requires_grad_() for part in parts]
            function(*parts, bits).backward(grad)
            results.append([part.grad for part in parts])
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("steps_as")
def test_zeros_of_a_relu_are_inside_the_range_and_say_nothing_of_its_zero_point() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).relu()
    assert int((x == 0).sum()) > 400
    for bits in (2, 8):
        parts = [x.clone(), torch.tensor(5.0 / 2**bits), torch.tensor(0.0)]
        inputs, step, zero = (part.requires_grad_() for part in parts)
        fake_quantize_activation(inputs, step, zero, bits).backward(torch.ones(1000))
        clipped = int((x > (2**bits - 1) * step).sum())
        assert float(zero.grad) == pytest.approx(-float(step) * clipped, abs=1e-4)
        assert int(inputs.grad.sum()) == 1000 - clipped


@pytest.mark.usefixtures("steps_as")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_steps_of_inputs_in_half_precision_have_the_gradients_of_full(dtype: torch.dtype, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(1 << 16, generator=generator)).to(dtype)
    grad = (0.01 * torch.randn(1 << 16, generator=generator)).to(dtype)
    found = []
    for precision in (dtype, torch.float32):
        step, zero = torch.tensor(3.0 / 2**bits).requires_grad_(), torch.tensor(2.0).requires_grad_()
        fake_quantize_activation(x.to(precision), step, zero, bits).backward(grad.to(precision))
        found.append((float(step.grad), float(zero.grad)))
    # Outputs are rounded to half precision, which the sum of their errors keeps.
    assert found[0][0] == pytest.approx(found[1][0], rel=0.15, abs=0.05)
    assert found[0][1] == pytest.approx(found[1][1], rel=0.02)


def _reference(x: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    def ste(v: torch.Tensor) -> torch.Tensor:
        return v + (v.round() - v).detach()

    low, high = activation_range(bits)
    # LSQ clips before it rounds: no gradient passes beyond the last level.
    return (ste(torch.clamp(x / step + ste(zero), low, high)) - ste(zero)) * step


@given(st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_activation_levels(bits: int, seed: int) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * 3
    step, zero = optimal_activation_qparams(x, float(x.min()), float(x.max()), bits)
    assert step > 0
    assert zero == int(zero)
    assert 0 <= zero <= 2**bits - 1
    levels = fake_quantize_activation(x, torch.tensor(step), torch.tensor(zero), bits).unique()
    assert len(levels) <= 2**bits
    assert 0.0 in levels


@given(st.integers(2, 8), st.integers(0, 1000), st.floats(0.01, 100))
def test_rows_have_a_step_each_from_their_own_values(bits: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 33, generator=generator) * scale * 10.0 ** torch.arange(-2, 3).view(5, 1)
    x[0, 0], x[0, 1], x[0, 2] = 0.0, x[0, 1].abs(), -x[0, 2].abs()
    x.requires_grad_(True)
    found = fake_quantize_rows(x, bits)
    span = x.detach().amax(-1).clamp(min=0) - x.detach().amin(-1).clamp(max=0)
    # Rounding the zero point may cost half a step more.
    assert bool(((found - x).abs().amax(-1) <= 1.01 * span / (2**bits - 1) + 1e-12).all())
    assert torch.equal(found[0, 0], torch.zeros(33))
    assert all(len(row.unique()) <= 2**bits for row in found.detach().flatten(0, 1))
    for row, expected in zip(x.detach().flatten(0, 1), found.detach().flatten(0, 1), strict=True):
        assert torch.equal(fake_quantize_rows(row, bits), expected)
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert fake_quantize_rows(x.detach().bfloat16(), bits).dtype == torch.bfloat16


def test_degenerate_inputs_have_steps() -> None:
    assert (optimal_weight_step(torch.zeros(3, 4), 4) > 0).all()
    assert optimal_activation_qparams(torch.zeros(5), 0.0, 0.0, 8)[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_as_tensors_round_as_numbers_do(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0)).to(dtype)
    step, zero = torch.tensor(0.0237), torch.tensor(101.4)
    expected = fake_quantize_activation(x, step, zero, 8)
    monkeypatch.setattr(quantization, "_reads_numbers", lambda x: False)
    found = fake_quantize_activation(x, step, zero, 8)
    assert found.dtype == dtype
    # 1 / step is a float32 there: what lies half way between two integers may be rounded to the other.
    apart = (found != expected).float().mean()
    assert float(apart) < (0.001 if dtype == torch.float32 else 0.2)
    torch.testing.assert_close(found.float(), expected.float(), atol=0.03, rtol=0.02)
