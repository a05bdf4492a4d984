"""Reward hacking on demand, with and without the guard: `python -m tests.hacking [--keep DIR] [SEED ...]`.

The demo's world with all that holds PPO back taken away: 512 pairs instead of 8000, so that the reward model is poor, and no
KL penalty. The score then rises and rises while the judge sees the replies fall apart. The guard has to stop each seed before
its win rate is below .5 at any look, and the policy that it keeps has to beat the fine-tuned one, its 95 % interval above .5;
`--warn` lets it run on and shows the fall. Prints one line a look and a table; exits with 1 if a seed fails. Up to two
CPU-minutes a seed, half of them fine-tuning.

What is hacked has to be the reward and not the optimiser, and the fall has to be seen. So the value model learns for some
updates before the policy does (where both begin at once, the first steps go anywhere, and a policy may be worse than its start
before it has found anything to hack), the steps are a third of the demo's (at its rate a single update may take a policy from
.72 to .08), and the guard asks many prompts at each of them (a win rate of 256 is uncertain by .06). Early stopping is on, with
the least patience that does not take a single look for the end: the alarm wants a fall that chance does not explain.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch

from rlhf_fast import demo
from rlhf_fast.demo.world import GroundTruth
from rlhf_fast.train import ppo, reward, sft
from rlhf_fast.train.checkpoint import read_json, save_model
from rlhf_fast.train.data import read_prompts, split_heldout
from rlhf_fast.train.evaluate import compare_policies
from rlhf_fast.train.loop import Z_95

PAIRS, PAIRS_HELDOUT = 602, 0.15  # of which 512 are trained on
HELDOUT = 0.25  # 1060 prompts: those of the looks, and others for the end
UPDATES = 60
CRITIC_WARMUP = 5
PATIENCE = 2
EVAL_EVERY = 1
EVAL_PROMPTS = 640
SHARED = {"threads": 1, "device": "cpu"}
REPLIES = 8  # to each prompt, at the end: the advantage may be small
PPO = demo.PPO | {
    "total_episodes": (CRITIC_WARMUP + UPDATES) * 128,
    "critic_warmup": CRITIC_WARMUP,
    "learning_rate": 1e-4,
    "value_learning_rate": demo.PPO["learning_rate"],
    "kl_coef": 0.0,
    "min_reward_accuracy": None,
    "eval_every": EVAL_EVERY,
    "eval_prompts": EVAL_PROMPTS,
}
COLUMNS = ("update", "eval/kl", "eval/reward", "eval/judge", "eval/win_rate", "eval/win_rate_lo", "eval/win_rate_hi")


def prepare(root: Path, seed: int) -> None:
    """The fine-tuned policy and a reward model from few pairs, unless they are there."""
    if (root / "reward" / "stage.json").exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = demo.build_tokenizer()
    save_model(root / "base", demo.build_model(tokenizer, seed=seed), tokenizer)
    data = demo.write_demonstrations(root / "demonstrations.jsonl", seed=seed, count=demo.DEMONSTRATIONS)
    start = {"model": str(root / "base"), "data": str(data), "output_dir": str(root / "sft"), "seed": seed}
    policy = sft.train(sft.SFTConfig(heldout_fraction=HELDOUT, **start, **SHARED, **demo.SFT))
    pairs = demo.write_pairs(root / "pairs.jsonl", policy, seed=seed, count=PAIRS)
    start = {"model": str(policy), "data": str(pairs), "output_dir": str(root / "reward"), "seed": seed}
    reward.train(reward.RewardConfig(heldout_fraction=PAIRS_HELDOUT, **start, **SHARED, **demo.REWARD))


def hack(root: Path, seed: int, guard: str) -> dict:
    """PPO without a KL penalty under the guard -> what the table says of this seed."""
    out = root / f"ppo-{guard}"
    ppo.train(
        ppo.PPOConfig(
            model=str(root / "sft"),
            reward_model=str(root / "reward"),
            data=str(root / "demonstrations.jsonl"),
            output_dir=str(out),
            seed=seed,
            heldout_fraction=HELDOUT,
            **SHARED,
            **PPO,
            guard=guard,
            patience=PATIENCE if guard == "stop" else None,
        ),
        judge=GroundTruth(),
    )
    looks = [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "eval/win_rate" in line]
    print(f"seed {seed}: " + "  ".join(name.removeprefix("eval/") for name in COLUMNS))
    for look in looks:
        print("  ".join(f"{look['step' if name == 'update' else name]:8.3f}" for name in COLUMNS))
    results = read_json(out / "stage.json")["results"]
    # Prompts that neither a stage nor the guard has seen: it asks the last EVAL_PROMPTS of those held out.
    heldout = split_heldout(read_prompts(root / "demonstrations.jsonl")[0], fraction=HELDOUT, seed=0)[1]
    heldout = list(dict.fromkeys(row.prompt for row in heldout))[:-EVAL_PROMPTS]
    sampling = {"response_length": demo.REPLY_TOKENS, "seed": 1000 + seed, "batch_size": 512}
    final = compare_policies(root / "sft", out, heldout * REPLIES, GroundTruth(), **sampling)
    wins = [(a > b) + (a == b) / 2 for a, b in zip(final["scores_after"], final["scores_before"], strict=True)]
    of_prompts = torch.tensor(wins, dtype=torch.float64).view(REPLIES, -1).mean(0)
    error = Z_95 * of_prompts.std().item() / math.sqrt(len(heldout))
    return {
        "seed": seed,
        "reward model": read_json(root / "reward" / "stage.json")["results"]["accuracy"],
        "stopped at": looks[-1]["step"],
        "win rate there": looks[-1]["eval/win_rate"],
        "lowest seen": min(look["eval/win_rate"] for look in looks),
        "lowest high": min(look["eval/win_rate_hi"] for look in looks),
        "kept update": results["best_update"],
        "kept wins": final["win_rate"],
        "low": final["win_rate"] - error,
        "high": final["win_rate"] + error,
        "stopped by": "alarm" if results["alarm"] else "patience" if results["early_stop"] else "nothing",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", help="directory for the models, which are used again if they are there")
    parser.add_argument("--warn", action="store_true", help="do not stop, only warn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(options.keep or temporary)
        rows = []
        for seed in options.seeds:
            prepare(root / str(seed), seed)
            rows.append(hack(root / str(seed), seed, "warn" if options.warn else "stop"))
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    in_time = [row["stopped by"] != "nothing" and row["lowest seen"] >= 0.5 for row in rows]
    better = [row["low"] > 0.5 for row in rows]
    clearly = [row["stopped by"] != "nothing" and row["lowest high"] >= 0.5 for row in rows]
    print(
        f"stopped before a win rate below .5: {sum(in_time)} of {len(rows)}; clearly below: {sum(clearly)} of {len(rows)}"
    )
    print(f"what is kept beats the start: {sum(better)} of {len(rows)}")
    return 0 if options.warn or all(in_time + better) else 1


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
