"""The table of a benchmark run: python -m bench.report FILE.json (what pytest-benchmark wrote), ours beside each peer.

A ratio is the peer's median over ours, both of this run; the spread is that of the ratio when each side is taken at its
quartiles. GB/s counts the bytes that must move, at our median.
"""

import json
import sys
from pathlib import Path

import rlhf_fast


def ratios(benchmarks: list[dict]) -> list[dict]:
    """One row for each case and peer."""
    groups: dict[str, dict[str, dict]] = {}
    for row in benchmarks:
        groups.setdefault(row["group"], {})[row["extra_info"]["who"]] = row
    table = []
    for name, contenders in groups.items():
        ours = contenders.pop("rlhf_fast", None)
        for peer, row in contenders.items() if ours else ():
            a, b = ours["stats"], row["stats"]
            table.append(
                {
                    "case": ours["extra_info"]["case"],
                    "size": ours["extra_info"]["size"],
                    "peer": peer,
                    "ours_us": a["median"] * 1e6,
                    "peer_us": b["median"] * 1e6,
                    "ratio": b["median"] / a["median"],
                    "low": b["q1"] / a["q3"],
                    "high": b["q3"] / a["q1"],
                    "gb_s": ours["extra_info"]["bytes"] / a["median"] / 1e9,
                }
            )
        if not ours:
            raise SystemExit(f"{name}: no row of ours to compare with")
    return table


def render(table: list[dict]) -> str:
    lines = ["| case | size | peer | ratio | spread | GB/s |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r['case']} | {r['size']} | {r['peer']} | {r['ratio']:.1f}x | {r['low']:.1f}-{r['high']:.1f} | {r['gb_s']:.1f} |"
        for r in table
    ]
    return "\n".join(lines)


def main(path: str) -> None:
    result = json.loads(Path(path).read_text())
    machine = result["machine_info"]
    info = rlhf_fast.build_info()
    threads = {row["extra_info"]["threads"] for row in result["benchmarks"]}
    print(
        f"{machine['cpu'].get('brand_raw', machine['machine'])}, {sorted(threads)} threads, "
        f"torch {info['torch']}, {info['cpu_level']}"
    )
    print(f"commit {result['commit_info']['id'][:12]}{' (dirty)' if result['commit_info']['dirty'] else ''}\n")
    print(render(ratios(result["benchmarks"])))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
