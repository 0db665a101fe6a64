"""What the code of a page of the docs takes for granted: models, data and files, all small and offline.

A setup is a generator: before each block of its page it is asked once, and what it yields joins the names that the
block sees. A page that needs nothing has none. Nothing here is shown to readers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import hq_plugin as hq

Names = dict[str, Any]


class Net(nn.Module):
    """The user's model: two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(8, 32, 3, padding=1)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(x.flatten(1))


def images() -> Names:
    torch.manual_seed(0)
    data = [(torch.randn(32, 1, 8, 8), torch.randint(10, (32,))) for _ in range(6)]
    return {"model": Net().eval(), "data": data, "loader": data, "x": data[0][0], "hq": hq, "hq_plugin": hq}


def text() -> Names:
    from tests.integrations.huggingface.conftest import TEXTS, build, tokenizer

    return {"model": build("llama"), "texts": TEXTS, "tokenizer": tokenizer()}


def quantized(**options: Any) -> nn.Module:
    names = images()
    return hq.quantize(names["model"], "5bit", names["data"], effort="smoke", progress=False, **options)


def linear() -> Names:
    """A network of Linear layers with float inputs, as torchao's tensors want them, quantized and exported."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    data = [torch.randn(32, 64) for _ in range(6)]
    small = hq.quantize(model, "5bit", data, effort="smoke", progress=False, activation_bits=16)
    return {"model": model, "small": small, "exported": torch.export.export(model, (data[0],)).module()}


def elsewhere(name: str) -> None:
    """Goes to a new folder, for pages that use a name of a folder twice."""
    Path(name).mkdir()
    os.chdir(name)


def plain() -> Iterator[Names]:
    yield images()


def readme() -> Iterator[Names]:
    from transformers import AutoModelForCausalLM

    yield images()
    yield {}
    elsewhere("language")
    yield {**text(), "AutoModelForCausalLM": AutoModelForCausalLM}
    yield {**images(), "small": quantized()}
    yield images()


def deployment() -> Iterator[Names]:
    from torchao.quantization import quantize_
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    yield {**images(), "Budget": hq.Budget, "small": quantized()}
    yield {}
    yield {}
    names = text()
    language = hq.quantize(
        names["model"],
        "4.6bit",
        names["texts"],
        processor=names["tokenizer"],
        sequence_length=16,
        effort="smoke",
        zero_points="whole",
    )
    hq.export(language, "small.onnx")
    yield {"ids": np.array([[3, 4, 5]], dtype=np.int64)}
    yield {"data": [inputs for inputs, _ in images()["data"]]}
    yield {**linear(), "quantize_": quantize_, "prepare_pt2e": prepare_pt2e}


def huggingface() -> Iterator[Names]:
    from transformers import TrainingArguments

    names = text()
    names["model"].save_pretrained("float")
    names["tokenizer"].save_pretrained("float")
    yield {"name": "float", "texts": names["texts"]}
    yield {}
    # One after LoRA, which changes the model that it is put on.
    again = hq.quantize(
        names["model"], "4.6bit", names["texts"], processor=names["tokenizer"], sequence_length=16, effort="smoke"
    )
    ids = [torch.tensor(names["tokenizer"](line)["input_ids"][:16]) for line in names["texts"]]
    arguments = TrainingArguments("out", max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    policy = again.hq.policy  # type: ignore[union-attr]
    yield {
        "teacher": names["model"],
        "policy": policy,
        "arguments": arguments,
        "rows": [{"input_ids": row, "labels": row} for row in ids],
    }


def report() -> Iterator[Names]:
    names = images()
    yield names
    session = hq.meta_train(names["model"], names["data"], effort="smoke", progress=False)
    session.save("session")
    Path("policy.json").write_text(json.dumps(session.search("5bit").policy.to_json()))
    yield names


def timm() -> Iterator[Names]:
    import timm
    from safetensors.torch import save_file
    from sklearn.datasets import load_sample_images

    save_file(timm.create_model("test_resnet").state_dict(), "float.safetensors")
    photographs = [Image.fromarray(picture) for picture in load_sample_images().images]
    Path("photographs").mkdir()
    for number in range(24):
        left = 10 * number
        photographs[number % 2].crop((left, 0, left + 200, 200)).save(f"photographs/{number}.png")
    yield {"name": "test_resnet", "picture": photographs[0]}


#: Page to setup; pages that stand for themselves are not here.
SETUPS: dict[str, Callable[[], Iterator[Names]]] = {
    "README.md": readme,
    "docs/index.md": plain,
    "docs/budgets.md": plain,
    "docs/deployment.md": deployment,
    "docs/distributed.md": plain,
    "docs/huggingface.md": huggingface,
    "docs/report.md": report,
    "docs/timm.md": timm,
}
