import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hq_plugin
from hq_plugin import Config, HybridPolicy, LayerBits, torch_ao
from hq_plugin.nn import SplitEmbedding, packed_modules, with_split_tables
from hq_plugin.sites import find_sites, split_tables

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
    places = IDS.flatten() // split.words.rows
    everywhere = split.words._everywhere(IDS.flatten() % split.words.rows, places)
    assert torch.equal(everywhere.view(2, 3, 16), model.words(IDS))
    assert torch.equal(split.words.weight, model.words.weight)
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in model.parameters())
    # From the names of its tables it is split in the same way again.
    again = with_split_tables(model, [name for name, _ in split.named_modules()])
    assert [part.weight.shape for part in again.words.parts] == [part.weight.shape for part in split.words.parts]


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
    assert len(split_tables(model, config).words.parts) == 4
    for other in (
        Config().filled(),
        Config(embedding_parts=4, exclude=("words",)),
        Config(embedding_parts=4, pinned={"w*": 8}),
        Config(embedding_parts=4, groups=(("words", "head"),)),
    ):
        assert split_tables(model, other) is model
    assert split_tables(Words(4000), config).words.weight.shape == (4000, 16)
    assert type(split_tables(Words(4000), config).words) is nn.Embedding
    tied = Words(5000)
    tied.head = nn.Linear(16, 5000)
    tied.head.weight = tied.words.weight
    assert split_tables(tied, config) is tied


def test_from_quantize_to_a_file_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Words(4200).eval()
    # Half of the vocabulary never occurs.
    data = [torch.randint(2100, (16, 6)) for _ in range(8)]
    small = hq_plugin.quantize(model, "4.5bit", data, effort="smoke", progress=False, embedding_parts=4)
    widths = [small.hq.policy[f"words.parts.{n}"].weight for n in range(4)]
    assert min(widths[:2]) > max(widths[2:]), widths
    assert small.hq.effective_bits <= 4.5
    hq_plugin.save(small, tmp_path / "small")
    again = hq_plugin.load(tmp_path / "small", Words(4200))
    assert torch.equal(again(IDS)["logits"], small(IDS)["logits"])
    assert torch.equal(copy.deepcopy(again)(IDS)["logits"], small(IDS)["logits"])
