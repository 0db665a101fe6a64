"""What torch's exporter does not translate, said in what it does, while a model is traced.

Only what fails otherwise is said anew: attention whose inputs are not batches of as many heads, reshaped complex
numbers, the inverse of the error function, products in bfloat16, and whether all of a tensor is true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: Polynomials of M. Giles, "Approximating the erfinv function" (GPU Computing Gems, 2011), in single precision: of
#: w - 2.5 where w = -log(1 - x²) is below 5, and of √w - 3 elsewhere.
_CENTRAL = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


class Rewritten(TorchFunctionMode):
    """Inside, a traced model calls what can be translated."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls the function, or what stands for it."""
        return _REWRITES.get(func, func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Attention on `[batch, heads, length, width]`, as many heads in all unless they are grouped."""
    grouped = kwargs.get("enable_gqa", False)
    if query.dim() == 4 and (grouped or query.shape[1] == key.shape[1] == value.shape[1]):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    *leading, heads = query.shape[:-2] if query.dim() > 3 else (*query.shape[:-2], 1)

    def flat(given: Tensor) -> Tensor:
        own = given.shape[-3] if grouped and given.dim() > 3 else heads
        given = given.unsqueeze(-3) if query.dim() == 3 and given.dim() == 3 else given
        return given.expand(*leading, own, *given.shape[-2:]).reshape(-1, own, *given.shape[-2:])

    mask = None if attn_mask is None else flat(attn_mask)
    output = F.scaled_dot_product_attention(flat(query), flat(key), flat(value), mask, *args, **kwargs)
    return output.reshape(*query.shape[:-1], value.shape[-1])


def _unsqueeze(input: Tensor, dim: int) -> Tensor:  # arguments are called as torch's are
    if not input.is_complex():
        return input.unsqueeze(dim)
    return torch.view_as_complex(torch.view_as_real(input).unsqueeze(dim if dim >= 0 else dim - 1))


def _erfinv(input: Tensor) -> Tensor:
    w = -torch.log((1 - input) * (1 + input))
    parts = _polynomial(_CENTRAL, w - 2.5), _polynomial(_TAIL, torch.sqrt(w) - 3)
    return input * torch.where(w < 5, *parts)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def _bfloat16(input: Tensor) -> Tensor:
    """Rounds as bfloat16 does and stays in float32: the runtime multiplies no bfloat16 on a processor."""
    return input.to(torch.bfloat16).float()


_REWRITES: dict[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: _attention,
    torch.unsqueeze: _unsqueeze,
    Tensor.unsqueeze: _unsqueeze,
    torch.erfinv: _erfinv,
    Tensor.erfinv: _erfinv,
    torch.special.erfinv: _erfinv,
    Tensor.bfloat16: _bfloat16,
    Tensor._is_all_true: Tensor.all,  # what torch's own checks call
}
