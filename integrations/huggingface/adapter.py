"""What hq_plugin asks of transformers: options that fit a model, fused layers, data, rebuilding.

How text and pictures become batches is `inputs.py`; how `save_pretrained` and `from_pretrained` work is
`quantizer.py`.
"""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hq_plugin.adapters import Unwrapped, without_memory
from hq_plugin.config import Config
from hq_plugin.errors import ArtifactError, ModelError
from hq_plugin.integrations.huggingface import inputs, rows
from hq_plugin.integrations.huggingface.layers import with_linear_layers
from hq_plugin.integrations.huggingface.quantizer import attach
from hq_plugin.integrations.huggingface.strangers import checked, offline

_LOG = logging.getLogger(__name__)

#: Layers of one parent that kernels run as one matrix product.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
#: Steps, evaluations and held-out sequences for models that write text, whose steps cost seconds and not
#: milliseconds, by effort.
_CAUSAL_STEPS: dict[str, dict[str, int]] = {
    "smoke": {"meta_steps": 2, "search_evaluations": 6, "finetune_steps": 2, "holdout": 2},
    "fast": {"meta_steps": 12, "search_evaluations": 24, "finetune_steps": 60, "holdout": 4},
    "balanced": {"meta_steps": 40, "search_evaluations": 80, "finetune_steps": 300, "holdout": 8},
    "best": {"meta_steps": 400, "search_evaluations": 400, "finetune_steps": 4000, "holdout": 16},
}
#: The same for other models of text.
_TEXT_STEPS: dict[str, dict[str, int]] = {
    "smoke": {},
    "fast": {"meta_steps": 40, "search_evaluations": 60, "finetune_steps": 200, "holdout": 64},
    "balanced": {"meta_steps": 150, "search_evaluations": 150, "finetune_steps": 800, "holdout": 128},
    "best": {"meta_steps": 600, "search_evaluations": 600, "finetune_steps": 4000, "holdout": 256},
}


class HuggingFaceAdapter:
    """The adapter of `hq_plugin.adapters`."""

    name = "huggingface"

    def matches(self, model: nn.Module) -> bool:
        """Returns whether the model is one of transformers'."""
        return isinstance(model, PreTrainedModel)

    def unwrap(self, model: Any) -> Unwrapped | None:
        """Takes the model out of a pipeline; of a bare model, turns Conv1D layers into Linear ones.

        Raises:
            ModelError: The model is quantized already, on the meta device, or offloaded.
        """
        if type(model).__module__.startswith("peft."):
            raise ModelError(
                "The model is a PeftModel: its adapter is not quantized. Merge it first: "
                "hq_plugin.quantize(model.merge_and_unload(), budget, data)."
            )
        # By its name when it is needed: transformers' pipelines take longer to import than a model takes to load.
        if not isinstance(model, nn.Module) and isinstance(model, transformers.Pipeline):
            pipe = model
            # By the model's input: pipelines that write what they see or hear have a tokenizer as well.
            kind = inputs.PROCESSORS.get(pipe.model.main_input_name, "tokenizer")
            processor = getattr(pipe, kind) or pipe.tokenizer or pipe.image_processor or pipe.feature_extractor

            def wrap(packed: nn.Module) -> Any:
                # A shallow copy: the user's pipeline keeps the float model.
                copied = object.__new__(type(pipe))
                copied.__dict__.update(pipe.__dict__)
                copied.model, copied.hq = packed, packed.hq
                return copied

            return Unwrapped(with_linear_layers(_checked(pipe.model)), processor, wrap)
        if isinstance(model, PreTrainedModel):
            return Unwrapped(with_linear_layers(_checked(model)), None, lambda packed: packed)
        return None

    def options(self, model: nn.Module, config: Config) -> dict[str, Any]:
        """Returns options that fit the model.

        Nothing but what is quantized is trained. Models that generate text get weights alone, in groups of
        64, and few, long samples; others of text 8-bit inputs with a step for each token.
        """
        assert isinstance(model, PreTrainedModel)
        proposed: dict[str, Any] = {"prepare_batch": rows.splitter(model), "train_float": False}
        if inputs.takes_text(model):
            length = rows.positions(model) or 512
            causal = model.can_generate()
            proposed |= {"batch_size": 4 if causal else 16, "sequence_length": min(256 if causal else 128, length)}
            # Tokens differ by orders of magnitude: one step for all of them costs more than any width.
            proposed["activation_scheme"] = "dynamic"
            if causal:
                proposed |= {
                    "activation_bits": (16,),
                    "group_size": 64,
                    "sensitivities": "fisher",
                    "self_written": 0.5,
                    "temperature": 1.0,
                    "block_loss": 0.0,  # measured: nothing gained, and every block's states are kept
                    "finetune_from": "generated",  # measured: float weights rounded to second order end further
                    "rounding": "nearest",
                    **_CAUSAL_STEPS[config.effort],
                }
                proposed |= {"learning_rate": 3e-5, "step_learning_rate": 1e-3}
            else:
                # Who names widths gets no others; a target has narrowed the default ones.
                if config.weight_bits == Config(target=config.target).weight_bits:
                    proposed["embedding_bits"] = (1, *config.weight_bits)
                if config.target == "storage":  # the others' fastest kernels have one step a channel
                    proposed["group_size"] = (0, 32, 64, 128)
                    if "embedding_bits" in proposed:
                        proposed |= {"embedding_bits": (0, 1, *config.weight_bits), "embedding_columns": 4}
                proposed |= {
                    "embedding_parts": 12,
                    "block_loss": 0.3,  # measured: neither less nor 1 made a difference
                    "sensitivities": "measured",  # the second order beside them was not tried for these
                    "rounding": "second_order",
                    "calibration_batches": 16,
                    "learning_rate": 2e-4,
                    "step_learning_rate": 1e-3,
                    **_TEXT_STEPS[config.effort],
                }
        return proposed

    def fused(self, model: nn.Module) -> list[list[str]]:
        """Returns the layers that kernels run as one."""
        found = []
        for name, module in model.named_modules():
            children = dict(module.named_children())
            for names in FUSED:
                if all(isinstance(children.get(child), nn.Linear) for child in names):
                    found.append([f"{name}.{child}" if name else child for child in names])
        return found

    def batches(self, model: nn.Module, data: Any, config: Config) -> Any:
        """Turns text, a tokenizer's output or pictures into a Dataset; None becomes generated text."""
        assert isinstance(model, PreTrainedModel)
        return inputs.batches(model, data, config)

    def example_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns random inputs for two samples, of the sizes that the model's configuration says."""
        assert isinstance(model, PreTrainedModel)
        return (), inputs.example(model)

    def describe(self, model: nn.Module) -> dict[str, Any] | None:
        """Returns class, configuration and, of models that generate, how they do."""
        assert isinstance(model, PreTrainedModel)
        made = getattr(transformers, type(model).__name__, None)
        # By the module, since a packed model's class may be a subclass of transformers' own (saving.py).
        if made is None or type(model).__module__ != made.__module__:
            return None  # the user's class or remote code, whatever its name: only the user can build it
        config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
        settings: Any = getattr(model, "generation_config", None)
        try:
            config = json.loads(json.dumps(config))
            # As transformers writes them into generation_config.json: what differs from its defaults.
            text = None if settings is None else settings.to_json_string(ignore_metadata=True)
            generation = {} if text is None else {"generation_config": json.loads(text)}
        except (TypeError, ValueError):
            return None
        return {"class": type(model).__name__, "config": config, **generation}

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Builds the architecture without values in its parameters, and without any download.

        Raises:
            ArtifactError: transformers has no such class, or not with this configuration.
        """
        name, values = description.get("class"), description.get("config")
        made: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        if not (isinstance(made, type) and issubclass(made, PreTrainedModel) and isinstance(values, dict)):
            raise ArtifactError(
                f"transformers {transformers.__version__} has no model class {name!r}. Upgrade transformers, or "
                "pass a float model: hq_plugin.load(directory, model)."
            )
        values = checked(values)
        # Earlier versions saved none: those models generate as their configuration says.
        generation = checked(description.get("generation_config"))
        try:
            with offline():
                model: Any = _hollow(made, made.config_class.from_dict(values))  # type: ignore[attr-defined]
            model.tie_weights()  # a part of the initialisation that was left out
            if generation is not None and model.can_generate():
                model.generation_config = model.generation_config.from_dict(generation)
        except Exception as error:  # whatever a class makes of a damaged configuration
            raise ArtifactError(f"The saved model cannot be rebuilt: {error}") from error
        return with_linear_layers(model.eval())

    def skeleton(self, model: nn.Module) -> nn.Module:
        """Returns the model with Linear layers for Conv1D, and with values in buffers that no file holds."""
        assert isinstance(model, PreTrainedModel)
        model = with_linear_layers(model)
        hollow = {name for name, buffer in model.named_buffers() if buffer.is_meta}
        if not hollow:
            return model
        model = copy.deepcopy(model)  # what is hollow takes no memory
        try:
            with torch.device("cpu"):
                made = _hollow(type(model), copy.deepcopy(model.config))
        except Exception:  # a class that takes more than its configuration; whoever needs the values says so
            return model
        for name, buffer in made.named_buffers():
            if name in hollow:
                parent, _, last = name.rpartition(".")
                model.get_submodule(parent)._buffers[last] = buffer
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """Gives a packed model what `save_pretrained` needs."""
        return attach(model)


ADAPTER = HuggingFaceAdapter()


def _hollow(made: Any, config: Any) -> PreTrainedModel:
    """Builds a model of a class without values in its parameters; its buffers have theirs."""
    with torch.random.fork_rng(devices=[]), no_init_weights():
        model: PreTrainedModel = without_memory(lambda: made(config))  # type: ignore[assignment]
    return model


def _checked(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model if it can be quantized."""
    settings = getattr(model.config, "quantization_config", None)
    method = getattr(settings, "quant_method", "another method")
    method = getattr(method, "value", method)
    # transformers dequantizes GGUF files on loading: what is here is a float model.
    if method != "gguf" and (settings is not None or getattr(model, "is_quantized", False)):
        raise ModelError(
            f"The model is quantized already (by {method}). Load the float checkpoint; "
            "of one that was dequantized, delete config.quantization_config and set hf_quantizer to None first."
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_meta:
            places = sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()})
            where = f"offloaded ({', '.join(places)})" if places else "on the meta device"
            raise ModelError(
                f"The model is {where}: {name} holds no values. Load it whole: from_pretrained(..., "
                "device_map=None), or device_map='auto' on a machine where it fits."
            )
    return model
