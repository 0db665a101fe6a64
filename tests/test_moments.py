import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hq_plugin import Config, ConfigError
from hq_plugin.batch import Batch
from hq_plugin.distillation import RelativeError, kl_divergence
from hq_plugin.meta_training import build_network
from hq_plugin.moments import collect_moments, fisher_losses
from hq_plugin.sites import SiteTable, find_sites
from hq_plugin.space import SearchSpace


class Words(nn.Module):
    """An embedding, a hidden layer and a head that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(20, 32), nn.Linear(32, 48), nn.Linear(48, 6)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.hidden(self.embed(ids))))}


@pytest.fixture
def setting() -> tuple[Words, SiteTable, list[Batch]]:
    torch.manual_seed(0)
    model = Words().eval().requires_grad_(False)
    with torch.no_grad():
        model.head.weight.mul_(3)
    batches = [Batch((torch.randint(15, (32, 8)),), {}, None, 32) for _ in range(4)]
    return model, find_sites(model, batches[0].run, 32), batches


def test_the_moments_are_means_of_squares(setting: tuple[Words, SiteTable, list[Batch]]) -> None:
    model, table, batches = setting
    moments = collect_moments(model, table, batches, seed=0)
    assert set(moments) == {"embed", "hidden", "head"}
    ids = torch.cat([batch.args[0] for batch in batches])
    torch.testing.assert_close(moments["hidden"].inputs, model.embed(ids).flatten(0, 1).square().mean(0))
    torch.testing.assert_close(moments["embed"].inputs.sum(), torch.tensor(1.0))
    assert float(moments["embed"].inputs[15:].sum()) == 0.0
    assert moments["head"].outputs.shape == (6,)
    assert not any(parameter.requires_grad for parameter in model.parameters())


class States(Words):
    """The same without class scores: hidden states, and something beside them that counts a tenth."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        states = super().forward(ids)["logits"]
        return {"last_hidden_state": 3 * states + 5, "first": states[:, 0]}


@pytest.mark.parametrize(
    ("made", "distance"),
    [
        (None, lambda found, wanted: kl_divergence(found["logits"], wanted["logits"])),
        (States, lambda found, wanted: RelativeError([wanted])(found, wanted)),
    ],
    ids=["divergence", "squared error without class scores"],
)
def test_the_second_order_estimate_is_the_distance(
    setting: tuple[Words, SiteTable, list[Batch]],
    made: type[Words] | None,
    distance: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor],
) -> None:
    model, table, batches = setting
    model = model if made is None else made().eval().requires_grad_(False)
    moments = collect_moments(model, table, batches, seed=0)
    ids = torch.cat([batch.args[0] for batch in batches])
    for name in moments:
        found, expected = 0.0, 0.0
        for seed in range(20):
            torch.manual_seed(seed)
            changed = copy.deepcopy(model)
            weight = changed.get_submodule(name).weight
            error = 0.02 * weight.std() * torch.randn_like(weight)
            weight.add_(error)
            found += moments[name].loss(error)
            expected += float(distance(changed(ids), model(ids)))
        assert found == pytest.approx(expected, rel=0.3), name


def test_the_estimate_holds_where_the_loss_has_fewer_positions_than_a_layer() -> None:
    torch.manual_seed(0)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 6)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(torch.tanh(self.body(x)).mean(1))
            return found

    model = Pooled().eval().requires_grad_(False)
    with torch.no_grad():
        model.head.weight.mul_(10)
    batches = [Batch((torch.randn(64, 50, 16),), {}, None, 64) for _ in range(4)]
    moments = collect_moments(model, find_sites(model, batches[0].run, 64), batches, seed=0)
    for name in ("body", "head"):
        found, expected = 0.0, 0.0
        for seed in range(10):
            torch.manual_seed(seed)
            changed = copy.deepcopy(model)
            weight = changed.get_submodule(name)._parameters["weight"]
            assert weight is not None
            error = 0.05 * weight.std() * torch.randn_like(weight)
            weight.add_(error)
            found += moments[name].loss(error)
            for batch in batches:
                expected += float(kl_divergence(batch.run(changed), batch.run(model))) / len(batches)
        assert 0.5 < found / expected < 2, name


def test_losses_of_widths(setting: tuple[Words, SiteTable, list[Batch]]) -> None:
    model, table, batches = setting
    config = Config(activation_bits=16, group_size=16, weight_bits=(2, 3, 4, 8), pinned={"embed": 4}).filled()
    space = SearchSpace.build(table, config)
    from hq_plugin.data import Data

    moments = collect_moments(model, table, batches, seed=0)
    network = build_network(model, space, Data(batches, batches), config)
    losses = fisher_losses(network, space, moments)
    assert losses.shape == (3, 4)
    assert losses[0, 0] == 0
    assert torch.isinf(torch.tensor(losses[0, 1:])).all()
    for row in losses[1:]:
        assert row[0] > 2 * row[1] > 4 * row[2] > 0
        assert row[3] == 0


class OddEmbedding(nn.Embedding):
    """Called with a mask, looks up positions behind an offset, and scales them."""

    def forward(self, mask: Tensor) -> Tensor:
        return 5 * super().forward(mask.long().cumsum(1) + 1)


def test_embeddings_are_seen_where_they_look_up() -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.head = OddEmbedding(20, 32), nn.Linear(32, 6)

        def forward(self, mask: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.positions(mask))}

    model = Model().eval().requires_grad_(False)
    batch = Batch((torch.ones(4, 8),), {}, None, 4)
    moments = collect_moments(model, find_sites(model, batch.run, 4), [batch], 0)
    assert moments["positions"].inputs.nonzero().flatten().tolist() == list(range(2, 10))
    # The gradient at what was looked up, and not at what became of it: 25 times as large.
    plain = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 6)).eval().requires_grad_(False)
    plain[0].weight, plain[1].weight, plain[1].bias = (
        nn.Parameter(5 * model.positions.weight, requires_grad=False),
        model.head.weight,
        model.head.bias,
    )
    ids = torch.arange(2, 10).expand(4, 8)

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = plain

        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.body(ids)}

    other = Batch((ids,), {}, None, 4)
    expected = collect_moments(Scores(), find_sites(Scores(), other.run, 4), [other], 0)["body.0"]
    torch.testing.assert_close(moments["positions"].outputs, 25 * expected.outputs)


def test_it_needs_an_output_that_hangs_on_the_layers() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).detach().unsqueeze(1)

    model = Cut()
    batch = Batch((torch.randn(2, 5, 4),), {}, None, 2)
    with pytest.raises(ConfigError, match=r'hangs on the layers.*"measured"'):
        collect_moments(model, find_sites(model, batch.run, 2), [batch], 0)


def test_convolutions_have_the_second_order_of_what_errors_cost() -> None:
    """The KL divergence that small random errors of a convolution make, against what its moments say."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)).eval()
    model.requires_grad_(False)
    with torch.no_grad():
        model[3].weight.mul_(4)  # type: ignore[operator]
    batches = [Batch((torch.randn(64, 1, 8, 8),), {}, None, 64) for _ in range(8)]
    moments = collect_moments(model, find_sites(model, batches[0].run, 64), batches, seed=0)
    assert set(moments) == {"0", "3"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    predicted, measured = 0.0, 0.0
    for _ in range(40):
        error = 1e-2 * torch.randn(6, 1, 3, 3) * torch.rand(6, 1, 1, 1)
        noisy = copy.deepcopy(model)
        noisy[0].weight += error  # type: ignore[operator]
        predicted += moments["0"].loss(error)
        measured += sum(float(kl_divergence(batch.run(noisy), batch.run(model))) for batch in batches) / 8
    assert predicted == pytest.approx(measured, rel=0.15)


def test_a_model_may_change_what_a_layer_returned_in_place() -> None:
    class InPlace(Words):
        def forward(self, ids: Tensor) -> dict[str, Tensor]:
            hidden = self.hidden(self.embed(ids).mul_(2.0))
            return {"logits": self.head(hidden.tanh_())}

    torch.manual_seed(0)
    model = InPlace().eval().requires_grad_(False)
    batch = Batch((torch.randint(20, (4, 6)),), {}, None, 4)
    moments = collect_moments(model, find_sites(model, batch.run, 4), [batch], seed=0)
    assert set(moments) == {"embed", "hidden", "head"}
    assert all(bool((seen.outputs > 0).all()) for seen in moments.values())  # type: ignore[union-attr]


class Grouped(nn.Linear):
    """Multiplies each group of inputs by the rows of that group."""

    def forward(self, x: Tensor) -> Tensor:  # [..., groups, inputs] to [..., groups, rows of a group]
        groups = self.weight.view(x.shape[-2], -1, x.shape[-1])
        return torch.einsum("...gi,goi->...go", x, groups)


def test_a_layer_that_multiplies_by_parts_of_its_weight_has_the_moments_of_its_gradient() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped, self.head = Grouped(8, 24, bias=False), nn.Linear(24, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.grouped(x.view(-1, 4, 8)).flatten(1))}

    torch.manual_seed(0)
    model = Model().eval().requires_grad_(False)
    batches = [Batch((torch.randn(32, 32),), {}, None, 32) for _ in range(4)]
    moments = collect_moments(model, find_sites(model, batches[0].run, 32), iter(batches), seed=0)
    assert moments["grouped"].gradient.shape == (24, 8)  # type: ignore[union-attr]
    assert float(moments["grouped"].gradient.min()) > 0  # type: ignore[union-attr]
    assert moments["head"].inputs.shape == (24,)
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Masked(Words):
    """The same as a language model has it: with a mask."""

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(ids)


def test_padding_changes_no_moments() -> None:
    torch.manual_seed(0)
    model = Masked().eval().requires_grad_(False)
    ids = torch.randint(1, 20, (16, 4))
    padded = torch.cat([ids, torch.zeros(16, 12, dtype=torch.long)], dim=1)
    mask = (padded > 0).long()
    plain, masked = Batch((ids,), {}, None, 16), Batch((padded,), {"attention_mask": mask}, None, 16)
    table = find_sites(model, plain.run, 16)
    wanted, found = (collect_moments(model, table, [batch], seed=0) for batch in (plain, masked))
    for name, moments in wanted.items():
        for part in ("inputs", "outputs"):
            torch.testing.assert_close(getattr(found[name], part), getattr(moments, part))
