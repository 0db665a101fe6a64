"""The same seed gives the same result, whatever the caller's randomness, which stays as it was."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import hq_plugin as hq
from hq_plugin.seeding import seeded
from tests.conftest import TinyNet

OPTIONS = {"effort": "smoke", "meta_steps": 3, "finetune_steps": 3, "search_evaluations": 6, "progress": False}


class Augmented(Dataset):
    """Images with noise of every usual source of randomness."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Tensor:
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return torch.full((1, 8, 8), index / 96) + noise * torch.randn(1, 8, 8)


def states() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, tuple(keys), *rest), tuple(torch.get_rng_state().tolist())


def test_inside_all_follows_from_the_seed() -> None:
    drawn = []
    for outside in (1, 2):
        for source in (random.seed, np.random.seed, torch.manual_seed):
            source(outside)
        before = states()
        with seeded(3):
            drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        assert states() == before
    assert drawn[0] == drawn[1]
    with seeded(4):
        assert random.random() != drawn[0][0]
    before = states()
    with pytest.raises(ZeroDivisionError), seeded(-1 % 2**64):
        1 / 0  # noqa: B018
    assert states() == before


def model() -> nn.Module:
    torch.manual_seed(0)
    return TinyNet().eval()


@pytest.mark.parametrize("workers", [0, 2])
def test_same_seed_same_result(workers: int) -> None:
    found = []
    for outside in (1, 2):
        float_model = model()
        for source in (random.seed, np.random.seed, torch.manual_seed):
            source(outside)
        loader = DataLoader(Augmented(), batch_size=16, num_workers=workers)
        small = hq.quantize(float_model, "3.5bit", loader, seed=5, **OPTIONS)  # type: ignore[arg-type]
        found.append((small.hq.policy, small.hq.kl, small.hq.history["finetune"], small.state_dict()))  # type: ignore[union-attr]
    assert found[0][:3] == found[1][:3]
    assert all(torch.equal(value, found[1][3][name]) for name, value in found[0][3].items())
    other = hq.quantize(model(), "3.5bit", loader, seed=6, **OPTIONS)  # type: ignore[arg-type]
    assert other.hq.history["finetune"] != found[0][2]  # type: ignore[union-attr]


def test_resumed_work_sees_the_same_random_data(tmp_path: Path) -> None:
    loader = DataLoader(Augmented(), batch_size=16)
    plain = hq.quantize(model(), "3.5bit", loader, **OPTIONS)  # type: ignore[arg-type]
    for _ in range(2):  # kept, and found again
        kept = hq.quantize(model(), "3.5bit", loader, checkpoint_dir=tmp_path / "ck", **OPTIONS)  # type: ignore[arg-type]
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in kept.state_dict().items())
        assert kept.hq.kl == plain.hq.kl  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:No data")
def test_no_call_touches_the_caller_s_randomness(tmp_path: Path) -> None:
    float_model = model()
    session = hq.meta_train(float_model, DataLoader(Augmented(), batch_size=16), **OPTIONS)  # type: ignore[arg-type]
    session.save(tmp_path / "session")
    by_name = timm.create_model("test_resnet", num_classes=4).eval()
    images = [torch.randn(4, 3, 32, 32) for _ in range(3)]
    tiny = {**OPTIONS, "weight_bits": (2, 8), "batch_size": 2, "holdout": 2, "recalibration": 2}
    small = hq.quantize(by_name, "4bit", images, **tiny)  # type: ignore[arg-type]
    hq.save(small, tmp_path / "small")
    loader = DataLoader(Augmented(), batch_size=16)
    calls: dict[str, Callable[[], object]] = {
        "quantize": lambda: hq.quantize(float_model, "3.5bit", loader, **OPTIONS),  # type: ignore[arg-type]
        "without data": lambda: hq.quantize(by_name, "4bit", **tiny),  # type: ignore[arg-type]
        "meta_train": lambda: hq.meta_train(float_model, loader, **OPTIONS),  # type: ignore[arg-type]
        "search": lambda: session.search("3bit"),
        "session.quantize": lambda: session.quantize("4bit"),
        "load_session": lambda: hq.load_session(tmp_path / "session", float_model, loader),
        "load": lambda: hq.load(tmp_path / "small"),
        "profile": lambda: hq.profile(float_model, loader, weight_bits=(4,), progress=False),
        "export": lambda: hq.export(small, tmp_path / "small.onnx"),
    }
    for name, call in calls.items():
        before = states()
        call()
        assert states() == before, name
