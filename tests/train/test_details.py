"""The details of RLHF with PPO that decide whether it learns, row by row: the key that sets each, or how it always is.

The rows are those published by Huang et al. 2024 (arXiv 2403.17031), with what later work added; the defaults are theirs
wherever they name one.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlhf_fast.train.config import keys
from rlhf_fast.train.ppo import PPOConfig
from rlhf_fast.train.reward import RewardConfig

CONFIGS = {"ppo": PPOConfig, "reward": RewardConfig}


@dataclass(frozen=True)
class Detail:
    """keys: `stage.key` and its default; always: the test of what holds without a key."""

    name: str
    keys: dict = field(default_factory=dict)
    always: str = ""


DETAILS = {
    1: Detail(
        "reward and value read prompt and reply together",
        always="test_model.test_values_are_read_before_each_token_and_scores_at_the_last",
    ),
    2: Detail(
        "the pad token is not the end token",
        always="test_model.test_a_missing_or_shared_pad_token_gets_a_row_of_its_own",
    ),
    3: Detail(
        "prompts are padded left, SFT and reward model right",
        always="test_generate.test_prompts_are_padded_on_the_left_and_nothing_follows_the_end",
    ),
    4: Detail("positions count real tokens", always="test_model.test_positions_count_real_tokens_only"),
    5: Detail("pads are not read", always="test_model.test_padding_changes_no_logprob_value_or_score"),
    6: Detail(
        "temperature, in sampling and in every log-prob; no top_k, no top_p",
        {"ppo.temperature": 0.7, "reward.temperature": 0.7},
        always="test_generate.test_the_samples_follow_the_distribution_whose_logprobs_ppo_uses",
    ),
    7: Detail("length of replies", {"ppo.response_length": 53, "ppo.max_prompt_tokens": 512}),
    8: Detail("replies end at the first stop token, and are scored so", {"ppo.stop_token": "eos"}),
    9: Detail(
        "a reply without an end",
        {"ppo.missing_eos": "replace", "ppo.missing_eos_penalty": 1.0, "ppo.min_response_length": 0},
    ),
    10: Detail("the reward head starts at 1/sqrt(d + 1)", {"reward.head_init_std": None}),
    11: Detail("the value model starts as a copy of the reward model", {"ppo.value_init": "reward"}),
    12: Detail(
        "reward model: one epoch, annealed",
        {
            "reward.num_train_epochs": 1,
            "reward.learning_rate": 3e-6,
            "reward.lr_schedule": "cosine",
            "reward.batch_size": 64,
        },
    ),
    13: Detail("its scores are normalised on replies of the SFT model", {"reward.normalize_samples": 256}),
    14: Detail("scores are clipped", {"ppo.score_clip": None}),
    15: Detail("KL in the reward, a token", {"ppo.kl_estimator": "k1"}),
    16: Detail("weight of the KL", {"ppo.kl_coef": 0.05}),
    17: Detail("adaptive KL", {"ppo.kl_target": None, "ppo.kl_horizon": 10_000}),
    18: Detail("rewards are whitened, mean kept", {"ppo.whiten_rewards": False}),
    19: Detail(
        "advantages are whitened, biased variance", {"ppo.whiten_advantages": True, "ppo.whiten_unbiased": False}
    ),
    20: Detail("discount and lambda", {"ppo.gamma": 1.0, "ppo.lam": 0.95}),
    21: Detail(
        "clipping of ratio and value",
        {"ppo.cliprange": 0.2, "ppo.cliprange_high": None, "ppo.cliprange_value": 0.2, "ppo.dual_clip": None},
    ),
    22: Detail("weight of the value loss", {"ppo.vf_coef": 0.1}),
    23: Detail("passes and minibatches of an update", {"ppo.num_ppo_epochs": 4, "ppo.num_mini_batches": 1}),
    24: Detail(
        "AdamW and its rate",
        {
            "ppo.learning_rate": 3e-6,
            "ppo.lr_schedule": "linear",
            "ppo.warmup_steps": 0,
            "ppo.adam_beta1": 0.9,
            "ppo.adam_beta2": 0.999,
            "ppo.adam_epsilon": 1e-5,
            "ppo.weight_decay": 0.01,
            "reward.adam_epsilon": 1e-5,
        },
    ),
    25: Detail("gradient clipping", {"ppo.max_grad_norm": 1.0, "reward.max_grad_norm": 1.0}),
    26: Detail("no dropout", always="test_model.test_dropout_is_off_even_in_training_mode"),
    27: Detail("rollouts of an update and in all", {"ppo.batch_size": 512, "ppo.total_episodes": None}),
    28: Detail(
        "InstructGPT: written replies in the loss, average of the weights, the value model's own rate",
        {"ppo.ptx_coef": 0.0, "ppo.ptx_data": None, "ppo.ema_decay": None, "ppo.value_learning_rate": None},
    ),
    29: Detail(
        "PPO-max: scores by their running deviation, advantages clipped, the critic first",
        {"ppo.reward_scaling": False, "ppo.advantage_clip": None, "ppo.critic_warmup": 0, "ppo.target_kl": None},
    ),
    30: Detail(
        "seed, and one of each process's own for what it samples",
        {"ppo.seed": 0},
        always="test_distributed.test_ppo_draws_other_numbers_in_each_process",
    ),
    31: Detail("the log of the ratio is held", {"ppo.log_ratio_clip": 20.0}),
    32: Detail("a poor reward model is refused", {"ppo.min_reward_accuracy": 0.5}),
    33: Detail(
        "scores do not depend on padding",
        {"ppo.checks": True},
        always="test_reward.test_scores_do_not_depend_on_the_batch_they_stand_in",
    ),
}
OWN = {"seed", "checks", "min_reward_accuracy", "total_episodes"}  # without a source


def test_the_table_is_whole_and_what_always_holds_is_tested():
    assert list(DETAILS) == list(range(1, 34))
    assert all(detail.keys or detail.always for detail in DETAILS.values())
    for detail in DETAILS.values():
        if detail.always:
            file, test = detail.always.split(".")
            assert f"\ndef {test}(" in (Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8"), detail.name


@pytest.mark.parametrize("row", [row for row, detail in DETAILS.items() if detail.keys])
def test_each_key_has_the_published_default_and_says_where_it_is_from(row):
    for name, default in DETAILS[row].keys.items():
        stage, name = name.split(".")
        key = next(key for key in keys(CONFIGS[stage]) if key.name == name)
        assert key.default == default and isinstance(key.default, type(default)), name
        assert key.info.get("source") or name in OWN, name
