import pytest

from hq_plugin.progress import progress


def test_bars_go_to_stderr_with_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(True) as bars:
        task = bars.task("searching", total=2)
        task.advance(loss=0.5, stage="first")
        with progress(True) as inner:
            assert inner is bars
            inner.task("inside", total=1).advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "searching" in captured.err
    assert "inside" in captured.err
    assert "loss 0.5" in captured.err
    assert "stage first" in captured.err


def test_without_a_terminal_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress() as bars:
        task = bars.task("searching", total=10)
        for _ in range(9):
            now[0] += 20
            task.advance(loss=0.5)
    assert capsys.readouterr().err.splitlines() == [
        "searching: 2 of 10, 3 min left, loss 0.5",
        "searching: 4 of 10, 2 min left, loss 0.5",
        "searching: 6 of 10, 1 min left, loss 0.5",
        "searching: 8 of 10, under a minute left, loss 0.5",
    ]


@pytest.mark.parametrize("enabled", [False, None])
def test_off(enabled: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(enabled) as bars:
        bars.task("searching", total=2).advance()
    assert capsys.readouterr() == ("", "")


def test_only_the_first_process_shows_any(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress(True) as bars:
        bars.task("searching", total=2).advance()
    assert capsys.readouterr() == ("", "")


def test_inside_a_silent_one_all_is_silent_and_after_an_error_all_is_as_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        with progress(False), progress(True) as inner:
            inner.task("searching", total=2).advance()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert capsys.readouterr() == ("", "")
    with progress(True) as bars:
        bars.task("searching", total=0)
    assert "searching" in capsys.readouterr().err
