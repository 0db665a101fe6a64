import numpy as np
import pytest
import torch
from torch import nn

from hq_plugin import Config, ConfigError, HQWarning, HybridPolicy, LayerBits, PolicyError
from hq_plugin.cost import CostTable
from hq_plugin.sites import find_sites
from hq_plugin.space import SearchSpace
from hq_plugin.stored_qparams import ACTIVATION_QPARAM_BYTES
from tests.conftest import SITES, TinyNet


def test_a_group_size_that_fits_no_layer_is_said() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    table = find_sites(model, lambda m: m(torch.randn(2, 8)), 2)
    with pytest.warns(HQWarning, match="group_size=7 divides"):
        SearchSpace.build(table, Config(group_size=7))


def test_pins_that_contradict_each_other() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    table = find_sites(model, lambda m: m(torch.randn(2, 8)), 2)
    together = {"groups": [["0", "2"]]}
    with pytest.raises(ConfigError, match="different widths"):
        SearchSpace.build(table, Config(pinned={"0": 3, "2": 5}, **together))  # type: ignore[arg-type]
    space = SearchSpace.build(table, Config(pinned={"0": 3, "*": 3}, **together))  # type: ignore[arg-type]
    assert [group.weight_bits for group in space.groups] == [(3,)]
    with pytest.raises(ConfigError, match="not possible"):
        SearchSpace.build(table, Config(pinned={"0": (8, 8, 8)}))  # type: ignore[dict-item]


def build(**options: object) -> SearchSpace:
    x = torch.randn(2, 1, 8, 8)
    return SearchSpace.build(find_sites(TinyNet().eval(), lambda m: m(x), 2), Config(**options))  # type: ignore[arg-type]


def test_genomes_and_policies_convert() -> None:
    space = build(weight_bits=(2, 4), activation_bits=(4, 8))
    rng = np.random.RandomState(0)
    for _ in range(10):
        genome = rng.randint(0, space.top + 1)
        policy = space.policy(genome)
        assert list(policy) == SITES
        assert np.array_equal(space.genome(policy), genome)


def test_a_name_is_pinned_before_patterns() -> None:
    space = build(pinned={"*": 4, "head": (8, 16)})
    assert {group.name: group.weight_bits for group in space.groups}["head"] == (8,)
    assert {group.weight_bits for group in space.groups if group.name != "head"} == {(4,)}


def test_pinned_and_groups() -> None:
    space = build(pinned={"head": (8, 16), "st*": 8}, groups=(("*wise",),))
    assert [group.name for group in space.groups] == ["stem", "depthwise", "head"]
    policy = space.policy(np.zeros(space.shape, dtype=np.int64))
    assert policy["head"] == LayerBits(8, 16)
    assert policy["stem"] == LayerBits(8, 8)
    assert policy["depthwise"] == policy["pointwise"] == LayerBits(2, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"pinned": {"nothing": 8}},
        {"pinned": {"head": 9}},
        {"pinned": {"head": (8, 1)}},
        {"groups": (("nothing*",),)},
        {"groups": (("stem", "head"), ("head", "depthwise"))},
    ],
)
def test_mistakes(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        build(**options)


def test_policies_that_do_not_fit() -> None:
    space = build(weight_bits=(2, 4), groups=(("*wise",),))
    good = dict.fromkeys(SITES, LayerBits(4, 8))
    space.genome(HybridPolicy(good))
    for change, says in [
        ({"head": LayerBits(3, 8)}, "weight width of 3"),
        ({"head": LayerBits(4, 4)}, "activation width of 4"),
        ({"depthwise": LayerBits(2, 8)}, "share one width"),
        ({"other": LayerBits(4, 8)}, "another model"),
    ]:
        with pytest.raises(PolicyError, match=says):
            space.genome(HybridPolicy({**good, **change}))
    with pytest.raises(PolicyError, match="lacks head"):
        space.genome(HybridPolicy({name: good[name] for name in SITES[:-1]}))


def test_dynamic_activations_are_those_of_linear_layers(tiny: torch.nn.Module) -> None:
    table = find_sites(tiny, lambda m: m(torch.randn(2, 1, 8, 8)), 2)
    config = Config(activation_bits=(4, 8, 16), activation_scheme="dynamic")
    space = SearchSpace.build(table, config)
    policy = space.policy(space.top * 0)
    assert {name: bits.dynamic for name, bits in policy.items()} == {name: name == "head" for name in SITES}
    assert not space.policy(space.top)["head"].dynamic  # float
    assert np.array_equal(space.genome(policy), space.top * 0)
    static = SearchSpace.build(table, Config(activation_bits=(4, 8, 16)))
    with pytest.raises(PolicyError, match="'head' dynamic activations; this search space has static"):
        static.genome(policy)
    # Nothing is stored for them.
    saved = CostTable(static).activation_bytes - CostTable(space).activation_bytes
    assert saved[-1, 0].tolist() == [ACTIVATION_QPARAM_BYTES, ACTIVATION_QPARAM_BYTES, 0]
    assert np.array_equal(CostTable(static).bitops, CostTable(space).bitops)


def test_tied_sites_with_and_without_input() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    ids = torch.zeros(2, 3, dtype=torch.long)
    space = SearchSpace.build(find_sites(Tied(), lambda m: m(ids), 2), Config())
    policy = space.policy(space.top)
    assert (policy["embed"], policy["head"]) == (LayerBits(8, 16), LayerBits(8, 8))
    assert np.array_equal(space.genome(policy), space.top)


def test_embeddings_may_have_widths_of_their_own() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4))
    table = find_sites(model, lambda m: m(torch.zeros(1, 3, dtype=torch.long)), 1)
    space = SearchSpace.build(table, Config(weight_bits=(2, 4), embedding_bits=(1, 2)))
    assert {group.name: group.weight_bits for group in space.groups} == {"0": (1, 2), "1": (2, 4)}
    same = SearchSpace.build(table, Config(weight_bits=(2, 4)))
    assert {group.weight_bits for group in same.groups} == {(2, 4)}
