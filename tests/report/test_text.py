from dataclasses import replace

import hq_plugin as hq
from hq_plugin.report import gather
from hq_plugin.report.text import description, duration, escape, module_name, number, plural, share


def test_numbers_for_people() -> None:
    assert [number(v) for v in (None, 0.012345, 12345.6)] == ["–", "0.0123", "12,346"]
    assert [duration(v) for v in (0.5, 61, 3720)] == ["0.5 s", "1 min 1 s", "1 h 2 min"]
    assert [plural(1, "layer"), plural(2, "policy")] == ["1 layer", "2 policies"]
    assert [share(0.123), share(None)] == ["12.3 %", "–"]


def test_html_of_strangers_is_text() -> None:
    assert escape('<b onclick="x">') == "&lt;b onclick=&quot;x&quot;&gt;"
    assert module_name("a.<b>") == "a.<wbr>&lt;b&gt;"


def test_a_layer_is_described_by_name_shape_bytes_and_sensitivity(result: hq.Result) -> None:
    layer = gather(result).layers[-1]
    lines = description(layer, "KL divergence").splitlines()
    assert lines[0] == "head"
    assert "10 × 64 = 640 weights" in lines[2]
    assert lines[3].endswith(" B")
    assert lines[4].startswith("sensitivity ")
    bare = replace(gather(result).layers[-1], weight_bits=0, size=0)
    assert description(bare, "KL divergence").splitlines()[3] == "left out"
    assert (
        description(replace(bare, weight_bits=4), "KL divergence").splitlines()[3].startswith("shares its weights")
    )
    assert lines[5].startswith("inputs from ")
