"""The tables and plots of measurements: python -m bench.report [FILE.json [--name NAME]] [--plots]

FILE.json is what pytest-benchmark wrote: prints a table, ours beside each peer, and with --name keeps its rows in
bench/results/NAME.json and .md. --plots draws what bench/results holds, as SVG in bench/results/plots: of log-probs by
vocabulary the share of a plain copy's bandwidth and the memory a call takes; of a PPO update, ours and TRL 1.12's, the time and
the peak of memory.

A ratio is the peer's median over ours, both of one run; the spread is that of the ratio when each side is taken at its
quartiles. GB/s counts the bytes that must move, at our median; "of copy" sets it against a plain copy in the same run.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from bench import contenders
from rlhf_fast.train.report import plot

PLOTS = contenders.RESULTS / "plots"
STYLE = Path(plot.__file__).with_name("style.css")
OURS, EAGER = "rlhf_fast", "eager"
PASSES = ["logprobs", "logprobs + entropy", "logprobs, forward + backward", "logprobs, forward + in-place backward"]
HEAD = 72  # height of the title, what it ran on and the legend above a chart


# ------------------------------------------------------------------------------------------------------------- rows


def ratios(benchmarks: list[dict]) -> list[dict]:
    """One row for each case and peer."""
    groups: dict[str, dict[str, dict]] = {}
    for row in benchmarks:
        groups.setdefault(row["group"], {})[row["extra_info"]["who"]] = row
    rows = []
    for name, sides in groups.items():
        ours = sides.pop(OURS, None)
        for peer, row in sides.items() if ours else ():
            a, b, info = ours["stats"], row["stats"], ours["extra_info"]
            rows.append(
                {
                    "case": info["case"],
                    "size": info["size"],
                    "peer": peer,
                    "ours_us": a["median"] * 1e6,
                    "peer_us": b["median"] * 1e6,
                    "ratio": b["median"] / a["median"],
                    "low": b["q1"] / a["q3"],
                    "high": b["q3"] / a["q1"],
                    "gb_s": info["bytes"] / a["median"] / 1e9,
                    "of_copy": info["bytes"] / a["median"] / info["copy"],
                    "input_bytes": info["inputs"],
                    "ours_peak_bytes": info["peak"],
                    "peer_peak_bytes": row["extra_info"]["peak"],
                    "ours_error": info["error"],
                    "peer_error": row["extra_info"]["error"],
                }
            )
        if not ours:
            raise SystemExit(f"{name}: no row of ours to compare with")
    return rows


def render(rows: list[dict]) -> str:
    columns = [
        "case",
        "size",
        "ours, us",
        "peer",
        "ratio",
        "spread",
        "GB/s",
        "of copy",
        "memory MB",
        "peer's",
        "error",
        "peer's",
    ]
    return contenders.table(
        columns,
        [
            [
                r["case"],
                r["size"],
                f"{r['ours_us']:.1f}",
                r["peer"],
                f"{r['ratio']:.1f}x",
                f"{r['low']:.1f}-{r['high']:.1f}",
                f"{r['gb_s']:.1f}",
                f"{r['of_copy']:.0%}" if r["gb_s"] else "",
                f"{r['ours_peak_bytes'] / contenders.MB:.1f}",
                f"{r['peer_peak_bytes'] / contenders.MB:.1f}",
                *("" if r[side] is None else f"{r[side]:.0e}" for side in ("ours_error", "peer_error")),
            ]
            for r in rows
        ],
    )


def measured(run: dict) -> dict:
    """The rows of a run of pytest-benchmark, and what it ran on."""
    import rlhf_fast

    info, machine, commit = rlhf_fast.build_info(), run["machine_info"], run["commit_info"]
    first = run["benchmarks"][0]["extra_info"]
    threads = f"{first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    return {
        "machine": f"{machine['cpu'].get('brand_raw', machine['machine'])}, {threads}, {info['cpu_level']}",
        "torch": info["torch"],
        "commit": f"{commit['id'][:12]}{' (dirty)' if commit['dirty'] else ''}",
        "copy_bytes_per_second": first["copy"],
        "rows": ratios(run["benchmarks"]),
    }


def page(result: dict) -> str:
    return (
        f"{result['machine']}, torch {result['torch']}, copy {result['copy_bytes_per_second'] / 1e9:.1f} GB/s\n"
        f"commit {result['commit']}\n\n{render(result['rows'])}"
    )


# ------------------------------------------------------------------------------------------------------------ plots


def figure(title: str, on: str, chart: str, series: Sequence[plot.Series]) -> str:
    """A chart as a file of its own: with its title, what it ran on, a legend and the colours of the report."""
    css = STYLE.read_text()
    rules = [
        line for line in css.splitlines() if re.match(r"\.plot [^{]|\.chart |polyline", line)
    ]  # not its width on a page
    legend, x = [], 0
    for line in series:
        legend.append(f'<text class="t{line.colour}" x="{x:.0f}" y="58">● {escape(line.label)}</text>')
        x += 30 + 6.2 * len(line.label)  # the font is the reader's: about
    width, height = max(plot.WIDTH, x), plot.HEIGHT + HEAD
    placed = chart.replace("<svg ", f'<svg y="{HEAD}" width="{plot.WIDTH}" height="{plot.HEIGHT}" ', 1)
    return (
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="-14 -8 {width + 28} {height + 16}" '
        f'font-family="system-ui, sans-serif"><style>\n{css[: css.index("* {")]}{chr(10).join(rules)}\n'
        ".plot .title { font-size: 15px; font-weight: 600; fill: var(--ink); } .back { fill: var(--card); }\n</style>"
        f'<rect class="back" x="-14" y="-8" width="{width + 28}" height="{height + 16}" rx="12"/>'
        f'<text class="title" x="0" y="16">{escape(title)}</text>'
        f'<text class="unit" x="0" y="36">{escape(on)}</text>{"".join(legend)}{placed}</svg>\n'
    )


def by_vocabulary(name: str, title: str, on: str, unit: str, series: list[plot.Series], **options) -> dict[str, str]:
    """{file name: SVG}; nothing where nothing was measured."""
    series = [line for line in series if line.points]
    if not series:
        return {}
    chart = plot.line_chart(name, title, series, x_label="vocabulary", y_label=unit, include=[0], **options)
    return {f"{name}.svg": figure(title, on, chart, series)}


def of_logprobs(rows: list[dict], on: str, prefix: str = "") -> dict[str, str]:
    """Share of a copy's bandwidth and memory of a call, for each type of the logits; file names begin with `prefix`."""
    rows = [r for r in rows if r["peer"] == EAGER]
    large = [r for r in rows if r["input_bytes"] >= contenders.MB]  # less comes from what the allocator has

    def line(label: str, colour: int, rows: list[dict], case: str, value: Callable[[dict], float]) -> plot.Series:
        points = sorted((int(r["size"].split("x")[-1]), value(r)) for r in rows if r["case"] == case)
        return plot.Series(label, points, "marks", colour)

    def memory(side: str) -> Callable[[dict], float]:
        return lambda r: r[f"{side}_peak_bytes"] / r["input_bytes"]

    drawn: dict[str, str] = {}
    for kind in ("float32", "bfloat16"):
        shares = [
            line(case.removeprefix("logprobs, "), colour, rows, f"{case} {kind}", lambda r: r["of_copy"])
            for colour, case in enumerate(PASSES)
        ]
        drawn |= by_vocabulary(
            f"{prefix}bandwidth-{kind}",
            f"Bandwidth of log-probs, {kind}",
            on,
            "of a plain copy's",
            shares,
            percent=True,
        )
        backward, in_place = (f"{case} {kind}" for case in PASSES[2:])
        bytes_ = [
            line("ours", 0, large, backward, memory("ours")),
            line("ours, in place", 1, large, in_place, memory("ours")),
            line(EAGER, 2, large, backward, memory("peer")),
        ]
        drawn |= by_vocabulary(
            f"{prefix}memory-{kind}", f"Memory of log-probs, {kind}, forward + backward", on, "times the logits", bytes_
        )
    return drawn


def of_updates(results: list[dict]) -> dict[str, str]:
    """A PPO update of each trainer. Of a vocabulary that was measured twice, the result with more updates counts."""
    found: dict[str, dict[int, dict]] = {}
    for result in results:
        for vocab, sides in result["contenders"].items():
            for who, one in sides.items():
                known = found.setdefault(who, {}).get(int(vocab), {"cpu_seconds": []})
                if len(one.get("cpu_seconds", [])) > len(known["cpu_seconds"]):
                    found[who][int(vocab)] = one
    on = f"{results[0]['machine']}, {results[0]['settings']['threads']} thread" if results else ""

    def lines(value: Callable[[dict], float]) -> list[plot.Series]:
        return [
            plot.Series(who.replace("-", " "), [(v, value(one)) for v, one in sorted(sizes.items())], "marks", colour)
            for colour, (who, sizes) in enumerate(found.items())
        ]

    seconds = lines(lambda one: contenders.median(one["cpu_seconds"]))
    peak = lines(lambda one: one["peak_bytes"] / contenders.GIB)
    return by_vocabulary("ppo-update-time", "A PPO update", on, "CPU-seconds", seconds) | by_vocabulary(
        "ppo-update-memory", "Peak memory of PPO", on, "GiB", peak
    )


def write(drawn: dict[str, str], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in drawn.items():
        (folder / name).write_text(svg, encoding="utf-8")
    return [folder / name for name in drawn]


def plots(results: Path, folder: Path) -> list[Path]:
    """Of every measurement in `results`; a run on a GPU has a folder of its own and is drawn there."""
    read = {
        path: json.loads(path.read_text()) for path in sorted([*results.glob("*.json"), *results.glob("gpu-*/*.json")])
    }
    updates = [r for r in read.values() if "contenders" in r and "ppo_epochs" in r.get("settings", {})]
    written = write(of_updates(updates), folder)
    for path, result in read.items():
        if "copy_bytes_per_second" in result:
            own = path.parent != results
            drawn = of_logprobs(result["rows"], result["machine"], "" if own else f"{path.stem}-")
            written += write(drawn, path.parent if own else folder)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="what pytest-benchmark wrote")
    parser.add_argument("--name", help="keep the rows in bench/results/NAME.json and .md")
    parser.add_argument("--plots", action="store_true", help="draw what bench/results holds")
    options = parser.parse_args()
    if not (options.file or options.plots) or (options.name and not options.file):
        parser.error("give a FILE.json, or --plots; --name goes with a FILE.json")
    if options.file:
        result = measured(json.loads(options.file.read_text()))
        if options.name:
            contenders.write(options.name, result, page(result))
        else:
            print(page(result))
    if options.plots:
        written = plots(contenders.RESULTS, PLOTS)
        print(
            "\n".join(str(path.relative_to(contenders.ROOT)) for path in written) or "nothing to draw", file=sys.stderr
        )


if __name__ == "__main__":
    main()
