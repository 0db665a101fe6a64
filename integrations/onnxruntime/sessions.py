"""How exported files are opened here, and by those who want the same sums on every processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: ONNX Runtime's setting against clipped sums of 8-bit products, on processors of x86 without VNNI. It concerns
#: weights outside of -64 to 63 alone, and changes nothing on other processors.
EXACT_SUMS = ("session.x64quantprecision", "1")


def open_session(file: Path | bytes, threads: int = 0) -> Any:
    """Opens a file on the CPU, with sums that are exact.

    Args:
        file: The file, or its content.
        threads: Of one operator; 0 takes what ONNX Runtime takes.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        ImportError: ONNX Runtime is not installed; files can be written without it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(*EXACT_SUMS)
    content = file if isinstance(file, bytes) else str(file)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
