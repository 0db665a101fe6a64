"""A report as one HTML page that needs nothing else, and its short form for notebooks."""

from __future__ import annotations

import json
from importlib import resources
from string import Template

from hq_plugin.budget import format_bytes, format_count
from hq_plugin.policy import FLOAT_BITS
from hq_plugin.report.charts import front_chart, front_legend, search_chart, training_chart
from hq_plugin.report.document import Document, format_cost
from hq_plugin.report.gather import gather
from hq_plugin.report.layers import ROWS, activations_table, layers_figure, layers_table, table
from hq_plugin.report.text import duration, escape, number, plural, share
from hq_plugin.result import Result


def page(result: Result) -> str:
    """Returns the report of a result as an HTML page, without any reference to a network."""
    document = gather(result)
    # "<" would end the script element that holds the data.
    data = json.dumps(document.to_json(), separators=(",", ":")).replace("<", "\\u003c")
    return Template(asset("page.html")).substitute(
        title=escape(f"{document.model} in {document.budget}"),
        style=asset("style.css") + asset("page.css"),
        body="\n".join(section for section in _sections(document) if section),
        version=escape(document.versions.get("hq_plugin", "")),
        data=data,
        script=asset("page.js"),
    )


def summary(result: Result) -> str:
    """Returns the first parts of the report as a piece of HTML for notebooks, with a style of its own."""
    document = gather(result)
    parts = (_head(document, level=3), _comparison(document), layers_figure(document))
    return f'<div class="hq-report"><style>{asset("style.css")}</style>{"".join(parts)}</div>'


def asset(name: str) -> str:
    """Returns a text file of this package."""
    return resources.files("hq_plugin.report").joinpath(name).read_text(encoding="utf-8")


def _sections(document: Document) -> list[str]:
    sections = [
        ("comparison", "Against the float model and simpler policies", _compared(document)),
        ("layers", "Layer by layer", _layers(document)),
        ("front", "The front", _front(document)),
        ("history", "Training and search", _history(document)),
        ("activations", "What inputs can hold", _activations(document)),
        ("float", "What stayed float", _float(document)),
        ("stages", "Time and memory", _stages(document)),
        ("origin", "Versions and options", _origin(document)),
    ]
    present = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in present)
    return [
        _head(document),
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
        *(
            f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>'
            f"{body}</section>"
            for name, title, body in present
        ),
    ]


def _head(document: Document, level: int = 1) -> str:
    result, before = document.result, document.candidates[0]
    smaller = f"{document.float_size / result.size:.1f} times smaller than {format_bytes(document.float_size)}"
    tiles = [
        ("size", format_bytes(result.size), smaller),
        ("effective bits a weight", f"{result.weight_bits:.3f}", "steps and zero points counted"),
        (document.distance_name, number(result.distance), "to the float model, on held-out data"),
    ]
    if result.accuracy is not None:
        tiles.append(("accuracy", share(result.accuracy), f"float model: {share(before.accuracy)}"))
    if document.agreement is not None:
        tiles.append(("same answer", share(document.agreement), "of held-out samples, as the float model"))
    if result.metric is not None:
        tiles.append(("your metric", number(result.metric), f"float model: {number(before.metric)}"))
    if result.latency_ms is not None:
        tiles.append(("latency", f"{result.latency_ms:.3g} ms", "of a forward"))
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    title = f"<h{level}>{escape(document.model)} <span>quantized to {escape(document.budget)}</span></h{level}>"
    if document.chosen == "given":
        title = f"<h{level}>{escape(document.model)} <span>quantized by a given policy</span></h{level}>"
    return f'<header>{title}<dl class="tiles">{shown}</dl>{_limits(document)}</header>'


def _limits(document: Document) -> str:
    meters = "".join(
        f'<div class="limit"><span id="limit-{limit.name}">{escape(limit.label)}: '
        f"{escape(format_cost(limit.name, limit.spent))} of {escape(format_cost(limit.name, limit.limit))}</span>"
        f'<span class="meter" role="meter" aria-labelledby="limit-{limit.name}" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{limit.share * 100:.1f}"><i style="width:{limit.share:.2%}"></i>'
        f"</span><b>{share(limit.share)}</b></div>"
        for limit in document.limits
    )
    return f'<div class="limits">{meters}</div>' if meters else ""


def _compared(document: Document) -> str:
    baselines = {c.name: c for c in document.candidates if c.name not in ("float", "result")}
    result, text = document.result, ""
    if document.chosen in baselines:
        before = baselines[document.chosen].distance
        closest = before == min((c.distance for c in baselines.values() if c.distance is not None), default=None)
        text = f"The policy comes from {escape(document.chosen_label)}: of those below it "
        text += (
            "was the closest to the float model before fine-tuning. "
            if closest
            else "had the least distance together with what fine-tuning would not repair. "
        )
        uniform = baselines.get("uniform")
        if uniform and document.chosen != "uniform" and uniform.distance and before:
            factor = uniform.distance / before
            times = f"{factor:.3g} times as close as" if factor >= 1 else f"{1 / factor:.3g} times as far as"
            times = "as close as" if abs(factor - 1) < 0.005 else times
            text += f"It came {times} the best uniform policy. "
        if before and result.distance is not None:
            text += (
                f"Fine-tuning brought it from {number(before)} to {number(result.distance)}."
                if result.distance < before
                else "Fine-tuning did not bring it closer."
            )
    return (f"<p>{text}</p>" if text else "") + _comparison(document)


def _comparison(document: Document) -> str:
    def known(field: str) -> bool:
        return any(getattr(candidate, field) is not None for candidate in document.candidates)

    distances = [c.distance for c in document.candidates if c.distance]
    most = max(distances, default=1.0)
    head = ["(model)", document.distance_name, "(drawn)"]
    head += ["accuracy"] if known("accuracy") else []
    head += ["your metric"] if known("metric") else []
    head += ["bits", "bytes", "BitOps"]
    head += ["latency"] if known("latency_ms") else []
    rows = []
    for c in document.candidates:
        mark = ' <b class="chosen-mark">chosen</b>' if c.chosen else ""
        bar = f'<span class="track thin"><i style="width:{(c.distance or 0) / most:.1%}"></i></span>'
        cells = [f"{escape(c.label)}{mark}", number(c.distance), bar]
        cells += [share(c.accuracy)] if known("accuracy") else []
        cells += [number(c.metric)] if known("metric") else []
        cells += ["32" if c.weight_bits is None else f"{c.weight_bits:.3f}", f"{c.size:,}"]
        cells += ["" if c.bitops is None else format_count(c.bitops).strip()]
        cells += ["" if c.latency_ms is None else f"{c.latency_ms:.3g} ms"] if known("latency_ms") else []
        rows.append(cells)
    return f'<div class="comparison">{table(head, rows, raw=("(model)", "(drawn)"))}</div>'


def _layers(document: Document) -> str:
    layers = document.layers
    low, high = min(layer.weight_bits for layer in layers), max(layer.weight_bits for layer in layers)
    many = len(layers) > ROWS
    text = f"{plural(len(layers), 'layer')}, with weights of {low} to {high} bits. "
    if low == high:
        text = f"{plural(len(layers), 'layer')}, each with weights of {low} bits. "
    inputs = {layer.activation_bits for layer in layers}
    if len(inputs) == 1:
        text += "Inputs stay float. " if inputs == {FLOAT_BITS} else f"All inputs have {inputs.pop()} bits. "
    else:
        text += f"{'Small numbers below' if many else 'A and a number'} are the bits of inputs, f is float. "
    if any(layer.sensitivities for layer in layers):
        text += "Cells say what each width would cost alone, the stronger the farther from the float model"
        text += f"{', the widest on top' if many else ''}; the outlined one was chosen. "
    text += "Grey bars are bytes, by their square root."
    widths = sorted({layer.weight_bits for layer in layers})
    legend = "".join(
        f'<li><i class="b{bits}"></i>{bits} bit{"" if bits == 1 else "s"}: '
        f"{plural(sum(layer.weight_bits == bits for layer in layers), 'layer')}</li>"
        for bits in widths
    )
    return (
        f'<p>{text}</p><ul class="legend">{legend}</ul>{layers_figure(document)}'
        f"<details><summary>The same as a table</summary>{layers_table(document)}</details>"
    )


def _front(document: Document) -> str:
    whole, near = front_chart(document), front_chart(document, near=True)
    if not whole:
        return ""
    text = "Lower is closer to the float model, further left is cheaper. The dashed line is what adding up "
    text += "sensitivities predicts before any training; everything else was measured. "
    if document.policies:
        text += f"The search scored {plural(document.policies_scored, 'policy')}, "
        text += "none of which exceeds the budget; the thin line joins those that no other one betters. "
    figures = f"<figure>{whole}<figcaption>All budgets</figcaption></figure>"
    if near:
        figures += f"<figure>{near}<figcaption>Near this budget</figcaption></figure>"
    return f'<p>{text}</p>{front_legend(document)}<div class="figures">{figures}</div>{_policies_table(document)}'


def _policies_table(document: Document) -> str:
    best = sorted((p for p in document.policies if p.score is not None), key=lambda p: p.score or 0.0)[:20]
    if not best:
        return ""
    rows = [
        (
            str(policy.evaluation + 1),
            number(policy.score),
            format_cost("weight_bits", policy.weight_bits),
            "" if policy.size is None else f"{policy.size:,}",
            "" if policy.bitops is None else format_count(policy.bitops).strip(),
        )
        for policy in best
    ]
    shown = table(["policy", document.distance_name, "effective bits", "bytes", "BitOps"], rows)
    return f"<details><summary>The best of the search as a table</summary>{shown}</details>"


def _history(document: Document) -> str:
    charts = [
        (training_chart(document, "meta_training", "Meta-training: loss"), "Meta-training, a new policy each step"),
        (search_chart(document), "Search, and the best until then"),
        (training_chart(document, "finetune", "Fine-tuning: loss"), "Fine-tuning of the chosen policy"),
    ]
    figures = "".join(f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in charts if svg)
    return f'<div class="figures">{figures}</div>' if figures else ""


def _activations(document: Document) -> str:
    shown = activations_table(document)
    if not shown:
        return ""
    known = sum(layer.activation_high is not None for layer in document.layers)
    text = f"{plural(known, 'layer')} quantize their input: to (integer − zero point) × step, cut off outside the "
    text += "range. The vertical line is zero."
    if known <= ROWS // 2:
        return f"<p>{text}</p>{shown}"
    return f"<p>{text}</p><details><summary>{plural(known, 'range')}</summary>{shown}</details>"


def _float(document: Document) -> str:
    if not document.float_layers:
        return "<p>Nothing: every layer with parameters is quantized.</p>"
    rows = []
    for group in document.float_layers:
        names = ", ".join(escape(name) for name in group.layers)
        if len(group.layers) > 4:
            names = f"<details><summary>{len(group.layers)} layers</summary>{names}</details>"
        rows.append((escape(group.reason), names, f"{group.parameters:,}"))
    return f'<div class="float">{table(["why", "layers", "parameters"], rows, raw=("why", "layers"))}</div>'


def _stages(document: Document) -> str:
    if not document.stages:
        return ""
    longest = max(stage.seconds for stage in document.stages) or 1.0
    cuda = any(stage.cuda_memory for stage in document.stages)
    rows = []
    for stage in document.stages:
        bar = f'<span class="track thin"><i style="width:{stage.seconds / longest:.1%}"></i></span>'
        name = f'<span class="{"part" if stage.part_of else ""}">{escape(stage.label)}</span>'
        memory = [stage.memory, *([stage.cuda_memory] if cuda else [])]
        rows.append((name, duration(stage.seconds), bar, *("–" if m is None else format_bytes(m) for m in memory)))
    total = sum(stage.seconds for stage in document.stages if stage.part_of is None)
    head = ["stage", "time", "(drawn)", "memory at most, so far", *(["on the GPU"] if cuda else [])]
    text = (
        f"{duration(total)} together. Memory is that of the whole process since it began: a stage can only add to "
    )
    text += "it."
    return f'<p>{text}</p><div class="stages-table">{table(head, rows, raw=("stage", "(drawn)"))}</div>'


def _origin(document: Document) -> str:
    facts = [*document.versions.items(), ("seed", document.seed), ("effort", document.config.get("effort"))]
    shown = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts if v is not None)
    options = [(name, json.dumps(value)) for name, value in sorted(document.config.items())]
    gaps = "".join(f"<li>{escape(gap)}</li>" for gap in document.gaps)
    return (
        f'<dl class="facts">{shown}</dl>'
        + (
            f"<details><summary>All options</summary>{table(['option', 'value'], options)}</details>"
            if options
            else ""
        )
        + (f"<h3>What this report does not show</h3><ul>{gaps}</ul>" if gaps else "")
        + '<p id="download" hidden><a download="report.json">Download the data of this page (JSON)</a></p>'
    )
