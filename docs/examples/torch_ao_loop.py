"""Your own training loop around torch.ao's prepare and convert, with a hybrid policy.

    python docs/examples/torch_ao_loop.py

The policy is written by hand here; `hq_plugin.meta_train(...).search(budget).policy` finds one.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hq_plugin import HybridPolicy, LayerBits, torch_ao
from hq_plugin.integrations.timm.demo_data import digits

torch.manual_seed(0)
train_x, train_y, test_x, test_y = digits()


def accuracy(model: nn.Module) -> float:
    """Share of the test images that are right."""
    with torch.no_grad():
        return float((model(test_x).argmax(1) == test_y).float().mean())


def train(model: nn.Module, steps: int, rate: float) -> None:
    """The loop: nothing in it knows of quantization."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        pick = torch.randint(len(train_x), (64,))
        loss = F.cross_entropy(model(train_x[pick]), train_y[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(256, 10),
)
train(model, steps=300, rate=3e-3)
model.eval()
print(f"float: accuracy {accuracy(model):.3f}")

# Site names are those of named_modules(); layers that are not named stay float.
policy = HybridPolicy({"0": LayerBits(8, 8), "3": LayerBits(3, 8), "6": LayerBits(2, 8)})
prepared = torch_ao.prepare(model, policy)
with torch.no_grad(), torch_ao.calibrate(prepared):  # ranges of activations, from a few hundred images
    prepared(train_x[:256])
print(f"prepared, untrained: accuracy {accuracy(prepared):.3f}")
train(prepared, steps=200, rate=1e-3)

packed = torch_ao.convert(prepared)
print(f"packed: accuracy {accuracy(packed):.3f}")
with torch.no_grad():
    difference = float((packed(test_x) - prepared(test_x)).abs().max())
print(f"largest difference of an output, packed to prepared: {difference:.1e}")
