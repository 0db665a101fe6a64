"""A PT2E quantizer: annotates an exported graph with the widths of a policy."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import (
    HistogramObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer.quantizer import (
    Q_ANNOTATION_KEY,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

from hq_plugin.errors import PolicyError
from hq_plugin.policy import FLOAT_BITS, HybridPolicy, LayerBits

_PRODUCTS = (
    torch.ops.aten.linear.default,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv1d.padding,  # named, "same"
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv2d.padding,
)


class HybridQuantizer(Quantizer):
    """For `prepare_pt2e(exported, HybridQuantizer(policy))`.

    Args:
        policy: Widths of layers. Weights get a step a channel, group sizes are passed over; inputs get
            one step, 16 bits leave them float.
    """

    def __init__(self, policy: HybridPolicy) -> None:
        super().__init__()
        self.policy = policy

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotates the inputs and weights of the layers that the policy names.

        Raises:
            PolicyError: The graph has no product for a layer that the policy names, its input is dynamic, or its
                weight has fewer than 2 bits.
        """
        left = set(self.policy)
        dynamic = [name for name, bits in self.policy.items() if bits.dynamic]
        if dynamic:
            raise PolicyError(
                f"The policy gives {', '.join(dynamic[:5])}{' ...' if len(dynamic) > 5 else ''} a step for each "
                'row of the input, which PT2E cannot annotate. Search with activation_scheme="static".'
            )
        narrow = [name for name, bits in self.policy.items() if bits.weight < 2]
        if narrow:
            raise PolicyError(
                f"The policy gives {', '.join(narrow[:5])}{' ...' if len(narrow) > 5 else ''} fewer than 2 bits, "
                "which PT2E rounds to zeros. Search with weight_bits of at least 2, or leave these layers out."
            )
        for node in model.graph.nodes:
            name = _layer_of(node)
            if node.target in _PRODUCTS and name in self.policy:
                x, weight = node.args[:2]
                specs = {weight: _weight_spec(self.policy[name])}
                if self.policy[name].activation != FLOAT_BITS:
                    specs[x] = _input_spec(self.policy[name])
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
                left.discard(name)
        if left:
            raise PolicyError(
                f"The policy names {', '.join(sorted(left)[:5])}{' ...' if len(left) > 5 else ''}, for which the "
                "exported graph has no linear or convolution. Embeddings have none: leave them out."
            )
        return model

    def validate(self, model: GraphModule) -> None:
        """Accepts every graph: what is wrong, `annotate` has said."""


def _layer_of(node: Node) -> str:
    """Returns the name of the layer that a node stems from."""
    stack: list[Any] = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack else ""


def _weight_spec(bits: LayerBits) -> QuantizationSpec:
    most = 2 ** (bits.weight - 1) - 1
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver,
        quant_min=-most - 1,
        quant_max=max(most, 0),
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def _input_spec(bits: LayerBits) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.uint8,
        observer_or_fake_quant_ctr=HistogramObserver,
        quant_min=0,
        quant_max=2**bits.activation - 1,
        qscheme=torch.per_tensor_affine,
    )
