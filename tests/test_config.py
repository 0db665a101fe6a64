import json

import pytest

from hq_plugin import Config, ConfigError


def test_effort_sets_what_is_not_given() -> None:
    steps = Config(effort="fast", finetune_steps=7).steps
    assert (steps.meta, steps.finetune) == (100, 7)


def test_pairs_of_widths_may_be_lists() -> None:
    assert Config(pinned={"stem": [8, 8], "head": 4}).pinned == {"stem": (8, 8), "head": 4}  # type: ignore[dict-item]


def test_options_replace() -> None:
    assert Config().with_options({"seed": 3, "activation_bits": 4}).activation_bits == (4,)
    with pytest.raises(ConfigError, match=r"no option 'sed'.*seed"):
        Config().with_options({"sed": 3})


@pytest.mark.parametrize(
    "options",
    [
        {"effort": "much"},
        {"block": "deep"},
        {"weight_bits": ()},
        {"weight_bits": (0, 4)},
        {"embedding_bits": (-1, 4)},
        {"embedding_bits": (3,), "target": "onnxruntime"},
        {"weight_bits": "34"},
        {"weight_bits": (2.5,)},
        {"weight_bits": (2.0, 4)},
        {"embedding_bits": "2,4"},
        {"train_float": "False"},
        {"progress": 1.5},
        {"dense_limit": "64k"},
        {"groups": 5},
        {"exclude": 5},
        {"activation_bits": (1,)},
        {"activation_bits": 32},
        {"meta_steps": -1},
        {"meta_steps": 1.5},
        {"learning_rate": 0.0},
        {"block_loss": -0.1},
        {"block_loss": float("nan")},
        {"learning_rate": float("nan")},
        {"crossover": 1.5},
        {"exclude": "head"},
        {"exclude": [["head"]]},
        {"groups": ["first", "second"]},
        {"groups": "head"},
        {"loss": "l1"},
        {"batch_size": 0},
    ],
)
def test_impossible_values(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Config(**options)  # type: ignore[arg-type]


def test_json_reads_back() -> None:
    config = Config(
        effort="smoke", pinned={"head": (8, 8), "stem": 8}, groups=(("a", "b"),), activation_bits=(4, 16)
    )
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert Config(prepare_batch=len).to_json()["prepare_batch"] == "builtins:len"  # type: ignore[arg-type]


def test_none_is_no_pattern() -> None:
    config = Config(exclude=None, groups=None, trackers=None)  # type: ignore[arg-type]
    assert (config.exclude, config.groups, config.trackers) == ((), (), ())
