"""What a rival's script needs of a task: runs in the rival's environment, with torch and safetensors there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: The training that hq_plugin's one call has, for rivals that train: steps, images a step, Adam's peak rate.
STEPS, BATCH, RATE = 300, 128, 5e-4


class Task:
    """A task folder: `task.json`, and the files that it names.

    Attributes:
        model, variant, bits, seed: What is asked; `bits` counts scales and zero points.
        seconds: Seconds of each stage, by `with task.stage("search")`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given: dict[str, Any] = json.loads((folder / "task.json").read_text())
        self.model, self.variant = str(self.given["model"]), str(self.given["variant"])
        self.bits, self.seed = float(self.given["bits"]), int(self.given["seed"])
        self.seconds: dict[str, float] = {}
        torch.manual_seed(self.seed)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Returns the tensors of a file that the task names."""
        return load_file(self.given["files"][name])

    def network(self) -> nn.Module:
        """Returns the float network, in eval mode."""
        if self.model != "resnet20":
            stub_torchvision()
        from tests.benchmarks.networks import new

        network = new(self.model)
        network.load_state_dict(self.tensors("weights"))
        return network.eval()

    def batches(self, count: int, size: int) -> list[Tensor]:
        """Returns batches of training images, drawn with the task's seed."""
        images = self.tensors("train")["images"]
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        if count * size > len(rows):
            rows = rows.repeat(-(-count * size // len(rows)))
        return list(images[rows[: count * size]].split(size))

    def answer(
        self,
        layers: dict[str, dict[str, Any]],
        *,
        float_elements: int,
        packages: tuple[str, ...],
        activation_bits: int = 16,
        activation_tensors: int = 0,
        logits: Tensor | None = None,
        measured: dict[str, float] | None = None,
    ) -> None:
        """Writes test logits (or what was measured of them), and `result.json`."""
        if logits is not None:
            save_file({"logits": logits.float().contiguous()}, self.folder / "logits.safetensors")
        result = {
            "layers": layers,
            "float_elements": float_elements,
            "activation_bits": activation_bits,
            "activation_tensors": activation_tensors,
            "measured": measured,
            "seconds": self.seconds,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "versions": {name: importlib.metadata.version(name) for name in (*packages, "torch")},
        }
        (self.folder / "result.json").write_text(json.dumps(result))

    @torch.no_grad()
    def logits(self, network: nn.Module) -> Tensor:
        """Returns the logits of the test images."""
        network.eval()
        return torch.cat([network(part) for part in self.tensors("test")["images"].split(500)])

    def language_model(self) -> Any:
        """Returns the float language model, in eval mode."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.given["files"]["model"], dtype=torch.float32).eval()

    def tokenizer(self) -> Any:
        """Returns the language model's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.given["files"]["model"])

    @torch.no_grad()
    def fidelity(self, quantized: Any, teacher: Any) -> dict[str, float]:
        """Returns perplexity, KL to the float model in nats a token, and top-1 agreement, on held-out text.

        The float model's logits (1.2 GB) are kept beside the text for the next rival.
        """
        windows = self.tensors("text")["windows"]
        kept = Path(self.given["files"]["text"]).with_name(f"logits-torch{torch.__version__}.safetensors")
        if not kept.exists():
            logits = {str(i): teacher(window).logits[0].float() for i, window in enumerate(windows.split(1))}
            partial = kept.with_suffix(f".{os.getpid()}")
            save_file(logits, partial)
            partial.rename(kept)
        sums = {"perplexity": 0.0, "kl": 0.0, "agreement": 0.0}
        with safe_open(kept, "pt") as file:
            for i, window in enumerate(windows.split(1)):
                found, expected = quantized(window).logits[0].float(), file.get_tensor(str(i))
                sums["perplexity"] += float(F.cross_entropy(found[:-1], window[0, 1:]))
                sums["kl"] += float(kl_divergence(found, expected))
                sums["agreement"] += float((found.argmax(-1) == expected.argmax(-1)).float().mean())
        means = {name: value / len(windows) for name, value in sums.items()}
        return {**means, "perplexity": float(torch.tensor(means["perplexity"]).exp())}

    def distil(self, student: nn.Module, teacher: nn.Module, step: Callable[[], None] = lambda: None) -> None:
        """Quantization-aware training, as long as hq_plugin's: KL to the float model, Adam, a cosine schedule.

        BatchNorm keeps its statistics, as it does in hq_plugin's fine-tuning; its scales and biases train.
        """
        optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
        student.eval()
        for images in self.batches(STEPS, BATCH):
            with torch.no_grad():
                expected = teacher(images)
            loss = kl_divergence(student(images), expected)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step()


def task() -> Task:
    """Returns the task that the command line names."""
    return Task(Path(sys.argv[1]))


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) in nats, the mean over rows: hq_plugin.distillation's, which is not here."""
    log_student, log_teacher = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()


def weight_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the convolutions and linear layers."""
    return {name: m for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def folded_biases(network: nn.Module) -> int:
    """Returns how many numbers stay float once BatchNorm is folded: a bias for each output channel."""
    return sum(m.weight.shape[0] for m in weight_layers(network).values())


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Returns a language model's linear layers, without the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


def stub_torchvision() -> None:
    """Lets timm import torchvision beside a torch without CUDA, for which registries have no torchvision.

    Its operators do not load there, and it refuses to be imported without the names of two of them.
    """
    if torch.version.cuda is None and not _KEPT:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[Any] = []


def float_rest(model: Any, layers: dict[str, nn.Module]) -> int:
    """Returns how many parameters are not these layers' weights; tied ones count once."""
    return sum(p.numel() for p in model.parameters()) - sum(m.weight.numel() for m in layers.values())
