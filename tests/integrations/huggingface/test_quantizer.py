import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    LlamaForCausalLM,
    pipeline,
)

import hq_plugin as hq
from hq_plugin import ArtifactError, HQWarning, ModelError
from hq_plugin.integrations.huggingface import ADAPTER, HqConfig, inputs
from hq_plugin.integrations.huggingface.card import card
from hq_plugin.integrations.huggingface.folder import read_folder, write_folder
from hq_plugin.integrations.huggingface.quantizer import _summary
from hq_plugin.nn import packed_modules
from tests.benchmarks import architectures
from tests.integrations.huggingface.conftest import BERT, KINDS, SMOKE, TEXTS, build, llama, tokenizer

IDS = torch.arange(12).view(1, 12)


@pytest.fixture
def folder(packed_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    packed_llama.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@torch.no_grad()
def logits(model) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return model(IDS).logits


@pytest.mark.filterwarnings("ignore:No data")
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_the_same_bytes_again(kind: str, tmp_path: Path) -> None:
    packed = hq.quantize(build(kind), "4.6bit", config=SMOKE, sequence_length=16)
    packed.save_pretrained(tmp_path / "one")
    loaded = type(packed).from_pretrained(tmp_path / "one")
    batch = inputs.example(packed)
    with torch.no_grad():
        assert torch.equal(loaded(**batch)[0], packed(**batch)[0])
    loaded.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    # What the report promised, and the header of the file.
    size = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert packed.hq.size <= size <= packed.hq.size + 20_000


def test_an_encoder_with_a_large_vocabulary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{**BERT, "vocab_size": 5000})).eval()
    uneven = "encoder.layer.0.output.dense"
    with torch.no_grad():
        model.get_submodule(uneven).weight[:, 3] *= 30  # type: ignore[operator]
    packed = hq.quantize(model, "4.6bit", TEXTS, config=SMOKE, processor=tokenizer())
    words = "embeddings.word_embeddings"
    tables = {name: bits for name, bits in packed.hq.policy.items() if name.startswith(f"{words}.parts")}
    assert set(tables) == {f"{words}.parts.{table}.{column}" for table in range(12) for column in range(4)}
    assert packed.hq.policy[f"{words}.basis"].dynamic
    inputs_ = {bits.dynamic for name, bits in packed.hq.policy.items() if "embeddings" not in name}
    assert inputs_ == {True}
    assert packed.hq.policy[uneven].group_size == 32
    assert not any(packed.hq.policy[name].group_size for name in tables)
    assert packed.get_input_embeddings().weight.shape == (5000, 64)
    packed.save_pretrained(tmp_path / "packed")
    assert "a step for each token" in (tmp_path / "packed" / "README.md").read_text()
    loaded = BertModel.from_pretrained(tmp_path / "packed")
    ids = torch.tensor([[3, 4999, 700, 12]])
    with torch.no_grad():
        expected = packed(ids).last_hidden_state
        assert torch.equal(loaded(ids).last_hidden_state, expected)
        again = hq.load(hq.save(packed, tmp_path / "saved"))
        assert torch.equal(again(ids).last_hidden_state, expected)
    loaded.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore:No data")
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_nothing_is_dequantized_on_loading(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = hq.quantize(build(kind), "4.6bit", config=SMOKE, sequence_length=16)
    packed.save_pretrained(tmp_path / "one")

    def unpack(*_: object) -> torch.Tensor:
        raise AssertionError("a weight was dequantized")

    monkeypatch.setattr("hq_plugin.nn.packed.unpack_bits", unpack)
    loaded = type(packed).from_pretrained(tmp_path / "one")
    monkeypatch.undo()
    batch = inputs.example(packed)
    with torch.no_grad():
        assert torch.equal(loaded(**batch)[0], packed(**batch)[0])


def run(code: str, *, plugin: bool) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process that has imported nothing of ours, and may not unless `plugin`."""
    head = "import hq_plugin\n" if plugin else "import sys\nsys.modules['hq_plugin'] = None\n"
    return subprocess.run(
        [sys.executable, "-c", head + code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_a_new_process_gets_equal_logits(folder: Path, packed_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    code = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
torch.save(model(torch.arange(12).view(1, 12)).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    done = run(code, plugin=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(packed_llama))


def test_without_the_plugin_there_is_an_error_and_no_random_model(folder: Path) -> None:
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    done = run(code, plugin=False)
    assert done.returncode != 0
    assert "mismatch" in done.stderr
    assert "hq" in done.stderr


def test_transformers_may_be_imported_first(folder: Path) -> None:
    code = f"""
from transformers import AutoModelForCausalLM
import transformers.quantizers.auto
import sys; del sys.modules['hq_plugin']
import hq_plugin
AutoModelForCausalLM.from_pretrained({str(folder)!r})
"""
    done = run(code, plugin=False)
    assert done.returncode == 0, done.stderr


def test_auto_classes_pipeline_and_tokenizer(folder: Path, packed_llama: LlamaForCausalLM) -> None:
    tokenizer().save_pretrained(folder)
    with torch.no_grad():
        body = AutoModel.from_pretrained(folder)(IDS).last_hidden_state
        assert torch.equal(body, packed_llama.model(IDS).last_hidden_state)
    made = pipeline("text-generation", model=str(folder), tokenizer=AutoTokenizer.from_pretrained(folder))
    assert made("the cat", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("the cat")


def test_dtype_device_map_and_moves(folder: Path, packed_llama: LlamaForCausalLM) -> None:
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16
    assert {m.weight_packed.dtype for m in packed_modules(half).values()} == {torch.uint8}
    torch.testing.assert_close(logits(half).float(), logits(packed_llama), atol=0.1, rtol=0.1)
    # The steps are exact in any dtype.
    for name, module in packed_modules(half).items():
        assert torch.equal(module.weight, packed_modules(packed_llama)[name].weight.bfloat16())
    assert torch.equal(logits(half.to("cpu")), logits(half))
    mapped = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert torch.equal(logits(mapped), logits(packed_llama))


def test_a_device_map_that_offloads(folder: Path, packed_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    on_cpu = ("model.embed_tokens", "lm_head", "model.rotary_emb", "model.norm", "model.layers.0")
    places = {**dict.fromkeys(on_cpu, "cpu"), "model.layers.1": "disk"}
    for device_map in ("auto", places):
        mapped = AutoModelForCausalLM.from_pretrained(
            folder, device_map=device_map, offload_folder=str(tmp_path / "off")
        )
        assert any(tensor.is_meta for tensor in mapped.state_dict().values()) == (device_map is places)
        assert torch.equal(logits(mapped), logits(packed_llama))


def test_shards(packed_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    packed_llama.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits(loaded), logits(packed_llama))


def test_a_shard_that_lacks_a_tensor(packed_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    packed_llama.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = next(file for file in tmp_path.glob("*.safetensors") if KEY in load_file(file))
    tensors = load_file(shard)
    del tensors[KEY]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises((ArtifactError, OSError), match="up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tied_weights_stay_tied_and_are_stored_once(folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.get_input_embeddings().weight_packed is loaded.lm_head.weight_packed
    assert sum("embed_tokens" in name or "lm_head" in name for name in load_file(folder / "model.safetensors")) == 3


def test_pinned_and_excluded_embeddings(tmp_path: Path) -> None:
    options = {"config": SMOKE, "processor": tokenizer(), "sequence_length": 16}
    pinned = hq.quantize(build("llama"), "5bit", TEXTS, pinned={"lm_head": 8}, **options)
    assert pinned.hq.policy["lm_head"].weight == pinned.hq.policy["model.embed_tokens"].weight == 8
    float_ends = hq.quantize(build("llama"), "4.5bit", TEXTS, exclude=["lm_head", "model.embed_tokens"], **options)
    assert "lm_head" not in float_ends.hq.policy
    float_ends.save_pretrained(tmp_path / "ends")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ends")
    assert torch.equal(logits(loaded), logits(float_ends))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_to_the_hub(
    by: str, packed_llama: LlamaForCausalLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub itself cannot be reached: what would be uploaded is looked at instead."""
    uploaded = tmp_path / "uploaded"

    class Hub:
        def create_repo(self, name: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(repo_id=name)

        def create_commit(self, operations: list[CommitOperationAdd], **_: object) -> None:
            uploaded.mkdir()
            for operation in operations:
                shutil.copy(operation.path_or_fileobj, uploaded / operation.path_in_repo)

    def no_card(*_: object, **__: object) -> None:
        raise EntryNotFoundError("the repository is new")

    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", no_card)
    if by == "push_to_hub":
        packed_llama.push_to_hub("me/small")
    else:
        packed_llama.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="me/small")
    for file in folder.iterdir():
        assert (uploaded / file.name).read_bytes() == file.read_bytes(), file.name
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(uploaded)), logits(packed_llama))


def test_the_card_names_the_float_model_where_the_hub_can_know_it(
    packed_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for origin, named in (
        ("owner/net-1.5", True),
        ("gpt2", True),
        ("llm/", False),
        ("/a/b", False),
        ("mine", False),
    ):
        page = card("LlamaForCausalLM", origin, packed_llama.config.quantization_config)
        assert (f"base_model: {origin}\n" in page) is named


def test_the_model_card_says_what_it_is(folder: Path, packed_llama: LlamaForCausalLM) -> None:
    page = (folder / "README.md").read_text()
    assert "4.6bit" in page
    assert "LlamaForCausalLM.from_pretrained" in page
    assert "library_name: transformers" in page
    assert f"{packed_llama.hq.kl:.5f}" in page
    policy = json.loads((folder / "config.json").read_text())["quantization_config"]["policy"]
    assert policy == packed_llama.hq.policy.to_json()


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_newer_or_damaged_folder(folder: Path) -> None:
    edit(folder, version=2)
    with pytest.raises(ArtifactError, match="Upgrade"):
        AutoModelForCausalLM.from_pretrained(folder)
    edit(folder, version=1, policy={"model.layers.0.mlp.up_proj": [9, 16]})
    with pytest.raises(ArtifactError, match="damaged"):
        AutoModelForCausalLM.from_pretrained(folder)
    edit(folder, policy={})
    with pytest.raises(ArtifactError, match="no quantized layer"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_distance_that_is_not_finite_is_null(packed_llama: LlamaForCausalLM) -> None:
    (name, baseline), *_ = packed_llama.hq.baselines.items()
    broken = replace(packed_llama.hq, kl=math.nan, baselines={name: replace(baseline, kl=math.inf)})
    summary = _summary(broken)
    assert summary["kl"] is summary["baselines"][name] is None
    page = card("LlamaForCausalLM", "", HqConfig(packed_llama.config.quantization_config.policy, summary=summary))
    assert "| this model | not finite |" in page


def test_a_body_and_a_body_with_a_head_of_its_own_are_saved_under_their_names(tmp_path: Path) -> None:
    small = hq.quantize(build("bert"), "5bit", TEXTS, config=SMOKE, processor=tokenizer())
    small.save_pretrained(tmp_path / "body", True)  # type: ignore[operator]
    ids = torch.randint(64, (2, 9))
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=3).eval()
    headed.save_pretrained(tmp_path / "headed")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "headed").eval()
    body = AutoModel.from_pretrained(tmp_path / "headed").eval()
    body.save_pretrained(tmp_path / "again")
    last = AutoModel.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, headed(ids).logits)
        for one in (body, last):
            assert torch.equal(one(ids).last_hidden_state, small(ids).last_hidden_state)
    assert last.config.quantization_config.summary == small.config.quantization_config.summary  # type: ignore[union-attr]


class Own(BertPreTrainedModel):
    """A class that transformers does not have."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert, self.head = BertModel(config), torch.nn.Linear(config.hidden_size, 5)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return self.head(self.bert(input_ids).pooler_output)


def test_a_class_of_the_user_s_own_is_told_of_and_can_be_given(tmp_path: Path) -> None:
    made = Own(build("bert").config).eval()
    made.save_pretrained(tmp_path)
    with pytest.warns(HQWarning, match=r"from a Own, which transformers does not have.*without its head"):
        body, _ = read_folder(tmp_path)
    assert type(body) is BertModel
    model, _ = read_folder(tmp_path, Own)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), made(IDS))


def test_a_folder_inside_is_read_by_its_own_configuration(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    build("bert").save_pretrained(tmp_path / "encoder")
    assert type(read_folder(tmp_path, subfolder="encoder")[0]) is BertModel


def test_another_head_says_which_class_was_saved(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no layer lm_head. Load the class.*\(LlamaForCausalLM\), or its"):
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


def test_a_model_with_biases_loads_in_half_precision(tmp_path: Path) -> None:
    small = hq.quantize(build("bert"), "5bit", TEXTS, config=SMOKE, processor=tokenizer())
    small.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
        ids = torch.randint(64, (2, 9))
        with torch.no_grad():
            close, found = small(ids).last_hidden_state, loaded(ids).last_hidden_state
        assert found.dtype == dtype
        assert float((found.float() - close).norm() / close.norm()) < 0.05


def test_a_policy_for_another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, policy={name.replace("mlp", "ffn"): bits for name, bits in config["policy"].items()})
    with pytest.raises(ModelError, match=r"another model.*ffn"):
        AutoModelForCausalLM.from_pretrained(folder)
    edit(folder, policy={**config["policy"], "tail": [4, 16]})
    with pytest.raises(ModelError, match=r"another model.*tail"):
        AutoModelForCausalLM.from_pretrained(folder)


def tamper(folder: Path, change) -> Path:  # type: ignore[no-untyped-def]
    copy = folder.parent / "tampered"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


KEY = "model.layers.0.mlp.up_proj.weight"


def test_a_missing_tensor(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"up_proj.weight_packed is missing"):
        AutoModelForCausalLM.from_pretrained(tamper(folder, lambda tensors: tensors.pop(KEY)))


def test_a_missing_step(folder: Path) -> None:
    key = KEY.replace("weight", "weight_step")
    with pytest.raises(ArtifactError, match=r"up_proj.weight_step is missing"):
        AutoModelForCausalLM.from_pretrained(tamper(folder, lambda tensors: tensors.pop(key)))


def test_a_tensor_of_another_dtype(folder: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY] = tensors[KEY].short()

    with pytest.raises(ArtifactError, match=r"up_proj.weight_packed is I16"):
        AutoModelForCausalLM.from_pretrained(tamper(folder, widen))


def test_a_packed_layer_that_the_policy_does_not_name(folder: Path) -> None:
    policy = json.loads((folder / "config.json").read_text())["quantization_config"]["policy"]
    del policy["model.layers.0.mlp.up_proj"]
    edit(folder, policy=policy, checksum=None)
    with pytest.raises(ArtifactError, match=r"up_proj is packed"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY] = tensors[KEY][:-8].clone()

    with pytest.raises(ArtifactError, match=r"up_proj.weight_packed is U8 \("):
        AutoModelForCausalLM.from_pretrained(tamper(folder, shorten))


def test_an_extra_tensor(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.surprise"] = torch.zeros(3)

    with pytest.raises(ArtifactError, match="surprise"):
        AutoModelForCausalLM.from_pretrained(tamper(folder, add))


def test_only_quantized_checkpoints_load_with_the_config(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    with pytest.raises((ArtifactError, ValueError), match="quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=HqConfig())


@pytest.mark.filterwarnings("ignore:No data")
@pytest.mark.parametrize("kind", ["laguna", "llama4_text"])
def test_models_whose_tensors_transformers_renames(kind: str, tmp_path: Path) -> None:
    """Laguna's own names look like old ones; Llama 4's parameters are found under two names."""
    model, batch = architectures.transformers_model("causal", kind)
    packed = hq.quantize(model, "4.6bit", [batch(0), batch(1)], config=SMOKE)
    assert any("experts" in name for name in packed.hq.policy)
    packed.save_pretrained(tmp_path / "packed")
    loaded = type(packed).from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(loaded(**batch(0)).logits, packed(**batch(0)).logits)
    loaded.save_pretrained(tmp_path / "again")
    saved = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("packed", "again")]
    assert saved[0] == saved[1]


def test_an_adapter_that_lies_beside_the_model_is_no_part_of_it(
    packed_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    (tmp_path / "packed").mkdir()
    save_file({"lora": torch.ones(3)}, tmp_path / "packed" / "adapter_model.safetensors")
    packed_llama.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(packed_llama))


def test_a_pickled_model_saves_what_it_was(packed_llama: LlamaForCausalLM, folder: Path, tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(packed_llama))
    assert torch.equal(logits(again), logits(packed_llama))
    again.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:No data")
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_model_to_load_into_needs_no_values(kind: str, tmp_path: Path) -> None:
    packed = hq.quantize(build(kind), "4.6bit", config=SMOKE, sequence_length=16)
    saved = hq.save(packed, tmp_path / "saved")
    with torch.device("meta"):
        hollow = KINDS[kind]()
    half = build(kind).bfloat16()
    with torch.no_grad():
        assert torch.equal(hq.load(saved, hollow)(IDS)[0], packed(IDS)[0])
        loaded = hq.load(saved, half)
        torch.testing.assert_close(loaded(IDS)[0].float(), packed(IDS)[0], rtol=0.1, atol=0.1)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert hollow.device.type == "meta"
    with pytest.raises(hq.ModelError, match="another architecture"):
        hq.load(saved, llama().bfloat16())


def test_a_card_that_was_edited_stays(packed_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    packed_llama.save_pretrained(tmp_path)
    page = tmp_path / "README.md"
    written = page.read_text()
    page.write_text(card("Another", "", packed_llama.config.quantization_config))
    packed_llama.save_pretrained(tmp_path)
    assert page.read_text() == written, "ours, of another model"
    page.write_text(written.replace("## Loading", "## My own words"))
    packed_llama.save_pretrained(tmp_path)
    assert "My own words" in page.read_text()


def test_a_folder_that_is_replaced_keeps_its_edited_card(packed_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    page = write_folder(packed_llama, None, tmp_path / "small") / "README.md"
    written = page.read_text()
    page.write_text(card("Another", "", packed_llama.config.quantization_config))
    write_folder(packed_llama, None, tmp_path / "small")
    assert page.read_text() == written, "ours, of another model"
    page.write_text("My own words")
    write_folder(packed_llama, None, tmp_path / "small")
    assert page.read_text() == "My own words"


def test_what_lies_beside_a_model_stays(packed_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    target = write_folder(packed_llama, None, tmp_path / "small")
    (target / "notes").mkdir()
    (target / "notes" / "a.txt").write_text("mine")
    (target / "adapter_model.safetensors").write_bytes(b"an adapter")
    (target / "model-00002-of-00002.safetensors").write_bytes(b"of an earlier save")
    (tmp_path / "link").symlink_to(target)
    write_folder(packed_llama, None, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (target / "notes" / "a.txt").read_text() == "mine"
    assert (target / "adapter_model.safetensors").read_bytes() == b"an adapter"
    assert not (target / "model-00002-of-00002.safetensors").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(target)), logits(packed_llama))


def test_a_report_goes_with_the_model_that_it_is_of(
    packed_llama: LlamaForCausalLM, folder: Path, tmp_path: Path
) -> None:
    report = folder / "hq_result.json"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(folder)
    assert report.exists(), "it is the same model"
    with torch.no_grad():
        loaded.model.norm.weight.mul_(2)
    loaded.save_pretrained(folder)
    assert not report.exists(), "it is another one"
    packed_llama.save_pretrained(folder)
    assert report.exists()
    write_folder(loaded, None, folder)
    assert not report.exists()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("TimmBackbone", {"backbone": "hf-hub:some/one"}),
        (
            "TimmWrapperForImageClassification",
            {"architecture": "resnet10t", "model_args": {"checkpoint_path": "x.pth"}},
        ),
        ("BertModel", {"num_labels": 1_000_000_000}),
        ("DetrModel", {"backbone": "some/one", "use_timm_backbone": False, "backbone_config": None}),
    ],
)
def test_a_configuration_from_a_file_fetches_nothing(name: str, config: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="saved"):
        ADAPTER.rebuild({"class": name, "config": config})


def test_weights_that_are_fetched_anyway_are_not_when_ours_replace_them() -> None:
    config = {"backbone": "resnet10t", "use_timm_backbone": True, "use_pretrained_backbone": True}
    rebuilt = ADAPTER.rebuild({"class": "DetrModel", "config": {**config, "backbone_config": None}})
    assert next(rebuilt.parameters()).is_meta or next(rebuilt.parameters()).numel()


@pytest.mark.filterwarnings("ignore:No data")
def test_a_class_with_the_name_of_another_is_not_rebuilt_as_that(tmp_path: Path) -> None:
    class Other(BertModel):
        pass

    Other.__name__ = "BertModel"
    packed = hq.quantize(Other(BertConfig(**BERT)).eval(), "4.6bit", config=SMOKE)
    hq.save(packed, tmp_path / "packed")
    with pytest.raises(ArtifactError, match="Pass a float model"):
        hq.load(tmp_path / "packed")
    assert isinstance(hq.load(tmp_path / "packed", Other(BertConfig(**BERT))), Other)


@pytest.mark.filterwarnings("ignore:No data")
def test_how_a_model_generates_is_saved(tmp_path: Path) -> None:
    model = build("llama")
    model.generation_config.eos_token_id, model.generation_config.max_new_tokens = [2, 7, 9], 5
    packed = hq.quantize(model, "4.6bit", config=SMOKE, sequence_length=16)
    hq.save(packed, tmp_path / "packed")
    loaded = hq.load(tmp_path / "packed")
    assert loaded.generation_config == model.generation_config
    with torch.no_grad():
        assert torch.equal(loaded.generate(IDS, do_sample=False), packed.generate(IDS, do_sample=False))


def test_how_a_model_generates_comes_from_a_file() -> None:
    description = ADAPTER.describe(build("llama"))
    assert description is not None
    before = {name: value for name, value in description.items() if name != "generation_config"}
    assert ADAPTER.rebuild(before).generation_config.eos_token_id == 1, "of an earlier version"
    for wrong in ({"early_stopping": 7}, {"cache_dir": "/tmp"}, ["no mapping"], {"a": {"b": "hf-hub:a/b"}}):
        with pytest.raises(ArtifactError, match="saved"):
            ADAPTER.rebuild({**description, "generation_config": wrong})
