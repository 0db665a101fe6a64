"""The pipeline on a real, small problem: digits, and a network that was trained on them."""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hq_plugin as hq
from hq_plugin import (
    ArtifactError,
    Budget,
    BudgetError,
    HQWarning,
    HybridPolicy,
    LayerBits,
    ModelError,
    PolicyError,
    Result,
)
from hq_plugin.explore.planner import Planner
from hq_plugin.nn import packed_modules
from hq_plugin.session import Session
from hq_plugin.session_store import read_session_outline
from hq_plugin.storage import JSON_FILE, TENSOR_FILE

OPTIONS = {"meta_steps": 200, "finetune_steps": 60, "search_evaluations": 40, "holdout": 128, "effort": "smoke"}


@pytest.fixture(scope="module")
def session(trained: nn.Module, batches) -> Session:  # type: ignore[no-untyped-def]
    return hq.meta_train(trained, batches, activation_bits=(4, 8), **OPTIONS)


def test_meta_training_lowers_the_loss(session: Session) -> None:
    losses = [record["loss"] for record in session.history]
    assert len(losses) == 200
    assert np.mean(losses[-15:]) < np.mean(losses[:15])


def test_the_metaquantnet_is_trained_and_not_the_teacher(session: Session, trained: nn.Module) -> None:
    blocks = [p for name, p in session.network.named_parameters() if "block.outer" in name]
    assert blocks
    assert all(float(p.detach().abs().max()) > 0 for p in blocks)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), session.teacher.parameters(), strict=True))


@pytest.mark.parametrize("budget", ["2.8bit", "3bit", "5bit", "20%", "900B", "2MBitOps + 3.2bit"])
def test_every_budget_is_kept_and_used(session: Session, budget: str) -> None:
    found = session.search(budget)
    assert all(share <= 1 for share in found.used.values())
    # A uniform policy seldom fills a budget; it is given only where it is better than what the search found.
    assert max(found.used.values()) >= 0.97 or found.chosen == "uniform"
    searched = session.space.genome(found.baselines["searched"].policy)
    shares = [resource.used(searched) for resource in session.costs.resources(Budget.parse(budget))]
    assert 0.97 <= max(shares) <= 1
    limit = Budget.parse(budget)
    if limit.weight_bits:
        assert found.costs.weight_bits <= limit.weight_bits
    if limit.size:
        assert found.costs.size <= limit.size
    if limit.bitops:
        assert found.costs.bitops <= limit.bitops


def test_the_result_is_never_worse_than_a_baseline(session: Session) -> None:
    found = session.search("3bit")
    assert set(found.baselines) == {"searched", "dynamic_programming", "uniform"}
    assert found.baselines[found.chosen].kl == min(b.kl for b in found.baselines.values())
    assert found.policy == found.baselines[found.chosen].policy
    assert all(b.costs.weight_bits <= 3 for b in found.baselines.values())
    assert len(found.history) <= 40


def test_fine_tuning_that_leads_away_is_not_taken(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = session.baselines("3bit")["dynamic_programming"]
    untrained = session.finetune(policy, steps=0)
    monkeypatch.setattr(session, "config", replace(session.config, learning_rate=3.0))
    with pytest.warns(HQWarning, match="20 steps of fine-tuning ended at a distance of .* they are not taken"):
        packed = session.finetune(policy, steps=20)
    assert packed.hq.kl == untrained.hq.kl  # type: ignore[union-attr]
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(packed(x), untrained(x))


def test_rates_that_lead_away_fall(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = session.space.policy(session.space.top)  # close: BatchNorm keeps its statistics
    monkeypatch.setattr("hq_plugin.rates.RELATIVE_RATE", 1e-4)
    calm = session.finetune(policy, start="float", steps=60).hq
    monkeypatch.setattr("hq_plugin.rates.RELATIVE_RATE", 0.5)
    hot = session.finetune(policy, start="float", steps=60).hq
    assert calm.history["finetune"][0]["rates"] == 1.0  # type: ignore[union-attr]
    assert hot.history["finetune"][0]["rates"] < 1  # type: ignore[union-attr]
    assert len(hot.history["finetune"]) == 60  # type: ignore[union-attr]
    monkeypatch.setattr(session, "config", replace(session.config, learning_rate=1e-4))
    given = session.finetune(policy, start="float", steps=60).hq
    assert given.history["finetune"][0]["rates"] == 1.0  # type: ignore[union-attr]


def test_searching_trains_and_changes_nothing(session: Session) -> None:
    before = copy.deepcopy(session.network.state_dict())
    first, second = session.search("3bit"), session.search("3bit")
    assert first.policy == second.policy
    assert all(torch.equal(before[name], value) for name, value in session.network.state_dict().items())


def test_more_bits_are_closer(session: Session) -> None:
    found = session.pareto(["2.8bit", "4bit", "7bit"])
    distances = [f.baselines[f.chosen].kl for f in found]
    assert distances[0] > 1.5 * distances[1]
    assert distances[0] > 1.5 * distances[2]


def test_quantize_gives_a_packed_model_with_a_report(
    session: Session, trained: nn.Module, batches, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    model = session.quantize(
        "3bit", eval_fn=lambda m: float(m(batches[0][0]).argmax(1).eq(batches[0][1]).float().mean())
    )
    result = model.hq
    assert isinstance(result, Result)
    assert result.effective_bits <= 3
    assert result.budget == "3bit"
    assert result.kl < result.baselines[result.chosen].kl, "fine-tuning helps"
    assert result.accuracy is not None
    assert result.accuracy > 0.8
    assert result.metric is not None
    assert set(result.history) == {"meta_training", "search", "finetune"}
    assert sum(layer.bitops for layer in result.layers) == result.bitops
    assert {layer["name"] for layer in result.float_layers} == {"bn1", "bn2"}
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
    measured = session.scorer.measure(model)
    assert measured.distance == pytest.approx(result.kl)
    target = hq.save(model, tmp_path / "model")
    on_disk = sum(path.stat().st_size for path in target.iterdir())
    assert on_disk <= result.size * 1.01 + 64 * 1024, "the report is not what makes a model large"
    loaded = hq.load(target, trained)
    assert loaded.hq.baselines == result.baselines
    assert 0 < len(loaded.hq.history["search"]) <= 100


def test_a_given_policy(session: Session) -> None:
    names = [site.name for site in session.space.table]
    policy = HybridPolicy(dict.fromkeys(names, LayerBits(4, 8)))
    for start in ("generated", "float"):
        model = session.finetune(policy, start=start, steps=5)  # type: ignore[arg-type]
        assert model.hq.policy == policy
        assert len(model.hq.history["finetune"]) == 5
        assert model.hq.history["finetune"][0]["start"] == start
    with pytest.raises(PolicyError, match="another model"):
        session.finetune(HybridPolicy({"x": LayerBits(4)}))


def test_with_few_steps_the_closest_start_is_taken(session: Session) -> None:
    policy = HybridPolicy({site.name: LayerBits(2, 8) for site in session.space.table})
    untrained = {start: session.finetune(policy, start=start, steps=0).hq.kl for start in ("generated", "float")}
    assert untrained["generated"] < untrained["float"]  # 200 steps of meta-training have told them apart
    result = session.finetune(policy, steps=5).hq
    assert result.history["finetune"][0]["start"] == "generated"
    assert session.finetune(policy, steps=0).hq.kl == untrained["generated"]


def test_baselines_keep_the_budget(session: Session) -> None:
    policies = session.baselines("3bit")
    for policy in policies.values():
        assert session.costs.costs(session.space.genome(policy)).weight_bits <= 3
    assert len({bits.weight for bits in policies["uniform"].values()}) == 1


def test_saving_and_loading(session: Session, trained: nn.Module, batches, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    before = session.search("3bit")
    session.save(tmp_path / "session")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = hq.load_session(tmp_path / "session", trained, batches)
    after = loaded.search("3bit")
    assert after.policy == before.policy
    assert after.baselines == before.baselines
    assert loaded.history == session.history
    assert hq.load_session(tmp_path / "session", trained, batches, finetune_steps=3).config.steps.finetune == 3


def test_a_session_of_another_model(session: Session, trained: nn.Module, batches, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    target = session.save(tmp_path / "session")
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.head.bias.add_(1)
    with pytest.raises(ModelError, match="another float model"):
        hq.load_session(target, other, batches)
    with pytest.raises(ArtifactError, match="not a saved"):
        hq.load(target, trained)


def test_the_second_order_is_saved_and_plans(trained: nn.Module, batches, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = {**OPTIONS, "meta_steps": 1, "effort": "fast"}
    made = hq.meta_train(trained, batches, progress=False, **options)
    assert made.second_order is not None
    loaded = hq.load_session(made.save(tmp_path / "session"), trained, batches)
    np.testing.assert_array_equal(loaded.second_order, made.second_order)
    assert Planner(read_session_outline(tmp_path / "session"))._losses.tolist() == made.losses.table.tolist()
    measured = hq.meta_train(trained, batches, progress=False, sensitivities="measured", **options)
    assert measured.second_order is None
    np.testing.assert_array_equal(measured.sensitivities, made.sensitivities)


def test_damaged_sessions(session: Session, trained: nn.Module, batches, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    target = session.save(tmp_path / "session")
    content = json.loads((target / JSON_FILE).read_text())
    for key in ("config", "history", "tied", "sensitivities", "second_order"):
        (target / JSON_FILE).write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        with pytest.raises(ArtifactError, match="damaged"):
            hq.load_session(target, trained, batches)
    (target / JSON_FILE).write_text(json.dumps(content))
    (target / TENSOR_FILE).write_bytes(b"")
    with pytest.raises(ArtifactError, match="damaged"):
        hq.load_session(target, trained, batches)


def test_dynamic_inputs_that_may_stay_float() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    config = hq.Config(effort="smoke", activation_scheme="dynamic", activation_bits=(8, 16), progress=False)
    session = hq.meta_train(network, [torch.randn(16, 16) for _ in range(8)], config=config)
    for index, dynamic in ((0, True), (1, False)):
        policy = session.space.policy(session.space.top * [1, index])
        packed = session.finetune(policy, steps=1)
        assert {layer.bits.dynamic for layer in packed_modules(packed).values()} == {dynamic}


def test_one_budget_or_another_kind_of_policy_is_told_from_what_is_wanted(session: Session) -> None:
    with pytest.raises(BudgetError, match="several budgets"):
        session.pareto("3bit")
    with pytest.raises(PolicyError, match=r"HybridPolicy\.from_json"):
        session.finetune({"head": (4, 8)})  # type: ignore[arg-type]
