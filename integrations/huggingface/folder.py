"""Folders of transformers for the command line: float models, quantized ones, and pictures for either."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from hq_plugin.artifact import SavedModel, SavedSite
from hq_plugin.compact import REPORT_FILE, read_beside
from hq_plugin.cost import weight_bytes
from hq_plugin.distribution import is_first, wait_for_all
from hq_plugin.errors import ArtifactError, ArtifactPathError, DataError, HQWarning, ModelError
from hq_plugin.image_files import find_images
from hq_plugin.integrations.huggingface.inputs import PROCESSORS
from hq_plugin.nn import packed_modules
from hq_plugin.storage import JSON_LIMIT, move_into_place

#: What makes the main input of a model, to the class that loads it.
_READERS = {
    "tokenizer": AutoTokenizer,
    "image_processor": AutoImageProcessor,
    "feature_extractor": AutoFeatureExtractor,
}


#: Arguments of `from_pretrained` that say where files are and what may be done with them.
_WHERE = ("subfolder", "revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "force_download")
#: Files that an earlier save of a model left, and that the next one may lack.
_OF_A_MODEL = re.compile(r"(model|pytorch_model).*\.(safetensors|bin|index\.json)|" + re.escape(REPORT_FILE))


def read_folder(
    reference: str | Path, own_class: type[nn.Module] | None = None, **arguments: Any
) -> tuple[nn.Module, Any]:
    """Loads a model, float or quantized, as the class that its configuration names.

    Args:
        reference: A folder, or a name on the hub.
        own_class: The class, where transformers has none of that name.
        **arguments: For `from_pretrained`.

    Returns:
        The model in float32 and eval mode, that of a GGUF file dequantized, and its tokenizer or image processor,
        or None.

    Raises:
        ModelError: transformers cannot build it.
        ArtifactError: The folder holds what may never end, such as a device, or JSON of an unlikely size.
        OSError: There is none, or it has no safetensors file; nothing else is read.
    """
    _check_files(Path(reference))
    packed = _gguf(reference, arguments)
    where = packed | {name: arguments[name] for name in _WHERE if name in arguments}
    try:
        config = AutoConfig.from_pretrained(reference, **where)
        name = (getattr(config, "architectures", None) or [""])[0]
        made: Any = own_class or getattr(transformers, name, None)
        if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
            made = AutoModelForCausalLM if packed else AutoModel
            if name and not packed and not getattr(config, "auto_map", None):
                warnings.warn(
                    f"{reference} was made from a {name}, which transformers does not have: it is read as "
                    f"{made.__name__} reads it, without its head. Give its class as module:function.",
                    HQWarning,
                    stacklevel=2,
                )
        arguments = {"dtype": torch.float32, "use_safetensors": True, **packed, **arguments}
        model: nn.Module = made.from_pretrained(reference, **arguments).eval()
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, (ModelError, ArtifactError)):
            raise
        raise ModelError(f"transformers {transformers.__version__} cannot load {reference}: {error}") from error
    processor = None
    reader: Any = _READERS.get(PROCESSORS.get(getattr(model, "main_input_name", ""), ""))
    if reader is not None:
        try:
            processor = reader.from_pretrained(reference, **where)
        except Exception:  # there is none, and whoever needs it says so
            processor = None
    return model, processor


def _check_files(folder: Path) -> None:
    """Looks at what transformers is about to read whole, whatever it is."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            continue
        if not path.is_file():
            raise ArtifactError(f"{path} is not a regular file.")
        if path.suffix == ".json" and path.stat().st_size > JSON_LIMIT:
            raise ArtifactError(f"{path} has {path.stat().st_size:,} bytes; JSON has {JSON_LIMIT:,} at most.")


def _gguf(reference: str | Path, arguments: dict[str, Any]) -> dict[str, str]:
    """Returns the argument that names a GGUF file: that was given, or the only one of a folder without a config."""
    if "gguf_file" in arguments:
        return {"gguf_file": arguments["gguf_file"]}
    folder = Path(reference)
    if not folder.is_dir() or (folder / "config.json").exists():
        return {}
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(f"{reference} holds {len(files)} GGUF files. Name one: --model-arg gguf_file={files[0]}.")
    return {"gguf_file": files[0]} if files else {}


def write_folder(model: Any, processor: Any, directory: str | Path) -> Path:
    """Saves a quantized model as `save_pretrained` does, with its processor and report, whole or not at all.

    The model that is there is replaced: the caller knows that it may be. What else there is (an adapter, notes)
    stays beside the new one.

    Raises:
        ArtifactPathError: The directory cannot be written.
    """
    target = Path(directory).expanduser().resolve()
    if not is_first():
        wait_for_all()
        return target
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        if (target / "README.md").is_file():  # a card that was edited stays, which saving decides
            (staging / "new").mkdir()
            shutil.copy2(target / "README.md", staging / "new" / "README.md")
        model.save_pretrained(staging / "new")
        if processor is not None:
            processor.save_pretrained(staging / "new")
        for kept in target.iterdir() if target.is_dir() else ():
            if not (staging / "new" / kept.name).exists() and not _OF_A_MODEL.fullmatch(kept.name):
                copy = shutil.copytree if kept.is_dir() else shutil.copy2
                copy(kept, staging / "new" / kept.name)
        move_into_place(staging / "new", target)
    except OSError as error:
        raise ArtifactPathError(f"{target} could not be written: {error}. Choose another directory.") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        wait_for_all()
    return target


def read_info(directory: str | Path) -> SavedModel:
    """Reads what a quantized model's folder holds, as `hq_plugin.artifact.read_info` does of its own.

    Raises:
        ArtifactError: The folder is damaged.
    """
    root = Path(directory)
    model, _ = read_folder(root)
    sites = tuple(
        SavedSite(name, module._float_type.__name__, shape, module.bits, weight_bytes(shape, module.bits))
        for name, module in packed_modules(model).items()
        for shape in (tuple(module.weight_shape),)
    )
    architecture = {"integration": "huggingface", "class": type(model).__name__}
    size = sum(path.stat().st_size for path in root.glob("*.safetensors"))
    return SavedModel(sites, architecture, read_beside(root), size)


class ImageFolder(Dataset[Any]):
    """Pictures of a folder as the image processor makes them: `{"pixel_values"}`, and `"labels"` where known.

    Args:
        folder: The folder; folders in it are classes, see `hq_plugin.image_files`.
        model: A model of pictures.
        processor: Its image processor.

    Raises:
        DataError: The model takes no pictures, there is no processor, or the folder holds no picture.
    """

    def __init__(self, folder: str | Path, model: nn.Module, processor: Any) -> None:
        if getattr(model, "main_input_name", "") != "pixel_values":
            raise DataError(f"{folder} is a folder of images, and {type(model).__name__} takes none.")
        if processor is None:
            raise DataError(f"{folder} is a folder of images, and the model's folder has no image processor.")
        self._processor = processor
        self.files = find_images(folder, {name for name in Image.registered_extensions() if name != ".pdf"})

    def __len__(self) -> int:
        return len(self.files.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.files.paths[index]
        try:
            with Image.open(path) as image:
                pixels = self._processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}. Remove it.") from error
        labels = self.files.labels
        return {"pixel_values": pixels} | ({} if labels is None else {"labels": labels[index]})
