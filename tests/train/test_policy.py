import dataclasses
import gc
import weakref

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
)

from rlhf_fast.ops.ppo_loss import ppo_policy_loss_reference
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.model import load_policy
from rlhf_fast.train.policy import _output_of_linear, logit_head, response_logprobs, response_ppo_loss

VOCAB = 300
# Architectures that do something to their logits, or to what the head reads.
STRETCHED = {
    "gemma2": lambda: Gemma2Config(
        vocab_size=VOCAB,
        intermediate_size=32,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=3.0,
        **tiny.SIZES,
    ),
    "cohere": lambda: CohereConfig(vocab_size=VOCAB, intermediate_size=32, logit_scale=0.25, **tiny.SIZES),
    "granite": lambda: GraniteConfig(vocab_size=VOCAB, intermediate_size=32, logits_scaling=8.0, **tiny.SIZES),
    "minicpm3": lambda: MiniCPM3Config(
        vocab_size=VOCAB,
        intermediate_size=32,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        dim_model_base=8,
        eos_token_id=1,
        **tiny.SIZES,
    ),
    "falcon_h1": lambda: FalconH1Config(
        vocab_size=VOCAB,
        intermediate_size=32,
        num_key_value_heads=2,
        lm_head_multiplier=0.5,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        **tiny.SIZES,
    ),
}
ARCHITECTURES = [*tiny.CONFIGS, *STRETCHED]


def model(architecture: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    if architecture in tiny.CONFIGS:
        made = tiny.model(architecture)
    else:
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(STRETCHED[architecture]())
    with torch.no_grad():  # logits large enough for a cap to bind
        made.get_output_embeddings().weight.normal_(generator=torch.Generator().manual_seed(1))
    return made.to(dtype).eval()


def random_ids(vocab: int, rows: int = 3, columns: int = 9) -> torch.Tensor:
    return torch.randint(3, vocab, (rows, columns), generator=torch.Generator().manual_seed(0))


def inputs(made: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask, and a response mask over the last four columns."""
    ids = random_ids(made.get_output_embeddings().out_features)
    response_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    return ids, torch.ones_like(ids, dtype=torch.bool), response_mask


def eager_logprobs(made, ids, response_mask, temperature):
    table = (made(input_ids=ids[:, :-1]).logits[:, -4:] / temperature).log_softmax(-1)
    entropy = -(table.exp() * table).sum(-1)
    return table.gather(2, ids[:, -4:, None]).squeeze(2) * response_mask, entropy * response_mask


def gradients(made, loss):
    made.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("full_logits", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_entropies_and_gradients_are_those_of_the_plain_model(architecture, full_logits):
    made = model(architecture)
    ids, mask, response_mask = inputs(made)
    expected = eager_logprobs(made, ids, response_mask, 0.7)
    options = {"temperature": 0.7, "response_mask": response_mask, "with_entropy": True, "full_logits": full_logits}
    got = response_logprobs(made, ids, mask, 4, **options)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    ours, eager = (gradients(made, (logprobs + 0.3 * entropy).sum()) for logprobs, entropy in (got, expected))
    assert set(ours) == set(eager) and any("lm_head" in n or "embed" in n or "wte" in n for n in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("full_logits", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_ppo_loss_and_its_gradients_are_those_of_the_plain_model(architecture, full_logits):
    made = model(architecture)
    ids, mask, response_mask = inputs(made)
    logprobs, entropy = eager_logprobs(made, ids, response_mask, 0.7)
    old = logprobs.detach() + torch.linspace(-0.5, 0.5, logprobs.numel()).view(logprobs.shape)
    advantages = torch.linspace(1, -2, logprobs.numel()).view(logprobs.shape)
    options = {"clip_low": 0.3, "clip_high": 0.1, "normalizer": 17}
    policy_loss, stats = ppo_policy_loss_reference(logprobs, old, advantages.double(), response_mask, **options)
    more = {"temperature": 0.7, "entropy_coef": 0.2, "full_logits": full_logits}
    loss, got = response_ppo_loss(made, ids, mask, 4, old, advantages, response_mask, **options, **more)
    torch.testing.assert_close(loss, policy_loss - 0.2 * entropy.sum() / 17, rtol=1e-9, atol=1e-10)
    for name, value in (stats | {"entropy": entropy.sum() / 17, "policy_loss": policy_loss}).items():
        torch.testing.assert_close(got[name], value.detach(), rtol=1e-9, atol=1e-10, msg=name)
    ours, eager = gradients(made, loss), gradients(made, policy_loss - 0.2 * entropy.sum() / 17)
    assert set(ours) == set(eager)
    for name in ours:
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-8, atol=1e-10, msg=name)


def test_a_soft_cap_and_the_scales_are_found():
    found = {name: dataclasses.astuple(logit_head(model(name)))[1:] for name in ARCHITECTURES}
    plain = {name: (None, 1.0) for name in tiny.CONFIGS}
    stretched = {"cohere": 0.25, "granite": 1 / 8, "minicpm3": 0.5, "falcon_h1": 0.5}
    assert found == plain | {"gemma2": (3.0, 1.0)} | {name: (None, scale) for name, scale in stretched.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ["gemma2", "granite", "llama"])
def test_narrow_models_have_the_same_head(architecture, dtype):
    head, wide = logit_head(model(architecture, dtype)), logit_head(model(architecture))
    assert (head.softcap, head.logit_scale) == (wide.softcap, wide.logit_scale)


def test_a_head_of_zeros_does_not_hide_what_follows_it():
    made = model("granite")
    torch.nn.init.zeros_(made.get_output_embeddings().weight)
    assert logit_head(made).logit_scale == 1 / 8


class Adapter(torch.nn.Linear):
    """Adds 0 at first, as LoRA does."""


class Squared(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits**2
        return output


def adapted():
    made = model("llama")
    made.set_output_embeddings(Adapter(16, made.config.vocab_size, bias=False).double())
    return made


def hooked():
    made = model("llama")
    made.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: output * 1.0)
    return made


def squared():
    made = model("llama")
    made.__class__ = Squared
    return made


@pytest.mark.parametrize(
    ("make", "words"),
    [(adapted, "come from a Adapter"), (hooked, "Linear with hooks"), (squared, "does more to its logits")],
)
def test_a_head_that_is_more_than_a_linear_layer_is_refused_and_full_logits_are_right(make, words):
    made = make()
    ids, mask, response_mask = inputs(made)
    with pytest.raises(UserError, match=f"{words}.*full_logits"):
        response_logprobs(made, ids, mask, 4)
    expected, _ = eager_logprobs(made, ids, response_mask, 0.7)
    got = response_logprobs(made, ids, mask, 4, temperature=0.7, response_mask=response_mask, full_logits=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_a_head_put_on_later_is_not_taken_for_the_old_one():
    made = model("llama")
    assert logit_head(made).layer is made.get_output_embeddings()
    made.set_output_embeddings(torch.nn.Linear(16, made.config.vocab_size).double())
    assert logit_head(made).layer is made.get_output_embeddings()
    made.set_output_embeddings(Adapter(16, made.config.vocab_size).double())
    with pytest.raises(UserError, match="Adapter"):
        logit_head(made)


def test_knowing_a_head_does_not_keep_its_model_alive():
    made = model("llama")
    logit_head(made)
    gone = weakref.ref(made)
    del made
    gc.collect()
    assert gone() is None


def test_no_logits_are_kept_for_the_backward_pass(tmp_path):
    made, _ = load_policy(tiny.save_base(tmp_path / "base"))
    ids, mask, response_mask = inputs(made)
    ids, mask, response_mask = (x.repeat(4, 1) for x in (ids, mask, response_mask))
    vocab = made.get_output_embeddings().out_features
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_logprobs(made, ids, mask, 4, response_mask=response_mask, with_entropy=True)
    shapes = [tuple(tensor.shape) for tensor in saved]
    assert not any(shape[-1:] == (vocab,) for shape in shapes) and (vocab, 16) in shapes


def test_only_the_output_of_a_linear_layer_is_overwritten():
    layer = torch.nn.Linear(4, 5)
    made = {bias: torch.nn.Linear(4, 5, bias=bias)(torch.ones(2, 3, 4)) for bias in (True, False)}
    assert _output_of_linear(made[True]) and _output_of_linear(made[False])
    x = layer(torch.ones(2, 3, 4))
    for other in (x.tanh(), x.tanh().view(6, 5), x.softmax(-1), x.detach(), x[:, 1:]):
        assert not _output_of_linear(other)
