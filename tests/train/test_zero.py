"""What may be asked of DeepSpeed, by flags and by its own config; what it does then is in test_distributed."""

import json

import pytest

from rlhf_fast.train import zero
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.sft import SFTConfig

STAGE = SFTConfig(model="x", data="x", output_dir="x", max_grad_norm=0.5)


@pytest.fixture
def told(monkeypatch, tmp_path):
    """A function that lets the launcher ask for a config of DeepSpeed's, with DeepSpeed in place."""
    monkeypatch.setenv(zero.ASKED, "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(zero.importlib.metadata, "version", lambda name: zero.OLDEST)

    def tell(config):
        (tmp_path / "zero.json").write_text(json.dumps(config))
        monkeypatch.setenv(zero.FILE, str(tmp_path / "zero.json"))

    return tell


def test_what_is_auto_or_switched_off_is_left_to_the_stage(told):
    off = {"offload_optimizer": {"device": "none", "pin_memory": True}, "offload_param": {"device": None}}
    own = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
    sizes = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1}
    fp16 = {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16}
    kept = {"stage": 1, "reduce_bucket_size": 1000, "contiguous_gradients": False}
    bf16 = {"bf16": {"enabled": True}}
    told({"zero_optimization": kept | off, "optimizer": own, "fp16": fp16, "gradient_clipping": 0.5} | sizes | bf16)
    zero.check(STAGE)
    assert zero.distributed.mixed_precision()
    found = zero._config()
    assert {name: found[zero.SECTION + name] for name in kept} == kept


def test_flags_say_what_the_file_leaves_open(told, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.5")
    zero.check(STAGE)
    assert zero._config()[zero.STAGE] == 2  # as Accelerate takes it
    told({"zero_optimization": {"stage": "auto"}, "gradient_clipping": "auto"})
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    zero.check(STAGE)
    assert zero._config() == {zero.STAGE: 1, "gradient_clipping": 0.5}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            "stage 3 was asked for and is not supported: --use_fsdp --fsdp_version 2",
        ),
        ({"zero_optimization": {"stage": 0}}, "stage 0 was asked for and is not supported: .* --multi_gpu"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "overlap_comm true needs ZeRO 2, got 1"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device nvme was asked for",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "offload_param.device cpu .* or train an adapter",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled True was asked for and is not supported: use bf16"),
        ({"gradient_clipping": 1.0}, "gradient_clipping 1.0 was asked for and max_grad_norm of the stage is 0.5"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps 4 .* micro_batch_size to the stage"),
        ({"train_batch_size": 8}, "train_batch_size 8 was asked for .* give batch_size to the stage"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "optimizer.params.lr 0.001 .* give learning_rate"),
        ({"optimizer": {"type": "Lamb", "params": {}}}, "optimizer.type Lamb .* the optimizer is AdamW"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type WarmupLR .* give lr_schedule"),
        ({"communication_data_type": "fp16"}, "communication_data_type fp16 was asked for .* leave it out"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "reduce_bucket_size must be a number, .* got '5e8'"),
        ([], "must hold an object of keys, got list"),
    ],
)
def test_what_it_may_not_be_asked_for_is_refused_by_name(told, config, words):
    told(config)
    with pytest.raises(UserError, match=f"DeepSpeed.*{words}"):
        zero.check(STAGE)


def test_a_config_that_cannot_be_read_is_named(told, monkeypatch, tmp_path):
    monkeypatch.setenv(zero.FILE, str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"DeepSpeed's config .*none.json cannot be read"):
        zero.check(STAGE)


def test_without_deepspeed_or_with_an_old_one_the_stage_says_so(told, monkeypatch):
    monkeypatch.setattr(zero.importlib.metadata, "version", lambda name: "0.18.12")
    with pytest.raises(UserError, match=r"DeepSpeed 0.18.12 is installed and 0.19.6 or newer is needed"):
        zero.check(STAGE)
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="DeepSpeed was asked for and is not installed: pip install deepspeed"):
        zero.check(STAGE)
