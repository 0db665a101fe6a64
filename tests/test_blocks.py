import copy

import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from hq_plugin import Config
from hq_plugin.batch import Batch, make_batch
from hq_plugin.blocks import BlockOutputs, find_blocks
from hq_plugin.data import prepare_data
from hq_plugin.distillation import loss_function
from hq_plugin.rates import Rates
from hq_plugin.training import Task, train
from tests.conftest import SITES, TinyNet


def linear_sites(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]


def test_blocks_of_families() -> None:
    found = {}
    for name in ("resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto"):
        model = timm.create_model(name)
        found[name] = find_blocks(model, linear_sites(model))
    assert found["resnet18"] == [f"layer{stage}.{number}" for stage in (1, 2, 3, 4) for number in (0, 1)]
    assert found["vit_tiny_patch16_224"] == [f"blocks.{number}" for number in range(12)]
    assert found["mobilenetv3_small_050"][:3] == ["blocks.0.0", "blocks.1.0", "blocks.1.1"]
    assert "stages.2.blocks.5" in found["convnext_atto"]
    assert not any("conv_dw" in name or "mlp" in name for names in found.values() for name in names)


def test_blocks_of_transformers() -> None:
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16))
    assert find_blocks(bert, linear_sites(bert)) == ["encoder.layer.0", "encoder.layer.1"]
    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=32)
    )
    assert find_blocks(llama, linear_sites(llama)) == ["model.layers.0", "model.layers.1"]


def test_without_repeated_parts_the_layers_are_the_blocks() -> None:
    assert find_blocks(TinyNet(), SITES) == SITES
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert find_blocks(plain, ["0", "2"]) == ["0", "2"]


def test_distance_is_the_mean_relative_error_over_blocks() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[1].bias.add_(0.5)
    batch = make_batch(torch.randn(16, 3), lambda x: ((x,), {}, None))
    outputs = BlockOutputs(["0", "1"])
    with outputs.watching(student, teacher, batch) as watched, torch.no_grad():
        expected = batch.run(teacher)
        batch.run(student)
        distance = watched.distance(batch)
        assert float(watched.distance(batch)) == 0.0  # what was compared is forgotten
    torch.testing.assert_close(distance, 0.25 / expected.var(correction=0) / 2)
    batch.run(student)  # nobody watches any more
    assert not outputs._seen
    assert not student[0]._forward_hooks


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=30)
    ).eval()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    batch = make_batch({"input_ids": torch.randint(0, 30, (2, 4)), "attention_mask": mask}, lambda x: ((), x, None))
    student = copy.deepcopy(bert)

    def spoil(module: nn.Module, args: object, output: object) -> object:
        state = output[0] if isinstance(output, tuple) else output
        state[~mask.bool()] += 100.0  # type: ignore[index]
        return output

    student.encoder.layer[1].register_forward_hook(spoil)
    with (
        BlockOutputs(["encoder.layer.0", "encoder.layer.1"]).watching(student, bert, batch) as watched,
        torch.no_grad(),
    ):
        batch.run(bert)
        batch.run(student)
        assert float(watched.distance(batch)) == pytest.approx(0.0, abs=1e-9)


def test_training_brings_the_blocks_closer(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    data = prepare_data(batches, trained, Config(effort="smoke"))
    blocks = ["stem", "depthwise", "pointwise"]
    distances = {}
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        student = copy.deepcopy(trained)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        loss = loss_function("kl", torch.randn(2, 10))
        train(Task("test", student, trained, data, loss, 40, Rates(3e-3, 3e-3), blocks=blocks, block_loss=weight))
        with BlockOutputs(blocks).watching(student, trained, data.holdout[0]) as watched, torch.no_grad():
            data.holdout[0].run(trained)
            data.holdout[0].run(student)
            distances[weight] = float(watched.distance(data.holdout[0]))
    assert distances[3.0] < 0.7 * distances[0.0]


def test_blocks_lead_until_a_share_of_the_steps_and_are_not_kept_after(  # type: ignore[no-untyped-def]
    trained: nn.Module, batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def distance(self: BlockOutputs, batch: Batch) -> torch.Tensor:
        kept.append(sum(map(len, self._seen.values())))
        return compare(self, batch)

    compare = BlockOutputs.distance
    monkeypatch.setattr(BlockOutputs, "distance", distance)
    left: list[int] = []

    def forget(self: BlockOutputs) -> None:
        left.append(len(self._seen))
        let_go(self)

    let_go = BlockOutputs.forget
    monkeypatch.setattr(BlockOutputs, "forget", forget)
    data = prepare_data(batches, trained, Config(effort="smoke"))
    loss, rates = loss_function("kl", torch.randn(2, 10)), Rates(1e-4, 1e-4)
    blocks = {"blocks": ["stem", "pointwise"], "block_loss": 2.0, "blocks_until": 0.5}
    task = Task("test", copy.deepcopy(trained), trained, data, loss, 8, rates, **blocks)  # type: ignore[arg-type]
    assert [task.block_loss_at(step) for step in range(8)] == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    train(task)
    assert kept == [2] * 4
    assert left[-1] == 0  # what ran after has left nothing
