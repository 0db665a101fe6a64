from torch import nn

from hq_plugin.nn import replace_modules


def test_modules_are_replaced_wherever_they_are_referred_to() -> None:
    old, new = nn.Linear(2, 2), nn.Identity()
    model = nn.Sequential(old, nn.Sequential(old, nn.ReLU()))
    assert replace_modules(model, {id(old): new}) is model
    assert model[0] is model[1][0] is new  # type: ignore[index]
    assert type(model[1][1]) is nn.ReLU  # type: ignore[index]


def test_the_model_itself_may_be_replaced() -> None:
    old, new = nn.Linear(2, 2), nn.Identity()
    assert replace_modules(old, {id(old): new}) is new
