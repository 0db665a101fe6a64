"""Saving and loading sessions: the meta-trained network and what was measured on it.

The float model itself is not stored: whoever loads a session passes it again, and a checksum tells
whether it is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hq_plugin.config import Config
from hq_plugin.data import Data
from hq_plugin.distillation import loss_name
from hq_plugin.errors import ArtifactError, ConfigError, ModelError
from hq_plugin.findings import model_name
from hq_plugin.meta_training import build_network
from hq_plugin.nn.split import saved_orders
from hq_plugin.outline import Outline, read_outline, read_second_order, read_table, write_outline, write_table
from hq_plugin.preparation import at_work, device_of, distance_of, open_checkpoint, search_space, teacher_of
from hq_plugin.rewriting import float_state
from hq_plugin.search import Scored
from hq_plugin.session import Session
from hq_plugin.state import load_state, memory_of, state_tensors
from hq_plugin.storage import fingerprint, read_json, read_tensors, write_directory
from hq_plugin.untrusted import at_most, clean_errors

FORMAT, VERSION = "hq_plugin session", 1
#: Building the network registers its tensors some times over, but not more than this.
_SLACK = 16


def save_session(session: Session, directory: str | Path, *, overwrite: bool = False) -> Path:
    """Saves a session into a directory, whole or not at all.

    Raises:
        ArtifactPathError: The directory holds something else, or cannot be written.
    """
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    tied, tensors = {}, {}
    for name, tensor in state_tensors(session.network).items():
        owner = first.setdefault(memory_of(tensor), name) if tensor.numel() else name
        if owner != name:
            tied[name] = owner
            continue
        storage = tensor.untyped_storage().data_ptr()
        # A copy of another view of one memory, since safetensors refuses such.
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    content = {
        "model": session.known_by,
        "sites": [site.name for site in session.space.table],
        "config": session.config.to_json(),
        "history": session.history,
        "seconds": session.seconds,
        "memory": session.memory,
        "sensitivities": write_table(session.sensitivities),
        "second_order": None if session.second_order is None else write_table(session.second_order),
        "tied": tied,
        "outline": write_outline(session, model_name(session.teacher), loss_name(session.loss)),
    }
    return write_directory(directory, FORMAT, VERSION, content, tensors, overwrite=overwrite)


#: Options that the MetaQuantNet's shape follows from.
_SHAPING = (
    "weight_bits",
    "activation_bits",
    "activation_scheme",
    "embedding_bits",
    "embedding_parts",
    "embedding_columns",
    "group_size",
    "zero_points",
    "exclude",
    "block",
    "hidden",
    "rank",
    "dense_limit",
    "target",
    "pinned",
    "groups",
)
#: Options that what was measured and held out follows from.
_MEASURED = ("seed", "holdout", "loss", "sensitivities")


def read_session(
    directory: str | Path,
    model: nn.Module,
    prepare: Callable[[Config, dict[str, Any]], tuple[Config, Data]],
    options: Mapping[str, Any],
) -> Session:
    """Loads a session for the float model that it was made from.

    Args:
        directory: What `save_session` wrote.
        model: The float model.
        prepare: Completes the session's configuration by what changes in it, and makes the data from it.
        options: Fields of the configuration that change, and functions that it had.

    Raises:
        ArtifactError: The directory holds no session, or a damaged or newer one.
        ModelError: The session is for another model.
        ConfigError: An option shapes the MetaQuantNet, and cannot change; or a function is missing.
    """
    content = read_json(directory, FORMAT, VERSION)
    functions = _functions(content.get("config"), options)
    tensors = read_tensors(directory, content.get("sha256"))
    with clean_errors(f"{directory}, or does not fit the options that changed: it"):
        before = Config.from_json(content["config"])
        _refuse_changes(before, {name: value for name, value in options.items() if name not in functions})
        # Another effort holds out as many samples as before: the others were trained on.
        config, data = prepare(before, {**options, "holdout": before.steps.holdout})
        teacher = teacher_of(model, data, config, by_use=saved_orders(tensors))
        if content.get("model") != fingerprint(float_state(teacher)):
            raise ModelError(
                f"{directory} was made from another float model, or from other weights. Load the same checkpoint."
            )
        tensors |= {name: tensors[owner] for name, owner in content["tied"].items()}
        device, teacher = device_of(teacher), at_work(teacher)
        space = search_space(teacher, data, config)
        size = sum(tensor.numel() for tensor in [*tensors.values(), *state_tensors(teacher).values()])
        with at_most(_SLACK * size, _SLACK * len(tensors)):
            network = build_network(teacher, space, data, config)
        load_state(network, tensors)
        session = Session(teacher, network.eval(), space, data, config, distance_of(teacher, data, config), device)
        session.history, session.seconds = list(content["history"]), dict(content["seconds"])
        session.memory, session.known_by = dict(content.get("memory", {})), content["model"]
        session.sensitivities = read_table(content["sensitivities"])
        if session.sensitivities.shape != session.costs.weight_bytes.shape:
            raise ArtifactError(f"{directory} is damaged, or an option changed its search space.")
        session.second_order = read_second_order(content.get("second_order"), session.sensitivities)
        if "outline" in content:  # sessions that an earlier version saved have none
            outline = read_outline(content["outline"], content["sensitivities"], content.get("second_order"))
            session.source = outline.source
            if outline.space.groups == space.groups:  # an option may have changed the choices
                session.scored = [Scored(genome, score) for genome, score in outline.scored]
    if options.get("checkpoint_dir") is not None:  # not the one that the session was meta-trained with
        session.checkpoint = open_checkpoint(teacher, data, config, None, session=str(content.get("sha256")))
    return session


def _refuse_changes(before: Config, options: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that differs from what the session's own work hangs on."""
    after = before.with_options(options)
    changed = [name for name in options if getattr(after, name) != getattr(before, name)]
    if fixed := [name for name in changed if name in _SHAPING]:
        raise ConfigError(
            f"{', '.join(fixed)} cannot change in a session: its MetaQuantNet was trained for what it was. Leave "
            "that out, and give hq_plugin.meta_train other widths, layers or blocks."
        )
    if fixed := [name for name in changed if name in _MEASURED]:
        raise ConfigError(
            f"{', '.join(fixed)} cannot change in a session: it measured sensitivities on what it holds out, and "
            "was trained on the rest. Leave that out, and give it to hq_plugin.meta_train."
        )


def _functions(stored: Any, options: Mapping[str, Any]) -> list[str]:
    """Returns which options were functions, which no file holds, and checks that the same are given again."""
    found = []
    for name in ("loss", "prepare_batch"):
        written = stored.get(name) if isinstance(stored, Mapping) else None
        # Functions are written as module:name. An integration brings its own along.
        if not isinstance(written, str) or ":" not in written or written.startswith("hq_plugin."):
            continue
        given = getattr(options.get(name), "__qualname__", type(options.get(name)).__name__)
        if options.get(name) is None or written.partition(":")[2] != given:
            raise ConfigError(
                f"The session was trained with {name}={written}, a function, which no file holds"
                f"{'' if options.get(name) is None else f', and not with {given}'}. Give the same again: "
                f"load_session(directory, model, data, {name}=...)."
            )
        found.append(name)
    return found


def read_session_outline(directory: str | Path) -> Outline:
    """Reads what a saved session knows without its model.

    Raises:
        ArtifactError: The directory holds no session, a damaged or newer one, or one of an earlier version.
    """
    content = read_json(directory, FORMAT, VERSION)
    if "outline" not in content:
        raise ArtifactError(
            f"{directory} was saved by an earlier version, which kept less. Load it with its model and save it "
            "again: hq_plugin.load_session(directory, model, data).save(directory, overwrite=True)."
        )
    return read_outline(content["outline"], content.get("sensitivities"), content.get("second_order"))
