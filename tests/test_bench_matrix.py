"""The benchmark matrix does what it says: budgets are kept, rows are resumable, failures leave their reason.

No accuracies: those are the benchmark's own findings.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hq_plugin import Budget, Config, HybridPolicy
from hq_plugin.batch import Batch
from hq_plugin.distillation import loss_function
from tests.benchmarks.matrix import claims, evopress, haq, page, pictures, rank_correlation, rows, run
from tests.benchmarks.matrix.allocators import ALLOCATORS, Problem
from tests.benchmarks.matrix.budget_moves import filled, keeps, lowered, random_genome
from tests.benchmarks.matrix.ddpg import Agent
from tests.benchmarks.matrix.hawq import hawq_losses, hessian_traces, twice_differentiable
from tests.benchmarks.matrix.measures import Classification
from tests.benchmarks.matrix.methods import METHODS, Runner, methods_of, untrained
from tests.benchmarks.matrix.run import Plan
from tests.benchmarks.matrix.tasks import Task, task
from tests.benchmarks.packaged import Missing

BUDGET = "4bit"


@pytest.fixture(scope="module")
def small(trained: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Task:
    """The tests' network on digits, as a task of a few steps."""
    x, y = (torch.cat(parts) for parts in zip(*batches[:3], strict=True))
    config = Config(effort="smoke", progress=False)
    measure = Classification(trained, x, y)
    work: dict[str, Any] = {"steps": 4, "meta": 2, "evaluations": 12, "episodes": 8}
    return Task("tiny", trained, batches[3:12], measure, config, budgets=(BUDGET,), **work)


@pytest.fixture(scope="module")
def problem(small: Task) -> Problem:
    return untrained(small, 0)


def builds(made: Task) -> Any:
    return lambda name, data: made


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("budget", ["3.4bit", "5bit", "6KB"])
def test_allocators_keep_the_budget(problem: Problem, name: str, budget: str) -> None:
    resources = problem.session.costs.resources(Budget.parse(budget))
    found = ALLOCATORS[name](problem, resources)
    assert keeps(problem.session.space.genome(found.policy), resources)


def test_searches_use_the_budget_up(problem: Problem) -> None:
    space, resources = problem.session.space, problem.session.costs.resources(Budget.parse(BUDGET))
    for seed in range(5):
        genome = random_genome(space, resources, np.random.RandomState(seed))
        for place in map(tuple, np.argwhere(genome < space.top)):
            wider = genome.copy()
            wider[place] += 1
            assert not keeps(wider, resources)


def test_lowering_leaves_what_is_to_stay(problem: Problem) -> None:
    space, resources = problem.session.space, problem.session.costs.resources(Budget.parse(BUDGET))
    found = lowered(space.top, resources, np.random.RandomState(0), keep=[0])
    assert found is not None
    assert (found[0] == space.top[0]).all()
    assert keeps(found, resources)
    everything = range(len(space.groups))
    assert lowered(space.top, resources, np.random.RandomState(0), keep=everything) is None


def test_trace_of_a_linear_model_is_exact() -> None:
    """For `y = Wx` and half the squared error, the Hessian of W is `I ⊗ mean(x xᵀ)`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3, bias=False))
    x = torch.randn(32, 5)

    def half_squared(student: Tensor, teacher: Tensor) -> Tensor:
        return 0.5 * (student - teacher).square().sum(1).mean()

    batch = Batch((x,), {}, None, len(x))
    found = hessian_traces(model, ["0"], [batch], half_squared, probes=1000)["0"]
    assert found == pytest.approx(3 * float(x.square().sum(1).mean()), rel=0.06)


def half_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """A distance whose Hessian in the output is the identity."""
    return 0.5 * (student - teacher).square().sum()


def test_traces_of_layers_do_not_mix() -> None:
    """Two independent diagonal quadratics: each sign vector gives each trace exactly."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a.weight * x, 2 * self.b.weight * x], 1)

    model = Scales()
    batch = Batch((torch.ones(1, 4),), {}, None, 1)

    found = hessian_traces(model, ["a", "b"], [batch], half_squared, probes=1)
    assert found == {"a": pytest.approx(4.0), "b": pytest.approx(16.0)}


def test_traces_of_class_scores_are_those_of_the_gauss_newton_matrix() -> None:
    """For `softmax(Wx)`, the Hessian of W is `(diag(p) - p pᵀ) ⊗ x xᵀ`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3, bias=False))
    x = torch.randn(16, 5)
    p = model(x).detach().softmax(1)
    wanted = ((p - p.square()).sum(1) * x.square().sum(1)).mean()
    loss = twice_differentiable(loss_function("kl", model(x)))
    found = hessian_traces(model, ["0"], [Batch((x,), {}, None, len(x))], loss, probes=1000)["0"]
    assert found == pytest.approx(float(wanted), rel=0.06)


def test_traces_behind_activations_without_a_second_derivative() -> None:
    """torch has no second derivative of `hardswish`; that of 0.5 |hardswish(Wx)|² is the Gauss-Newton matrix's."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(4, 1, bias=False), nn.Hardswish()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.layer.weight * x)

    torch.manual_seed(0)
    model, x = Net(), torch.ones(1, 4)
    w = model.layer.weight.detach()
    assert bool((w.abs() < 3).all())
    wanted = float(((2 * w + 3) / 6).square().sum())

    found = hessian_traces(model, ["layer"], [Batch((x,), {}, None, 1)], half_squared, probes=1)["layer"]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_an_embedding_that_no_token_reads_has_no_trace() -> None:
    """Parts of a split embedding may be read by no token of a batch; torch fails on their second derivative."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.unread = nn.Embedding(4, 3), nn.Embedding(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.cat([self.read(ids), self.unread(ids[:0])])

    batch = Batch((torch.tensor([0, 2]),), {}, None, 2)
    found = hessian_traces(Parts(), ["read", "unread"], [batch], half_squared, probes=1)
    assert found == {"read": pytest.approx(6.0), "unread": 0.0}


def test_hawq_losses_fall_with_width(problem: Problem) -> None:
    losses = hawq_losses(problem.session, probes=8)
    assert losses.shape == problem.session.costs.weight_bytes.shape
    assert (losses >= 0).all()
    summed = losses.sum(axis=(0, 2))
    assert (np.diff(summed) < 0).all()
    assert summed[-1] > 0


def toy_score(problem: Problem, seed: int = 0) -> Any:
    """An additive score with strong preferences."""
    space = problem.session.space
    weights = np.random.RandomState(seed).rand(len(space.groups)) ** 3

    def score(policy: HybridPolicy, share: float = 1.0) -> float:
        lacking = space.top[:, 0] - space.genome(policy)[:, 0]
        return float((weights * lacking).sum()) + 0.01

    return score


def test_agent_learns_an_additive_reward() -> None:
    """Once its noise has faded, the agent's actions are much better than random ones."""
    agent = Agent(3, layers=4, warmup=20, seed=0)
    states = [np.array([i / 4, i % 2, 1.0], dtype=np.float32) for i in range(4)]
    wanted, gains = np.array([0.0, 1.0, 0.0, 1.0]), []
    for _ in range(110):
        actions = [agent.act(state) for state in states]
        gains.append(-float(np.square(np.array(actions) - wanted).mean()))
        agent.learn(states, actions, gains[-1])
    assert np.mean(gains[-10:]) > 0.5 * np.mean(gains[:20])  # both are negative


def test_haq_finds_more_than_its_random_start(problem: Problem) -> None:
    resources = problem.session.costs.resources(Budget.parse(BUDGET))
    found = haq.learn(problem.session.space, resources, toy_score(problem), 60, seed=0)
    assert found.score <= found.curve[10][2]
    assert found.scored <= 60
    assert keeps(found.genome, resources)
    assert [point[2] for point in found.curve] == sorted((point[2] for point in found.curve), reverse=True)


def test_haq_stops_at_what_is_enough(problem: Problem) -> None:
    resources = problem.session.costs.resources(Budget.parse(BUDGET))
    found = haq.learn(problem.session.space, resources, toy_score(problem), 60, seed=0, enough=1e9)
    assert len(found.curve) == 1


def test_evopress_never_exceeds_the_budget(problem: Problem) -> None:
    space, resources = problem.session.space, problem.session.costs.resources(Budget.parse(BUDGET))
    inner, seen = toy_score(problem), []

    def score(policy: HybridPolicy, share: float) -> float:
        seen.append(policy)
        return inner(policy)

    found = evopress.evolve(space, resources, score, 80, seed=0)
    assert all(keeps(space.genome(policy), resources) for policy in seen)
    assert found.scored == len(seen)
    assert found.evaluations <= 80
    bests = [best for _, best in found.curve]
    assert bests == sorted(bests, reverse=True)
    assert bests[-1] <= bests[0]


def test_switches_keep_the_budget_full(problem: Problem) -> None:
    space, resources = problem.session.space, problem.session.costs.resources(Budget.parse(BUDGET))
    rng = np.random.RandomState(0)
    genome = filled(np.zeros_like(space.top), space.top, resources, rng)
    for _ in range(50):
        mutant = evopress.switched(genome, space.top, resources, rng)
        if mutant is not None:
            assert keeps(mutant, resources)
            genome = mutant


def test_rows_have_what_the_issue_asks_for(small: Task) -> None:
    runner = Runner(small, 0)
    for method in ("uniform_ptq", "dynamic_programming", "hq_dense"):
        row = runner.row(method, BUDGET)
        assert "error" not in row, row["error"]
        assert row["effective_bits"] <= 4
        assert row["trained_steps"] == (0 if method == "uniform_ptq" else 4)
        measured = ("kl", "agreement", "accuracy", "float_accuracy", "bytes", "bitops", "scored", "seconds")
        for name in (*measured, "peak_memory"):
            assert row[name] is not None
        json.dumps(row)


@pytest.mark.parametrize("method", ["uniform", "dynamic_programming", "hawq", "hq_table"])
def test_inputs_are_searched_where_bitops_are_limited(small: Task, method: str) -> None:
    runner = Runner(small, 0)
    plain = runner.row(method, "4bit")
    limit = plain["bitops"] * 0.6
    row = runner.row(method, f"4bit + {limit / 1e3:.3f}kBitOps")
    assert "error" not in row, row["error"]
    assert row["bitops"] <= limit
    assert {inputs for _, inputs in plain["policy"].values()} == {8}
    assert {inputs for _, inputs in row["policy"].values()} != {8}


def test_rows_are_never_measured_twice(small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def row(self: Runner, method: str, budget: str) -> rows.Row:
        calls.append(method)
        head = {"model": "tiny", "seed": self.seed, "method": method, "budget": budget, "steps": self.steps}
        failed = method == "hawq" and len(calls) < 5
        return {**head, **({"error": "ValueError: no"} if failed else {"distance": 1.0})}

    monkeypatch.setattr(Runner, "row", row)
    path, plan = tmp_path / "matrix.jsonl", Plan(methods=("random", "hawq"), models=("tiny",), seeds=(0,))
    assert len(list(run.run(plan, path, builds(small)))) == 2
    path.write_text(path.read_text() + '{"cut')  # a stop in the middle of a line
    assert list(run.run(plan, path, builds(small))) == []
    other = Plan(methods=("random",), models=("tiny",), seeds=(0,), steps=7)
    assert len(list(run.run(other, path, builds(small)))) == 1
    retry = Plan(methods=("random", "hawq"), models=("tiny",), seeds=(0,), retry=True)
    assert [found["method"] for found in run.run(retry, path, builds(small))] == ["hawq"]
    calls += ["", ""]
    assert [found["method"] for found in run.run(retry, path, builds(small))] == ["hawq"]
    assert list(run.run(retry, path, builds(small))) == []


def test_a_failing_method_leaves_its_reason(small: Task, tmp_path: Path) -> None:
    plan = Plan(methods=("uniform", "hq_dense"), models=("tiny",), seeds=(0,), budgets=("0.1bit",))
    found = list(run.run(plan, tmp_path / "matrix.jsonl", builds(small)))
    assert len(found) == 2
    assert all("cannot be met" in row["error"] for row in found)


def test_missing_tasks_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(models=("cifar10", "imagenet:resnet18"))
    assert list(run.run(plan, tmp_path / "matrix.jsonl")) == []
    assert capsys.readouterr().out.count("--data") == 2
    with pytest.raises(Missing, match="no folder 'train'"):
        task("imagenet:resnet18", tmp_path)
    with pytest.raises(KeyError, match="resnet20"):
        task("resnet2000")


def test_methods_of_a_task(small: Task) -> None:
    assert "hq_dense" in methods_of(small)
    assert "hq_auto" not in methods_of(small)
    assert set(methods_of(small)) < set(METHODS)


def test_draws_of_the_rank_correlation(problem: Problem) -> None:
    costs = problem.session.costs
    within = [rank_correlation.draw(problem, "within", number, BUDGET)[0] for number in range(6)]
    assert len(set(within)) > 3
    assert within == [rank_correlation.draw(problem, "within", number, BUDGET)[0] for number in range(6)]
    for policy in within:
        assert costs.costs(problem.session.space.genome(policy)).weight_bits <= 4
    across = [rank_correlation.draw(problem, "across", number, BUDGET)[2] for number in range(6)]
    assert len(set(across)) > 3
    assert problem.session.baselines(BUDGET)["dynamic_programming"] not in within


def test_training_pictures_are_stamps_on_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(pretrained_cfg={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    monkeypatch.setattr(pictures, "STAMPS", tmp_path)
    with pytest.raises(Missing, match="tuxpaint-stamps-default"):
        pictures.training_pictures(model, 1)
    (tmp_path / pictures.SIGNS).mkdir()
    Image.new("RGBA", (8, 8), (0, 255, 0, 255)).save(tmp_path / pictures.SIGNS / "letter.png")
    red = Image.new("RGBA", (40, 30), (255, 0, 0, 255))
    red.paste((0, 0, 0, 0), (0, 0, 10, 30))  # a transparent quarter
    red.save(tmp_path / "thing.png")
    monkeypatch.setattr(pictures, "photographs", lambda package: [torch.full((3, 50, 60), 0.25)])
    made = pictures.training_pictures(model, 6, size=32)
    assert made.shape == (6, 3, 32, 32)
    covered = (made[:, 0] > 0.95).float().mean((1, 2))
    assert (covered > 0.1).all()
    assert (covered < 0.8).all()
    assert (made[:, 1] < 0).all(), "no sign"
    # What no stamp covers is the photograph.
    assert torch.isclose(made[:, 0], torch.tensor(-0.5), atol=1e-3).float().mean() > 0.2
    assert torch.equal(made, pictures.training_pictures(model, 6, size=32))


def test_claims_are_resumable_and_shown(small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "tasks_of", lambda plan: iter([small]))
    monkeypatch.setattr(claims, "PATIENCE", 1)
    path, plan = tmp_path / "claims.jsonl", Plan(models=("tiny",), seeds=(0,))
    found = list(claims.run(plan, claims.CLAIMS, 2, 3, path))
    assert [row.get("error") for row in found] == [None] * len(found)
    assert len(found) == 1 + 3 + 6  # a search; separate runs of two kinds and the session; two pools of three
    assert list(claims.run(plan, claims.CLAIMS, 2, 3, path)) == []
    page.write(tmp_path / "matrix.md", tmp_path / "none.jsonl", tmp_path / "none.jsonl", path)
    text = (tmp_path / "matrix.md").read_text()
    told = "trained end to end |", "trained as hq_plugin trains |", "within 4bit", "across budgets"
    for wanted in ("reinforcement-learning", "one session", *told):
        assert wanted in text


def test_page_renders_means_ratios_and_failures(tmp_path: Path) -> None:
    def row(method: str, seed: int, distance: float, **more: Any) -> rows.Row:
        base = {"model": "m", "seed": seed, "method": method, "budget": "3bit", "steps": 10, "distance": distance}
        return {**base, "kl": distance, "effective_bits": 2.9, "bytes": 100, "bitops": 1e6, "scored": 3, **more}

    for item in (
        row("hq_dense", 0, 0.1, total_seconds=5.0, peak_memory={"process": 1e9}),
        row("hq_dense", 1, 0.3),
        row("uniform", 0, 0.5, float_accuracy=0.875, trained_steps=10),
        row("uniform", 1, 0.7),
        row("hawq", 0, 0.4),
        row("hawq", 1, 0.4),
        {"model": "m", "seed": 0, "method": "haq", "budget": "3bit", "steps": 10, "error": "ValueError: broke\nx"},
    ):
        rows.append(tmp_path / "matrix.jsonl", item)
    shipped = {name: value for name, value in row("modelopt", 0, 0.9).items() if name != "steps"}
    rows.append(tmp_path / "rivals.jsonl", shipped)
    page.write(tmp_path / "matrix.md", tmp_path / "matrix.jsonl", tmp_path / "rivals.jsonl", tmp_path / "none")
    text = (tmp_path / "matrix.md").read_text()
    assert "0.2000 ± 0.1414" in text
    assert "**0.50**" in text
    assert "## m, float accuracy 0.8750" in text
    assert "`ValueError: broke`" in text
    assert "modelopt" in text
    assert (tmp_path / "matrix-m.svg").read_text().startswith("<?xml")
