import re
from dataclasses import replace

import hq_plugin as hq
from hq_plugin.report import gather
from hq_plugin.report.charts import front_chart, front_legend, search_chart, training_chart
from hq_plugin.report.plot import WIDTH


def test_the_front_shows_everything_that_was_scored_and_the_result(result: hq.Result) -> None:
    document = gather(result)
    svg = front_chart(document)
    assert svg.count("of the search\n") == len(document.policies)
    assert 'class="predicted"' in svg
    assert "result, fine-tuned" in svg
    assert ", chosen" in svg
    assert "best uniform" in front_legend(document)
    near = front_chart(document, near=True)
    assert 'class="predicted"' not in near


def test_the_search_and_training_are_lines(result: hq.Result) -> None:
    document = gather(result)
    assert 'class="best"' in search_chart(document)
    for stage in ("meta_training", "finetune"):
        assert 'class="smooth"' in training_chart(document, stage, "title")


def test_of_a_long_search_the_whole_is_shown(result: hq.Result) -> None:
    document = gather(result)
    (policy, *_) = document.policies
    policies = tuple(replace(policy, evaluation=n, score=1 + n % 7) for n in range(1200))
    svg = search_chart(replace(document, policies=policies))
    places = [float(x) for x in re.findall(r'<g class="scored" transform="translate\(([\d.]+)', svg)]
    assert len(places) == 600
    assert max(places) > 0.9 * WIDTH
    assert search_chart(document).count('<g class="scored"') == len(document.policies)


def test_without_a_history_there_is_no_empty_chart(result: hq.Result) -> None:
    document = gather(replace(result, history={}))
    assert search_chart(document) == training_chart(document, "finetune", "title") == ""
    assert front_chart(document, near=True) == ""
    assert "of the search\n" not in front_chart(document)
