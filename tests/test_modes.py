"""In which mode the modules of a network are while gradients are computed."""

import pytest
from torch import nn

from hq_plugin import modes


def test_gradients_are_computed_in_eval_mode_but_where_recurrent_layers_need_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modes, "_needs_training_mode", lambda module: isinstance(module, nn.RNNBase))  # as on CUDA
    network = nn.ModuleDict({"norm": nn.BatchNorm1d(4), "rnn": nn.LSTM(4, 4, num_layers=2, dropout=0.5)})
    network["norm"].eval()
    with modes.differentiable(network):
        assert (network["norm"].training, network["rnn"].training, network["rnn"].dropout) == (False, True, 0.0)
    assert (network.training, network["norm"].training, network["rnn"].training) == (True, False, True)
    assert network["rnn"].dropout == 0.5
