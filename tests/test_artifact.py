import copy
import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin import ArtifactError, ArtifactPathError, HybridPolicy, LayerBits, ModelError, torch_ao
from hq_plugin.artifact import read_info
from hq_plugin.cost import CostTable
from hq_plugin.nn import packed_modules
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace
from hq_plugin.storage import JSON_FILE, TENSOR_FILE, sealed
from tests.conftest import TinyNet

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
POLICY = HybridPolicy(
    {
        "stem": LayerBits(8, 16),
        "depthwise": LayerBits(5, 8),
        "pointwise": LayerBits(1, 4),
        "head": LayerBits(3, 8),
    }
)


def converted(model: nn.Module, policy: HybridPolicy, x: Tensor) -> nn.Module:
    prepared = torch_ao.prepare(model, policy).train()
    prepared(x)
    return torch_ao.convert(prepared.eval())


@pytest.fixture
def packed(tiny: nn.Module) -> nn.Module:
    return converted(tiny, POLICY, X)


@pytest.fixture
def saved(packed: nn.Module, tmp_path: Path) -> Path:
    return hq.save(packed, tmp_path / "model")


def test_loading_gives_bit_equal_outputs(packed: nn.Module, saved: Path) -> None:
    torch.manual_seed(1)
    loaded = hq.load(saved, TinyNet())
    assert torch.equal(loaded(X), packed(X))
    assert {name: module.bits for name, module in packed_modules(loaded).items()} == dict(POLICY)
    assert not loaded.training
    assert all(not p.requires_grad for p in loaded.parameters())


def test_the_model_given_to_load_is_not_changed(saved: Path) -> None:
    model = TinyNet().train()
    before = copy.deepcopy(model.state_dict())
    hq.load(saved, model)
    assert type(model.stem) is nn.Conv2d
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_file_is_as_small_as_the_cost_table_says(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    table = find_sites(model, lambda m: m(x), 2)
    space = SearchSpace.build(table, hq.Config(weight_bits=(2, 3, 8)))
    policy = space.policy(space.nearest_uniform(3, 8))
    counted = CostTable(space).costs(space.genome(policy)).size
    target = hq.save(converted(model, policy, x), tmp_path / "model")
    on_disk = sum(path.stat().st_size for path in target.iterdir())
    assert counted - 1 <= on_disk <= counted * 1.01 + 64 * 1024
    assert on_disk < 0.11 * table.float_bytes


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(500, 16), nn.Linear(16, 500, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    ids = torch.randint(500, (2, 5))
    model = converted(Tied(), HybridPolicy({"embed": LayerBits(4), "head": LayerBits(4, 8)}), ids)
    target = hq.save(model, tmp_path / "model")
    assert (target / TENSOR_FILE).stat().st_size < 500 * 16 / 2 + 500 * 2 + 1000
    loaded = hq.load(target, Tied())
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.head.weight_packed is loaded.embed.weight_packed


def test_a_timm_model_is_rebuilt_from_its_name_alone(tmp_path: Path) -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=7, in_chans=1)
    x = torch.randn(4, 1, 64, 64)
    policy = HybridPolicy({s.name: LayerBits(4, 8) for s in find_sites(model, lambda m: m(x), 4)})
    packed = converted(model, policy, x)
    target = hq.save(packed, tmp_path / "model")
    assert torch.equal(hq.load(target)(x), packed(x))


class OwnLoading(nn.Module):
    """A module that copies what it loads into its parameter, and a table that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(10))
        self.register_buffer("table", torch.arange(10.0), persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        with torch.no_grad():
            self.scale.copy_(state_dict[f"{prefix}scale"])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.table


class WithOwnLoading(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.last = OwnLoading()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x))


def test_modules_that_load_in_a_way_of_their_own(tmp_path: Path) -> None:
    model = WithOwnLoading().eval()
    packed = converted(model, POLICY, X)
    packed.last.table += 1
    again = WithOwnLoading()
    again.last.table += 1
    assert torch.equal(hq.load(hq.save(packed, tmp_path / "model"), again)(X), packed(X))


def test_float_tensors_take_the_dtype_of_the_model_given(packed: nn.Module, tmp_path: Path) -> None:
    target = hq.save(copy.deepcopy(packed).half(), tmp_path / "model")
    loaded = hq.load(target, TinyNet())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(X), packed(X), rtol=0.1, atol=0.1)


def test_a_loaded_model_does_not_read_its_file_any_more(packed: nn.Module, saved: Path) -> None:
    loaded = hq.load(saved, TinyNet())
    (saved / TENSOR_FILE).write_bytes(bytes((saved / TENSOR_FILE).stat().st_size))
    assert torch.equal(loaded(X), packed(X))


def test_without_a_name_the_model_must_be_given(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="Pass a float model"):
        hq.load(saved)


def test_read_info(saved: Path) -> None:
    info = read_info(saved)
    assert {site.name: site.bits for site in info.sites} == dict(POLICY)
    assert info.sites[3].size == 640 * 3 // 8 + 10 + 1
    assert info.file_bytes == (saved / TENSOR_FILE).stat().st_size


def test_overwriting(packed: nn.Module, saved: Path) -> None:
    with pytest.raises(ArtifactPathError, match="overwrite=True"):
        hq.save(packed, saved)
    hq.save(packed, saved, overwrite=True)
    assert torch.equal(hq.load(saved, TinyNet())(X), packed(X))
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model"], "nothing is left beside it"


def test_something_else_is_never_deleted(packed: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ArtifactPathError, match="something else"):
            hq.save(packed, tmp_path, overwrite=overwrite)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ArtifactPathError, match="is a file"):
        hq.save(packed, tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    hq.save(packed, tmp_path / "empty")


def test_a_directory_that_cannot_be_written(
    packed: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written"):
        hq.save(packed, tmp_path / "file" / "model")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactPathError, match="No space left"):
        hq.save(packed, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left behind"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small disk")
def test_a_full_disk(packed: nn.Module, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=4k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ArtifactPathError, match="could not be written"):
            hq.save(packed, disk / "model")
        assert list(disk.iterdir()) == []
    finally:
        os.system(f"umount {disk}")


def test_a_float_model_cannot_be_saved(tiny: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"hq_plugin\.quantize"):
        hq.save(tiny, tmp_path / "model")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "head", nn.Linear(64, 11)),
        lambda m: setattr(m, "head", nn.Identity()),
        lambda m: setattr(m, "extra", nn.Linear(2, 2)),
        lambda m: setattr(m, "bn1", nn.Identity()),
        lambda m: setattr(m, "pointwise", nn.Conv2d(8, 16, 1, bias=False)),
    ],
)
def test_a_model_of_another_architecture(saved: Path, change) -> None:  # type: ignore[no-untyped-def]
    model = TinyNet()
    change(model)
    with pytest.raises(ModelError, match="another architecture"):
        hq.load(saved, model)


def test_a_quantized_model_is_no_skeleton(packed: nn.Module, saved: Path) -> None:
    with pytest.raises(ModelError, match="quantized already"):
        hq.load(saved, packed)


def edit(directory: Path, **changes: object) -> None:
    data = json.loads((directory / JSON_FILE).read_text())
    data.update(changes)
    (directory / JSON_FILE).write_text(json.dumps(sealed(data)))


def test_an_edited_description_is_noticed(saved: Path) -> None:
    data = json.loads((saved / JSON_FILE).read_text())
    data["constants"]["bn1.running_mean"]["value"] = 0.5
    (saved / JSON_FILE).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="damaged, or was edited"):
        hq.load(saved, TinyNet())
    del data["checksum"]
    (saved / JSON_FILE).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="damaged, or was edited"):
        hq.load(saved, TinyNet())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "other"}, "not a saved"),
        ({"version": 99}, "Upgrade hq_plugin"),
        ({"version": "1"}, "version"),
        ({"sites": 3}, "damaged"),
        ({"sites": {"stem": {"bits": [9, 8], "shape": [1], "type": "x"}}}, "damaged|not possible"),
        ({"sites": {"stem": {"bits": [8, 8]}}}, "damaged"),
        ({"sha256": "0"}, "checksum"),
        ({"tied": []}, "damaged"),
        ({"constants": 1}, "damaged"),
        ({"constants": {"bn1.running_mean": {"shape": [8], "dtype": "pickle", "value": 0}}}, "damaged"),
        ({"architecture": 3}, "damaged"),
        ({"report": {"policy": {}}}, "damaged"),
    ],
)
def test_damaged_descriptions(saved: Path, changes: dict[str, object], says: str) -> None:
    edit(saved, **changes)
    with pytest.raises(hq.HQError, match=says):
        hq.load(saved, TinyNet())


def test_a_huge_declared_constant_is_not_allocated(saved: Path) -> None:
    edit(saved, constants={"bn1.running_mean": {"shape": [10**15], "dtype": "float32", "value": 0.0}})
    with pytest.raises(ModelError, match="another architecture"):
        hq.load(saved, TinyNet())


def test_a_huge_declared_architecture_is_not_allocated(tmp_path: Path) -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=7, in_chans=1)
    x = torch.randn(4, 1, 64, 64)
    policy = HybridPolicy({s.name: LayerBits(4, 8) for s in find_sites(model, lambda m: m(x), 4)})
    target = hq.save(converted(model, policy, x), tmp_path / "model")
    asked = json.loads((target / JSON_FILE).read_text())["architecture"]
    for argument in ({"num_classes": 10**9}, {"in_chans": 10**9}):
        edit(target, architecture={**asked, "arguments": {**asked["arguments"], **argument}})
        with pytest.raises(ArtifactError, match="larger model than the file holds"):
            hq.load(target)


@pytest.mark.timeout(60)
def test_what_is_no_file_is_not_waited_for(saved: Path) -> None:
    for name in (JSON_FILE, TENSOR_FILE):
        original = (saved / name).read_bytes()
        (saved / name).unlink()
        os.mkfifo(saved / name)
        with pytest.raises(ArtifactError, match="not a regular file"):
            hq.load(saved, TinyNet())
        (saved / name).unlink()
        (saved / name).symlink_to("/dev/zero")
        with pytest.raises(ArtifactError, match="not a regular file"):
            hq.load(saved, TinyNet())
        (saved / name).unlink()
        (saved / name).write_bytes(original)


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "null", "[]"])
def test_files_that_are_not_ours(saved: Path, text: str) -> None:
    (saved / JSON_FILE).write_text(text)
    with pytest.raises(ArtifactError):
        hq.load(saved, TinyNet())


def test_truncated_and_changed_tensors(saved: Path) -> None:
    raw = (saved / TENSOR_FILE).read_bytes()
    for broken in (raw[:-10], raw[: len(raw) // 2], b"", raw[:100] + bytes([raw[100] ^ 1]) + raw[101:]):
        (saved / TENSOR_FILE).write_bytes(broken)
        with pytest.raises(ArtifactError, match="damaged or truncated"):
            hq.load(saved, TinyNet())
    (saved / TENSOR_FILE).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        hq.load(saved, TinyNet())


def test_an_unknown_integration_is_not_imported(saved: Path) -> None:
    edit(saved, architecture={"integration": "os", "name": "x"})
    with pytest.raises(ArtifactError, match="knows timm"):
        hq.load(saved)
    edit(saved, architecture={"integration": "timm", "name": "resnet18", "arguments": {"pretrained": True}})
    with pytest.raises(ArtifactError, match="pretrained"):
        hq.load(saved)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no saved"):
        hq.load(tmp_path, TinyNet())


class Remembers(nn.Module):
    """Keeps in its state what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.scale = nn.Linear(32, 64), nn.Linear(64, 10), 1

    def get_extra_state(self) -> dict[str, int]:
        return {"scale": self.scale}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.scale = state["scale"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).relu()) * self.scale


def test_state_that_is_no_tensor_stays_that_of_the_model_that_is_loaded_into(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Remembers().eval(), [torch.randn(16, 32) for _ in range(4)]
    model.scale = 3
    options: Any = {"effort": "smoke", "progress": False, "checkpoint_dir": tmp_path / "work"}
    session = hq.meta_train(model, data, **options)
    session.save(tmp_path / "session")
    small = hq.load_session(tmp_path / "session", model, data).quantize("5bit")
    hq.save(small, tmp_path / "small")
    fresh = Remembers()
    fresh.scale = 3
    again = hq.load(tmp_path / "small", fresh)
    assert torch.equal(again(data[0]), small(data[0]))


class Inside(nn.Module):
    """What is rewritten before sites are found: a matrix of products, tables, a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5000, 16)
        self.mix = nn.Parameter(torch.randn(16, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) @ self.mix
        return self.normed(self.attention(x, x, x)[0]).mean(1)


@pytest.mark.parametrize("pattern", ["inside", "inside.*"])
def test_what_is_excluded_inside_a_module_is_saved_and_loaded(pattern: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(inside=Inside(), head=nn.Linear(16, 4)))

    ids = [torch.randint(5000, (8, 5)) for _ in range(6)]
    options: dict[str, Any] = {"effort": "smoke", "embedding_parts": 3, "progress": False}
    small = hq.quantize(build(), "4bit", ids, exclude=(pattern,), **options)
    assert set(small.hq.policy) == {"head"}  # type: ignore[union-attr]
    hq.save(small, tmp_path / "small")
    assert torch.equal(hq.load(tmp_path / "small", build())(ids[0]), small(ids[0]))


def test_an_expanded_buffer_is_loaded_into(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 4)
            self.register_buffer("mask", torch.ones(1).expand(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x * self.mask)

    torch.manual_seed(0)
    model, data = Masked(), [torch.randn(8, 16) for _ in range(6)]
    session = hq.meta_train(model, data, effort="smoke", progress=False)
    session.save(tmp_path / "session")
    again = hq.load_session(tmp_path / "session", model, data)
    assert torch.equal(again.quantize("4bit")(data[0]), session.quantize("4bit")(data[0]))
