from torch import nn

import hq_plugin as hq
from tests.conftest import digits_batches


def test_a_result_prints_as_a_line_and_not_with_its_histories(trained: nn.Module) -> None:
    small = hq.quantize(trained, "4bit", digits_batches(), effort="smoke", meta_steps=0, progress=False)
    line = str(small.hq)
    assert "\n" not in line
    assert len(line) < 200
    assert f"{small.hq.effective_bits:.3f} effective bits" in line
    assert f"{small.hq.size:,} of {small.hq.float_size:,} bytes" in line
    assert "4bit" in line
