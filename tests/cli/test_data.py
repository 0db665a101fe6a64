from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hq_plugin.cli.data import load_data
from hq_plugin.cli.models import Source
from hq_plugin.errors import DataError, HQError
from tests.conftest import TinyNet

TINY = Source(TinyNet())


class Text(nn.Module):
    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return input_ids * mask


def test_arrays_x_and_y(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((6, 1, 8, 8), np.uint8), y=np.arange(6, dtype=np.int32))
    x, y = load_data(str(tmp_path / "d.npz"), TINY)[5]
    assert (x.dtype, y.dtype, int(y)) == (torch.float32, torch.int64, 5)


def test_arrays_named_as_the_inputs(tmp_path: Path) -> None:
    ids = np.arange(12).reshape(6, 2)
    np.savez(tmp_path / "d.npz", input_ids=ids, mask=np.ones((6, 2), np.float64), label=np.arange(6))
    row = load_data(str(tmp_path / "d.npz"), Source(Text()))[1]
    assert row.keys() == {"input_ids", "mask", "label"}
    assert row["input_ids"].tolist() == [2, 3], "token ids stay whole numbers"
    assert row["mask"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64])
def test_token_ids_of_any_width(tmp_path: Path, dtype: type[np.integer]) -> None:
    np.savez(tmp_path / "d.npz", input_ids=np.arange(12, dtype=dtype).reshape(6, 2))
    ids = load_data(str(tmp_path / "d.npz"), Source(Text()))[1]["input_ids"]
    assert ids.dtype == torch.int64
    assert ids.tolist() == [2, 3]


def test_bad_arrays(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"

    def refused(**arrays: np.ndarray) -> str:
        np.savez(path, **arrays)
        with pytest.raises(DataError) as caught:
            load_data(str(path), TINY)
        return str(caught.value)

    assert "no array x" in refused(y=np.zeros(3))
    assert "2 in y" in refused(x=np.zeros((3, 1, 8, 8)), y=np.zeros(2))
    assert "of numbers" in refused(x=np.array([{}], dtype=object)), "nothing is unpickled"
    path.write_bytes(b"nothing")
    with pytest.raises(DataError):
        load_data(str(path), TINY)


def test_texts_are_lines_or_paragraphs(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    source, path = Source(BertModel(BertConfig(vocab_size=10, **sizes))), tmp_path / "t.txt"
    path.write_text("one\ntwo\n")
    assert load_data(str(path), source) == ["one", "two"]
    path.write_text("one\ntwo\n\n \nthree\n")
    assert load_data(str(path), source) == ["one\ntwo", "three"]
    path.write_text(" \n")
    with pytest.raises(DataError, match="no text"):
        load_data(str(path), source)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        load_data(str(path), source)
    with pytest.raises(DataError, match="no Hugging Face model"):
        load_data(str(path), TINY)


@pytest.mark.parametrize(
    ("reference", "says"),
    [("missing.npz", "is not there"), ("tests", "not a timm model"), ("nowhere:f", "module:function")],
)
def test_what_is_not_there(reference: str, says: str) -> None:
    with pytest.raises(HQError, match=says):
        load_data(reference, TINY)
