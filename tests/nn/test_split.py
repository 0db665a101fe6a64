import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hq_plugin
from hq_plugin import Config, HybridPolicy, LayerBits, torch_ao
from hq_plugin.nn import SplitEmbedding, packed_modules, with_split_tables
from hq_plugin.nn.split import _numbers, place_bytes, saved_orders, table_rows
from hq_plugin.rewriting import split_tables, splittable
from hq_plugin.sites import find_sites

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
