"""Tiny models of each kind, randomly initialised, and a tokenizer made from a few words."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
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
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
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


BERT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def bert() -> BertModel:
    return BertModel(BertConfig(**BERT)).eval()


def masked_bert() -> BertForMaskedLM:
    """Ties the head's weight to the embedding, and the head's bias to another bias."""
    return BertForMaskedLM(BertConfig(**BERT)).eval()


def bart() -> BartForConditionalGeneration:
    """Its positions are an embedding that is called with token ids, which it does not look up."""
    config = BartConfig(
        vocab_size=64,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=40,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config).eval()


def wav2vec2() -> Wav2Vec2Model:
    config = Wav2Vec2Config(
        **{name: value for name, value in BERT.items() if name != "max_position_embeddings"},
        conv_dim=[32, 32],
        conv_kernel=[10, 8],
        conv_stride=[5, 4],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    return Wav2Vec2Model(config).eval()


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


def qwen_moe() -> Qwen3MoeForCausalLM:
    """A router and many small experts, with keys and queries normed."""
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    settings = {name: value for name, value in SMALL.items() if name != "num_local_experts"}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, **options, decoder_sparse_step=1)).eval()


def gemma() -> Gemma2ForCausalLM:
    """Its embedding scales what it looks up by a buffer that no file holds."""
    return Gemma2ForCausalLM(Gemma2Config(**{**SMALL, "head_dim": 16})).eval()


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
KINDS |= {"mixtral": mixtral, "gpt_oss": gpt_oss, "qwen_moe": qwen_moe, "beit": beit}
KINDS |= {"masked_bert": masked_bert, "bart": bart, "gemma": gemma}


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
