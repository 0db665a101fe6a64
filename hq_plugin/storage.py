"""Directories of one JSON file and one safetensors file: written whole or not at all, read with checks.

Saved models (`artifact.py`), sessions (`session_store.py`) and states of training (`checkpoint.py`) are such
directories. The JSON holds a checksum of the tensors and one of itself. Nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save, save_file
from torch import Tensor

from hq_plugin.distribution import is_first, wait_for_all
from hq_plugin.errors import ArtifactError, ArtifactPathError
from hq_plugin.exclusive import exchange, locked
from hq_plugin.untrusted import clean_errors, read_file

JSON_FILE, TENSOR_FILE = "hq.json", "model.safetensors"
#: A JSON file above this size is not one of ours.
JSON_LIMIT = 64 << 20
#: Key under which JSON holds the checksum of the rest of it.
_SEAL = "checksum"


@functools.cache
def storable(dtype: torch.dtype) -> bool:
    """Whether a safetensors file can hold tensors of a dtype."""
    try:
        save({"": torch.zeros(1, dtype=dtype)})
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError):
        return False
    return True


def write_directory(
    directory: str | Path,
    kind: str,
    version: int,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a directory of a kind; it appears whole or not at all.

    Args:
        directory: Where; it may exist if it is empty, or of the same kind with `overwrite`.
        kind: Name of the format, which reading checks. Of several processes only the first writes.
        version: Version of the format.
        content: JSON values.
        tensors: Tensors by name, none of them sharing memory.
        overwrite: Whether a directory of this kind is replaced.

    Raises:
        ArtifactPathError: The directory holds something else, or cannot be written.
    """
    target = Path(directory).expanduser()
    if target.is_symlink():
        target = target.resolve()  # what it points to is replaced, and not the link
    _check_movable(target)
    if not is_first():
        wait_for_all()
        return target
    staging: Path | None = None
    try:
        check_target(target, kind, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            staging / TENSOR_FILE,
        )
        head = {"format": kind, "version": version, "sha256": _digest(staging / TENSOR_FILE)}
        (staging / JSON_FILE).write_text(json.dumps(sealed({**head, **content}), separators=(",", ":")))
        for name in (TENSOR_FILE, JSON_FILE):
            with open(staging / name, "rb") as file:
                os.fsync(file.fileno())
            (staging / name).chmod(0o644)  # safetensors 0.8 lets only the owner read
        staging.chmod(0o755)
        with locked(target.parent):
            check_target(target, kind, overwrite)  # again: another process may have been faster
            move_into_place(staging, target)
    except ArtifactPathError:
        raise
    except (OSError, SafetensorError) as error:
        raise ArtifactPathError(
            f"{target} could not be written: {error}. Nothing was left there. Choose a directory that is "
            "writable, on a disk with room."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        wait_for_all()
    return target


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all, in place of an old one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all, in place of an old one.

    Raises:
        OSError: It cannot be written; an old one is as it was.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp lets only the owner read
        os.replace(name, path)
    except BaseException:  # Ctrl-C as well
        Path(name).unlink(missing_ok=True)
        raise


def check_place(target: Path) -> None:
    """Finds out whether a directory could be written, without leaving anything.

    Raises:
        ArtifactPathError: It could not.
    """
    _check_movable(target.expanduser())
    place = target.expanduser().absolute().parent
    while not place.exists():
        place = place.parent
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ArtifactPathError(
            f"{target} cannot be written: {error.strerror}. Choose a writable place."
        ) from error


def check_file_place(target: Path) -> None:
    """Finds out whether a file could be written, without leaving anything.

    Raises:
        ArtifactPathError: It could not: it is a directory, or its place cannot be written.
    """
    if target.expanduser().is_dir():
        raise ArtifactPathError(
            f"{target} is a directory. Give a file, such as {target / ('name' + target.suffix)}."
        )
    check_place(target)


def _check_movable(target: Path) -> None:
    """Raises ArtifactPathError for a directory in whose place no other one can be put."""
    if not target.is_dir():
        return
    here = target.samefile(".")
    if here or os.path.ismount(target):
        what = "the current directory" if here else "a mount point"
        raise ArtifactPathError(
            f"{target} is {what}, which cannot be replaced as a whole. Choose a new directory in it: "
            f"{target / 'model'}."
        )


def check_target(target: Path, kind: str, overwrite: bool) -> None:
    """Finds out whether something may be saved into a directory: what is not ours is never deleted.

    Raises:
        ArtifactPathError: It is no directory, or holds something else, or what may not be replaced.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise ArtifactPathError(f"{target} is a file, not a directory. Choose another name.")
    try:
        names = {path.name for path in target.iterdir()}
    except OSError as error:
        raise ArtifactPathError(f"{target} cannot be read: {error}") from error
    if not names:
        return
    ours = names == {JSON_FILE, TENSOR_FILE}
    if ours:
        try:
            ours = read_json(target, kind, version=None)["format"] == kind
        except ArtifactError:
            ours = False
    if not ours:
        raise ArtifactPathError(
            f"{target} holds something else ({', '.join(sorted(names)[:4])}), which is not deleted. Choose "
            "an empty or a new directory."
        )
    if not overwrite:
        raise ArtifactPathError(f"{target} holds a saved {kind}. Pass overwrite=True or another directory.")


def move_into_place(staging: Path, target: Path) -> None:
    """Puts a directory in the place of another one on the same disk; at every moment one whole one exists."""
    if not target.exists():
        staging.rename(target)
        return
    if exchange(staging, target):
        return  # the old one is where the staging was, and goes with it
    # Else the old one moves aside first, so that at every moment one whole directory exists.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(aside / "old")
    try:
        staging.rename(target)
    except OSError:
        (aside / "old").rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_json(directory: str | Path, kind: str, version: int | None) -> dict[str, Any]:
    """Reads the JSON part, and checks format and version (None skips the version).

    Raises:
        ArtifactError: The file is missing, damaged, foreign or of a newer version.
    """
    path = Path(directory).expanduser() / JSON_FILE
    try:
        return read_sealed(path, kind, version)
    except FileNotFoundError:
        raise ArtifactError(
            f"{Path(directory)} holds no saved {kind} (no {JSON_FILE}). Give a directory that hq_plugin wrote."
        ) from None


def read_sealed(path: Path, kind: str, version: int | None) -> dict[str, Any]:
    """Reads a JSON file that `sealed` has made whole, and checks format, version and checksum.

    Raises:
        ArtifactError: The file cannot be read, is damaged, foreign or of a newer version.
        FileNotFoundError: There is none.
    """
    try:
        data = json.loads(read_file(path, JSON_LIMIT))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: it is not JSON ({error}). Save the {kind} again.") from error
    if not isinstance(data, dict) or data.get("format") != kind:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ArtifactError(f"{path} is not a saved {kind} (format {str(found)[:80]!r}).")
    found = data.get("version")
    if version is not None and not (type(found) is int and 1 <= found <= version):
        raise ArtifactError(
            f"{path} has format version {str(found)[:80]}; this hq_plugin reads up to {version}. Upgrade hq_plugin."
        )
    with clean_errors(path):
        expected = sealed(data)[_SEAL]
    if data.get(_SEAL) != expected:
        raise ArtifactError(
            f"{path} is damaged, or was edited: its checksum is not that of its content. Copy or save it again."
        )
    return data


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns JSON values with the checksum of their canonical text in place, by which damage is told."""
    # As it will be read again: JSON turns tuples into lists, and keys into strings.
    rest = {name: value for name, value in json.loads(json.dumps(content)).items() if name != _SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, _SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read_tensors(directory: str | Path, digest: Any) -> dict[str, Tensor]:
    """Reads the tensor part, once its checksum is right.

    Raises:
        ArtifactError: The file is missing, damaged or truncated.
    """
    tensors, check = start_reading(directory, digest)
    check()
    return tensors


def start_reading(directory: str | Path, digest: Any) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Reads the tensor part, and starts to compute its checksum beside whatever comes next.

    Returns:
        The tensors, which may be damaged, and what waits for the checksum and raises an `ArtifactError` if it is
        not the one given.

    Raises:
        ArtifactError: The file is missing, damaged or truncated.
    """
    path = Path(directory).expanduser() / TENSOR_FILE
    try:
        raw = read_file(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    found = beside(lambda: hashlib.sha256(raw).hexdigest())

    def check() -> None:
        if found() != digest:
            raise ArtifactError(
                f"{path} is damaged or truncated: its checksum is not the one in {JSON_FILE}. Copy or save it "
                "again."
            )

    try:
        with clean_errors(path):
            return load_tensors(raw), check
    except (SafetensorError, ArtifactError) as error:
        check()
        raise ArtifactError(f"{path} is not a safetensors file: {error}") from error


def beside(work: Callable[[], str]) -> Callable[[], str]:
    """Starts to compute a checksum on another thread, which digests of large tensors let run.

    Returns:
        What waits for the checksum and returns it.
    """
    executor = ThreadPoolExecutor(1)
    found = executor.submit(work)
    executor.shutdown(wait=False)
    return found.result


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Returns a checksum of names, dtypes, shapes and values, to recognise a float model by."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
