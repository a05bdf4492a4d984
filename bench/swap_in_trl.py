"""TRL 1.12's PPO trainer with and without rlhf_fast.patch("trl"): python -m bench.swap_in_trl

The trainer of bench.ppo_update, 50 updates on tiny random models, each way in a process of its own, one thread. Both must report
the same: every policy loss, value loss, KL and reward of the 50 updates within 1e-4. Beside that, CPU-seconds an update and peak
memory, also at a larger vocabulary for some updates.

Needs `make peers`. Writes bench/results/swap-in-trl.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import contenders, ppo_update

PLAIN, PATCHED = "TRL", "TRL, patched"
CURVES = ("loss/policy_avg", "loss/value_avg", "objective/kl", "objective/rlhf_reward")
TOLERANCE = 1e-4
SIZES = [
    {"vocab": 500, "batch": 16, "response_tokens": 32, "updates": 49},  # and one for warm-up
    {"vocab": 32_000, "batch": 32, "response_tokens": 64, "updates": 4},
]


def contend(name: str, s: dict) -> contenders.Result:
    import rlhf_fast

    if name == PATCHED:
        rlhf_fast.patch("trl")
    with TemporaryDirectory() as directory:
        ppo_update.save_models(Path(directory), s)
        start = contenders.forget_peak()
        laps, logs = ppo_update.trl(Path(directory), s)
    return laps.after(s["warm_up"]) | {
        "start_bytes": start,
        "peak_bytes": contenders.memory("VmHWM"),
        "curves": {key: [float(line[key]) for line in logs] for key in CURVES},
    }


def worst(pair: dict[str, contenders.Result]) -> dict[str, float]:
    """The greatest difference of each curve, relative to max(1, |unpatched|)."""
    plain, patched = (pair[name]["curves"] for name in (PLAIN, PATCHED))
    return {
        key: max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(plain[key], patched[key], strict=True)) for key in CURVES
    }


def render(result: contenders.Result) -> str:
    s = result["settings"]
    lines = [
        f"{result['machine']}, {s['threads']} thread, trl 1.12.0; commit {result['commit']}",
        "",
        f"Llama of {s['layers']} layers, width {s['hidden']}, float32; {s['ppo_epochs']} epochs an update. CPU-seconds: median "
        f"of the updates after {s['warm_up']}, least and most in brackets. Peak: above what was resident before training. "
        f"Difference: the greatest of {', '.join(CURVES)} over all updates, relative to max(1, |TRL's|).",
        "",
    ]
    rows = []
    for size, pair in zip(result["sizes"], result["pairs"], strict=True):
        for name, one in pair.items():
            peak = (one["peak_bytes"] - one["start_bytes"]) / contenders.MB
            rows.append(
                [
                    f"{size['vocab']:,}, {size['batch']} x {size['response_tokens']}",
                    name,
                    str(size["updates"] + s["warm_up"]),
                    f"{contenders.median(one['cpu_seconds']):.2f} ({contenders.spread(one['cpu_seconds'])})",
                    f"{peak:.0f}",
                    f"{max(worst(pair).values()):.0e}" if name == PATCHED else "",
                ]
            )
    columns = ["V, B x T", "trainer", "updates", "CPU-s an update", "peak MB", "difference"]
    return "\n".join([*lines, contenders.table(columns, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.swap_in_trl", description=__doc__.splitlines()[0])
    parser.add_argument("--contender", nargs=3, metavar=("NAME", "SETTINGS", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--name", default="swap-in-trl", help="of the files in bench/results (default: swap-in-trl)")
    options = parser.parse_args()
    if options.contender:
        name, settings, file = options.contender
        Path(file).write_text(json.dumps(contend(name, json.loads(settings))))
        return
    python, pairs = contenders.peer_python("trl-1.12"), []
    for size in SIZES:
        settings = ppo_update.SETTINGS | size
        pair = {
            name: contenders.run("bench.swap_in_trl", name, settings, python=python, memory_gib=18.0)
            for name in (PLAIN, PATCHED)
        }
        if any("failed" in one for one in pair.values()):
            sys.exit("a contender failed: see above")
        pairs.append(pair)
    result = {
        "machine": contenders.machine(),
        "commit": contenders.commit(),
        "settings": ppo_update.SETTINGS | ppo_update.SHARED,
        "sizes": SIZES,
        "pairs": pairs,
    }
    contenders.write(options.name, result, render(result))
    apart = [f"{key} {far:.1e}" for pair in pairs for key, far in worst(pair).items() if far > TOLERANCE]
    if apart:
        sys.exit(f"further apart than {TOLERANCE}: {', '.join(apart)}")


if __name__ == "__main__":
    main()
