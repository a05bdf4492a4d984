"""A config of TRL 1.12's PPO moves over: every name is honoured, idle, or refused with what to do instead."""

import argparse

import pytest

from rlhf_fast.train import trl
from rlhf_fast.train.config import add_flags, build, from_dict, keys
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.ppo import PPOConfig
from rlhf_fast.train.run import RunConfig

# The fields of trl 1.12.0's PPOConfig with transformers 5.23: those of TrainingArguments, then its own.
TRAINING_ARGUMENTS = """
output_dir per_device_train_batch_size num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16
bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs
gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size
logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps
save_on_each_node save_total_limit enable_jit_checkpoint hub_token hub_private_repo hub_model_id hub_strategy
hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
remove_unused_columns label_names train_sampling_strategy length_column_name ddp_find_unused_parameters
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
"""
PPO = """
learning_rate dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size
num_sample_generations response_length stop_token stop_token_id temperature missing_eos_penalty sft_model_path
world_size num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size
push_to_hub reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef
kl_estimator cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation
"""

OURS = {key.name for key in keys(PPOConfig)}
NEEDED = {"model": "m", "data": "d", "output_dir": "o"}
# As people write it.
TLDR = """
output_dir: o
data: d
sft_model_path: sft
reward_model_path: rm
per_device_train_batch_size: 16
gradient_accumulation_steps: 4
local_rollout_forward_batch_size: 8
num_mini_batches: 2
num_ppo_epochs: 4
total_episodes: 1000
learning_rate: 3e-6
lr_scheduler_type: cosine
missing_eos_penalty: 1.0
stop_token: eos
response_length: 53
kl_coef: 0.05
kl_estimator: k3
cliprange: 0.2
vf_coef: 0.1
cliprange_value: 0.2
whiten_rewards: false
logging_steps: 1
gradient_checkpointing: true
report_to: [tensorboard, csv]
save_total_limit: 3
batch_size:
push_to_hub: false
"""


def ppo(**given):
    return from_dict(PPOConfig, NEEDED | given)


def refusal(**given):
    with pytest.raises(UserError) as error:
        ppo(**given)
    return str(error.value)


def test_each_of_the_145_names_is_ours_or_translated_or_refused():
    names = {*TRAINING_ARGUMENTS.split(), *PPO.split()}
    assert len(names) == 145
    assert names <= OURS | trl.Names.names
    assert not OURS & trl.Names.names
    assert set(trl.RENAMED.values()) <= OURS
    assert {key for value in trl.COMBINED.values() for key in value.split(", ")} <= OURS


def test_a_config_moves_over(tmp_path, capsys):
    (tmp_path / "trl.yaml").write_text(TLDR)
    config = build(PPOConfig, tmp_path / "trl.yaml", {})
    expected = {
        "model": "sft",
        "reward_model": "rm",
        "batch_size": 64,
        "micro_batch_size": 16,
        "rollout_micro_batch_size": 8,
        "lr_schedule": "cosine",
        "missing_eos": "subtract",
        "missing_eos_penalty": 1.0,
        "kl_estimator": "k3",
        "report_to": "tensorboard, csv",
        "keep_checkpoints": 3,
        "total_episodes": 1000,
        "gradient_checkpointing": True,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "batch_size 64 (per_device_train_batch_size x gradient_accumulation_steps)" in said
    assert "model sft (sft_model_path)" in said and "without effect here: logging_steps\n" in said
    assert "push_to_hub" not in said


def test_names_are_flags_and_stand_in_sections_of_run(capsys):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, RunConfig)
    words = [
        "--data",
        "d",
        "--output_dir",
        "o",
        "--ppo.per_device_train_batch_size",
        "4",
        "--ppo.gradient-accumulation-steps",
    ]
    flags = vars(parser.parse_args([*words, "2", "--ppo.push_to_hub", "false"]))
    config = build(RunConfig, None, flags, base={"ppo": {"batch_size": 99, "num_mini_batches": 2}})
    assert (config.ppo.batch_size, config.ppo.micro_batch_size, config.ppo.num_mini_batches) == (8, 4, 2)
    assert capsys.readouterr().err.startswith("ppo: names of TRL's PPOConfig: ")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"push_to_hub": True}, "'push_to_hub' True: nothing is uploaded"),
        ({"stop_token_id": 0}, "'stop_token_id' 0: give the text of that token as stop_token"),
        (
            {"fp16": True, "max_steps": 5},
            "'fp16' True: use dtype float32 or bfloat16; 'max_steps' 5: give total_episodes",
        ),
        ({"num_train_epochs": 3.0}, "'num_train_epochs' 3.0 cannot be honoured: give total_episodes"),
        ({"resume_from_checkpoint": "x/checkpoint-3"}, "its own output_dir"),
        ({"optim": "sgd"}, "the optimizers are adamw_torch, adamw_torch_fused, adamw_8bit, adamw_bnb_8bit"),
        ({"fsdp": "full_shard"}, "the launcher shards models: accelerate launch --use_fsdp"),
        ({"deepspeed": "ds.json"}, "the launcher shards models: accelerate launch --use_fsdp"),
        ({"bf16": True}, "accelerate launch --mixed_precision bf16 does it; dtype bfloat16"),
        (
            {"lr_scheduler_type": "polynomial"},
            "'lr_schedule' must be one of linear, cosine, constant, got 'polynomial'",
        ),
        (
            {"per_device_train_batch_size": 0},
            "'per_device_train_batch_size' must be a whole number of at least 1, got 0",
        ),
        ({"per_device_train_batch_size": "x"}, "must be a whole number of at least 1, got 'x'"),
        ({"stop_token": "<STOP_TOKEN>"}, "that transformers hides in a dump"),
        ({"warmup_ratio": 0.1}, "give warmup_steps"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_what_to_do(given, words):
    message = refusal(**given)
    assert message.startswith("ppo: ") and words in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sft_model_path": "other"}, "'sft_model_path' is TRL's name of 'model', and both are given"),
        ({"reward_model": "a", "reward_model_path": "b"}, "TRL's name of 'reward_model'"),
        ({"batch_size": 64, "per_device_train_batch_size": 8}, "is TRL's name of 'batch_size', and both are given"),
        ({"device": "cuda", "use_cpu": True}, "TRL's name of 'device'"),
        ({"optimizer": "adamw_8bit", "optim": "adamw_torch"}, "TRL's name of 'optimizer'"),
        ({"gradient_checkpointing": True, "activation_checkpointing": False}, "TRL's name of 'gradient_checkpointing'"),
    ],
)
def test_a_key_under_both_names_is_refused(given, words):
    assert words in refusal(**given)


def test_what_trl_computes_may_stand_beside_what_it_computes_it_from():
    config = ppo(batch_size=32, micro_batch_size=8, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert (config.batch_size, config.micro_batch_size) == (32, 8)


def test_ways_to_save_memory_move_over():
    assert ppo(optim="adamw_bnb_8bit").optimizer == "adamw_8bit"
    assert ppo(optim="adamw_torch_fused").optimizer == "adamw"
    for both in (
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "gradient_checkpointing": True},
    ):
        assert ppo(**both).gradient_checkpointing
    assert ppo(activation_checkpointing=True, gradient_checkpointing=None).gradient_checkpointing


def test_what_a_device_takes_is_taken_by_each_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = ppo(per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert (config.batch_size, config.micro_batch_size) == (96, 8)
    assert "gradient_accumulation_steps x 3 processes" in capsys.readouterr().err


def test_the_penalty_for_a_missing_end_means_what_its_config_means(capsys):
    """TRL subtracts it; the default here replaces the score, so it is said which of them holds."""
    assert ppo(missing_eos_penalty=2.0).missing_eos == "replace"
    assert "missing_eos_penalty replaces the score; TRL subtracts it" in capsys.readouterr().err
    assert ppo(missing_eos_penalty=2.0, kl_coef=0.1, gradient_accumulation_steps=2).missing_eos == "subtract"
    assert ppo(missing_eos_penalty=None).missing_eos == "none"
    assert ppo(missing_eos_penalty=2.0, missing_eos="replace", world_size=1).missing_eos == "replace"


def test_without_trls_names_nothing_is_said(capsys):
    ppo(kl_coef=0.1, num_ppo_epochs=2)
    assert capsys.readouterr().err == ""


def test_help_lists_what_is_named_otherwise():
    text = trl.Names().help()
    assert "  sft_model_path = model" in text and "  gradient_accumulation_steps = batch_size, micro_batch_size" in text
