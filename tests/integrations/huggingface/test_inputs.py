"""Text as batches, and text that a model writes itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

import hq_plugin
from hq_plugin import Config, ConfigError, DataError
from hq_plugin.batch import Batch
from hq_plugin.integrations.huggingface.inputs import batches, written
from hq_plugin.integrations.huggingface.rows import splitter
from tests.integrations.huggingface.conftest import TEXTS as BOOK
from tests.integrations.huggingface.conftest import bart, bert, llama, t5, tokenizer, wav2vec2, whisper

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


def test_what_is_written_goes_on_after_an_end_and_knows_no_settings_but_the_distribution() -> None:
    model = llama()
    settings, vocabulary = model.generation_config, model.config.vocab_size
    end = vocabulary - 1
    settings.eos_token_id = model.config.eos_token_id = end
    settings.suppress_tokens, settings.max_new_tokens = list(range(vocabulary - 2)), 2
    found = written(model, config(), 64, length=32)
    assert found.shape == (64, 32)
    assert model.generation_config is settings
    assert (found[:, 1:-1] == end).any()
    assert len(found[:, 1:].unique()) > vocabulary / 2


def test_a_model_in_training_mode_writes_as_in_eval_mode() -> None:
    model = llama(attention_dropout=0.9)
    expected = written(model, config(), 3, length=32)
    model.train().lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(written(model, config(), 3, length=32), expected)
    assert [module.training for module in model.modules()] == modes


def test_a_model_of_sounds_in_training_mode_writes_as_in_eval_mode() -> None:
    model = whisper()
    torch.manual_seed(0)
    sounds = [torch.randn(16_000).numpy() for _ in range(4)]
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=400)
    settings = replace(config(), processor=extractor)
    expected = batches(model, sounds, settings).tensors["decoder_input_ids"]
    for name in ("dropout", "activation_dropout", "attention_dropout"):
        for module in model.modules():
            if hasattr(module, name):
                setattr(module, name, 0.9)
    model.train()
    assert torch.equal(batches(model, sounds, settings).tensors["decoder_input_ids"], expected)
    assert model.training


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


def test_padding_is_cut_from_all_that_has_a_value_for_each_token() -> None:
    model = bert()
    ids, mask = torch.randint(1, 60, (2, 32)), torch.zeros(2, 32, dtype=torch.long)
    mask[:, :12] = 1
    boxes = torch.zeros(2, 32, 4, dtype=torch.long)
    _, kwargs, _ = splitter(model)({"input_ids": ids, "attention_mask": mask, "bbox": boxes})
    assert {name: tuple(value.shape[:2]) for name, value in kwargs.items() if isinstance(value, torch.Tensor)} == {
        "input_ids": (2, 16),
        "attention_mask": (2, 16),
        "bbox": (2, 16),
    }
    _, kwargs, _ = splitter(model)({"input_ids": ids, "attention_mask": mask, "of_each_token": boxes})
    assert kwargs["input_ids"].shape == kwargs["of_each_token"].shape[:2] == (2, 32)


def test_what_a_decoder_reads_is_padded_and_masked() -> None:
    model = bart()
    model.config.pad_token_id = 7
    data = [{"input_ids": [5] * 4, "decoder_input_ids": [1, *[5] * (n % 3)]} for n in range(6)]
    found = batches(model, data, config()).tensors
    assert found["decoder_input_ids"][:3].tolist() == [[1, 7, 7], [1, 5, 7], [1, 5, 5]]
    assert found["decoder_attention_mask"][:3].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    given = [{**row, "decoder_attention_mask": [0, *[1] * (len(row["decoder_input_ids"]) - 1)]} for row in data]
    assert batches(model, given, config()).tensors["decoder_attention_mask"][2].tolist() == [0, 1, 1]
    assert "decoder_attention_mask" not in batches(model, data[:1] * 4, config()).tensors


@pytest.mark.parametrize("build", [bart, t5])
@torch.no_grad()
def test_a_decoder_s_padding_is_not_looked_at(build) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = build()
    ids, labels = torch.randint(2, 60, (2, 8)), torch.randint(2, 60, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0  # of the source 13 tokens count, of the target 11
    labels[0, 7:], labels[1, 4:] = -100, -100
    args, kwargs, _ = splitter(model)({"input_ids": ids, "attention_mask": mask, "labels": labels})
    found = Batch(args, kwargs, None, 2).run(model)
    assert found["logits"].shape == (11, 64)
    assert found["encoder_last_hidden_state"].shape[0] == 13
    # So it is of the outputs of blocks, which are known by their names.
    batch, states = Batch(args, kwargs, None, 2), [torch.randn(2, 8, 4)]
    assert [len(part) for part in batch.without_padding(states, "model.encoder.layers.0")] == [13]
    assert [len(part) for part in batch.without_padding(states, "model.decoder.layers.0")] == [11]
    alone = model(
        input_ids=ids[:1, :5], decoder_input_ids=kwargs["decoder_input_ids"][:1, :7], use_cache=False
    ).logits
    torch.testing.assert_close(found["logits"][:7], alone[0], rtol=1e-4, atol=1e-4)


def test_rows_of_a_model_that_knows_no_padding() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)).eval()
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(16)]
    made = batches(model, data, config())
    assert made.tensors["pixel_values"].shape == (16, 3, 16, 16)
    assert made.tensors["labels"].shape == (16,)


def test_spectrograms_are_rows_and_examples() -> None:
    from transformers import ASTConfig, ASTForAudioClassification

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ASTForAudioClassification(ASTConfig(**sizes, max_length=32, num_mel_bins=16, num_labels=3)).eval()
    torch.manual_seed(0)
    data = [{"input_values": torch.randn(32, 16), "labels": i % 3} for i in range(16)]
    made = batches(model, data, config())
    assert made.tensors["input_values"].shape == (16, 32, 16)
    options = {"effort": "smoke", "sensitivities": "fisher", "progress": False}
    packed = hq_plugin.quantize(model, "4bit", data, **options)
    assert packed.hq.accuracy is not None
    with pytest.warns(hq_plugin.HQWarning, match="No data was given"):
        packed = hq_plugin.quantize(model, "4bit", **options)
    assert packed(torch.randn(2, 32, 16)).logits.shape == (2, 3)


PAIRS = [(BOOK[i], BOOK[-1 - i]) for i in range(16)]


@pytest.mark.parametrize(
    "data",
    [
        PAIRS,
        [{"text": a, "text_pair": b, "label": i % 2} for i, (a, b) in enumerate(PAIRS)],
        [{"premise": a, "hypothesis": b} for a, b in PAIRS],
    ],
    ids=["tuples", "text_pair", "premise"],
)
def test_pairs_of_texts_are_read_as_pairs(data: list[Any]) -> None:
    settings = replace(config(), processor=tokenizer(), sequence_length=64)
    words = tokenizer()
    words.pad_token = words.eos_token
    expected = words([a for a, _ in PAIRS], [b for _, b in PAIRS], return_tensors="pt", padding=True)
    made = batches(bert(), data, settings).tensors
    assert torch.equal(made["input_ids"], expected["input_ids"])
    assert made["input_ids"].shape[1] == 48
    assert ("labels" in made) == (isinstance(data[0], dict) and "label" in data[0])
    with pytest.raises(DataError, match="Some rows are pairs"):
        batches(bert(), [*PAIRS, "the cat"], settings)


def test_chats_and_prompts_are_read_by_causal_models() -> None:
    words = tokenizer()
    settings = replace(config(), processor=words, sequence_length=8, self_written=0.0)
    prompts = [{"prompt": "the cat ", "completion": text} for text in BOOK]
    expected = batches(llama(), ["the cat " + text for text in BOOK], settings).tensors["input_ids"]
    assert torch.equal(batches(llama(), prompts, settings).tensors["input_ids"], expected)
    chats = [{"messages": [{"role": "user", "content": "the cat "}, {"role": "it", "content": t}]} for t in BOOK]
    with pytest.raises(DataError, match="the tokenizer cannot write them"):
        batches(llama(), chats, settings)
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert torch.equal(batches(llama(), chats, settings).tensors["input_ids"], expected)


def test_a_row_without_text_is_named() -> None:
    settings = replace(config(), processor=tokenizer())
    with pytest.raises(DataError, match=r"A row has no text, as the first one has: \['label', 'text'\]"):
        batches(bert(), [{"text": "the cat", "label": 0}, {"text": None, "label": 1}] * 8, settings)


def test_a_decoder_repeats_token_ids_that_come_alone() -> None:
    ids = torch.randint(3, 64, (16, 12))
    for data in ({"input_ids": ids}, [{"input_ids": part} for part in ids], [{"input_ids": ids[:8]}] * 4):
        packed = hq_plugin.quantize(t5(), "5bit", data, effort="smoke", progress=False)
        assert packed.hq.effective_bits <= 5
    _, kwargs, _ = splitter(t5())({"input_ids": ids})
    assert kwargs["decoder_input_ids"][:, 0].tolist() == [0] * 16
    assert torch.equal(kwargs["decoder_input_ids"][:, 1:], ids[:, :-1])


def test_sounds_of_one_channel_and_as_lists() -> None:
    torch.manual_seed(0)
    sounds = [torch.randn(16_000) for _ in range(4)]
    settings = replace(config(), processor=Wav2Vec2FeatureExtractor())
    expected = batches(wav2vec2(), sounds, settings).tensors["input_values"]
    for given in ([s.numpy()[None] for s in sounds], [s.tolist() for s in sounds]):
        assert torch.allclose(batches(wav2vec2(), given, settings).tensors["input_values"], expected, atol=1e-4)
