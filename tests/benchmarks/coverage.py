"""Every architecture once: quantize to 3 bits, meet the budget, run, save, load, export.

python -m tests.benchmarks.coverage [-j 2] [--only timm/] [--again] [--no-onnx]

Resumable: a case that has a row in docs/benchmarks/coverage.jsonl is not run again (`--again` runs those that
failed). Every case is a process of its own with a time limit, forked from one that has imported everything. The
export takes most of the time, so it comes in a second pass, after all cases were quantized. The table is
docs/benchmarks/coverage.md. Weights are random and the data noise: what is counted is whether it works, not how
well.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import signal
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

ROWS, TABLE = Path("docs/benchmarks/coverage.jsonl"), Path("docs/benchmarks/coverage.md")
BUDGET = "3bit"
OPTIONS = {
    "effort": "smoke",
    "meta_steps": 2,
    "search_evaluations": 4,
    "finetune_steps": 2,
    "sensitivities": "fisher",
    "weight_bits": (2, 4, 8),
    "progress": False,
}
#: Largest relative difference of the output in ONNX Runtime, which computes in other orders and in 8-bit integers.
TOLERANCE = 0.05
#: Deep random networks amplify any difference. Where this much noise at the input changes the packed model's own
#: output by more than the tolerance, ONNX Runtime may differ by twice as much.
NOISE = 1e-4
Row = dict[str, Any]


def sweep_one(case: str, told: Connection, known: str | None, onnx: bool) -> None:
    """Runs one case in its own process, with the export if `onnx`; every stage that is reached is told at once."""
    import torch
    import transformers

    import hq_plugin as hq
    from tests.benchmarks import architectures

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    kind, name = case.split("/", 1)
    row: Row = {"case": case, "stage": "build"}

    def tell(**values: Any) -> None:
        row.update(values)
        told.send(dict(row))

    tell()
    try:
        if kind == "timm":
            variant = known or architectures.smallest(name)
            tell(name=variant)
            model, inputs = architectures.timm_model(variant)
        else:
            model, inputs = architectures.transformers_model(kind, name)
            tell(name=type(model).__name__)
    except Exception as error:
        tell(reason=_short(error))
        return
    try:
        matrices = {id(p): p.numel() for p in model.parameters() if p.dim() > 1}
        tell(
            stage="quantize",
            parameters=sum(p.numel() for p in model.parameters()),
            matrices=sum(matrices.values()),
        )
        began = time.perf_counter()
        data = [inputs(seed) for seed in range(3)]
        small = hq.quantize(model, BUDGET, data, **OPTIONS)  # type: ignore[arg-type]
        result: hq.Result = small.hq  # type: ignore[assignment]
        from hq_plugin.nn import packed_modules

        weights = {id(m.weight_packed): m for m in packed_modules(small).values()}
        tell(
            stage="budget",
            seconds=round(time.perf_counter() - began, 1),
            effective_bits=round(result.effective_bits, 4),
            quantized=sum(math.prod(m.weight_shape) for m in weights.values()),
            unreached=_unreached(model, data[0], {layer["name"] for layer in result.float_layers}),
            left_float=[
                f"{layer['name']} ({layer['type_name']}, {layer['parameters']}): {layer['reason']}"
                for layer in sorted(result.float_layers, key=lambda layer: -layer["parameters"])[:3]
                if layer["parameters"] > 0.01 * sum(matrices.values())
            ],
        )
        if not all(used <= 1 for used in result.used.values()):
            raise AssertionError(f"the budget is exceeded: {result.used}")
        tell(stage="run")
        expected = _output(small, data[0])
        if not bool(torch.isfinite(expected).all()):
            raise AssertionError("the output is not finite")
        tell(stage="load")
        with tempfile.TemporaryDirectory() as place:
            hq.save(small, Path(place) / "model")
            loaded = [hq.load(Path(place) / "model", model)]
            if kind != "timm":
                small.save_pretrained(Path(place) / "folder")  # type: ignore[operator]
                loaded.append(type(small).from_pretrained(Path(place) / "folder"))  # type: ignore[attr-defined]
            elif json.loads((Path(place) / "model" / "hq.json").read_text())["architecture"]:
                loaded.append(hq.load(Path(place) / "model"))
            else:
                tell(by_name=False)
            if not all(torch.equal(_output(again, data[0]), expected) for again in loaded):
                raise AssertionError("the outputs of the loaded model differ")
            tell(stage="done", ok=True)
            if not onnx:
                return
            tell(onnx="export")
            # In float32, where the default also rounds what enters products with float inputs.
            options: dict[str, Any] = {"accuracy_level": 1} | ({"cache": False} if kind == "causal" else {})
            path = Path(place) / "model.onnx"
            hq.export(small, path, data[0], **options)
            tell(onnx="run")
            moved = _output(small, _noisy(data[0]))
            allowed = max(TOLERANCE, 2 * _difference(moved.numpy(), expected.numpy()))
            found = _onnx_error(path, data[0], expected)
            tell(onnx_error=round(found, 5), onnx_allowed=round(allowed, 5))
            if not found <= allowed:
                raise AssertionError(f"its output differs by {found:.3f}")
            tell(onnx=True)
    except Exception as error:
        if row.get("ok"):
            tell(onnx=False, onnx_reason=f"{row.get('onnx')}: {_short(error)}")
        else:
            tell(ok=False, reason=_short(error))


def _unreached(model: Any, batch: Any, left_float: set[str]) -> int:
    """Returns how many parameters are in matrices that these inputs never come to.

    Those of modules that stay float and are not called, nor are the modules that they are in: the vision tower of a
    model that is given text, cross-attention without an encoder.
    """
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))  # type: ignore[misc]
        for name, module in model.named_modules()
    ]
    _output(model, batch)
    for handle in handles:
        handle.remove()
    reached: dict[int, bool] = {}
    sizes: dict[int, int] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        runs = name in called or (parent in called and name not in left_float)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                reached[id(parameter)] = reached.get(id(parameter), False) or runs
                sizes[id(parameter)] = parameter.numel()
    return sum(size for key, size in sizes.items() if not reached[key])


def _output(model: Any, batch: Any) -> Any:
    import torch

    with torch.no_grad():
        output = model(**batch) if isinstance(batch, dict) else model(batch)
    while not isinstance(output, torch.Tensor):
        logits = getattr(output, "logits", None)
        output = (
            logits if logits is not None else next(iter(output.values() if hasattr(output, "values") else output))
        )
    return output


def _onnx_error(path: Path, batch: Any, expected: Any) -> float:
    import onnxruntime

    from hq_plugin.integrations.onnxruntime.sessions import EXACT_SUMS

    options = onnxruntime.SessionOptions()
    # The runtime turns what dequantizes a weight for a product into MatMulNBits, by default in 8-bit integers.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry(*EXACT_SUMS)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    entries = session.get_inputs()
    values = batch if isinstance(batch, dict) else {entries[0].name: batch}
    feed = {entry.name: values[entry.name].numpy() for entry in entries}
    wanted = expected.numpy()
    return _difference(next(out for out in session.run(None, feed) if out.shape == wanted.shape), wanted)


def _difference(found: Any, wanted: Any) -> float:
    return float(abs(found - wanted).mean() / max(float(abs(wanted).mean()), 1e-12))


def _noisy(batch: Any) -> Any:
    """Returns inputs with a little noise where they are floating point."""
    import torch

    def of(value: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(value.shape, generator=generator)
        return value + NOISE * noise if value.is_floating_point() else value

    return {name: of(value) for name, value in batch.items()} if isinstance(batch, dict) else of(batch)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def rows() -> dict[str, Row]:
    """Returns the last row of every case."""
    if not ROWS.exists():
        return {}
    found = [json.loads(line) for line in ROWS.read_text().splitlines()]
    return {row["case"]: row for row in found}


def run(case: str, limit: float, known: str | None, onnx: bool = True) -> Row:
    """Runs a case in a process, and ends it after `limit` seconds; the last thing it told is its row."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=sweep_one, args=(case, sender, known, onnx))
    process.start()
    sender.close()
    row: Row = {"case": case, "stage": "start"}
    deadline = time.monotonic() + limit
    try:
        while receiver.poll(max(deadline - time.monotonic(), 0)):
            row = receiver.recv()
    except EOFError:
        process.join()
    late = process.is_alive()
    process.kill()
    process.join()
    if late or process.exitcode:
        why = f"after {limit:.0f} s" if late else f"died: {_death(process.exitcode or 0)}"
        if not row.get("ok"):
            row["reason"] = why
        elif onnx:
            row |= {"onnx": False, "onnx_reason": f"{row.get('onnx')}: {why}"}
    row.setdefault("ok", False)
    return row


def _death(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def spread(names: list[str]) -> list[str]:
    """Returns the cases in an order in which every kind advances alike, so that half a sweep tells of each."""
    kinds = [name.split("/")[0] for name in names]
    place = [kinds[:i].count(kind) / kinds.count(kind) for i, kind in enumerate(kinds)]
    return [names[i] for i in sorted(range(len(names)), key=place.__getitem__)]


def table(found: dict[str, Row], names: list[str]) -> str:
    """Returns the page."""
    import timm
    import torch
    import transformers

    kinds = list(dict.fromkeys(name.split("/")[0] for name in names))
    text = [
        "# Which architectures work",
        "",
        f"timm {timm.__version__}: of each module the smallest variant. transformers {transformers.__version__}:",
        "every type of the mappings of causal models, sequence, image and audio classification, CTC and",
        "speech-to-text, as small as its configuration allows. Weights are random, data is noise, two samples a",
        f"batch. Quantized to {BUDGET} with widths 2, 4, 8 and few steps. *Works*: keeps the budget, runs, gives",
        "bit-equal outputs once saved and loaded (`hq_plugin.load`, and `from_pretrained` or timm's name). *ONNX*:",
        f"exported, and within {TOLERANCE:.0%} of the packed model in ONNX Runtime (or within twice what noise of",
        f"{NOISE:g} at the input does to it: deep random networks amplify). *Quantized*: parameters of packed",
        "layers among matrices that the inputs come to, in the models that work. *Of all*: among all matrices,",
        "also the vision tower of a model that is given text, and cross-attention without an encoder.",
        "",
        "Reproduce: `make coverage-sweep` (hours on 2 cores; resumable).",
        f"Python {platform.python_version()}, torch {torch.__version__}, CPU.",
        "",
        "| kind | types swept | built small | work | of those built | ONNX, of those tried | quantized | of all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        mine = [found[name] for name in names if name.startswith(f"{kind}/") and name in found]
        total = f"{len(mine)} of {sum(name.startswith(f'{kind}/') for name in names)}"
        built = [row for row in mine if "parameters" in row]
        works = [row for row in built if row["ok"]]
        tried = sum("onnx" in row for row in works)
        onnx = f"{sum(row.get('onnx') is True for row in works)} of {tried}"
        share = sum(row["quantized"] for row in works) / max(sum(map(_reached, works)), 1)
        of_all = sum(row["quantized"] for row in works) / max(sum(row["matrices"] for row in works), 1)
        text.append(
            f"| {kind} | {total} | {len(built)} | {len(works)} | {len(works) / max(len(built), 1):.1%} | {onnx} | "
            f"{share:.2%} | {of_all:.2%} |"
        )
    text += ["", "## What does not work", "", "| case | model | stage | reason |", "|---|---|---|---|"]
    for name in names:
        row = found.get(name)
        if row is not None and not row["ok"]:
            reason = str(row.get("reason", "")).replace("|", "\\|")
            text.append(f"| {name} | {row.get('name', '')} | {row['stage']} | {reason} |")
    text += ["", "## What is not exported", "", "| case | model | reason |", "|---|---|---|"]
    for name in names:
        row = found.get(name, {})
        if row.get("ok") and row.get("onnx") is False:
            text.append(
                f"| {name} | {row['name']} | {str(row.get('onnx_reason', '')).replace('|', chr(92) + '|')} |"
            )
    text += ["", "## What stays float, above 1 % of a model's matrices", ""]
    text += ["| case | quantized | of all | layers |", "|---|---|---|---|"]
    for name in names:
        row = found.get(name, {})
        if row.get("ok") and row["quantized"] < 0.97 * row["matrices"]:
            layers = "; ".join(row["left_float"]).replace("|", "\\|")
            reached, of_all = row["quantized"] / max(_reached(row), 1), row["quantized"] / row["matrices"]
            text.append(f"| {name} | {reached:.1%} | {of_all:.1%} | {layers} |")
    missing = [name for name in names if name not in found]
    if missing:
        text += ["", "## Not swept yet", "", ", ".join(missing)]
    return "\n".join([*text, ""])


def _reached(row: Row) -> int:
    """Returns the parameters in matrices that the inputs come to."""
    matrices: int = row["matrices"] - row.get("unreached", 0)
    return matrices


def main() -> None:
    """Runs what has no row yet, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", "--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name starts so")
    parser.add_argument("--again", action="store_true", help="run those again that did not work")
    parser.add_argument("--no-onnx", action="store_true", help="leave the export for a later call")
    parser.add_argument("--onnx", action="store_true", help="with --again: also those that were not exported")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for a case")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    from tests.benchmarks import architectures

    names, known, lock = architectures.cases(), rows(), Lock()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.benchmarks.warm"])

    def wanted(name: str, onnx: bool) -> bool:
        row = known.get(name)
        if row is None or not row["ok"]:
            return not onnx and (row is None or arguments.again)
        return onnx and ("onnx" not in row or (arguments.again and arguments.onnx and row["onnx"] is not True))

    def work(name: str, onnx: bool) -> None:
        row = run(name, arguments.limit, known.get(name, {}).get("name"), onnx)
        with lock:
            ROWS.parent.mkdir(parents=True, exist_ok=True)
            with open(ROWS, "a") as log:
                log.write(json.dumps(row) + "\n")
            known[name] = row
            state = "works" if row["ok"] else f"{row['stage']}: {row.get('reason')}"
            print(f"{name}: {state}; onnx {row.get('onnx')} {row.get('onnx_reason', '')}", flush=True)

    passes = () if arguments.table else (False,) if arguments.no_onnx else (False, True)
    for onnx in passes:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            mine = [name for name in spread(names) if name.startswith(tuple(arguments.only)) and wanted(name, onnx)]
            list(pool.map(work, mine, [onnx] * len(mine)))
    TABLE.write_text(table(rows(), names))


if __name__ == "__main__":
    main()
