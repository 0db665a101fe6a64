"""What is handed to a rival: float weights, images or text, and `task.json`. Nothing is pickled."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.benchmarks.rivals.environment import CACHE

VISION, LANGUAGE = ("resnet20", "mobilenetv3"), ("smollm2",)


@cache
def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns Fashion-MNIST."""
    from hq_plugin.integrations.timm.demo_data import fashion_mnist

    return fashion_mnist()


def files(model: str) -> dict[str, str]:
    """Writes what all tasks of a model share, once, and returns the paths by name."""
    folder = CACHE / "data"
    folder.mkdir(parents=True, exist_ok=True)
    return _language(folder) if model in LANGUAGE else _vision(model, folder)


def _vision(model: str, folder: Path) -> dict[str, str]:
    from tests.benchmarks.float_models import float_model

    paths = {name: folder / f"{name}.safetensors" for name in ("train", "test")}
    if not all(path.exists() for path in paths.values()):
        train_x, train_y, test_x, _ = images()
        save_file({"images": train_x, "labels": train_y}, paths["train"])
        save_file({"images": test_x}, paths["test"])
    paths["weights"] = folder / f"{model}.safetensors"
    state = float_model(model).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, paths["weights"])
    return {name: str(path.absolute()) for name, path in paths.items()}


def _language(folder: Path) -> dict[str, str]:
    from tests.benchmarks import language

    paths = {"model": folder / "smollm2", "text": folder / "text.safetensors", "calibration": folder / "text.json"}
    if not paths["calibration"].exists():
        model, tokenizer = language.smollm2()
        model.save_pretrained(paths["model"], safe_serialization=True)
        tokenizer.save_pretrained(paths["model"])
        save_file({"windows": language.windows(tokenizer)}, paths["text"])
        paths["calibration"].write_text(json.dumps([{"text": text} for text in language.read([language.MANUAL])]))
    return {name: str(path.absolute()) for name, path in paths.items()}


def write(rival: str, model: str, variant: str, bits: float, seed: int) -> Path:
    """Writes a task folder, empty but for `task.json`, and returns it."""
    folder = CACHE / "tasks" / f"{rival}-{model}-{variant}-{bits:g}-{seed}".replace(" ", "_").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given = {"model": model, "variant": variant, "bits": bits, "seed": seed, "files": files(model)}
    (folder / "task.json").write_text(json.dumps(given))
    return folder


def result(folder: Path) -> dict[str, Any]:
    """Returns what the rival said."""
    said: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return said


def logits(folder: Path) -> Tensor:
    """Returns the rival's logits of the test images."""
    return load_file(folder / "logits.safetensors")["logits"]


@cache
def float_logits(model: str) -> Tensor:
    """Returns the float network's logits of the test images."""
    from tests.benchmarks.float_models import float_model

    network = float_model(model)
    with torch.no_grad():
        return torch.cat([network(part) for part in images()[2].split(500)])
