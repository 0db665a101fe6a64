"""The calls that users make: `quantize`, `meta_train`, `load_session`, `profile`, `export`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hq_plugin import adapters
from hq_plugin.budget import Budget
from hq_plugin.config import Config
from hq_plugin.data import RERANK_FACTOR, Data, prepare_data
from hq_plugin.errors import ConfigError, EngineError, ModelError
from hq_plugin.metric import EvalFunction, Metric
from hq_plugin.modes import gradients
from hq_plugin.nn import packed_modules
from hq_plugin.policy import HybridPolicy
from hq_plugin.preparation import search_space, teacher_of
from hq_plugin.profiles import Profile
from hq_plugin.profiling import measure_profile
from hq_plugin.seeding import seeded
from hq_plugin.session import Session
from hq_plugin.state import state_tensors
from hq_plugin.storage import storable
from hq_plugin.synthetic import synthetic_data
from hq_plugin.tracking import tracking


def quantize(
    model: nn.Module,
    budget: str | Budget,
    data: Any = None,
    *,
    eval_fn: EvalFunction | None = None,
    config: Config | None = None,
    **options: Any,
) -> nn.Module:
    """Quantizes a float model into a packed hybrid model that keeps a budget.

    The four steps of arXiv:2004.11506: meta-training, genetic search, fine-tuning, conversion.

    Args:
        model: Any `nn.Module`; it is not changed.
        budget: `"3bit"` (mean effective bits a weight), `"250KB"`, `"4MB"`, `"12%"` (of the float
            size), `"1.5GBitOps"`, several joined by `+`, or a `Budget`. Never exceeded, but for a
            latency that nothing found keeps: then the fastest is returned, with a warning.
        data: Batches (tensor, tuple or dict) in anything that can be iterated more than once, a
            DataLoader or a Dataset; labels are not needed. Samples of a Dataset, or the first batches of an
            iterable, are held out to measure. None makes synthetic batches up.
        eval_fn: Called with a model in eval mode, returns a number that is reported for the float model, which it
            sees first, for the baselines and for the result.
        config: Options.
        **options: Any field of `Config`, in place of the one in `config`.

    Returns:
        A model with the same forward, in eval mode; `.hq` is the `Result`.

    Raises:
        BudgetError: The budget cannot be read or met.
        DataError: The data cannot be used.
        ModelError: There is nothing to quantize.
        ConfigError: An option does not exist or has an impossible value.
        TrainingError: The loss is not finite from the start.
    """
    wrapper, budget = adapters.unwrap(model), Budget.parse(budget)
    config = _config(wrapper, config, options)
    with tracking(config):
        metric = Metric.tried(eval_fn, wrapper.model)
        session = Session.create(wrapper.model, _data(wrapper.model, data, config), config, budget, share=True)
        packed: nn.Module = wrapper.wrap(session.quantize(budget, eval_fn=metric))
    return packed


def meta_train(
    model: nn.Module,
    data: Any = None,
    *,
    budget: str | Budget | None = None,
    policy: HybridPolicy | None = None,
    config: Config | None = None,
    **options: Any,
) -> Session:
    """Trains the MetaQuantNet of a model, once, for any number of budgets.

    Args:
        model: Any `nn.Module`; it is not changed.
        data: As for `quantize`.
        budget: Where there is a main budget, policies near it are trained, as `quantize` does; others remain
            possible. None trains for all.
        policy: One that `Session.finetune` is to be given: whether the session will have its widths is found out
            before anything is trained.
        config: Options.
        **options: Any field of `Config`, in place of the one in `config`.

    Returns:
        A session: `session.quantize("3bit")`, `session.search(...)`, `session.pareto([...])`.

    Raises:
        DataError: The data cannot be used.
        ModelError: There is nothing to quantize.
        BudgetError: The budget cannot be read or met.
        PolicyError: The options do not allow the policy.
        ConfigError: An option does not exist or has an impossible value.
        TrainingError: The loss is not finite from the start.
    """
    wrapper = adapters.unwrap(model)
    config = _config(wrapper, config, options)
    focus = None if budget is None else Budget.parse(budget)
    return Session.create(wrapper.model, _data(wrapper.model, data, config), config, focus, policy=policy)


def load_session(directory: str | Path, model: nn.Module, data: Any = None, **options: Any) -> Session:
    """Loads what `session.save(directory)` wrote, for the same float model.

    Args:
        directory: The directory.
        model: The float model; it is not changed.
        data: As for `quantize`: what is held out scores policies, the rest fine-tunes.
        **options: Fields of `Config` that change, such as `finetune_steps`; `loss` and `prepare_batch` again
            where the session was made with functions of the user.

    Raises:
        ArtifactError: The directory holds no session, or a damaged one.
        ModelError: The session is for another model.
        ConfigError: An option cannot change, or a function that the session was made with is not given.
    """
    from hq_plugin.session_store import read_session

    wrapper = adapters.unwrap(model)

    def prepare(before: Config, changed: dict[str, Any]) -> tuple[Config, Data]:
        config = _config(wrapper, before, {**_by_effort(wrapper.model, before, changed), **changed})
        return config, _data(wrapper.model, data, config)

    with seeded(0), gradients():
        return read_session(directory, wrapper.model, prepare, options)


def profile(
    model: nn.Module, data: Any = None, *, batch: int = 1, config: Config | None = None, **options: Any
) -> Profile:
    """Measures how long each layer of a model takes at each width on this machine, for budgets of latency.

    Args:
        model: A float model; it is not changed.
        data: As for `quantize`; sizes matter, values do not.
        batch: Samples of a forward.
        config: Options.
        **options: Any field of `Config`; `target` chooses between PyTorch and ONNX Runtime, `weight_bits` and
            `activation_bits` what is measured.

    Returns:
        A profile: `profile.save("laptop.json")`, `quantize(..., profile="laptop.json")`.

    Raises:
        DataError: The data cannot be used.
        ModelError: There is nothing to quantize.
        EngineError: The target is ONNX Runtime, which is not installed.
        ExportError: The target is ONNX Runtime, and the model cannot be exported.
    """
    wrapper = adapters.unwrap(model)
    config = replace(_config(wrapper, config, options), self_written=0.0)
    prepared = _data(wrapper.model, data, config)
    with seeded(config.seed):
        teacher = teacher_of(wrapper.model, prepared, config)
        space = search_space(teacher, prepared, config)
        return measure_profile(teacher, space, prepared.holdout[0], batch, config.target, config.progress)


def export(model: nn.Module, path: str | Path, example_inputs: Any = None, **options: Any) -> Any:
    """Writes a packed model as an ONNX file that ONNX Runtime runs without this library, or PyTorch.

    Args:
        model: What `quantize` or `load` returned; it is not changed.
        path: The file; it appears whole or not at all.
        example_inputs: Inputs of one forward: a tensor, a tuple, or a dict of named inputs. Batch size, and
            the length of token sequences, stay free. None takes what the library that the model is from
            proposes.
        **options: As for `hq_plugin.integrations.onnxruntime.export`.

    Returns:
        What became of each layer (`Exported`).

    Raises:
        EngineError: onnx is not installed.
        ExportError: An operator cannot be exported; the message names it.
    """
    try:
        from hq_plugin.integrations.onnxruntime.export import export as write
    except ImportError as error:
        raise EngineError(f"{error}. Install what export needs: pip install 'hq-plugin[onnx]'.") from error
    with seeded(0):
        return write(model, path, example_inputs, **options)


def _config(wrapper: adapters.Unwrapped, config: Config | None, options: dict[str, Any]) -> Config:
    _check_model(wrapper.model)
    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"config is a {type(config).__name__}, not a Config. Options may be given as keywords.")
    config = (config or Config()).with_options(options)
    if config.processor is None:
        config = replace(config, processor=wrapper.processor)
    adapter = adapters.find(wrapper.model)
    return config.filled(None if adapter is None else adapter.options(wrapper.model, config))


def _by_effort(model: nn.Module, before: Config, changed: dict[str, Any]) -> dict[str, Any]:
    """Returns what an adapter proposes for another effort, in place of what it proposed for the one before."""
    adapter = adapters.find(model)
    if adapter is None or changed.get("effort", before.effort) == before.effort:
        return {}
    old = adapter.options(model, before)
    new = adapter.options(model, replace(before, effort=changed["effort"]))
    return {
        name: value
        for name, value in new.items()
        if value != old.get(name) and getattr(before, name) == old.get(name)
    }


def _check_model(model: Any) -> None:
    """Raises ModelError for what no library's own check knows to be no float model."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"of type {type(model).__name__}"
        hint = {str: "Build it first: timm.create_model(name), say", type: "Make one: model()"}.get(
            type(model), "Give the network itself, with its weights"
        )
        raise ModelError(f"model is {kind}, not a torch.nn.Module. {hint}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "model is TorchScript, whose layers cannot be swapped. Give the module that it was made from."
        )
    if packed_modules(model):
        raise ModelError("model is quantized already. Give the float model that it was made from.")
    if "hq" in {**model._modules, **model._parameters, **model._buffers}:
        raise ModelError("The model has a part of the name 'hq', under which the result's report goes. Rename it.")
    for name, tensor in state_tensors(model).items():
        if not storable(tensor.dtype):
            raise ModelError(
                f"The model's {name!r} is {tensor.dtype}, which no safetensors file can hold. Give it another "
                "dtype, or register it with persistent=False."
            )
    if any(p.is_meta for p in model.parameters()):
        raise ModelError("The model is on the meta device, without weights. Load it with its weights.")
    half = sorted({str(p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)})
    if half:
        raise ModelError(
            f"The model has parameters of {', '.join(half)}, whose rounding would drown that of training. Give "
            "model.float() and data of float32; accelerate's mixed precision trains in bfloat16."
        )


def _data(model: nn.Module, data: Any, config: Config) -> Data:
    with seeded(config.seed), gradients():
        return _prepared(model, data, config)


def _prepared(model: nn.Module, data: Any, config: Config) -> Data:
    adapter = adapters.find(model)
    if adapter is not None:
        data = adapter.batches(model, data, config)
    if data is not None:
        return prepare_data(data, model, config)
    assert config.batch_size is not None
    held = -(-config.steps.holdout * RERANK_FACTOR // config.batch_size)
    smoke = config.effort == "smoke"
    return synthetic_data(
        model,
        batch_size=config.batch_size,
        batches=2 if smoke else 16,
        held=1 if smoke else min(held, 8),
        seed=config.seed,
        steps=4 if smoke else 60,
        show=config.progress,
    )
