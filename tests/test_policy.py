import json

import pytest

from hq_plugin import HybridPolicy, LayerBits, PolicyError


def test_json_reads_back() -> None:
    policy = HybridPolicy(
        {
            "a": LayerBits(3, 8),
            "b.c": LayerBits(1),
            "d": LayerBits(3, 16, 64),
            "e": LayerBits(4, 8, dynamic=True),
        }
    )
    assert HybridPolicy.from_json(json.dumps(policy.to_json())) == policy
    assert hash(policy) == hash(HybridPolicy(dict(policy)))
    assert str(policy["a"]) == "W3A8"
    assert str(policy["b.c"]) == "W1"
    assert str(policy["d"]) == "W3g64"
    assert str(policy["e"]) == "W4A8d"
    assert policy.to_json() == {"a": [3, 8], "b.c": [1, 16], "d": [3, 16, 64], "e": [4, 8, 0, 1]}
    assert [bits.static_input for bits in policy.values()] == [True, False, False, False]


def test_dynamic_activations_have_a_width() -> None:
    with pytest.raises(PolicyError, match="2 to 8 bits"):
        LayerBits(4, 16, dynamic=True)
    with pytest.raises(PolicyError, match="dynamic=2"):
        HybridPolicy.from_json({"a": [4, 8, 0, 2]})


def test_equal_policies_have_one_hash_whatever_their_order() -> None:
    one, other = LayerBits(3, 8), LayerBits(4, 8)
    policies = {HybridPolicy({"a": one, "b": other}), HybridPolicy({"b": other, "a": one})}
    assert len(policies) == 1


def test_a_weight_that_is_left_out_has_no_groups() -> None:
    assert str(LayerBits(0)) == "W0"
    with pytest.raises(PolicyError, match="left out"):
        LayerBits(0, 16, 32)


@pytest.mark.parametrize("weight", [4.0, 0.0, False, 9, -1, 2.5, True, None])
def test_impossible_weight_widths(weight: object) -> None:
    with pytest.raises(PolicyError, match="1 to 8"):
        LayerBits(weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", [8.0, 0, 1, 9, 32])
def test_impossible_activation_widths(activation: int) -> None:
    with pytest.raises(PolicyError, match="2 to 8"):
        LayerBits(4, activation)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '{"a": 3}', '{"a": [3, 4, 5, 6]}', '{"a": [3, 4, -5]}', '{"a": [2.5, 8]}', '{"a": ["3", 8]}'],
)
def test_damaged_json(text: str) -> None:
    with pytest.raises(PolicyError):
        HybridPolicy.from_json(text)
