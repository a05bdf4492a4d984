"""TRL's PPO and GRPO trainers with and without rlhf_fast.patch("trl"): python -m bench.swap_in_trl

TRL 1.12's PPO trainer as in bench.ppo_update, 50 updates on tiny random models, and TRL 1.16's GRPO trainer on the same policy,
each way in a process of its own, one thread. Both must report the same: every loss, KL and reward of the updates within 1e-4.
Beside that, CPU-seconds an update and peak memory, also at a larger vocabulary for some updates.

Needs `make peers`. Writes bench/results/swap-in-trl.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import contenders, ppo_update

PLAIN, PATCHED = "as it is", "patched"
PPO, GRPO = "PPOTrainer, TRL 1.12", "GRPOTrainer, TRL 1.16"
ENVIRONMENTS = {PPO: "trl-1.12", GRPO: "trl-1.16"}
CURVES = {
    PPO: ("loss/policy_avg", "loss/value_avg", "objective/kl", "objective/rlhf_reward"),
    GRPO: ("loss", "kl", "entropy", "reward"),
}
TOLERANCE = 1e-4
SIZES = [  # and one update for warm-up
    {"trainer": PPO, "vocab": 500, "batch": 16, "response_tokens": 32, "updates": 49},
    {"trainer": PPO, "vocab": 32_000, "batch": 32, "response_tokens": 64, "updates": 4},
    {"trainer": GRPO, "vocab": 500, "batch": 16, "response_tokens": 32, "updates": 49},
    {"trainer": GRPO, "vocab": 32_000, "batch": 32, "response_tokens": 64, "updates": 4},
]


def grpo(directory: Path, s: dict) -> tuple[contenders.Laps, list[dict]]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(s["threads"])
    torch.manual_seed(0)
    laps = contenders.Laps()
    tokenizer = AutoTokenizer.from_pretrained(directory / "policy", padding_side="left")
    config = GRPOConfig(
        output_dir=str(directory / "out"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_completion_length=s["response_tokens"],
        per_device_train_batch_size=s["batch"],
        num_generations=4,
        max_steps=s["warm_up"] + s["updates"],
        learning_rate=1e-3,
        beta=0.05,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(directory / "policy"),
        reward_funcs=lambda completion_ids, **_: [sum(id % 7 for id in ids) / len(ids) for ids in completion_ids],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": tokenizer.batch_decode(ppo_update.prompts(s))}),
        processing_class=tokenizer,
        callbacks=[ppo_update.clock(laps)],
    )
    trainer.train()
    return laps, [line for line in trainer.state.log_history if "entropy" in line]


def contend(name: str, s: dict) -> contenders.Result:
    import rlhf_fast

    if name == PATCHED:
        rlhf_fast.patch("trl")
    with TemporaryDirectory() as directory:
        ppo_update.save_models(Path(directory), s)
        start = contenders.forget_peak()
        laps, logs = {PPO: ppo_update.trl, GRPO: grpo}[s["trainer"]](Path(directory), s)
    return laps.after(s["warm_up"]) | {
        "start_bytes": start,
        "peak_bytes": contenders.memory("VmHWM"),
        "curves": {key: [float(line[key]) for line in logs] for key in CURVES[s["trainer"]]},
    }


def worst(pair: dict[str, contenders.Result]) -> dict[str, float]:
    """The greatest difference of each curve, relative to max(1, |unpatched|)."""
    plain, patched = (pair[name]["curves"] for name in (PLAIN, PATCHED))
    return {
        key: max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(plain[key], patched[key], strict=True)) for key in plain
    }


def render(result: contenders.Result) -> str:
    s = result["settings"]
    lines = [
        f"{result['machine']}, {s['threads']} thread; commit {result['commit']}",
        "",
        f"Llama of {s['layers']} layers, width {s['hidden']}, float32; PPO takes {s['ppo_epochs']} epochs an update, GRPO one, "
        f"4 replies a prompt. CPU-seconds: median of the updates after {s['warm_up']}, least and most in brackets. Peak: above "
        f"what was resident before training. Difference: the greatest of {'; '.join(map(', '.join, CURVES.values()))} over all "
        "updates, relative to max(1, |TRL's|).",
        "",
    ]
    rows = []
    for size, pair in zip(result["sizes"], result["pairs"], strict=True):
        for name, one in pair.items():
            peak = (one["peak_bytes"] - one["start_bytes"]) / contenders.MB
            rows.append(
                [
                    size["trainer"],
                    f"{size['vocab']:,}, {size['batch']} x {size['response_tokens']}",
                    name,
                    str(size["updates"] + s["warm_up"]),
                    f"{contenders.median(one['cpu_seconds']):.2f} ({contenders.spread(one['cpu_seconds'])})",
                    f"{peak:.0f}",
                    f"{max(worst(pair).values()):.0e}" if name == PATCHED else "",
                ]
            )
    columns = ["trainer", "V, B x T", "", "updates", "CPU-s an update", "peak MB", "difference"]
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
    pairs = []
    for size in SIZES:
        settings, python = ppo_update.SETTINGS | size, contenders.peer_python(ENVIRONMENTS[size["trainer"]])
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
