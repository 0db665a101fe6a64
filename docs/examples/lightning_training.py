"""PyTorch Lightning trains the float model, and then its quantized student as one more LightningModule.

    pip install 'hq-plugin' lightning scikit-learn
    python docs/examples/lightning_training.py

`torch_ao.prepare` gives a plain module whose fake-quantizers train by autograd, so Lightning's loop, devices,
callbacks and checkpoints (state dicts) need no special care. `hq.quantize(task.model, ...)` after `fit` does all of
it in one call.
"""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hq_plugin as hq
from hq_plugin import torch_ao
from hq_plugin.distillation import kl_divergence


class Classifier(L.LightningModule):
    """The usual LightningModule; nothing in it knows of quantization."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        super().__init__()
        self.model, self.rate = model, rate

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Returns the cross-entropy of a batch."""
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Logs the accuracy."""
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.model.parameters(), lr=self.rate)


class Student(Classifier):
    """The same for a prepared model: the loss is the divergence from the float model."""

    def __init__(self, prepared: nn.Module, teacher: nn.Module, rate: float) -> None:
        super().__init__(prepared, rate)
        self.teachers = [teacher]  # in a list, so that it is neither trained nor in the checkpoint

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Returns the KL divergence of a batch."""
        images, _labels = batch
        with torch.no_grad():
            target = self.teachers[0](images)
        return kl_divergence(self.model(images), target)


def trainer(epochs: int) -> L.Trainer:
    """A Trainer that writes nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, **quiet)


L.seed_everything(0)
raw = load_digits()
images, labels = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(raw.target)
held = torch.arange(len(labels)) % 5 == 0
train = DataLoader(TensorDataset(images[~held], labels[~held]), batch_size=64, shuffle=True)
test = DataLoader(TensorDataset(images[held], labels[held]), batch_size=512)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(256, 10),
)
trainer(6).fit(Classifier(model, rate=3e-3), train)
model.eval()
(before,) = trainer(1).test(Classifier(model, rate=0.0), test, verbose=False)

session = hq.meta_train(model, train, effort="fast", meta_steps=15, search_evaluations=30)
found = session.search("2.6bit")
prepared = torch_ao.prepare(model, found.policy)
with torch.no_grad(), torch_ao.calibrate(prepared):
    prepared(images[~held][:256])
trainer(3).fit(Student(prepared, model, rate=1e-3), train)

small = torch_ao.convert(prepared.eval())
(after,) = trainer(1).test(Classifier(small, rate=0.0), test, verbose=False)
print(f"float accuracy {before['accuracy']:.3f}")
print(f"hybrid accuracy {after['accuracy']:.3f} at {found.costs.weight_bits:.2f} bits a weight: {found.policy}")
