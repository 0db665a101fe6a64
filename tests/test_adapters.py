import json
import sys

import pytest
import timm
import torch
from torch import nn

from hq_plugin import ArtifactError, adapters
from hq_plugin.adapters import without_memory
from hq_plugin.untrusted import build_at_most

#: Elements and tensors that a rebuilt model may have.
LIMITS = (10**8, 10**4)


def test_a_timm_model_is_found_and_others_are_not() -> None:
    assert adapters.find(timm.create_model("resnet10t")) is not None
    assert adapters.find(nn.Linear(2, 2)) is None
    assert adapters.describe(nn.Linear(2, 2)) is None


def test_a_library_that_was_not_imported_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("resnet10t")
    monkeypatch.delitem(sys.modules, "timm")
    assert adapters.find(model) is None


def test_only_known_integrations_are_imported() -> None:
    with pytest.raises(ArtifactError, match="knows timm"):
        adapters.rebuild({"integration": "../evil"}, *LIMITS)
    with pytest.raises(ArtifactError, match="no model"):
        adapters.rebuild({"integration": "timm", "name": "not_a_model", "arguments": {}}, *LIMITS)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "timm" or n.startswith("hq_plugin.integrations.timm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ArtifactError, match=r"pip install 'hq-plugin\[timm\]'"):
        adapters.rebuild({"integration": "timm", "name": "resnet10t", "arguments": {}}, *LIMITS)


def test_a_description_goes_through_json_and_back() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    description = json.loads(json.dumps(adapters.describe(model)))
    assert description["integration"] == "timm"
    assert adapters.describe(adapters.rebuild(description, *LIMITS)) == description


class Follows(nn.Module):
    """A module with a table that follows its parameter to the meta device, so that it is built twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.register_buffer("table", self.weight.detach() * 0 + 1, persistent=False)


def test_what_is_within_the_bounds_may_be_built_twice() -> None:
    def build() -> nn.Module:
        return without_memory(Follows)

    assert torch.equal(build_at_most(build, 16, 2).table, torch.ones(8))  # type: ignore[arg-type]
    for bounds in ((15, 2), (16, 1)):
        with pytest.raises(ArtifactError, match="larger model"):
            build_at_most(build, *bounds)
