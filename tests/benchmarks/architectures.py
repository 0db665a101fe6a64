"""One small, randomly initialised model for each architecture of timm and transformers, with inputs.

timm: of each module the variant with the fewest parameters. transformers: each type of its mappings, from its own
default configuration with every size made small. `coverage.py` sweeps over them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from hq_plugin.integrations.timm import data_config

#: Kinds of the sweep, and the mappings of transformers that they are.
MAPPINGS = {
    "causal": ("CAUSAL_LM",),
    "sequence-classification": ("SEQUENCE_CLASSIFICATION",),
    "image-classification": ("IMAGE_CLASSIFICATION",),
    "speech": ("CTC", "SPEECH_SEQ_2_SEQ", "AUDIO_CLASSIFICATION"),
}
#: Edge lengths at which a timm model that takes images of any size is tried.
SIZES = (64, 96, 128, 160, 224, 256)
SAMPLES, TOKENS = 2, 12
#: A configuration whose model has more parameters was not made small.
LARGEST = 40_000_000

#: What a number of a configuration becomes, by its name: the first pattern that matches the whole name.
SMALL: tuple[tuple[str, int], ...] = (
    (r"(vocab_size|.*_vocab_size|vocab_size_.*|num_codevectors.*|num_hash_buckets)", 128),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_len.*)", 128),
    (r"(max_source_positions|max_target_positions)", 64),
    (r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_(en|de)coder_layers|depth)", 2),
    (r"(num_attention_heads|n_heads?|(en|de)coder_attention_heads|num_heads|num_query_heads|n_q_heads)", 4),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|num_global_key_value_heads)", 2),
    (r"(head_dim|.*_head_dim|d_kv|v_head_dim|attention_head_dim|kv_channels|head_size)", 16),
    (
        r"(hidden_size|d_model|n_embd|n_embed|dim|embed_dim|hidden_dim|word_embed_proj_dim|embedding_size|pooler_hidden_size)",
        64,
    ),
    (r"((moe_|shared_|shared_expert_|expert_)?(intermediate|ffn_hidden|ffn|feed_?forward)_(size|dim))", 128),
    (r"(d_?ff|(en|de)coder_ffn_dim|ffn_dim|n_inner|d_inner|mlp_dim|dim_ff|d_expert|hidden_size_mlp)", 128),
    (r"(kv_lora_rank|q_lora_rank|.*_lora_rank|.*_rank|.*_low_rank_dim)", 32),
    (r"(qk_rope_head_dim|qk_nope_head_dim)", 16),
    (r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_routed_experts)", 4),
    (r"(num_experts_per_tok|num_experts_per_token|moe_k|moe_topk|top_k_experts|moe_top_k)", 2),
    (r"(n_group|num_expert_group|topk_group|n_shared_experts|num_shared_experts|first_k_dense_replace)", 1),
    (r"(image_size|img_size|crop_size)", 64),
    (r"(num_mel_bins|feature_size)", 32),
    (r"(mamba_n_heads|mamba_num_heads|linear_num_heads|linear_num_value_heads|linear_num_key_heads)", 4),
    (r"(mamba_d_head|mamba_head_dim|linear_key_head_dim|linear_value_head_dim)", 32),
    (r"(mamba_n_groups|n_groups)", 1),
)
#: What is tried, one after the other; None keeps the default.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"head_dim": None, "num_key_value_heads": 4},
    {"num_hidden_layers": 8, "num_layers": 8},
    {"image_size": None},
    {"max_position_embeddings": None},
    {"hidden_sizes": None, "embedding_size": None},
    {"hidden_size": None, "num_attention_heads": None},
    {"per_layer_config": {}},
    {"num_kv_shared_layers": 0},
)
#: Sizes that belong together in ways that no name tells, by type.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "num_hidden_layers": 2},
    "bit": {"hidden_sizes": [128, 128, 128, 128], "num_groups": 4, "embedding_size": 64},
    "blt": {
        "encoder_hash_byte_group_vocab": 128,
        "patcher_config.hidden_size": 64,
        "patcher_config.num_hidden_layers": 1,
        "patcher_config.vocab_size": 260,
        "vocab_size": 260,
        "use_cache": False,
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters.full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    "cvt": {"embed_dim": [32, 96, 192], "num_heads": [1, 3, 6], "depth": [1, 2, 3]},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "head_dim": 16,
    },
    "donut-swin": {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [3, 6, 12, 24], "image_size": [224, 224]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640, "image_size": 64},
    "esm": {
        "vocab_size": 33,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "pad_token_id": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "flaubert": {"n_words": 128, "emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "attention_layers": ["global", "local"],
    },
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2, "mamba_n_heads": 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "perceiver": {
        "num_latents": 16,
        "d_latents": 64,
        "d_model": 64,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "pvt": {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]},
    "pvt_v2": {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]},
    "qwen4_exp_text": {"head_dim": 16},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [4, 16],
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "rwkv": {"attention_hidden_size": 64, "intermediate_size": 128},
    "swin": {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [3, 6, 12, 24]},
    "swinv2": {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [3, 6, 12, 24]},
    "t5": {"decoder_start_token_id": 0, "eos_token_id": 1},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xlm": {"n_words": 128, "emb_dim": 64, "n_layers": 2, "n_heads": 4},
    "xlnet": {"d_head": 16, "d_model": 64, "n_head": 4, "n_layer": 2, "d_inner": 128},
    "xmod": {"default_language": "en_XX"},
}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LAYER_KINDS = ("layer_types", "layers_block_type", "block_types")
#: Versions, and names of stages that follow from the number of layers.
_NAMES = (
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "stage_names",
    "out_features",
    "out_indices",
)
_TOKENS = re.compile(r".*_token_id|.*_token_index|.*token_id.*")


def cases() -> list[str]:
    """Returns the names of all cases: kind, and module or type."""
    found = [f"timm/{module}" for module in timm.list_modules()]
    for kind, mappings in MAPPINGS.items():
        for mapping in mappings:
            names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
            found += [f"{kind}/{name}" for name in names if f"{kind}/{name}" not in found]
    return found


def smallest(module: str) -> str:
    """Returns the variant of a timm module with the fewest parameters."""

    def size(name: str) -> float:
        try:
            with torch.device("meta"):
                return sum(p.numel() for p in timm.create_model(name).parameters())
        except Exception:  # a variant that cannot be built without values
            return float("inf")

    return min(timm.list_models(module=module), key=size)


def timm_model(name: str) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Returns a model in eval mode, and what makes inputs for it from a seed."""
    torch.manual_seed(0)
    model, built_for = _timm_built(name)
    channels, *native = data_config(model)["input_size"]
    if built_for:
        sizes = [[built_for, built_for]]
    elif model.default_cfg.get("fixed_input_size"):
        sizes = [native]
    else:
        sizes = [[s, s] for s in SIZES if s < native[0]] + [native]
    for size in sizes:
        x = torch.randn(SAMPLES, channels, *size)
        try:
            with torch.no_grad():
                if torch.isfinite(model(x)).all():
                    break
        except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError):
            continue

    def inputs(seed: int) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))

    return model, inputs


def _timm_built(name: str) -> tuple[Any, int | None]:
    """Builds a model for images that are as small as it can be built for, and says the edge; None: for any."""
    with torch.device("meta"):
        fixed = timm.create_model(name).default_cfg.get("fixed_input_size")
    for size in (64, 96, 112, 128) if fixed else ():
        try:
            model = timm.create_model(name, img_size=size).eval()
            with torch.no_grad():
                model(torch.randn(1, 3, size, size))
            return model, size
        except Exception:  # a size that its windows do not divide, or a model that takes no size
            continue
    return timm.create_model(name).eval(), None


def transformers_model(kind: str, name: str) -> tuple[Any, Callable[[int], dict[str, Tensor]]]:
    """Returns a small model in eval mode, and what makes inputs for it from a seed.

    Raises:
        LookupError: No small configuration builds and runs; the message says why.
    """
    classes = [
        names[name]
        for mapping in MAPPINGS[kind]
        if name in (names := getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"))
    ]
    first = classes[0][0] if isinstance(classes[0], (tuple, list)) else classes[0]
    made = getattr(transformers, first)
    reasons = []
    for config in _small(made.config_class):
        try:
            if isinstance(config, Exception):
                raise config
            with torch.device("meta"):
                size = sum(p.numel() for p in made(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size / 1e6:.0f} M parameters are not small")
            torch.manual_seed(0)
            model = made(config).float().eval()
            _fill_zeros(model)
            return model, _inputs(model, kind)
        except Exception as error:  # whatever a class makes of sizes that do not fit
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
    raise LookupError("; ".join(dict.fromkeys(reasons)))


@torch.no_grad()
def _fill_zeros(model: Any) -> None:
    """Gives matrices of zeros values, such as routers: where all experts tie, each engine chooses others."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=0.02)


def _small(config_class: Any) -> Iterator[Any]:
    """Yields configurations, the most shrunken first: not every class takes every size."""
    try:
        default = config_class().to_dict()
    except Exception:  # a class without defaults for all of it
        default = {}
    special = SPECIAL.get(config_class.model_type, {})
    for variant in VARIANTS:
        values = _shrunken(default, variant)
        for name, value in special.items():
            *path, last = name.split(".")
            holder = values
            for part in path:
                holder = holder.setdefault(part, {})
            holder[last] = value
        try:
            yield config_class.from_dict(values)
        except Exception as error:
            yield error


def _shrunken(values: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    """Makes every size of a configuration small, by its name; None keeps what it is."""
    result: dict[str, Any] = {}
    kinds = next((v for k, v in values.items() if k in _LAYER_KINDS and isinstance(v, list) and v), None)
    # One layer of each kind, and at least two.
    layers = [kinds.index(kind) for kind in dict.fromkeys(map(str, kinds))] if kinds and _strings(kinds) else []
    layers += [i for i in range(len(kinds or [])) if i not in layers][: max(0, 2 - len(layers))]
    for name, value in values.items():
        if name in _NAMES:
            continue
        if name in variant:
            result[name] = value if variant[name] is None or value is None else variant[name]
        elif isinstance(value, dict) and layers and value and all(str(key).isdecimal() for key in value):
            by_layer = {int(key): of for key, of in value.items()}
            result[name] = {i: by_layer[layer] for i, layer in enumerate(sorted(layers)) if layer in by_layer}
        elif isinstance(value, dict):
            result[name] = _shrunken(value, variant)
        elif name == "pad_token_id":
            result[name] = 0
        elif layers and name in _LAYERS:
            result[name] = len(layers)
        elif layers and isinstance(value, list) and len(value) == len(kinds or []):
            result[name] = [value[i] for i in sorted(layers)]
        elif type(value) is int:
            result[name] = _small_number(name, value)
        elif isinstance(value, list) and value and all(type(v) is int for v in value):
            result[name] = _small_list(name, value)
        else:
            result[name] = value
    return result


def _strings(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _small_number(name: str, value: int) -> int:
    if _TOKENS.fullmatch(name):
        return min(value, 100)
    for pattern, small in SMALL:
        if re.fullmatch(pattern, name):
            return min(value, small)
    return value


def _small_list(name: str, value: list[int]) -> list[int]:
    if re.fullmatch(r"(depths|num_layers|layer_depths|num_blocks|num_hidden_layers)", name):
        return [min(v, 2) for v in value]
    if re.fullmatch(r"(hidden_sizes|embed_dims?|dims?|encoder_hidden_sizes|neck_hidden_sizes|dim)", name):
        return [32 * 2 ** min(i, 2) for i in range(len(value))]
    if re.fullmatch(r"(conv_dim|tdnn_dim|conv_channels)", name):
        return [min(v, 32) for v in value]
    return value


def _inputs(model: Any, kind: str) -> Callable[[int], dict[str, Tensor]]:
    """Finds inputs that the model takes; the first kind that runs is kept."""
    reasons = []
    for make in _attempts(model, kind):
        try:
            batch = make(0)
            with torch.no_grad():
                output = model(**batch)
            value = output[0] if isinstance(output[0], Tensor) else output.logits
            if not torch.isfinite(value).all():
                raise ValueError("the output is not finite")
            return make
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise LookupError(f"no inputs run: {'; '.join(dict.fromkeys(reasons))}")


def _attempts(model: Any, kind: str) -> Iterator[Callable[[int], dict[str, Tensor]]]:
    text = model.config.get_text_config()
    vocabulary = next((v for n in ("vocab_size", "n_vocab") if isinstance(v := getattr(text, n, None), int)), 100)

    def random(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def ids(seed: int, length: int = TOKENS) -> Tensor:
        # Above the special tokens, which some models count or look for.
        return torch.randint(
            min(5, vocabulary - 1), min(vocabulary, 100), (SAMPLES, length), generator=random(seed)
        )

    if kind in ("causal", "sequence-classification"):
        yield lambda seed: {"input_ids": ids(seed)}
        yield lambda seed: {"input_ids": ids(seed), "attention_mask": torch.ones(SAMPLES, TOKENS, dtype=torch.long)}
        yield lambda seed: {"input_ids": ids(seed), "decoder_input_ids": ids(seed)}
        # The last token of a classifier with an encoder and a decoder is its end of text.
        eos = getattr(text, "eos_token_id", None) or 2
        yield lambda seed: {"input_ids": torch.cat([ids(seed), torch.full((SAMPLES, 1), eos)], dim=1)}
        boxes = torch.zeros(SAMPLES, TOKENS, 4, dtype=torch.long)
        yield lambda seed: {"input_ids": ids(seed), "bbox": boxes}
        yield lambda seed: {"input_ids": ids(seed, 32)}
    elif kind == "image-classification":
        config = model.config
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 64
        sizes = [size if isinstance(size, int) else size[0], 64, 224]
        for edge in dict.fromkeys(sizes):
            shape = (SAMPLES, getattr(vision, "num_channels", 3), edge, edge)
            yield lambda seed, shape=shape: {"pixel_values": torch.randn(shape, generator=random(seed))}
        yield lambda seed: {"inputs": torch.randn(SAMPLES, 3, 64, 64, generator=random(seed))}
        yield lambda seed: {"inputs": torch.randn(SAMPLES, 3, 224, 224, generator=random(seed))}
        yield lambda seed: {"input_ids": ids(seed, 64)}
        patch = 3 * (getattr(vision, "patch_size", None) or 16) ** 2
        yield lambda seed: {
            "pixel_values": torch.randn(SAMPLES, 16, patch, generator=random(seed)),
            "pixel_attention_mask": torch.ones(SAMPLES, 16, dtype=torch.long),
            "spatial_shapes": torch.full((SAMPLES, 2), 4),
        }
    else:
        decoder = {"decoder_input_ids": ids(0, 6)}
        own = ("num_mel_bins", "feature_size", "input_channels", "feature_projection_input_dim")
        mels = [getattr(model.config, n, None) for n in own]
        mels += [
            getattr(getattr(model.config, part, None), n, None)
            for part in ("encoder_config", "audio_config", "audio_encoder_config", "speech_encoder_config")
            for n in ("num_mel_bins", "n_mels", "feature_size", "input_dim")
        ]
        bins = [m for m in dict.fromkeys([*mels, 80, 128]) if isinstance(m, int)]
        main = model.main_input_name
        for extra in ({}, decoder):
            for shape in ((4000,), (1, 4000)):
                yield lambda seed, extra=extra, shape=shape: {
                    main: torch.randn(SAMPLES, *shape, generator=random(seed)),
                    **extra,
                }
            for count in bins:
                for shape in ((count, 128), (128, count), (count, 3000), (1024, count)):
                    yield lambda seed, extra=extra, shape=shape: {
                        main: torch.randn(SAMPLES, *shape, generator=random(seed)),
                        **extra,
                    }
