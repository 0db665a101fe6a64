"""What is fuzzed: each kind of file that hq_plugin reads, written once, and how it is read."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import hq_plugin as hq
from hq_plugin import HybridPolicy, LayerBits, Profile, torch_ao
from hq_plugin.checkpoint import Checkpoint
from hq_plugin.integrations.huggingface.integrity import add_checksum
from hq_plugin.nn import packed_modules
from hq_plugin.sites import find_sites
from hq_plugin.storage import JSON_FILE, TENSOR_FILE, sealed
from tests.conftest import TinyNet
from tests.fuzz.mutations import Files
from tests.integrations.huggingface.conftest import build

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [X for _ in range(4)]


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        files: The good contents.
        read: Reads a directory; what it returns equals what the good files give, or the files are others.
        reseal: Makes the checksums of a directory right.
        clean: What reading may raise.
    """

    files: Files
    read: Callable[[Path], Any]
    reseal: Callable[[Path], None]
    clean: type[Exception] = hq.HQError


def _contents(directory: Path) -> Files:
    # JSON first: changes of JSON are more telling than those of tensors.
    paths = sorted((p for p in directory.rglob("*") if p.is_file()), key=lambda p: (p.suffix != ".json", str(p)))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def _reseal(directory: Path) -> None:
    """Makes every checksum below a directory right, where there is JSON to put it into."""
    for file in (path for path in directory.rglob("*.json") if path.is_file()):
        try:
            data = json.loads(file.read_bytes())
            tensors = file.parent / TENSOR_FILE
            if file.name == JSON_FILE and tensors.is_file():
                data["sha256"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
            file.write_text(json.dumps(sealed(data)))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue


def _converted(model: nn.Module, x: torch.Tensor, bits: LayerBits) -> nn.Module:
    policy = HybridPolicy({site.name: bits for site in find_sites(model, lambda m: m(x), len(x))})
    prepared = torch_ao.prepare(model, policy).train()
    prepared(x)
    return torch_ao.convert(prepared.eval())


def _outcome(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[str, bytes]:
    """Returns what a model is and says; a model that a stranger made may also be unable to run."""
    policy = {name: str(module.bits) for name, module in packed_modules(model).items()}
    if isinstance(getattr(model, "hq", None), hq.Result):
        policy["report"] = str(model.hq.to_json())  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            output = model(*args, **kwargs)
        value = output if isinstance(output, torch.Tensor) else output[0]
        return str(policy), value.contiguous().view(torch.uint8).numpy().tobytes()
    except (RuntimeError, ValueError, IndexError) as error:
        return str(policy), repr(error).encode()


def artifact(directory: Path) -> Target:
    torch.manual_seed(0)
    packed = hq.quantize(
        TinyNet().eval(), "4bit", BATCHES, effort="smoke", meta_steps=1, finetune_steps=1, progress=False
    )
    hq.save(packed, directory)
    return Target(_contents(directory), lambda d: _outcome(hq.load(d, TinyNet()), X), _reseal)


def rebuilt(directory: Path) -> Target:
    """An artifact whose architecture timm builds from the file's description."""
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = timm.create_model("test_resnet", num_classes=4).eval()
    hq.save(_converted(model, x, LayerBits(4)), directory)
    return Target(_contents(directory), lambda d: _outcome(hq.load(d), x), _reseal)


def session(directory: Path) -> Target:
    torch.manual_seed(0)
    model = TinyNet().eval()
    hq.meta_train(model, BATCHES, effort="smoke", meta_steps=1, progress=False).save(directory)

    def read(place: Path) -> Any:
        loaded = hq.load_session(place, model, BATCHES, progress=False)
        state = {name: tensor.tolist() for name, tensor in loaded.network.state_dict().items()}
        return str(state), loaded.config.to_json(), loaded.sensitivities.tolist(), loaded.history

    return Target(_contents(directory), read, _reseal)


def checkpoint(directory: Path) -> Target:
    def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        return network, torch.optim.Adam(network.parameters())

    key = {"float model": "x", "seed": 0}
    network, optimizer = parts()
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    kept = Checkpoint(directory, key)
    kept.keep("stage", 1, network, optimizer, [{"step": 0, "loss": 1.0}])
    kept.add_scores({f"policy {number}": number / 3 for number in range(5)})

    def read(place: Path) -> Any:
        found, (network, optimizer) = Checkpoint(place, key), parts()
        step, history = found.restore("stage", network, optimizer)
        # A score that is damaged is as one that was never kept.
        wrong = {of: score for of, score in found._scores.items() if score != kept.score(of)}
        state = {name: tensor.tolist() for name, tensor in network.state_dict().items()}
        moments = {name: str(sorted(value.items())) for name, value in optimizer.state_dict()["state"].items()}
        return step, history, state, sorted(moments.items()), wrong

    return Target(_contents(directory), read, _reseal)


def profile(directory: Path) -> Target:
    layers = {"conv": {"4,8": {"int8": 0.5, "dequantized": 0.7}}}
    made = Profile(
        "torch", 1, "a machine", "2026-01-01T00:00:00", {"torch": "2"}, 1.0, {"8": 1.0, "16": 0.9}, 0.1, layers
    )
    made.save(directory / "profile.json")
    return Target(_contents(directory), lambda d: Profile.load(d / "profile.json"), _reseal)


def policy(directory: Path) -> Target:
    """Policies are written by people, and have no checksum: another policy is no damage."""
    directory.mkdir()
    text = json.dumps(HybridPolicy({"stem": LayerBits(4, 8), "head": LayerBits(3, 16, 64)}).to_json())
    (directory / "policy.json").write_text(text)

    def read(place: Path) -> Any:
        if not (place / "policy.json").is_file():
            return None
        text = (place / "policy.json").read_bytes().decode(errors="replace")
        assert all(bits.weight <= 8 for bits in HybridPolicy.from_json(text).values())
        return None

    return Target(_contents(directory), read, lambda d: None)


def folder(directory: Path) -> Target:
    """What `save_pretrained` wrote; transformers reads it, and raises what it likes.

    By the door of the command line, which looks at the files first: transformers alone reads a configuration that
    is a link to a device until no memory is left, for any model.
    """
    model = build("llama")
    batch = {"input_ids": torch.arange(8).view(1, 8)}
    policy = HybridPolicy({s.name: LayerBits(4) for s in find_sites(model, lambda m: m(**batch), 1)})
    packed = torch_ao.convert(torch_ao.prepare(model, policy))
    from hq_plugin.integrations.huggingface.folder import read_folder
    from hq_plugin.integrations.huggingface.quantizer import attach

    attach(packed)
    packed.save_pretrained(directory)  # type: ignore[operator]
    (directory / "README.md").unlink()
    files = {name: raw for name, raw in _contents(directory).items() if name != "generation_config.json"}

    def read(place: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _outcome(read_folder(place, local_files_only=True)[0], **batch)

    def reseal(place: Path) -> None:
        if all((place / name).is_file() for name in files):
            with suppress(Exception):
                add_checksum(place)

    return Target(files, read, reseal, Exception)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "artifact": artifact,
    "rebuilt": rebuilt,
    "session": session,
    "checkpoint": checkpoint,
    "profile": profile,
    "policy": policy,
    "folder": folder,
}
