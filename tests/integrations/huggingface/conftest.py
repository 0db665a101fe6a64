"""Tiny models of each kind, randomly initialised, and a tokenizer made from a few words."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import hq_plugin as hq

WORDS = "the cat sat on a mat and saw that dog run to town with his red hat".split()  # noqa: SIM905
TEXTS = [" ".join(WORDS[(i * 7 + j * (i + 3)) % len(WORDS)] for j in range(24)) for i in range(40)]
SMOKE = hq.Config(effort="smoke", progress=False)


def llama(**options: object) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **options,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


def bert() -> BertModel:
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


def vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return ViTForImageClassification(config).eval()


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def whisper() -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        vocab_size=64,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return WhisperForConditionalGeneration(config).eval()


SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def mixtral() -> MixtralForCausalLM:
    """Experts that are 3-D parameters, `[experts, outputs, inputs]`."""
    return MixtralForCausalLM(MixtralConfig(**SMALL)).eval()


def gpt_oss() -> GptOssForCausalLM:
    """Experts that are 3-D parameters, `[experts, inputs, outputs]`."""
    return GptOssForCausalLM(GptOssConfig(**SMALL, head_dim=16)).eval()


def beit() -> BeitForImageClassification:
    """Reads weights around their layers."""
    config = BeitConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return BeitForImageClassification(config).eval()


KINDS = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit, "t5": t5, "whisper": whisper}
KINDS |= {"mixtral": mixtral, "gpt_oss": gpt_oss, "beit": beit}


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = KINDS[kind]()
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def packed_llama() -> LlamaForCausalLM:
    """A quantized Llama; tests do not change it."""
    model: LlamaForCausalLM = hq.quantize(  # type: ignore[assignment]
        build("llama"), "4.6bit", TEXTS, config=SMOKE, processor=tokenizer(), sequence_length=16
    )
    return model
