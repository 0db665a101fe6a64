"""What one process reaches, with which several are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed import launching
from tests.distributed.launching import reports, run


@pytest.fixture(scope="package")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("one")
    done = run(launching.alone(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return reports(out, 1)[0]


def assert_same(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    # Every process has the same model and the same log.
    assert all(report == found[0] for report in found)
    # Before anything is trained each policy is scored by one process on all samples: to the same bits.
    assert found[0]["sensitivities"] == alone["sensitivities"]
    # Gradients are means over the processes, in another order: not to the bit.
    for stage in ("meta", "finetune"):
        np.testing.assert_allclose(found[0][stage], alone[stage], rtol=0, atol=1e-4)
    assert found[0]["searched"] == alone["searched"]
    np.testing.assert_allclose(found[0]["scores"], alone["scores"], rtol=0, atol=1e-4)
    assert found[0]["policy"] == alone["policy"]
