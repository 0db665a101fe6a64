import copy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import hq_plugin
from hq_plugin import Config, HybridPolicy, LayerBits, torch_ao
from hq_plugin.errors import ModelError
from hq_plugin.integrations.torchao import to_torchao
from hq_plugin.nn import SplitEmbedding, packed_modules, weight_key, with_split_tables
from hq_plugin.nn.split import _numbers, place_bytes, principal_axes, same_columns, saved_orders, table_rows
from hq_plugin.rewriting import split_tables, splittable
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace

IDS = torch.tensor([[0, 7, 49], [21, 7, 3]])


class Words(nn.Module):
    def __init__(self, rows: int = 50) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(rows, 16, padding_idx=0), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.words(ids))}


@pytest.fixture
def model() -> Words:
    torch.manual_seed(0)
    return Words().eval()


@pytest.mark.parametrize("parts", [2, 3, 7, 50])
def test_it_looks_up_what_one_table_does(model: Words, parts: int) -> None:
    split = with_split_tables(model, [f"words.parts.{parts - 1}"])
    assert isinstance(split.words, SplitEmbedding)
    assert type(model.words) is nn.Embedding
    for ids in (IDS, IDS[0], IDS[0, 0], IDS[:, :0]):
        assert torch.equal(split.words(ids), model.words(ids))
    sizes = [len(part.weight) for part in split.words.parts]
    assert sizes == table_rows(50, parts)
    everywhere = split.words._everywhere(IDS.flatten())
    assert torch.equal(everywhere.view(2, 3, 16), model.words(IDS))
    assert torch.equal(split.words.weight, model.words.weight)
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in model.parameters())
    with pytest.raises(IndexError):
        split.words(torch.tensor([50]))
    with pytest.raises(IndexError):
        split.words(torch.tensor([-1]))
    # From the names of its tables it is split in the same way again.
    again = with_split_tables(model, [name for name, _ in split.named_modules()])
    assert [part.weight.shape for part in again.words.parts] == [part.weight.shape for part in split.words.parts]


@pytest.mark.parametrize("rows", [4, 50, 300, 30522])
def test_tables_grow_and_hold_every_row(rows: int) -> None:
    for parts in range(2, min(rows, 40) + 1):
        sizes = table_rows(rows, parts)
        assert (len(sizes), sum(sizes)) == (parts, rows)
        assert min(sizes) >= 1
        assert sizes == sorted(sizes) or rows < 100


@pytest.mark.parametrize("rows", [50, 300])
def test_rows_lie_by_use(rows: int) -> None:
    torch.manual_seed(1)
    model, order = Words(rows).eval(), torch.randperm(rows)
    split = with_split_tables(model, ["words.parts.3"], by_use={"words": order})
    ids = torch.randint(rows, (4, 9))
    assert torch.equal(split.words(ids), model.words(ids))
    assert torch.equal(
        split.words._everywhere(_numbers(split.words.places)[ids.flatten()]).view(4, 9, 16), model.words(ids)
    )
    assert torch.equal(split.words.parts[0].weight, model.words.weight[order[: table_rows(rows, 4)[0]]])
    assert torch.equal(split.words.weight, model.words.weight)
    state = split.state_dict()
    assert torch.equal(saved_orders(state)["words"], order)
    assert place_bytes(split)["words.parts.0"] == table_rows(rows, 4)[0] * (1 if rows == 50 else 2)
    again = with_split_tables(Words(rows), ["words.parts.3"])
    again.load_state_dict(state)
    assert torch.equal(again(ids)["logits"], split(ids)["logits"])
    state["words.places"][3] = state["words.places"][4]
    with pytest.raises(ValueError, match="each number once"):
        saved_orders(state)


def test_names_of_other_layers_are_passed_over(model: Words) -> None:
    assert with_split_tables(model, ["words", "head.parts.1", "nothing.parts.0", "words.parts.x"]) is model
    assert with_split_tables(model, ["words.parts.50"]) is model  # more tables than rows


def test_each_table_is_a_site_even_where_nothing_is_looked_up(model: Words) -> None:
    split = with_split_tables(model, ["words.parts.4"])
    table = find_sites(split, lambda m: m(IDS[:1, :1]), 1)
    assert [site.name for site in table] == [*(f"words.parts.{n}" for n in range(5)), "head"]
    assert table.float_layers == ()


def test_gradients_reach_what_was_looked_up(model: Words) -> None:
    policy = HybridPolicy({f"words.parts.{n}": LayerBits(2 + n, 16, 8) for n in range(5)})
    prepared = torch_ao.prepare(model, policy).train()
    (prepared(IDS)["logits"] * torch.arange(4)).sum().backward()
    weights = [part._parameters["weight"] for part in prepared.words.parts]
    gradient = torch.cat([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == sorted(set(IDS.flatten().tolist()))
    packed = torch_ao.convert(prepared)
    assert [module.bits.weight for module in packed_modules(packed).values()] == [2, 3, 4, 5, 6]
    assert torch.equal(packed(IDS)["logits"], prepared.eval()(IDS)["logits"])


@pytest.fixture
def turned(model: Words) -> nn.Module:
    order, axes = torch.randperm(50), principal_axes(model.words.weight)
    return with_split_tables(model, ["words.parts.2.3"], by_use={"words": order}, axes={"words": axes})


def test_axes_are_orthonormal_and_fall(model: Words) -> None:
    weight = model.words.weight.detach() * torch.linspace(0.1, 3, 16)
    axes = principal_axes(weight)
    torch.testing.assert_close(axes.T @ axes, torch.eye(16), atol=1e-6, rtol=0)
    spread = (weight @ axes).square().sum(0)
    assert spread.tolist() == sorted(spread.tolist(), reverse=True)
    torch.testing.assert_close(principal_axes(weight[torch.randperm(50)]), axes, atol=1e-5, rtol=1e-5)


def test_blocks_of_columns_look_up_what_one_table_does(model: Words, turned: Any) -> None:
    assert [tuple(block.weight.shape) for block in turned.words.parts[1]] == [(table_rows(50, 3)[1], 4)] * 4
    torch.testing.assert_close(turned.words(IDS), model.words(IDS), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(turned.words.weight, model.words.weight, atol=1e-6, rtol=1e-5)
    places = _numbers(turned.words.places)[IDS.flatten()]
    everywhere = turned.words.basis(turned.words._everywhere(places)).view(2, 3, 16)
    torch.testing.assert_close(everywhere, model.words(IDS), atol=1e-6, rtol=1e-5)
    again = with_split_tables(model, [name for name, _ in turned.named_modules()])
    again.load_state_dict(turned.state_dict())
    assert torch.equal(again(IDS)["logits"], turned(IDS)["logits"])
    assert same_columns("words.parts.2.3") == same_columns("words.parts.0.3") != same_columns("words.parts.0.2")
    assert same_columns("head") == "head"


def test_blocks_and_basis_are_sites_and_the_basis_adds_nothing(model: Words, turned: Any) -> None:
    plain, table = (find_sites(m, lambda m: m(IDS), 2) for m in (model, turned))
    blocks = [f"words.parts.{n}.{column}" for n in range(3) for column in range(4)]
    assert [site.name for site in table] == ["words.basis", *blocks, "head"]
    assert {site.name for site in table if site.may_be_left_out} == set(blocks)
    assert (table.weights, table.float_bytes) == (plain.weights, plain.float_bytes)
    assert table.rest_bytes == plain.rest_bytes
    assert [site.place_bytes for site in table if site.place_bytes] == table_rows(50, 3)
    space = SearchSpace.build(table, Config(weight_bits=(2, 4), embedding_bits=(0, 2)))
    assert [group.weight_bits for group in space.groups] == [(2, 4), *[(0, 2)] * 12, (2, 4)]
    whole = SearchSpace.build(plain, Config(weight_bits=(2, 4), embedding_bits=(0, 2)))
    assert whole.groups[0].weight_bits == (2,)


def test_a_block_that_is_left_out_is_zero_and_takes_nothing(turned: Any) -> None:
    names = [site.name for site in find_sites(turned, lambda m: m(IDS), 2)]
    left_out = [name for name in names if name.endswith((".2", ".3"))]
    policy = HybridPolicy({name: LayerBits(0 if name in left_out else 8) for name in names})
    prepared = torch_ao.prepare(turned, policy).train()
    (prepared(IDS)["logits"] * torch.arange(4)).sum().backward()
    for name in left_out:
        assert prepared.get_submodule(name)._parameters["weight"].grad is None
    packed: Any = torch_ao.convert(prepared)
    layers = packed_modules(packed)
    assert all(layers[name].weight_packed.numel() + layers[name].weight_step.numel() == 0 for name in left_out)
    assert all(not layers[name].weight.any() for name in left_out)
    assert len({weight_key(layer) for layer in layers.values()}) == len(layers)
    expected = turned.words.parts[0].weight.clone()
    expected[:, 8:] = 0
    torch.testing.assert_close(packed.words.parts[0].weight, expected, atol=0.02, rtol=0)
    assert torch.equal(packed(IDS)["logits"], prepared.eval()(IDS)["logits"])


def test_which_embeddings_are_split() -> None:
    model = Words(5000)
    config = Config(embedding_parts=4).filled()
    assert splittable(model, config) == ["words"]
    assert len(split_tables(model, config, {"words": torch.arange(5000)}).words.parts) == 4
    for other in (
        Config().filled(),
        Config(embedding_parts=4, exclude=("words",)),
        Config(embedding_parts=4, pinned={"w*": 8}),
        Config(embedding_parts=4, groups=(("words", "head"),)),
    ):
        assert splittable(model, other) == []
    assert splittable(Words(4000), config) == []
    assert split_tables(model, config, {}) is model
    tied = Words(5000)
    tied.head = nn.Linear(16, 5000)
    tied.head.weight = tied.words.weight
    assert splittable(tied, config) == []


def test_from_quantize_to_a_file_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Words(4200).eval()
    # Every second word never occurs, wherever it is.
    data = [2 * torch.randint(2100, (16, 6)) for _ in range(8)]
    small = hq_plugin.quantize(model, "4.5bit", data, effort="smoke", progress=False, embedding_parts=4)
    widths = [small.hq.policy[f"words.parts.{n}"].weight for n in range(4)]
    assert widths[0] > widths[-1], widths
    assert sum(len(part.weight_step) - 1 for part in small.words.parts) == 4200
    assert sum(site.size for site in small.hq.layers if "parts" in site.name) >= 2 * 4200  # places are paid for
    assert small.hq.effective_bits <= 4.5
    hq_plugin.save(small, tmp_path / "small")
    again = hq_plugin.load(tmp_path / "small", Words(4200))
    assert torch.equal(again(IDS)["logits"], small(IDS)["logits"])
    assert torch.equal(copy.deepcopy(again)(IDS)["logits"], small(IDS)["logits"])


def test_a_session_keeps_the_order_of_rows_whatever_data_it_is_loaded_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Words(4200).eval()
    first = [2 * torch.randint(2100, (16, 6)) for _ in range(8)]
    other = [torch.randint(100, (16, 6)) for _ in range(8)]
    session = hq_plugin.meta_train(model, first, effort="smoke", progress=False, embedding_parts=4)
    session.save(tmp_path / "session")
    again = hq_plugin.load_session(tmp_path / "session", model, other)
    assert torch.equal(again.teacher.words.places, session.teacher.words.places)
    assert torch.equal(again.teacher(IDS)["logits"], model(IDS)["logits"])
    policy = session.baselines("4.5bit")["dynamic_programming"]
    packed = [made.finetune(policy, steps=0).eval() for made in (session, again)]
    assert torch.equal(packed[0].words.weight, packed[1].words.weight)


COLUMNS: dict[str, Any] = {
    "effort": "smoke",
    "progress": False,
    "embedding_parts": 4,
    "embedding_columns": 4,
    "embedding_bits": (0, 1, 2, 4, 8),
}


class Correlated(Words):
    """Rows that lie near a few axes, as words of a language do."""

    def __init__(self) -> None:
        super().__init__(4200)
        with torch.no_grad():
            self.words.weight.copy_(torch.randn(4200, 16) * 0.6 ** torch.arange(16) @ torch.randn(16, 16) / 4)


def test_columns_are_kept_in_files_in_onnx_and_in_torchao(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Correlated().eval()
    data = [2 * torch.randint(2100, (16, 6)) for _ in range(8)]
    small: Any = hq_plugin.quantize(model, "2bit", data, **COLUMNS)
    assert small.hq.effective_bits <= 2
    assert 0 in {small.hq.policy[name].weight for name in small.hq.policy if ".parts." in name}
    layers, words = packed_modules(small), model.words.weight.numel()
    counted = sum(layer.weight_packed.numel() + layer.weight_step.numel() for layer in layers.values())
    counted += small.words.places.numel()
    assert counted * 8 / (words + model.head.weight.numel()) == pytest.approx(small.hq.effective_bits)
    hq_plugin.save(small, tmp_path / "small")
    again = hq_plugin.load(tmp_path / "small", Correlated())
    expected = small(IDS)["logits"]
    assert torch.equal(again(IDS)["logits"], expected)
    hq_plugin.export(small, tmp_path / "small.onnx", (IDS,))
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=0.1, rtol=0.05)
    wide: Any = hq_plugin.quantize(model, "2bit", data, activation_bits=16, **COLUMNS)
    torch.testing.assert_close(to_torchao(wide)(IDS)["logits"], wide(IDS)["logits"], atol=1e-4, rtol=1e-4)


def test_a_session_knows_its_model_again_though_axes_differ_in_their_last_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Correlated().eval()
    data = [2 * torch.randint(2100, (16, 6)) for _ in range(8)]
    session = hq_plugin.meta_train(model, data, **COLUMNS)
    session.save(tmp_path / "session")
    monkeypatch.setattr("hq_plugin.rewriting.principal_axes", lambda weight: principal_axes(weight).mul_(1 + 1e-7))
    again = hq_plugin.load_session(tmp_path / "session", model, data)
    assert not torch.equal(again.teacher.words.basis.weight, session.teacher.words.basis.weight)
    policy = session.baselines("3bit")["dynamic_programming"]
    packed: list[Any] = [made.finetune(policy, steps=0) for made in (session, again)]
    assert torch.equal(packed[0].words.weight, packed[1].words.weight)
    with torch.no_grad():
        model.words.weight[0, 0] += 1
    with pytest.raises(ModelError, match="other weights"):
        hq_plugin.load_session(tmp_path / "session", model, data)
