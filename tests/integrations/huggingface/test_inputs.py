"""Text as batches, and text that a model writes itself."""

import pytest
import torch

import hq_plugin
from hq_plugin import Config, ConfigError
from hq_plugin.integrations.huggingface.inputs import batches, written
from tests.integrations.huggingface.conftest import llama, tokenizer

TEXTS = ["the cat sat on the mat"] * 400


def config(**options: object) -> Config:
    given = {"effort": "smoke", "meta_steps": 4, "finetune_steps": 4, "holdout": 1, "batch_size": 2}
    return Config(processor=tokenizer(), sequence_length=8, **{**given, **options}).filled()  # type: ignore[arg-type]


def test_a_model_writes_its_share_of_the_calibration_text() -> None:
    model = llama()
    own = batches(model, TEXTS, config())
    mixed = batches(model, TEXTS, config(self_written=0.25))
    # (4 + 4) steps of 2, and 4 held out: 20 samples, a quarter of them written.
    assert len(mixed) == 20
    users = {tuple(row["input_ids"].tolist()) for row in own}
    assert sum(tuple(row["input_ids"].tolist()) in users for row in mixed) == 15


def test_what_is_written_follows_the_seed_and_leaves_the_caller_s_randomness_alone() -> None:
    model = llama()
    before = torch.random.get_rng_state()
    first = written(model, config(seed=1), 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.shape == (3, 8)
    assert torch.equal(first, written(model, config(seed=1), 3))
    assert not torch.equal(first, written(model, config(seed=2), 3))


def test_a_share_that_is_none() -> None:
    with pytest.raises(ConfigError, match="self_written=2 must be a share"):
        Config(self_written=2)


@pytest.mark.parametrize("rows", [False, True], ids=["batches", "rows"])
def test_pictures_in_patches(rows: bool) -> None:
    from transformers import Siglip2Config, Siglip2ForImageClassification

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Siglip2ForImageClassification(
        Siglip2Config(vision_config={**vision, "num_patches": 16, "patch_size": 4}, num_labels=3)
    ).eval()
    torch.manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        shapes = torch.tensor([[4, 4], [2, 8]])
        return {
            "pixel_values": torch.randn(2, 16, 48),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": shapes,
        }

    given = [batch() for _ in range(3)]
    data = [{name: value[i] for name, value in each.items()} for each in given for i in range(2)] if rows else given
    packed = hq_plugin.quantize(model, "4bit", data, effort="smoke", sensitivities="fisher", progress=False)
    assert packed(**given[0]).logits.shape == (2, 3)
