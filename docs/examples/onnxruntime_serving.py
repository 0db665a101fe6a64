"""From a float model to an HTTP service that runs packed integers in ONNX Runtime.

    pip install 'hq-plugin[onnx]' scikit-learn
    python docs/examples/onnxruntime_serving.py

Quantizes with widths that the runtime runs fast, exports, starts `onnxruntime_server.py` (which knows neither torch
nor hq_plugin) in a process of its own, sends it images and compares the answers with PyTorch's.
"""

import io
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import hq_plugin as hq

torch.manual_seed(0)
raw = load_digits()
images, labels = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(raw.target)
batches = list(zip(images.split(64), labels.split(64), strict=True))
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(512, 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(5):
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
model.eval()

small = hq.quantize(
    model,
    "5bit",
    batches,
    target="onnxruntime",  # leaves weights of 2, 4 and 7 bits
    effort="fast",
    meta_steps=10,
    search_evaluations=30,
    finetune_steps=20,
)
print(hq.export(small, "small.onnx", images[:2]))

command = [sys.executable, Path(__file__).with_name("onnxruntime_server.py"), "small.onnx", "--port", "0"]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    try:
        address = server.stdout.readline().split()[-1]
        request = io.BytesIO()
        np.save(request, images.numpy())
        with urllib.request.urlopen(urllib.request.Request(address, request.getvalue()), timeout=60) as reply:
            served = np.load(io.BytesIO(reply.read()))
    finally:
        server.terminate()

with torch.no_grad():
    expected = small(images).numpy()
agreement = float((served.argmax(1) == expected.argmax(1)).mean())
accuracy = float((served.argmax(1) == raw.target).mean())
print(f"{len(served)} images served: accuracy {accuracy:.3f}, same class as in PyTorch {agreement:.4f}")
