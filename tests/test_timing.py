import time

import torch

from hq_plugin.timing import OtherMemory, cpu_name, device_name, machine, median_milliseconds


def test_the_median_of_many_calls_is_taken() -> None:
    calls = []

    def call() -> None:
        calls.append(0)
        time.sleep(0.05 if len(calls) % 5 == 0 else 0.002)

    assert 2 <= median_milliseconds(call) < 50
    assert len(calls) >= 18


def test_short_calls_are_repeated_more_often() -> None:
    calls = []
    assert median_milliseconds(lambda: calls.append(0)) > 0
    assert len(calls) > 100


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


def test_other_memory_is_read_before_each_call_and_not_timed() -> None:
    others, order = OtherMemory(3 << 20, torch.device("cpu")), []
    assert others.size == 4 << 20
    assert OtherMemory(1 << 40, torch.device("cpu")).size == 64 << 20

    def before() -> None:
        others.read()
        time.sleep(0.01)
        order.append("before")

    found = median_milliseconds(lambda: order.append("call"), before)
    assert order[-2:] == ["before", "call"]
    assert found < 10
