"""transformers' own door: `save_pretrained` and `from_pretrained` of packed models.

The policy is in `config.json`, under `quantization_config`. A packed weight is stored under the name of the
float weight, in another shape: a process that does not know the method `hq` then stops with a size mismatch
and does not fill the layers with random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

# This file is imported while transformers still is (see `hq_plugin.registration`): nothing of it but these
# modules may be imported here, the rest where it is used.
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hq_plugin.errors import ArtifactError, ModelError, PolicyError
from hq_plugin.integrations.huggingface.integrity import start_check
from hq_plugin.integrations.huggingface.saving import bind
from hq_plugin.nn import (
    INPUT_BUFFERS,
    WEIGHT_BUFFERS,
    PackedModule,
    packed_modules,
    share_packed_weight,
    weight_key,
    with_layers_of,
)
from hq_plugin.nn.held import HOLDER
from hq_plugin.policy import HybridPolicy
from hq_plugin.report.document import finite
from hq_plugin.result import Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD, VERSION = "hq", 1
#: What safetensors calls the dtypes of a packed layer that no cast may change.
_DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32"}
#: Buffer of a packed layer, and its name in a file.
_STORED = {"weight_packed": "weight"}


@register_quantization_config(METHOD)
class HqConfig(QuantizationConfigMixin):
    """What `config.json` says of a packed model.

    Args:
        policy: `{site: [weight bits, activation bits(, group size)]}`.
        tied: Sites that use the weight of another: `{site: owner}`.
        summary: Budget and fidelity, for people; nothing depends on it.
        version: Version of the format.
        checksum: Of the folder; written and compared by `integrity.py`.
    """

    def __init__(
        self,
        policy: Mapping[str, Any] | None = None,
        tied: Mapping[str, str] | None = None,
        summary: Mapping[str, Any] | None = None,
        version: int = VERSION,
        checksum: str | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.version = version
        self.checksum = checksum
        self.policy = dict(policy or {})
        self.tied = dict(tied or {})
        self.summary = dict(summary or {})

    def hybrid_policy(self) -> HybridPolicy:
        """Returns the policy.

        Raises:
            ArtifactError: It is damaged, or from a newer version.
        """
        if type(self.version) is not int or not 1 <= self.version <= VERSION:
            raise ArtifactError(
                f"The model was saved in version {self.version!r} of hq_plugin's format; this hq_plugin reads "
                f"up to {VERSION}. Upgrade: pip install -U hq-plugin."
            )
        try:
            policy = HybridPolicy.from_json(self.policy)
        except PolicyError as error:
            raise ArtifactError(f"The policy in config.json is damaged: {error}") from error
        if not len(policy):
            raise ArtifactError(
                "config.json names no quantized layer. from_pretrained loads what was quantized before; to "
                "quantize a float model call hq_plugin.quantize(model, budget)."
            )
        return policy


@register_quantizer(METHOD)
class HqQuantizer(HfQuantizer):
    """Builds the packed layers before transformers loads their tensors."""

    requires_calibration = True
    quantization_config: HqConfig

    def is_serializable(self) -> bool:
        """Returns True: `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters (LoRA) can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` works on the model."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from hq_plugin.integrations.huggingface.layers import with_linear_layers

        config = self.quantization_config
        with_linear_layers(model, inplace=True)
        prefix = model.base_model_prefix
        policy = config.hybrid_policy()
        # AutoModel loads the body of a model with a head, and the other way round.
        places = {name: (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") for name in policy}
        with_layers_of(model, [place for names in places.values() for place in names], inplace=True)
        modules = dict(model.named_modules())
        self._names: dict[str, str] = {}
        lacking = []
        for name, bits in policy.items():
            found = next((place for place in places[name] if place in modules), None)
            weight = None if found is None else modules[found]._parameters.get("weight")
            if found is None or weight is None:
                lacking.append(name)
                continue
            self._names[name] = found
            parent, _, child = found.rpartition(".")
            packed = PackedModule.skeleton(modules[found], bits)
            setattr(model.get_submodule(parent) if parent else model, child, packed)
            # transformers would initialise the weight, for which every layer would be dequantized.
            owner, _, last = parent.rpartition(".")
            for initialised in (packed, *([modules[owner]] if last == HOLDER else [])):
                vars(initialised)["_is_hf_initialized"] = True
        # A body alone has no place for its head; a whole model has one for every layer.
        body = not hasattr(model, prefix)
        wrong = [name for name in lacking if name.startswith(f"{prefix}.")] if body and prefix else lacking
        if wrong or not self._names:
            classes = ", ".join(model.config.architectures or ["config.json names none"])
            raise ModelError(
                f"The policy in config.json is for another model: {type(model).__name__} has no layer "
                f"{', '.join((wrong or lacking)[:5])}{' ...' if len(wrong or lacking) > 5 else ''}. Load the class "
                f"that it was saved from ({classes}), or its body by AutoModel, and put a head of your own on it."
            )
        self._untie(model)
        self._finish_check: Callable[[], None] | None = None
        self._check_files(model, kwargs.get("checkpoint_files") or [])
        return model

    def _check_files(self, model: PreTrainedModel, files: Sequence[str]) -> None:
        """Compares what the files hold for each packed layer with what it needs, before anything is loaded.

        transformers would fill what is missing with random numbers, and pass over what is too much.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        if not files:
            return
        mapping = get_model_conversion_mapping(model, None, self)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = model.state_dict()
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in files:
            if not str(file).endswith(".safetensors"):
                raise ArtifactError(f"{file} is not a safetensors file; nothing else is read.")
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, not a mapping
                    part = tensors.get_slice(name)
                    key, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
                    found[key if key in state else name] = (tuple(part.get_shape()), part.get_dtype())
        expected, held = _by_layer(state, self._names.values()), _by_layer(found, self._names.values())
        problems = []
        for site, here in self._names.items():
            for key in expected[here]:
                shape, dtype = tuple(state[key].shape), _DTYPES.get(state[key].dtype)
                if key not in found:
                    if key not in model.all_tied_weights_keys:
                        problems.append(f"{site}: {key} is missing")
                elif found[key][0] != shape or (dtype is not None and found[key][1] != dtype):
                    problems.append(f"{key} is {found[key][1]} {found[key][0]}, not {dtype or ''} {shape}")
            problems += [f"{key} is too much" for key in held[here] if key not in state]
        modules, known = dict(model.named_modules()), set(self._names.values())
        packed = [key.rpartition(".")[0] for key in found if key.endswith(".weight_step")]
        problems += [f"{name} is packed" for name in packed if name in modules and name not in known]
        if problems:
            raise ArtifactError(
                f"The checkpoint does not fit the policy in config.json: {'; '.join(problems[:5])}"
                f"{' ...' if len(problems) > 5 else ''}. The folder is damaged, or parts of two were mixed."
            )
        self._finish_check = start_check(files)

    def _untie(self, model: PreTrainedModel) -> None:
        """Takes packed weights out of what transformers ties: we tie them, packed."""
        packed = packed_modules(model)
        ours = {f"{name}.weight" for name in packed}
        model.all_tied_weights_keys = {
            target: source
            for target, source in getattr(model, "all_tied_weights_keys", {}).items()
            if target not in ours and source not in ours
        }
        for name, owner in self.quantization_config.tied.items():
            if name in self._names and owner in self._names:
                share_packed_weight(packed[self._names[owner]], packed[self._names[name]])
                for buffer in WEIGHT_BUFFERS:
                    # Loaded once, for the owner; the other's are not expected in the file.
                    packed[self._names[name]]._non_persistent_buffers_set.add(buffer)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._finish_check is not None:
            self._finish_check()
            self._finish_check = None  # models are pickled with their quantizer
        # A body, or a body that was given a head, is saved under names of its own.
        config, names = self.quantization_config, self._names
        config.policy = {names[name]: bits for name, bits in config.policy.items() if name in names}
        config.tied = {
            names[name]: names[owner] for name, owner in config.tied.items() if name in names and owner in names
        }
        self._names = {name: name for name in names.values()}
        packed = packed_modules(model)
        for name, owner in config.tied.items():
            share_packed_weight(packed[owner], packed[name])
            packed[name]._non_persistent_buffers_set -= set(WEIGHT_BUFFERS)
        missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if missing and not getattr(model, "hf_device_map", None):
            raise ArtifactError(
                f"The checkpoint lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}."
            )
        for module in packed.values():
            module._cached = None
        _initialise_buffers(model, packed)
        model.requires_grad_(False)
        bind(model)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Keeps the dtype of what is exact (packed integers, steps); other tensors take that of the model."""
        from hq_plugin.integrations.huggingface.names import StoredTensors

        return None if isinstance(converter, StoredTensors) else super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """Leaves out transformers' renamings where the file has the model's own names.

        So it is saved where transformers joins or splits weights (`saving.py`), and a renaming may fit an own name.
        Earlier versions of transformers do not give the model.
        """
        from transformers.core_model_loading import WeightConverter

        if any(isinstance(entry, WeightConverter) for entry in weight_conversions):
            return self.get_weight_conversions()
        updated: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        return updated

    def get_weight_conversions(self) -> list[Any]:
        """Returns what takes the tensors of packed layers from a file."""
        from hq_plugin.integrations.huggingface.names import StoredTensors

        names = {
            f"{name}.{_STORED.get(buffer, buffer)}": f"{name}.{buffer}"
            for name in getattr(self, "_names", {})
            for buffer in (*WEIGHT_BUFFERS, *INPUT_BUFFERS)
        }
        return [StoredTensors(names)] if names else []

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns what `save_pretrained` writes."""
        state = dict(model.state_dict())
        for name in self.quantization_config.tied:
            for buffer in WEIGHT_BUFFERS:
                state.pop(f"{name}.{buffer}", None)
        renamed = {}
        for name, tensor in state.items():
            path, _, last = name.rpartition(".")
            renamed[f"{path}.{_STORED[last]}" if last in _STORED else name] = tensor
        return renamed, {}


def _initialise_buffers(model: PreTrainedModel, packed: Mapping[str, PackedModule]) -> None:
    """Lets the model set buffers of packed layers that no file holds (Gemma's scale of its embeddings)."""
    from transformers import PreTrainedModel, initialization

    parts = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    with torch.no_grad(), initialization.guard_torch_init_functions():
        for name, module in packed.items():
            if not module._non_persistent_buffers_set:
                continue
            owner = max((part for part in parts if not part or name.startswith(f"{part}.")), key=len)
            # What it does to weights does not reach this one, of which there is only a shape.
            weight: Any = torch.empty((), dtype=module.weight_dtype, device="meta").expand(module.weight_shape)
            weight._is_hf_initialized = True
            module._cached = weight
            parts[owner]._init_weights(module)
            module._cached = None


def _by_layer(keys: Iterable[str], layers: Iterable[str]) -> dict[str, list[str]]:
    """Returns the names of tensors by the layer that they lie in, those outside of any left out."""
    found: dict[str, list[str]] = {layer: [] for layer in layers}
    for key in keys:
        path = key.rpartition(".")[0]
        while path and path not in found:
            path = path.rpartition(".")[0]
        if path:
            found[path].append(key)
    return found


def attach(model: nn.Module) -> nn.Module:
    """Gives a packed model what transformers needs to save it; returns it."""
    made: Any = model  # a PreTrainedModel, whose attributes transformers itself sets like this
    packed = packed_modules(model)
    first: dict[int, str] = {}
    tied = {}
    for name, module in packed.items():
        owner = first.setdefault(weight_key(module), name)
        if owner != name:
            tied[name] = owner
    result = getattr(model, "hq", None)
    config = HqConfig(
        {name: module.bits.to_json() for name, module in packed.items()},
        tied,
        _summary(result) if isinstance(result, Result) else None,
    )
    made.config.quantization_config = config
    quantizer = HqQuantizer(config, pre_quantized=True)
    quantizer._names = {name: name for name in packed}
    made.hf_quantizer = quantizer
    made.is_quantized = True
    made.quantization_method = METHOD
    bind(made)
    return model


def _summary(result: Result) -> dict[str, Any]:
    summary = {
        "budget": result.budget,
        "effective_bits": round(result.effective_bits, 4),
        "bytes": result.size,
        "float_bytes": result.float_size,
        "kl": result.kl,
        "agreement": result.agreement,
        "baselines": {name: baseline.kl for name, baseline in result.baselines.items()},
    }
    plain: dict[str, Any] = finite(summary)  # config.json must be JSON
    return plain


__all__ = ["METHOD", "HqConfig", "HqQuantizer", "attach"]
