import numpy as np
import pytest

from hq_plugin import Budget, BudgetError
from hq_plugin.budget import format_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3bit", Budget(weight_bits=3)),
        ("2.5 bits", Budget(weight_bits=2.5)),
        ("250KB", Budget(size=250_000)),
        ("4MB", Budget(size=4_000_000)),
        ("4 MiB", Budget(size=4 * 2**20)),
        ("12%", Budget(size_fraction=0.12)),
        ("1.5GBitOps", Budget(bitops=1.5e9)),
        ("3bit + 2GBitOps", Budget(weight_bits=3, bitops=2e9)),
        ("3bit,10%", Budget(weight_bits=3, size_fraction=0.1)),
        ("1e3KB", Budget(size=1e6)),
        ("8ms for 4 samples", Budget(latency_ms=8, batch=4)),
        ("50\N{MICRO SIGN}J + 1e+3KB", Budget(energy_uj=50, size=1e6)),
        ("50\N{GREEK SMALL LETTER MU}J", Budget(energy_uj=50)),
        ("3bit + 0.5S for 1 Sample", Budget(weight_bits=3, latency_ms=500)),
    ],
)
def test_short_forms(text: str, expected: Budget) -> None:
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "bit", "3", "3 bytes", "three bit", "3bit 4MB", "4PB", "3bit+", "nanbit", "infMB"]
)
def test_what_cannot_be_read_says_what_can(text: str) -> None:
    with pytest.raises(BudgetError, match="3bit"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0bit", "-3bit", "-1MB", "0%", "0GBitOps"])
def test_not_positive(text: str) -> None:
    with pytest.raises(BudgetError, match="not positive"):
        Budget.parse(text)


def test_numbers_of_numpy_are_numbers() -> None:
    assert Budget(size=np.int64(3000), weight_bits=np.float32(3)) == Budget(size=3000, weight_bits=3)


def test_other_mistakes() -> None:
    with pytest.raises(BudgetError, match="at least one limit"):
        Budget()
    with pytest.raises(BudgetError, match="not a finite number"):
        Budget(size=float("nan"))
    with pytest.raises(BudgetError, match="above 1"):
        Budget.parse("120%")
    with pytest.raises(BudgetError, match="twice"):
        Budget.parse("3bit+4bit")
    with pytest.raises(BudgetError, match="only a time"):
        Budget.parse("3bits for 4 samples")
    with pytest.raises(BudgetError, match="batch=0"):
        Budget.parse("8ms for 0 samples")
    with pytest.raises(BudgetError, match="8ms for 4 samples"):
        Budget.parse("8ms for several samples")
    with pytest.raises(ValueError, match="string or a Budget"):
        Budget.parse(3)  # type: ignore[arg-type]


def test_text_reads_back() -> None:
    budget = Budget(weight_bits=2.5, size=250_000, size_fraction=0.12, bitops=1.5e9)
    assert Budget.parse(str(budget)) == budget
    for budget in (Budget(latency_ms=8, batch=4, energy_uj=50), Budget(latency_ms=8)):
        assert Budget.parse(str(budget)) == budget
    assert format_bytes(1234) == "1.23 kB"


def test_numbers_are_read_however_they_are_written() -> None:
    assert Budget.parse(".5e3KB") == Budget.parse("500KB") == Budget.parse("5.e2 kb")
