"""The report as one HTML page: no script, nothing loaded, everything from users and models escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from string import Template

from rlhf_fast.train.report import curves, findings
from rlhf_fast.train.report.plot import Series, alike, change, histogram, interval_bar, number
from rlhf_fast.train.report.read import Run, Stage, finite, finite_list

TITLES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "dpo": "DPO"}
PURPOSE = {
    "sft": "The model learns to imitate good replies.",
    "reward": "A second model learns from preference pairs which of two replies people like better.",
    "ppo": "The policy learns to write replies that the reward model scores higher, without straying too far.",
    "dpo": "The policy learns from the preference pairs themselves, without straying too far.",
}
METHODS = {
    "PPO": "proximal policy optimisation: the policy writes replies, the reward model scores them, and the policy is "
    "changed in small steps towards higher scores.",
    "GRPO": "group-relative policy optimisation: PPO without a value model; the policy writes several replies to each "
    "prompt, and each counts as good or bad compared with the others.",
    "RLOO": "REINFORCE leave-one-out: the policy writes several replies to each prompt, and each counts as good or bad "
    "compared with the mean of the others.",
    "DPO": "direct preference optimisation: the policy is changed so that, compared with the SFT model, the preferred "
    "reply of each pair becomes more likely than the other.",
}
STATUS = {
    "complete": ("done", "finished"),
    "unfinished": ("halted", "not finished"),
    "damaged": ("halted", "record damaged"),
    "absent": ("absent", "not run"),
}
DATE = "%d %B %Y, %H:%M %Z"
SIDES = ("before", "after")
SHOWN_SAMPLES = 6
SHOWN_FLAWS = 10

WORDS = (
    ("Policy", "the language model that writes the replies."),
    (
        "SFT",
        "supervised fine-tuning: training on example replies. The starting point of {method}, “before” in this report.",
    ),
    ("Reward model", "a model that gives a reply a score, trained on pairs of replies of which one was preferred."),
    ("Judge", "whatever scores the replies before and after {method} on prompts that no stage was trained on."),
    (
        "Win rate",
        "share of prompts on which the judge prefers the reply after {method} to the one before; a tie counts half.",
    ),
    ("95% interval", "the range of true values that the number of comparisons leaves plausible."),
    (
        "KL",
        "how different the policy's choices have become from the SFT model's, in nats per reply; 0 is no difference.",
    ),
)


def render(run: Run) -> str:
    """The whole page. Every part stands for itself: a part without data is left out or says what is missing."""
    verdict = findings.verdict(run)
    parts = [
        _headline(run, verdict),
        _problems(run),
        _pipeline(run),
        _checks(run),
        _samples(run),
        *(_curves(run, stage) for stage in run.pipeline),
        _data(run),
        _what_was_run(run),
        _glossary(run),
    ]
    name = text(run.directory.resolve().name)
    return Template(_resource("page.html")).substitute(
        title=f"{name}: {text(verdict.title)}",
        style=_resource("style.css"),
        run=name,
        body="\n".join(filter(None, parts)),
        date=f"{datetime.now(timezone.utc):{DATE}}",
    )


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def text(value: object) -> str:
    """Any value as HTML text: escaped, control characters made visible, halves of surrogate pairs replaced."""
    clean = str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    clean = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), clean.replace("\r\n", "\n"))
    clean = re.sub(r"[\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", clean)
    return escape(clean)


def _title(run: Run, stage: str) -> str:
    return TITLES.get(stage, run.method)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _tag(name: str, css: str, *inner: str) -> str:
    return f'<{name} class="{css}">{"".join(inner)}</{name}>'


def _section(section_id: str, title: str, intro: str, body: str) -> str:
    lead = f'<p class="intro">{intro}</p>' if intro else ""
    return f'<section aria-labelledby="{section_id}"><h2 id="{section_id}">{title}</h2>{lead}{body}</section>'


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, css: str = "") -> str:
    """A table of HTML cells that scrolls sideways by itself when the screen is narrow."""
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = _tag("table", css, f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody>")
    return f'<div class="scroll" tabindex="0">{table}</div>'


# ----------------------------------------------------------------------------------------------------- headline


def _headline(run: Run, verdict: findings.Verdict) -> str:
    tiles = [_share_tile(share) for share in findings.shares(run)]
    before, after = finite(run.evaluation, "score_before"), finite(run.evaluation, "score_after")
    if before is not None and after is not None:
        tiles.append(_tile("Judge's mean score", change(before, after), f"before → after {run.method}"))
    kl = findings.sequence_kl(run)
    if kl is not None:
        tiles.append(_tile("Distance from SFT", f"{number(kl)} <small>nats</small>", "KL per reply; 0 is no change"))
    seconds, cpu = findings.total(run, "seconds"), findings.total(run, "cpu_seconds")
    if seconds is not None:
        note = "training, all stages" + (f"; {duration(cpu)} of processor time" if cpu is not None else "")
        tiles.append(_tile("Time", duration(seconds), note, css="wide"))
    title = f'<h1>{text(verdict.title)}</h1><p class="verdict">{text(verdict.text)}</p>'
    headline = f'<section class="headline {verdict.level}" aria-label="Result">{title}</section>'
    return headline + (_tag("div", "tiles", *tiles) if tiles else "")


def _share_tile(share: findings.Share) -> str:
    bar = interval_bar(share.key, share.label, share.value, share.low, share.high, middle=share.middle)
    note = f"95% interval {findings.interval(share.low, share.high)}<br>{text(share.note)}"
    return _tile(share.label, findings.percent(share.value), note, css="share", chart=bar)


def _tile(label: str, value: str, note: str, *, css: str = "", chart: str = "") -> str:
    parts = _tag("p", "label", label), _tag("p", "value", value), chart, _tag("p", "note", note)
    return _tag("div", f"tile {css}".strip(), *parts)


def _problems(run: Run) -> str:
    if not run.problems:
        return ""
    rows = "".join(f"<li>{text(problem)}</li>" for problem in run.problems)
    intro = "Some files of the run are missing or damaged; the rest of the page shows what could be read."
    title = '<h2 id="problems">This report is not complete</h2>'
    return f'<aside class="problems" aria-labelledby="problems">{title}<p>{intro}</p><ul>{rows}</ul></aside>'


def _pipeline(run: Run) -> str:
    steps = []
    for place, name in enumerate(run.pipeline, start=1):
        stage = run.stages[name]
        css, status = STATUS[stage.status]
        seconds = finite(stage.summary, "seconds")
        took = f" in {duration(seconds)}" if seconds is not None else ""
        if stage.status == "unfinished" and stage.log:
            status = f"not finished; last record at step {number(stage.log[-1]['step'])}"
        steps.append(
            f'<li class="{css}"><p class="step"><span class="place" aria-hidden="true">{place}</span>{_title(run, name)}</p>'
            f'<p>{PURPOSE[name]}</p><p class="status">{status}{took}</p></li>'
        )
    return f'<ol class="pipeline" aria-label="The stages">{"".join(steps)}</ol>'


def _checks(run: Run) -> str:
    found = sorted(findings.checks(run), key=lambda check: check.passed)
    if not found:
        return ""
    rows = "".join(map(_check, found))
    failed = sum(not check.passed for check in found)
    intro = (
        "What a careful reader would ask before trusting the result. All of it is in order."
        if not failed
        else f"What a careful reader would ask before trusting the result. {failed} of {len(found)} "
        f"need{'s' if failed == 1 else ''} a look."
    )
    return _section("checks", "Can this be trusted?", intro, f'<ul class="checks">{rows}</ul>')


def _check(check: findings.Check) -> str:
    css, sign, spoken = ("passed", "✓", "In order: ") if check.passed else ("failed", "!", "Look at this: ")
    mark = f'<span class="mark" aria-hidden="true">{sign}</span>'
    return _tag("li", css, mark, f'<span><span class="hidden">{spoken}</span>{text(check.text)}</span>')


# ------------------------------------------------------------------------------------------------------ samples


def _samples(run: Run) -> str:
    samples = _rows(run.evaluation, "samples")
    compared = _compared(run)
    if not samples and not compared:
        return ""
    scorers = ("judge",) if run.evaluation.get("judge_is_training_reward") is True else ("judge", "reward")
    body = compared + _sample_list(samples[:SHOWN_SAMPLES], scorers, run.method)
    if rest := samples[SHOWN_SAMPLES:]:
        body += _details(f"{len(rest)} more in the same order", _sample_list(rest, scorers, run.method))
    if worst := _rows(run.evaluation, "worst_samples"):
        title = (
            f"The {len(worst)} where {run.method} lost most"
            if len(worst) > 1
            else f"The one where {run.method} lost most"
        )
        body += _details(title, _sample_list(worst, scorers, run.method))
    intro = (
        "Replies to held-out prompts, the first ones and not picked by hand. A judge's score is higher for a better "
        "reply; the frame marks the reply that the judge preferred."
    )
    return _section("samples", "Before and after, side by side", intro, body)


def _rows(mapping: dict, key: str) -> list[dict]:
    rows = mapping.get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _sample_list(rows: list[dict], scorers: Sequence[str], method: str) -> str:
    return _tag("div", "samples", *(_sample(row, scorers, method) for row in rows)) if rows else ""


def _sample(row: dict, scorers: Sequence[str], method: str) -> str:
    judged = {side: finite(row, f"judge_{side}") for side in SIDES}
    better = None
    if None not in judged.values() and judged["before"] != judged["after"]:
        better = max(SIDES, key=lambda side: judged[side])
    prompt = _tag("div", "prompt", '<p class="who">prompt</p>', _quote(row.get("prompt")))
    chips = {side: [] for side in SIDES}
    for scorer in scorers:
        scores = [finite(row, f"{scorer}_{side}") for side in SIDES]
        if None not in scores:
            for side, score in zip(SIDES, alike(*scores), strict=True):
                chips[side].append(_tag("span", "chip", f"{scorer} {score}"))
    replies = (_reply(f"{side} {method}", row.get(side), chips[side], preferred=side == better) for side in SIDES)
    return _tag("article", "sample", prompt, *replies)


def _reply(title: str, reply: object, chips: list[str], *, preferred: bool) -> str:
    mark = _tag("span", "chip prefers", "preferred") if preferred else ""
    who = _tag("p", "who", f"<span>{title}</span>", mark, *chips)
    return _tag("div", "reply better" if preferred else "reply", who, _quote(reply))


def _quote(value: object) -> str:
    if not isinstance(value, str):
        return '<p class="quote none">not recorded</p>'
    if not value.strip():
        return '<p class="quote none">(empty)</p>'
    return f'<p class="quote" dir="auto">{text(value)}</p>'


COMPARED = (
    ("Judge's score", "score", alike),
    ("Reward model's score", "reward", alike),
    ("Reply length, tokens", "length", alike),
    ("Replies that end by themselves", "eos_rate", findings.percents),
    ("Distinct words, of all words", "distinct_1", findings.percents),
    ("Distinct word pairs, of all pairs", "distinct_2", findings.percents),
)


def _compared(run: Run) -> str:
    """The spread of scores as a chart and the means as a table, whichever there are."""
    same = run.evaluation.get("judge_is_training_reward") is True
    rows = [
        (label, *show(before, after))
        for label, key, show in COMPARED
        if not (same and key == "reward")
        and (before := finite(run.evaluation, f"{key}_before")) is not None
        and (after := finite(run.evaluation, f"{key}_after")) is not None
    ]
    figures = _score_histogram(run)
    if rows:
        caption = "<figcaption><h3>Means over all compared replies</h3></figcaption>"
        figures += f"<figure>{caption}{_table(('', 'Before', 'After'), rows)}</figure>"
    return _tag("div", "charts", figures) if figures else ""


def _score_histogram(run: Run) -> str:
    before, after = (finite_list(run.evaluation, f"scores_{side}") for side in SIDES)
    if not before or not after:
        return ""
    svg = histogram(
        "judge-scores",
        f"Distribution of the judge's scores before and after {run.method}",
        before,
        after,
        x_label="judge's score",
    )
    explanation = (
        f"How the judge's scores are spread over all compared replies. After {run.method} the weight should lie further right; "
        "a new hump on the far left would be replies that went wrong."
    )
    series = (Series(f"before {run.method}", (), colour=0), Series(f"after {run.method}", (), colour=1))
    return _figure("The spread of scores", explanation, svg, series)


# ------------------------------------------------------------------------------------------------------- curves


def _curves(run: Run, stage: str) -> str:
    drawn = curves.charts(run, stage)
    if not drawn:
        return ""
    main = "".join(_chart(chart) for chart in drawn if not chart.detail)
    more = "".join(_chart(chart) for chart in drawn if chart.detail)
    body = _tag("div", "charts", main) if main else ""
    if more:
        body += _details("More curves, for when something looks wrong", _tag("div", "charts", more))
    return _section(f"curves-{stage}", f"{_title(run, stage)}: the curves", PURPOSE[stage], body)


def _chart(chart: curves.Chart) -> str:
    return _figure(chart.title, chart.explanation, chart.svg, chart.series)


def _figure(title: str, explanation: str, svg: str, series: Sequence[Series]) -> str:
    keys = []
    for line in series:
        shape = "dot" if line.kind in ("marks", "scatter") else "area" if not line.points else "line"
        keys.append(f'<li><i class="key {shape} k{line.colour}"></i>{text(line.label)}</li>')
    if smoothed := [line for line in series if line.window > 1]:
        run, mean = smoothed[0].run, smoothed[0].run * smoothed[0].window
        thin = "each value" if run == 1 else f"mean of {run}"
        keys.append(f'<li class="aside">thin: {thin}; bold: mean of {mean}</li>')
    if any(line.broken for line in series):
        keys.append('<li class="aside"><i class="key cross">×</i>not a finite number</li>')
    return (
        f'<figure><figcaption><h3>{text(title)}</h3><ul class="legend">{"".join(keys)}</ul></figcaption>{svg}'
        f'<p class="how">{text(explanation)}</p></figure>'
    )


# --------------------------------------------------------------------------------------------------------- data


def _data(run: Run) -> str:
    data = findings.data(run)
    if not data.stages:
        return ""
    head = (
        "Stage",
        "File",
        "Rows read",
        "Used",
        "For training",
        "Held out",
        "Prompts cut",
        "Replies cut",
        "Flawed rows",
    )
    rows = [
        (
            _title(run, name),
            f'<span class="path">{text(summary["path"])}</span>',
            *("–" if summary[key] is None else findings.count(summary[key]) for key in findings.COUNTS),
            findings.count(summary["flawed_rows"]),
        )
        for name, summary in data.stages.items()
    ]
    body = _table(head, rows, css="numbers")
    if data.flawed:
        flaws = _table(
            ("Where", "Field", "What is wrong"),
            (
                (f'<span class="path">{text(place)}</span>', f"<code>{text(field)}</code>", text(reason))
                for place, field, reason in data.flawed
            ),
        )
        title = (
            f"{findings.count(len(data.flawed))} flawed {'row was' if len(data.flawed) == 1 else 'rows were'} left out"
        )
        body += f"<h3>{title}</h3>{flaws}" if len(data.flawed) <= SHOWN_FLAWS else _details(title, flaws)
    else:
        body += "<p>No row was flawed.</p>"
    intro = (
        "Held-out rows are chosen by their prompt and are the same in every stage; nothing is trained on them. "
        "“Cut” counts texts that were longer than the limit."
    )
    return _section("data", "The data", intro, body)


# ------------------------------------------------------------------------------------------------- what was run


FACTS = (
    ("Started", lambda stage: _moment(stage.summary.get("started"))),
    ("Wall time", lambda stage: duration(finite(stage.summary, "seconds"))),
    ("Processor time", lambda stage: duration(finite(stage.summary, "cpu_seconds"))),
    ("Parameters", lambda stage: _count(stage, "parameters")),
    ("Device", lambda stage: text(stage.summary.get("device") or "–")),
    ("Threads", lambda stage: _count(stage, "threads")),
)


def _what_was_run(run: Run) -> str:
    present = [stage for stage in run.stages.values() if stage.summary]
    parts = [_command(present), _stage_table(run, present)]
    for stage in present:
        parts.append(_recorded(run, stage, "options in force", "config"))
        parts.append(_recorded(run, stage, "results", "results"))
    if run.config:
        parts.append(_details("The whole run: config.yaml", f'<pre tabindex="0">{text(run.config)}</pre>'))
    versions = next((v for stage in reversed(present) if isinstance(v := stage.summary.get("versions"), dict)), {})
    if versions:
        parts.append("<h3>Versions and compiled operations</h3>" + _facts(versions))
    body = "".join(parts)
    return _section("run", "What was run", "", body) if body else ""


def _command(stages: list[Stage]) -> str:
    """The commands as they were given; one that ran several stages is shown once."""
    commands = dict.fromkeys(
        stage.summary["command"] for stage in stages if isinstance(stage.summary.get("command"), str)
    )
    return "".join(f'<pre class="command" tabindex="0">{text(command)}</pre>' for command in commands)


def _stage_table(run: Run, stages: list[Stage]) -> str:
    if not stages:
        return ""
    rows = [(f"<b>{name}</b>", *(show(stage) for stage in stages)) for name, show in FACTS]
    return _table(("", *(_title(run, stage.name) for stage in stages)), rows)


def _recorded(run: Run, stage: Stage, title: str, key: str) -> str:
    value = stage.summary.get(key)
    return _details(f"{_title(run, stage.name)}: {title}", _facts(value)) if isinstance(value, dict) and value else ""


def _moment(started: object) -> str:
    try:
        return f"{datetime.fromisoformat(str(started)):{DATE}}"
    except ValueError:
        return text(started or "–")


def _count(stage: Stage, key: str) -> str:
    value = finite(stage.summary, key)
    return "–" if value is None else findings.count(value)


def _facts(mapping: dict) -> str:
    """A nested mapping as two columns: dotted key, value."""
    rows = [(f"<code>{text(key)}</code>", _value(value)) for key, value in _flatten(mapping)]
    return _table(("Name", "Value"), rows, css="facts")


def _flatten(mapping: dict, prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return text(", ".join(map(str, value))) or "–"
    if value is None or value == "":
        return "–"
    return text(number(value) if isinstance(value, float) else value)


def _glossary(run: Run) -> str:
    words = [(word, meaning.format(method=run.method)) for word, meaning in WORDS]
    words.insert(3, (run.method, METHODS[run.method]))
    rows = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in words)
    return _section("words", "Words used here", "", f"<dl>{rows}</dl>")
