import pytest
import torch

from hq_plugin.timing import OtherMemory, cpu_name, device_name, machine, median_milliseconds


class Clock:
    """The clock that `timing` reads: it stands still but for what a call takes, however busy the machine is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("hq_plugin.timing.time.perf_counter", lambda: self.now)

    def takes(self, milliseconds: float) -> None:
        self.now += milliseconds / 1e3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_median_of_many_calls_is_taken(clock: Clock) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(0)
        clock.takes(50 if len(calls) % 5 == 0 else 2)

    assert median_milliseconds(call) == pytest.approx(2)
    assert len(calls) == 3 + 15  # to warm up, and timed


@pytest.mark.parametrize(("milliseconds", "repeats"), [(30, 15), (1, 20), (0.25, 80), (0.001, 200)])
def test_short_calls_are_repeated_more_often(clock: Clock, milliseconds: float, repeats: int) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(0)
        clock.takes(milliseconds)

    assert median_milliseconds(call) == pytest.approx(milliseconds)
    assert abs(len(calls) - 3 - repeats) <= 1


def test_machines_and_devices_have_names() -> None:
    assert torch.__version__ in machine()
    assert f"{torch.get_num_threads()} threads" in machine()
    assert device_name(torch.device("cpu")) == "cpu"
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert " avx2" in machine()


def test_processors_of_one_name_are_told_apart_by_their_instructions() -> None:
    old = ["processor\t: 0", "model name\t: AMD EPYC", "flags\t\t: fpu avx2 sha_ni", "", "processor\t: 1"]
    new = [line.replace("sha_ni", "avx512f avx512_vnni") for line in old]
    assert cpu_name(old) == "AMD EPYC avx2"
    assert cpu_name(new) == "AMD EPYC avx2 avx512f avx512_vnni"
    assert cpu_name(["CPU implementer\t: 0x41", "Features\t: fp asimddp i8mm"]) == "asimddp i8mm"


def test_other_memory_is_read_before_each_call_and_not_timed(clock: Clock) -> None:
    others, order = OtherMemory(3 << 20, torch.device("cpu")), []
    assert others.size == 4 << 20
    assert OtherMemory(1 << 40, torch.device("cpu")).size == 64 << 20

    def before() -> None:
        others.read()
        clock.takes(10)
        order.append("before")

    def call() -> None:
        clock.takes(1)
        order.append("call")

    assert median_milliseconds(call, before) == pytest.approx(1)
    assert order[-2:] == ["before", "call"]
