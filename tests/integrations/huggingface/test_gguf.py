"""Models in GGUF files, which transformers dequantizes on loading."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import hq_plugin as hq
from hq_plugin.errors import ModelError
from hq_plugin.integrations.huggingface.folder import read_folder
from tests.integrations.huggingface.conftest import SMOKE

TOKENS, WIDTH, INNER = 64, 64, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_vocab_size(TOKENS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    random = np.random.RandomState(0)

    def add(name: str, *shape: int) -> None:
        values = (random.randn(*shape) * 0.1).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
            return
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    for name in ("token_embd", "output"):
        add(name, TOKENS, WIDTH)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        add(f"blk.0.{name}", WIDTH, WIDTH)
    for name, shape in (("ffn_gate", (INNER, WIDTH)), ("ffn_up", (INNER, WIDTH)), ("ffn_down", (WIDTH, INNER))):
        add(f"blk.0.{name}", *shape)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        add(name, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_it_is_quantized_like_a_float_model(folder: Path, tmp_path: Path) -> None:
    model, _ = read_folder(folder)
    assert model.config.quantization_config.quant_method == "gguf"
    ids = torch.randint(0, TOKENS, (6, 8))
    small = hq.quantize(model, "4.5bit", {"input_ids": ids}, config=SMOKE, self_written=0.0)
    small.save_pretrained(tmp_path / "small")  # type: ignore[operator]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert again.config.quantization_config.quant_method == "hq"
    assert torch.equal(again(input_ids=ids).logits, small(input_ids=ids).logits)


def test_one_of_several_has_to_be_named(folder: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes((folder / "tiny.gguf").read_bytes())
    with pytest.raises(ModelError, match=r"gguf_file=a\.gguf"):
        read_folder(tmp_path)
    model, _ = read_folder(tmp_path, gguf_file="b.gguf")
    assert model.config.num_hidden_layers == 1
