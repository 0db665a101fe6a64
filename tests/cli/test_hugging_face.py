"""The command line on Hugging Face folders: language models with text, models of pictures with folders."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import hq_plugin as hq
from tests.cli.conftest import call

TEXT = "the cat sat on a mat and saw that dog run to town with his red hat"
WORDS = ["<s>", "</s>", "<unk>", *TEXT.split()]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "llm"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    lines = [" ".join(WORDS[3 + (i * 7 + j * (i + 3)) % 16] for j in range(24)) for i in range(40)]
    (folder.parent / "text.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def small_llm(llm: Path) -> Path:
    out, text = llm.parent / "small", llm.parent / "text.txt"
    arguments = ["--effort", "smoke", "-o", "sequence_length=16", "--json"]
    result = call("quantize", llm, "4.5bit", "--data", text, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["costs"]["weight_bits"] <= 4.5
    return out


def test_a_pipeline_loads_what_was_quantized(small_llm: Path) -> None:
    pipe = pipeline("text-generation", model=str(small_llm))
    assert pipe("the cat", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("the cat")


def test_load_says_who_reads_it(small_llm: Path) -> None:
    with pytest.raises(hq.ArtifactError, match="from_pretrained of its class"):
        hq.load(small_llm)


def test_inspect(small_llm: Path) -> None:
    data = json.loads(call("inspect", small_llm, "--json").stdout)
    assert len(data["sites"]) == 16
    assert data["file_bytes"] == (small_llm / "model.safetensors").stat().st_size
    text = call("inspect", small_llm)
    assert "budget 4.5bit" in text.stdout, "the report is stored beside the model"


def test_perplexity(small_llm: Path, llm: Path) -> None:
    text = llm.parent / "text.txt"
    result = call("evaluate", small_llm, "--data", text, "--json")
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    words = (word for line in text.read_text().splitlines() for word in [*line.split(), "</s>"])
    stream = torch.tensor([WORDS.index(word) for word in words])
    samples = stream[: len(stream) // 64 * 64].view(-1, 64)
    model = AutoModelForCausalLM.from_pretrained(small_llm)
    with torch.no_grad():
        loss = model(input_ids=samples, labels=samples).loss
    assert measured == {"perplexity": pytest.approx(float(loss.exp()), rel=1e-4), "tokens": samples[:, 1:].numel()}


def test_export(small_llm: Path, tmp_path: Path) -> None:
    result = call("export", small_llm, "--out", tmp_path / "m.onnx", "--json")
    assert result.exit_code == 0, result.output
    assert {operator for _, operator in json.loads(result.stdout)["layers"].values()} >= {"MatMulNBits"}


UNTRAINED = ("--effort", "smoke", "-o", "meta_steps=0", "-o", "finetune_steps=0", "-o", "sequence_length=16")


def test_a_policy_of_a_result_without_a_session(llm: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=4200, max_position_embeddings=64, **sizes))
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[:, :32] *= 20
    model.save_pretrained(tmp_path / "bert")
    PreTrainedTokenizerFast.from_pretrained(llm).save_pretrained(tmp_path / "bert")
    arguments = ("--data", llm.parent / "text.txt", *UNTRAINED, "--json")
    result = call("quantize", tmp_path / "bert", "2bit", *arguments, "--out", tmp_path / "searched")
    assert result.exit_code == 0, result.output
    policy = json.loads(result.stdout)["policy"]
    assert any(".parts.11.3" in name for name in policy), "tables and blocks of columns"
    assert any(len(bits) == 4 for bits in policy.values()), "inputs with a step for each token"
    assert len({bits[2] for bits in policy.values() if len(bits) > 2}) > 1, "several group sizes"
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    arguments = ("--policy", tmp_path / "policy.json", *arguments)
    result = call("quantize", tmp_path / "bert", *arguments, "--out", tmp_path / "given")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["policy"] == policy


def test_a_policy_of_whole_channels_for_a_language_model(small_llm: Path, llm: Path, tmp_path: Path) -> None:
    policy = json.loads(call("inspect", small_llm, "--json").stdout)["result"]["policy"]
    plain = {name: [4, 8] if "layers" in name else [4, 16] for name in policy}
    for number, widths in enumerate((policy, plain)):
        (tmp_path / "policy.json").write_text(json.dumps(widths))
        arguments = ("--policy", tmp_path / "policy.json", "--data", llm.parent / "text.txt", *UNTRAINED, "--json")
        result = call("quantize", llm, *arguments, "--out", tmp_path / f"made {number}")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["policy"] == widths


def test_a_taken_directory(small_llm: Path, llm: Path) -> None:
    text = llm.parent / "text.txt"
    arguments = ("quantize", llm, "4.5bit", "--data", text, "--effort", "smoke", "-o", "sequence_length=16")
    assert "--overwrite" in call(*arguments, "--out", small_llm).stderr
    assert "something else" in call(*arguments, "--out", llm, "--overwrite").stderr, "a float model is not replaced"


def test_a_model_of_pictures_and_a_folder_of_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=16, patch_size=8, num_labels=2, **sizes)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    for label, color in (("a", "red"), ("b", "blue")):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for n in range(10):
            Image.new("RGB", (20 + n, 20), color).save(tmp_path / "pictures" / label / f"{n}.png")
    arguments = ("--data", tmp_path / "pictures", "--out", tmp_path / "small", "--effort", "smoke")
    result = call("quantize", f"hf:{tmp_path / 'vit'}", "5bit", *arguments)
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.stdout
    measured = json.loads(call("evaluate", tmp_path / "small", "--data", tmp_path / "pictures", "--json").stdout)
    assert measured["samples"] == 20


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    result = call("quantize", tmp_path, "3bit", "--out", tmp_path / "small")
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
