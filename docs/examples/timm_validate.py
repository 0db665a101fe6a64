"""Evaluate a saved hybrid model as timm's `validate.py` evaluates a checkpoint.

    pip install 'hq-plugin[timm]' scikit-learn
    python docs/examples/timm_validate.py

Dataset, loader, preprocessing, meters and top-k are timm's; the one line that differs from `validate.py` is
`load(directory)` in place of `create_model(name, checkpoint_path=...)`. For ImageNet put your folder and your model
in place of the digits.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_dataset, create_loader
from timm.utils import AverageMeter, accuracy
from torch import nn

import hq_plugin as hq
from hq_plugin.integrations.timm import ImageFolder, create_model, data_config, load


def write_digits(root: Path) -> None:
    """Writes scikit-learn's digits as `root/{train,validation}/CLASS/NUMBER.png`, the layout of ImageNet."""
    raw = load_digits()
    for number, (image, label) in enumerate(zip(raw.images, raw.target, strict=True)):
        folder = root / ("validation" if number % 5 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).resize((16, 16)).save(folder / f"{number}.png")


@torch.inference_mode()
def validate(model: nn.Module, root: Path, batch_size: int = 128) -> dict[str, float]:
    """The loop of timm's `validate.py`."""
    config = data_config(model)
    loader = create_loader(
        create_dataset("", root=str(root), split="validation", input_img_mode="L"),
        input_size=config["input_size"],
        batch_size=batch_size,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=1.0,
        num_workers=0,
        device=torch.device("cpu"),
    )
    top1, top5, losses = AverageMeter(), AverageMeter(), AverageMeter()
    model.eval()
    for images, target in loader:
        output = model(images)
        at1, at5 = accuracy(output.detach(), target, topk=(1, 5))
        losses.update(F.cross_entropy(output, target).item(), images.size(0))
        top1.update(at1.item(), images.size(0))
        top5.update(at5.item(), images.size(0))
    return {"top1": round(top1.avg, 2), "top5": round(top5.avg, 2), "loss": round(losses.avg, 4)}


torch.manual_seed(0)
with tempfile.TemporaryDirectory() as scratch:
    images = Path(scratch) / "digits"
    write_digits(images)
    model = create_model("resnet10t", in_chans=1, num_classes=10, channels=[8, 16, 32, 32], stem_width=8)
    model.pretrained_cfg = model.default_cfg = {
        **model.pretrained_cfg,
        "input_size": (1, 16, 16),
        "mean": (0.3,),
        "std": (0.37,),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    train = ImageFolder(images / "train", model)
    x, y = torch.stack([train[i][0] for i in range(len(train))]), torch.tensor(train.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(4):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()

    small = hq.quantize(
        model.eval(),
        "3bit",
        train,
        effort="fast",
        meta_steps=15,
        search_evaluations=30,
        finetune_steps=40,
    )
    folder = hq.save(small, Path(scratch) / "small")
    loaded = load(folder)  # by its name alone; the preprocessing was saved with it
    before, after = validate(model, images), validate(loaded, images)

print("float ", before, f"{small.hq.float_size:,} bytes")
print("hybrid", after, f"{small.hq.size:,} bytes, {small.hq.effective_bits:.2f} bits a weight")
