from pathlib import Path

import pytest

from hq_plugin.cli.config import config_options
from hq_plugin.cli.options import Effort
from hq_plugin.config import Config
from hq_plugin.errors import ConfigError


def test_what_was_not_given_is_left_out() -> None:
    assert config_options(None, effort=None, profile=None) == {}
    options = config_options(
        ['loss="mse"', "exclude=[]", 'pinned={"a": [8, 8]}', "checkpoint_seconds=5"],
        effort=Effort.fast,
        checkpoint_dir=Path("work"),
        weight_bits="2,4",
    )
    config = Config(**options)
    assert (config.effort, config.weight_bits, config.loss, config.checkpoint_dir) == (
        "fast",
        (2, 4),
        "mse",
        "work",
    )
    assert config.pinned == {"a": (8, 8)}


@pytest.mark.parametrize(
    ("others", "given", "says"),
    [
        (["effort=fast"], {"effort": Effort.fast}, "given twice"),
        (["effort"], {}, "name=value"),
        (None, {"weight_bits": "2;3"}, "no list of widths"),
    ],
)
def test_bad_options(others: list[str] | None, given: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_options(others, **given)  # type: ignore[arg-type]
