import copy
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DebertaV2Config,
    DebertaV2Model,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
    Pipeline,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    TorchAoConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    pipeline,
)

import hq_plugin as hq
from hq_plugin import DataError, HQWarning, ModelError, torch_ao
from hq_plugin.distillation import kl_divergence
from hq_plugin.integrations.huggingface import ADAPTER, inputs, rows
from hq_plugin.kernels import use_kernel
from hq_plugin.nn import PackedModule, cache_weights, packed_modules
from tests.integrations.huggingface.conftest import BERT, KINDS, SMOKE, TEXTS, build, llama, tokenizer, wav2vec2


@pytest.mark.parametrize("kind", KINDS)
def test_any_model_without_data(kind: str) -> None:
    model = build(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(HQWarning, match="No data"):
        packed = hq.quantize(model, "4.6bit", config=SMOKE, sequence_length=16)
    assert type(packed) is type(model)
    assert packed.hq.effective_bits <= 4.6
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    batch = inputs.example(model)
    with torch.no_grad():
        found, expected = packed(**batch)[0], model(**batch)[0]
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.9
    wide = sum(isinstance(module, nn.Linear) for module in packed.modules())
    assert wide > 3
    assert not [
        name for name, m in packed.named_modules() if isinstance(m, nn.Linear) and name not in packed.hq.policy
    ]


def test_text_models_get_weights_in_groups_and_no_quantized_activations(packed_llama: LlamaForCausalLM) -> None:
    assert {(bits.activation, bits.group_size) for bits in packed_llama.hq.policy.values()} == {(16, 64)}
    assert packed_llama.get_input_embeddings().weight_packed is packed_llama.lm_head.weight_packed


@pytest.mark.parametrize(
    ("target", "widths"),
    [("storage", (0, 1, 2, 3, 4, 5, 6, 8)), ("torch", (1, 2, 3, 4, 8)), ("onnxruntime", (2, 4, 8))],
)
def test_an_encoder_s_embeddings_may_have_what_the_target_runs(target: str, widths: tuple[int, ...]) -> None:
    def found(**options: object) -> object:
        config = hq.Config(target=target, **options)  # type: ignore[arg-type]
        return config.filled(ADAPTER.options(build("bert"), config)).embedding_bits

    assert found() == widths
    assert found(weight_bits=(2, 4)) is None, "who names widths gets no others"


def test_layers_that_kernels_fuse_share_a_width(packed_llama: LlamaForCausalLM) -> None:
    policy = packed_llama.hq.policy
    for layer in range(2):
        at = f"model.layers.{layer}"
        assert len({policy[f"{at}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({policy[f"{at}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_that_are_parameters_are_quantized(kind: str) -> None:
    packed = hq.quantize(build(kind), "4.6bit", TEXTS, config=SMOKE, processor=tokenizer(), sequence_length=16)
    policy = packed.hq.policy
    for name in ("gate_up_proj", "down_proj"):
        assert policy[f"model.layers.0.mlp.experts.held.{name}"].group_size == 64
    left = sum(layer["parameters"] for layer in packed.hq.float_layers)
    assert left < 0.02 * sum(parameter.numel() for parameter in build(kind).parameters())
    ids = torch.tensor([[3, 4, 5]])
    assert packed.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1).shape[1] <= 6


def test_it_generates(packed_llama: LlamaForCausalLM) -> None:
    ids = torch.tensor([[3, 4, 5]])
    out = packed_llama.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert out.shape[1] <= 8
    # With the cache of keys and values as without.
    again = packed_llama.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1, use_cache=False)
    assert torch.equal(out, again)


def test_a_pipeline_in_a_pipeline_out(tmp_path: Path) -> None:
    made = pipeline("text-generation", model=build("llama"), tokenizer=tokenizer())
    packed = hq.quantize(made, "4.6bit", TEXTS, config=SMOKE, sequence_length=16)
    assert isinstance(packed, Pipeline)
    assert packed_modules(packed.model)
    assert not packed_modules(made.model)
    answer = packed("the cat", max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"].startswith("the cat")
    assert packed.hq is packed.model.hq
    hq.save(packed, tmp_path / "ours")
    assert packed_modules(hq.load(tmp_path / "ours")).keys() == packed_modules(packed.model).keys()
    packed.save_pretrained(tmp_path / "pipeline")
    again = pipeline("text-generation", model=str(tmp_path / "pipeline"))
    assert again("the cat", max_new_tokens=4, do_sample=False) == answer


def test_a_pipeline_reads_sounds_with_its_feature_extractor() -> None:
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=400)
    words, model = tokenizer(), build("whisper")
    made = pipeline("automatic-speech-recognition", model=model, tokenizer=words, feature_extractor=extractor)
    packed = hq.quantize(made, "4.6bit", [torch.randn(16_000).numpy() for _ in range(8)], config=SMOKE)
    assert packed_modules(packed.model)
    assert packed.tokenizer is words


@pytest.mark.parametrize(
    "data",
    [
        TEXTS,
        [{"text": text} for text in TEXTS],
        tokenizer()(TEXTS, return_tensors="pt"),
        [tokenizer()(TEXTS[i : i + 4], return_tensors="pt") for i in range(0, 40, 4)],
    ],
    ids=["strings", "rows", "encoding", "batches"],
)
def test_kinds_of_text(data: object) -> None:
    packed = hq.quantize(build("llama"), "4.6bit", data, config=SMOKE, processor=tokenizer(), sequence_length=16)
    assert packed.hq.chosen in ("searched", "uniform", "dynamic_programming")


def test_encoders_and_encoder_decoders_take_text() -> None:
    for kind in ("bert", "t5"):
        packed = hq.quantize(build(kind), "4.6bit", TEXTS, config=SMOKE, processor=tokenizer())
        assert packed.hq.effective_bits <= 4.6


def test_rows_of_a_data_set() -> None:
    texts = datasets.Dataset.from_dict({"text": TEXTS, "label": [i % 2 for i in range(40)]})
    rows = texts.map(lambda row: tokenizer()(row["text"][: 30 + row["label"] * 30]))
    assert len({len(row["input_ids"]) for row in rows}) > 1
    model = build("bert")
    for data in (rows, rows.with_format("torch"), list(rows), [tokenizer()(text) for text in TEXTS]):
        made = inputs.batches(model, data, SMOKE.filled())
        assert {"input_ids", "attention_mask"} <= set(made.tensors) <= {"input_ids", "attention_mask", "label"}
        longest = max(len(row["input_ids"]) for row in data)
        assert made.tensors["input_ids"].shape == (40, longest)
        lengths = made.tensors["attention_mask"].sum(1)
        assert lengths.tolist() == [len(row["input_ids"]) for row in data]
    packed = hq.quantize(model, "4.6bit", rows, config=SMOKE)
    assert packed.hq.effective_bits <= 4.6
    with pytest.raises(DataError, match="longer than the 64"):
        hq.quantize(model, "4.6bit", [{"input_ids": [3] * 65}] * 8, config=SMOKE)
    with pytest.raises(DataError, match=r"'token_type_ids' cannot be stacked"):
        hq.quantize(model, "4.6bit", [{"input_ids": [3], "token_type_ids": [0]}, {"input_ids": [3]}], config=SMOKE)


def test_a_stream_is_read_as_far_as_it_is_needed() -> None:
    read = []

    def endless():  # type: ignore[no-untyped-def]
        for number in itertools.count():
            read.append(number)
            yield {"text": TEXTS[number % len(TEXTS)]}

    stream = datasets.IterableDataset.from_generator(endless)
    packed = hq.quantize(build("bert"), "4.6bit", stream, config=SMOKE, processor=tokenizer(), batch_size=4)
    assert packed.hq.effective_bits <= 4.6
    assert len(read) < 5000


def test_the_decoder_reads_the_target_text() -> None:
    model = build("t5")
    rows = tokenizer()(TEXTS[:8], text_target=TEXTS[8:16], return_tensors="pt")
    (_, kwargs, label) = ADAPTER.options(model, SMOKE)["prepare_batch"](dict(rows))
    assert torch.equal(kwargs["decoder_input_ids"][:, 1:], rows["labels"][:, :-1])
    assert set(kwargs["decoder_input_ids"][:, 0].tolist()) == {model.config.decoder_start_token_id}
    assert label is None


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_batch_keeps_no_column_that_is_padding_in_all_its_samples(kind: str) -> None:
    model = build(kind).eval()
    split = ADAPTER.options(model, SMOKE)["prepare_batch"]
    ids = torch.randint(5, 60, (2, 32))
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[0, 9:], mask[1, 3:] = 0, 0
    raw = {"input_ids": ids * mask, "attention_mask": mask}
    if kind == "t5":
        raw["decoder_input_ids"] = torch.cat([torch.zeros_like(ids[:, :1]), raw["input_ids"][:, :-1]], dim=1)
    kwargs = split(dict(raw))[1]
    assert {kwargs[name].shape for name in raw} == {(2, 16)}  # 9 tokens, and up to a multiple of 8
    with torch.no_grad():
        full, cut = model(**raw)[0], model(**kwargs)[0]
    assert torch.allclose(full[:, :16][mask[:, :16].bool()], cut[mask[:, :16].bool()], atol=1e-5)
    left = {"input_ids": ids, "attention_mask": mask.flip(1)}
    assert split(dict(left))[1]["input_ids"].shape == (2, 32)  # padding before the text moves no position


def test_pictures_with_a_processor() -> None:
    pictures = [Image.effect_noise((40, 40), 60 + i).convert("RGB") for i in range(16)]
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    for data in (pictures, [{"image": picture, "label": 1} for picture in pictures]):
        packed = hq.quantize(build("vit"), "4.6bit", data, config=SMOKE, processor=processor)
        assert {bits.activation for bits in packed.hq.policy.values()} == {8}
    with pytest.raises(DataError, match="processor=image_processor"):
        hq.quantize(build("vit"), "4.6bit", pictures, config=SMOKE)


def test_labels_beside_text_pictures_and_sounds_are_kept() -> None:
    numbers = [i % 5 for i in range(16)]
    pictures = [{"image": Image.effect_noise((40, 40), 60 + i), "label": i} for i in numbers]
    texts = [{"text": text, "labels": torch.tensor(i)} for text, i in zip(TEXTS, numbers, strict=False)]
    sounds = [{"audio": {"array": torch.randn(800).numpy(), "sampling_rate": 16_000}, "label": i} for i in numbers]
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    for model, data, reader in (
        (build("vit"), pictures, processor),
        (build("bert"), texts, tokenizer()),
        (wav2vec2(), sounds, Wav2Vec2FeatureExtractor()),
    ):
        made = inputs.batches(model, data, replace(SMOKE, processor=reader, sequence_length=16))
        assert made.tensors["labels"].tolist() == numbers
    packed = hq.quantize(build("vit"), "4.6bit", pictures, config=SMOKE, processor=processor)
    assert packed.hq.accuracy is not None
    named = [{**row, "label": "cat"} for row in pictures]
    for data in (named, [*pictures[:3], *named]):
        made = inputs.batches(build("vit"), data, replace(SMOKE, processor=processor))
        assert set(made.tensors) == {"pixel_values"}


def test_a_row_s_own_mask_is_kept_wherever_it_stands() -> None:
    found = [{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}, {"input_ids": [7], "attention_mask": [1]}]
    for data in (found, [dict(reversed(row.items())) for row in found]):
        made = inputs.batches(build("bert"), data, SMOKE)
        assert made.tensors["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]


def test_sounds_with_a_feature_extractor() -> None:
    rate = 16_000
    sounds = [torch.randn(800 + 40 * (i % 3)).numpy() for i in range(12)]
    rows = [{"audio": {"array": sound, "sampling_rate": rate}} for sound in sounds]
    for data in (sounds, rows):
        packed = hq.quantize(wav2vec2(), "4.6bit", data, config=SMOKE, processor=Wav2Vec2FeatureExtractor())
        assert packed.hq.effective_bits <= 4.6
    with pytest.raises(DataError, match="processor=feature_extractor"):
        hq.quantize(wav2vec2(), "4.6bit", sounds, config=SMOKE)
    with pytest.raises(DataError, match=r"is a \w*Tokenizer\w*, which reads none. Pass the feature extractor"):
        hq.quantize(wav2vec2(), "4.6bit", sounds, config=SMOKE, processor=tokenizer())
    slow = [{"audio": {"array": sound, "sampling_rate": 8000}} for sound in sounds]
    with pytest.raises(DataError, match=r"8000 samples a second.*Resample"):
        hq.quantize(wav2vec2(), "4.6bit", slow, config=SMOKE, processor=Wav2Vec2FeatureExtractor())


def test_the_decoder_of_sounds_reads_what_the_float_model_writes() -> None:
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=400)
    model = build("whisper")
    sounds = [torch.randn(16_000).numpy() for _ in range(4)]
    made = inputs.batches(model, sounds, replace(SMOKE, processor=extractor))
    assert made.tensors["input_features"].shape == (4, 16, 40)
    assert made.tensors["decoder_input_ids"].shape[1] > 1
    # What follows an end of text is padding, of which a decoder says nothing that counts.
    assert bool(made.tensors["decoder_attention_mask"].all())
    model.generation_config.eos_token_id = [int(made.tensors["decoder_input_ids"][0, 1])]
    ended = inputs.batches(model, sounds, replace(SMOKE, processor=extractor))
    mask = ended.tensors["decoder_attention_mask"][0]
    assert int(mask[0]) == 1
    assert int(mask.sum()) == 1
    model.generation_config.eos_token_id = None
    packed = hq.quantize(model, "4.6bit", sounds * 4, config=SMOKE, processor=extractor)
    assert packed.hq.effective_bits <= 4.6


def test_gpt2_s_conv1d_becomes_the_linear_layer_that_it_is() -> None:
    model = build("gpt2")
    options = {"processor": tokenizer(), "sequence_length": 16, "weight_bits": 8, "config": SMOKE}
    packed = hq.quantize(model, "8.5bit", TEXTS, **options)
    assert isinstance(packed.transformer.h[0].attn.c_attn, nn.Linear)
    assert isinstance(packed.transformer.h[0].attn.c_attn, PackedModule)
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, atol=0.05, rtol=0.05)


def test_lora_trains_on_packed_layers(packed_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    adapted = get_peft_model(
        copy.deepcopy(packed_llama), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    ids = torch.randint(20, (4, 12))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    packed = packed_modules(adapted)
    assert packed
    assert all(not p.requires_grad for m in packed.values() for p in m.parameters(recurse=False))
    adapted.save_pretrained(tmp_path / "adapter")
    packed_llama.save_pretrained(tmp_path / "packed")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), tmp_path / "adapter"
    )
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)
    # Integers cannot take an adapter in; what was merged would be lost without a word.
    merged = adapted.merge_and_unload()
    with pytest.raises(ModelError, match="merging an adapter"):
        merged.save_pretrained(tmp_path / "merged")
    with pytest.raises(ModelError, match="merging an adapter"):
        hq.save(merged, tmp_path / "merged")


@pytest.mark.parametrize("kept", ["kernel", "nothing"])
def test_a_merged_adapter_holds_where_no_weight_is_kept(kept: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x = torch.randn(40, 64)
    small = hq.quantize(layer, "5bit", [x], config=SMOKE)
    if kept == "kernel":
        assert use_kernel(small, "int8_matmul") == ["0", "2"]
    else:
        cache_weights(small, False)
    with torch.no_grad():
        before = small(x)
        adapted = get_peft_model(
            copy.deepcopy(small), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        )
        if kept == "kernel":
            use_kernel(adapted.get_base_model(), "int8_matmul")
        else:
            cache_weights(adapted, False)
        wanted = adapted(x)
        merged = adapted.merge_and_unload()
        # Sums in another order round some inputs of the second layer otherwise.
        assert float((merged(x) - wanted).norm() / wanted.norm()) < 0.03
        assert float((before - wanted).norm() / wanted.norm()) > 0.3
    with pytest.raises(ModelError, match="merging an adapter"):
        hq.save(merged, tmp_path / "merged")


def distiller(
    teacher: nn.Module, network: nn.Module, folder: Path, callbacks: Sequence[TrainerCallback] = ()
) -> Trainer:
    """The recipe of docs/huggingface.md."""

    class Distiller(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):  # type: ignore[no-untyped-def]
            with torch.no_grad():
                target = teacher(**inputs).logits
            output = model(**inputs)
            loss = kl_divergence(output.logits, target)
            return (loss, output) if return_outputs else loss

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    ids = tokenizer()(TEXTS, return_tensors="pt")["input_ids"]
    rows = [{"input_ids": row} for row in ids]
    return Distiller(model=network, args=arguments, train_dataset=rows, callbacks=list(callbacks))


def test_a_trainer_distils_a_prepared_model(tmp_path: Path) -> None:
    teacher = build("llama")
    policy = hq.HybridPolicy(
        {
            n: hq.LayerBits(3, 16, 64)
            for n, m in teacher.named_modules()
            if isinstance(m, nn.Linear) and "layers" in n
        }
    )
    student = torch_ao.prepare(teacher, policy)
    trainer = distiller(teacher, student, tmp_path)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    packed = torch_ao.convert(student)
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, student.eval()(ids).logits)


def test_a_trainer_meta_trains(tmp_path: Path) -> None:
    teacher = build("llama")
    session = hq.meta_train(teacher, TEXTS, config=SMOKE, meta_steps=0, processor=tokenizer(), sequence_length=16)
    before = {name: p.detach().clone() for name, p in session.network.named_parameters() if p.requires_grad}
    sampler, seen = session.sampler("4bit"), set()

    class SamplePolicies(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):  # type: ignore[no-untyped-def]
            seen.add(sampler(state.global_step))
            torch_ao.apply_policy(session.network, sampler(state.global_step))

    distiller(teacher, session.network, tmp_path, [SamplePolicies()]).train()
    changed = [
        name for name, p in session.network.named_parameters() if name in before and not p.equal(before[name])
    ]
    assert len(seen) > 5
    assert any(".outer." in name for name in changed)  # what generates weights has learned
    packed = session.quantize("4bit")
    assert packed.hq.effective_bits <= 4


def test_bad_input(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="processor=tokenizer"):
        hq.quantize(build("llama"), "4bit", TEXTS, config=SMOKE)
    with pytest.raises(DataError, match="longer than the 64"):
        hq.quantize(build("llama"), "4bit", [{"input_ids": torch.zeros(2, 65, dtype=torch.long)}] * 4, config=SMOKE)
    with pytest.raises(DataError, match="longer than the 64"):
        hq.quantize(build("llama"), "4bit", TEXTS, config=SMOKE, processor=tokenizer(), sequence_length=65)
    later = [{"input_ids": torch.zeros(2, n, dtype=torch.long)} for n in (8, 8, 8, 65, 65, 65, 65, 65)]
    with pytest.raises(DataError, match="longer than the 64"):
        hq.quantize(build("llama"), "4bit", DataLoader(later, batch_size=None), config=SMOKE)
    with pytest.raises(DataError, match="more text"):
        hq.quantize(build("llama"), "4bit", ["the cat"], config=SMOKE, processor=tokenizer(), sequence_length=64)
    with pytest.raises(DataError, match="several lengths"):
        hq.quantize(build("llama"), "4bit", {"input_ids": [[1, 2], [3]]}, config=SMOKE)
    with torch.device("meta"):
        hollow = llama()
    with pytest.raises(ModelError, match="meta device"):
        hq.quantize(hollow, "4bit", TEXTS, config=SMOKE)
    with pytest.raises(ModelError, match=r"float16.*float32"):
        hq.quantize(llama().half(), "4bit", TEXTS, config=SMOKE)
    config = llama().config
    with FakeTensorMode(), torch.device("cuda"):
        elsewhere = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"bfloat16.*float32"):
        hq.quantize(elsewhere, "4bit", TEXTS, config=SMOKE)


def test_positions_that_are_kept_for_padding_do_not_count() -> None:
    model = RobertaModel(RobertaConfig(**BERT, pad_token_id=1)).eval()
    assert rows.positions(model) == 62
    with torch.no_grad():
        model(torch.full((1, 62), 5))
    with pytest.raises(DataError, match="longer than the 62"):
        hq.quantize(model, "4bit", {"input_ids": torch.full((4, 63), 5)}, config=SMOKE)


@pytest.mark.parametrize(
    ("made", "config"),
    [
        (T5ForConditionalGeneration, T5Config(vocab_size=64, d_model=32, d_ff=32, num_layers=1, n_positions=64)),
        (DebertaV2Model, DebertaV2Config(**BERT, position_biased_input=False, relative_attention=True)),
    ],
    ids=["t5", "deberta"],
)
def test_models_of_relative_positions_take_any_length(made, config) -> None:  # type: ignore[no-untyped-def]
    model = made(config).eval()
    ids = torch.full((2, 100), 5)
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        model(**batch)
    assert rows.positions(model) is None
    _, kwargs, _ = rows.splitter(model)(batch)
    assert kwargs["input_ids"].shape == (2, 100)


def test_models_of_both_kinds_of_positions_are_bounded() -> None:
    assert rows.positions(MPNetModel(MPNetConfig(**BERT))) == 62


def test_a_model_that_is_quantized_already(packed_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ModelError, match="quantized already"):
        hq.quantize(packed_llama, "4bit", TEXTS, config=SMOKE)
    other = build("llama")
    other.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="quantized already"):
        hq.quantize(other, "4bit", TEXTS, config=SMOKE)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_another_library_quantized(method: str, tmp_path: Path) -> None:
    pytest.importorskip(method)
    build("llama").save_pretrained(tmp_path)
    if method == "bitsandbytes":
        config: object = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    with pytest.raises(ModelError, match=f"quantized already.*{method}"):
        hq.quantize(model, "4bit", TEXTS, config=SMOKE)


def test_an_offloaded_model(tmp_path) -> None:  # type: ignore[no-untyped-def]
    build("llama").save_pretrained(tmp_path / "float")
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "float", device_map=device_map, offload_folder=str(tmp_path / "off")
        )
    with pytest.raises(ModelError, match="offloaded"):
        hq.quantize(model, "4bit", TEXTS, config=SMOKE)


def test_a_session_serves_several_budgets(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = build("llama")
    session = hq.meta_train(model, TEXTS, config=SMOKE, processor=tokenizer(), sequence_length=16)
    session.save(tmp_path / "session")
    again = hq.load_session(tmp_path / "session", model, TEXTS, processor=tokenizer())
    for budget in ("3.5bit", "5bit"):
        one, other = session.quantize(budget), again.quantize(budget)
        assert one.hq.policy == other.hq.policy
        ids = torch.randint(20, (1, 6))
        with torch.no_grad():
            assert torch.equal(one(ids).logits, other(ids).logits)
    longer = hq.load_session(tmp_path / "session", model, TEXTS, processor=tokenizer(), effort="fast")
    assert longer.config.steps.finetune > again.config.steps.finetune
    assert longer.config.steps.holdout == again.config.steps.holdout
