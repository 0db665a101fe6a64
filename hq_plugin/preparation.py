"""What a session is made of before anything is trained: teacher, search space, calibration, checkpoint."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from types import CellType, CodeType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hq_plugin import adapters
from hq_plugin.batch import Batch
from hq_plugin.budget import Budget
from hq_plugin.checkpoint import Checkpoint
from hq_plugin.config import Config
from hq_plugin.data import Data
from hq_plugin.distillation import LossFunction, RelativeError, loss_function
from hq_plugin.distribution import processes
from hq_plugin.errors import ModelError
from hq_plugin.rewriting import float_state, hold_parameters, plain_weights, split_tables, splittable
from hq_plugin.sharding import sharded
from hq_plugin.sites import find_sites, reject_lazy
from hq_plugin.space import SearchSpace
from hq_plugin.storage import fingerprint
from hq_plugin.usage import rows_by_use

#: Samples whose outputs tell what errors are divided by.
_EXAMPLES = 64
#: Samples by which weights are rounded, at least: four batches of the default size. By 64 pictures, a MobileNetV2
#: began a fifth further from the float model than by 256 (docs/experiments.md).
_ROUNDED_BY = 256
#: Batches for that, unless more are asked for: each is a forward of its own in both networks.
_MOST_BATCHES = 64


def calibration_batches(teacher: nn.Module, data: Data, config: Config) -> list[Batch]:
    """Returns the batches from which moments are taken, where the teacher is."""
    device = device_of(teacher)
    return [batch.to(device) for batch in islice(iter(data.train), config.calibration_batches)]


def rounding_batches(teacher: nn.Module, data: Data, config: Config) -> list[Batch]:
    """Returns the batches by which weights are rounded: those for moments, and more where they hold few samples."""
    device, least = device_of(teacher), config.calibration_batches or 1
    taken: list[Batch] = []
    for batch in islice(iter(data.train), max(least, _MOST_BATCHES)):
        if len(taken) >= least and sum(one.size for one in taken) >= _ROUNDED_BY:
            break
        taken.append(batch.to(device))
    return taken


@torch.no_grad()
def distance_of(teacher: nn.Module, data: Data, config: Config) -> LossFunction:
    """Returns the distance of a configuration, as the teacher's outputs for held-out samples want it."""
    device, examples, samples = device_of(teacher), [], 0
    for batch in data.holdout:
        examples.append(batch.to(device).run(teacher))
        samples += batch.size
        loss = loss_function(config.loss, *examples)
        # Only errors that are divided by variances hang on more than what the output is made of.
        if not isinstance(loss, RelativeError) or samples >= _EXAMPLES:
            break
    return loss


def at_work(teacher: nn.Module) -> nn.Module:
    """Returns a teacher where it is to run: on accelerate's device, in place, unless it is sharded."""
    return teacher if sharded() else teacher.to(Accelerator().device)


def open_checkpoint(
    teacher: nn.Module, data: Data, config: Config, budget: Budget | None, *, session: str | None = None
) -> Checkpoint | None:
    """Opens the checkpoint that a configuration asks for.

    Args:
        teacher: The float model.
        data: What is held out of it is what the work is known by.
        config: Options.
        budget: Around which the MetaQuantNet was trained.
        session: By what a saved session is known whose work this is.
    """
    if config.checkpoint_dir is None:
        return None
    accelerator = Accelerator()
    key = {
        "float model": fingerprint(float_state(teacher)),
        "budget": None if budget is None else asdict(budget),
        **({} if session is None else {"session": session}),
        **decisive(config),
        "mixed precision": accelerator.mixed_precision,
        "gradient accumulation": accelerator.gradient_accumulation_steps,
    }
    held = tree_leaves([(batch.args, batch.kwargs) for batch in data.holdout])
    seen = fingerprint({str(n): value for n, value in enumerate(held) if isinstance(value, Tensor)})
    return Checkpoint(config.checkpoint_dir, key, config.checkpoint_seconds, seen)


def decisive(config: Config) -> dict[str, Any]:
    """Returns the options that a result depends on."""
    free = ("progress", "checkpoint_dir", "checkpoint_seconds", "trackers", "tracker_dir")
    options = {name: value for name, value in config.to_json().items() if name not in free}
    if callable(config.loss):  # functions are written by their names, which two lambdas share
        options["loss"] = f"{options['loss']} {hashlib.sha256(_described(config.loss).encode()).hexdigest()[:16]}"
    return options


def _described(value: Any, around: tuple[int, ...] = ()) -> str:
    """Returns what tells two functions apart, equal in every process: instructions, and values that they hold."""
    if id(value) in around:  # a function may hold itself
        return "..."
    if isinstance(value, Tensor):
        return fingerprint({"": value})
    code = getattr(value, "__code__", None)
    parts: Any = None
    if isinstance(value, CodeType):
        parts = [value.co_code.hex(), *value.co_names, *value.co_consts]
    elif code is not None:
        cells = [cell for cell in value.__closure__ or () if cell != CellType()]
        parts = [code, value.__defaults__, value.__kwdefaults__, [cell.cell_contents for cell in cells]]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, Mapping):
        parts = [*value.items()]
    elif isinstance(value, (tuple, list)):
        parts = value
    if parts is not None:
        return f"[{', '.join(_described(part, (*around, id(value))) for part in parts)}]"
    plain = value is None or isinstance(value, (bool, int, float, complex, str, bytes))
    # The text of other objects may hold where in memory they are.
    return repr(value) if plain else f"{type(value).__module__}.{type(value).__qualname__}"


def teacher_of(
    model: nn.Module,
    data: Data,
    config: Config,
    *,
    share: bool = False,
    by_use: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Returns the frozen copy of a float model that everything is measured against.

    Parameters that are matrices of products are layers of their own in it, large embeddings several, their rows
    sorted by use; weights that are computed from other parameters are parameters.

    Args:
        model: The float model; it is not changed.
        data: Gives inputs for one forward, and what is looked up.
        config: Options.
        share: Whether parameters share their memory with those of `model`, but those of large embeddings.
        by_use: Rows of embeddings in the order in which they lie in the tables, by name; None counts in the data.

    Raises:
        ModelError: The model cannot be copied, has parameters without values, or layers that wait for others.
    """
    reject_lazy(model)
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) and processes()[1] > 1:
        raise ModelError(
            "The model has SyncBatchNorm layers, which wait for the other processes, and each process scores "
            "policies of its own. Give the model as it was before torch.nn.SyncBatchNorm.convert_sync_batchnorm."
        )
    # Embeddings with `max_norm` change rows that they look up.
    changed = {id(module.weight) for module in model.modules() if getattr(module, "max_norm", None) is not None}
    shared = [p for p in model.parameters() if id(p) not in changed] if share else []
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in shared}
    try:
        with torch.no_grad():  # TorchScript copies its parameters by an operation of torch
            teacher = copy.deepcopy(model, memo).eval().requires_grad_(False)
    except RuntimeError as error:
        if "Only Tensors created explicitly by the user" not in str(error):
            raise
        raise ModelError(
            "The model cannot be copied: a layer keeps a tensor with a gradient, as torch.nn.utils.weight_norm "
            "does, or torch.nn.utils.prune. Use torch.nn.utils.parametrizations.weight_norm, or remove_weight_norm "
            'first; prune.remove(layer, "weight") makes pruning permanent, and zeros stay zeros.'
        ) from error
    except TypeError as error:
        if "cannot pickle" not in str(error):
            raise
        raise ModelError(
            f"The model cannot be copied: copy.deepcopy(model) says {str(error)!r}. A module holds such an object "
            "(a lock, a file, a connection): take it out, or give the module a __getstate__ that leaves it out."
        ) from error
    for module in teacher.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False  # its gradients are for the optimizers that know such
        for name, buffer in module._buffers.items():
            if buffer is not None and 0 in buffer.stride():
                module._buffers[name] = buffer.contiguous()  # expanded: nothing could be loaded into it
    run = data.holdout[0].to(device_of(teacher)).run
    teacher = hold_parameters(plain_weights(teacher, run, config), run)
    if by_use is None:
        by_use = rows_by_use(teacher, splittable(teacher, config), data.train)
    return split_tables(teacher, config, by_use)


def search_space(model: nn.Module, data: Data, config: Config) -> SearchSpace:
    """Finds a model's sites with one held-out batch, and builds the search space of `config`."""
    batch = data.holdout[0].to(device_of(model))
    table = find_sites(model, batch.run, batch.size, exclude=config.exclude)
    adapter = adapters.find(model)
    fused = [] if adapter is None else adapter.fused(model)
    weights = {site.name: model.get_submodule(site.name)._parameters["weight"] for site in table}
    return SearchSpace.build(table, config, fused, weights)  # type: ignore[arg-type]


def device_of(model: nn.Module) -> torch.device:
    """Returns where a model is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
