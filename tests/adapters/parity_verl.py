"""verl 0.9.1 beside rlhf_fast.adapters.verl."""

import importlib
import inspect
import os
import subprocess
import sys
import tempfile

import torch

from rlhf_fast.adapters import verl as ours
from tests.adapters.parity import ROOT, Case, Difference, Draw, bfloat16, installed, truth

WIDE, SMALL = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
ROUNDING = 2.0**-8  # of a bf16 gradient that either side rounds
BFLOAT16 = {"remark": "bf16, against verl on the same in float64", "gradient_tolerance": ROUNDING}
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def cases() -> list:
    functional, algos = map(importlib.import_module, ("verl.utils.torch_functional", "verl.trainer.ppo.core_algos"))
    return [
        *log_probs(functional),
        *masked(functional),
        *fused_head(),
        *advantages(algos),
        *policy_losses(algos),
        *value_loss(algos),
        *kl(algos),
        *installed(
            "verl",
            [
                "verl.trainer.distillation.losses",
                "verl.workers.engine.fsdp.transformer_impl",
                "verl.workers.utils.losses",
            ],
            train,
            "verl's ppo_loss, value_loss and advantage estimators give the same",
        ),
        Difference("patch", "in a Ray worker, by patch_worker as its setup hook", ray_worker, 1, verdict="holds"),
    ]


def logits_and_labels(draw: Draw, *dtypes: torch.dtype, rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed [N, V], as verl's engines have them, or [B, T, V]."""
    shape = [draw.size(4), draw.size(rows), draw.one_of(1, 2, 7, 33, 257, 1000)][draw.one_of(0, 1) :]
    logits = draw.normal(*shape, scale=draw.one_of(0.1, 1.0, 3.0, 20.0), dtype=draw.one_of(*dtypes), grad=True)
    return logits, draw.integers(shape[-1], *shape[:-1])


def log_probs(functional):
    original, mine = functional.logprobs_from_logits, ours.logprobs_from_logits

    def with_masked_columns(draw):
        logits, labels = logits_and_labels(draw, *WIDE)
        columns = draw.integers(2, logits.shape[-1]).bool()
        columns[0] = False
        logits = logits.detach().masked_fill(columns, -torch.inf).requires_grad_()
        return logits, labels, draw.one_of(True, False)

    def rounding(draw):
        logits, labels = draw.normal(16, 5000, scale=3.0, dtype=torch.bfloat16), draw.integers(5000, 16)
        exact = original(logits.double(), labels)
        assert (mine(logits, labels) - exact).abs().max() < 1e-5
        return (original(logits, labels) - exact).abs().max().item()

    def ignored(draw):
        logits, labels = draw.normal(4, 7), draw.integers(7, 4).index_fill(0, torch.tensor([1]), -100)
        assert mine(logits, labels)[1] == 0
        try:
            original(logits, labels)
        except (RuntimeError, IndexError):
            return
        raise AssertionError("verl takes -100 without flash-attn now")

    def tanh_before(draw):
        x, labels = draw.normal(4, 7, grad=True), draw.integers(7, 4)
        loss = mine(torch.tanh(x), labels).sum()
        try:
            loss.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return
        raise AssertionError("a tanh was differentiated through logits that were overwritten")

    def response(function):
        def log_probs(logits, ids, length):
            functional.logprobs_from_logits, kept = function, functional.logprobs_from_logits
            try:
                return functional.log_probs_from_logits_response(ids, logits, length)
            finally:
                functional.logprobs_from_logits = kept

        return log_probs

    def draw_response(draw):
        length = draw.size(6)
        logits = draw.normal(draw.size(3), length + draw.size(4), 33, grad=True)
        return logits, draw.integers(33, *logits.shape[:2]), length

    def entropy_of_masked(draw):
        logits = draw.normal(3, 9)
        logits[:, 4] = -torch.inf
        assert functional.entropy_from_logits(logits).isnan().all()
        assert torch.allclose(
            ours.entropy_from_logits(logits), functional.entropy_from_logits(logits[:, torch.arange(9) != 4]), atol=1e-5
        )

    def entropy_rounding(draw):
        logits = draw.normal(16, 5000, scale=3.0, dtype=torch.bfloat16)
        exact = functional.entropy_from_logits(logits.double())
        assert (ours.entropy_from_logits(logits) - exact).abs().max() < 1e-5
        return (functional.entropy_from_logits(logits) - exact).abs().max().item()

    name, entropy, chunked = "logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking"
    small = {"remark": "bf16 and fp16, against verl on the same logits in float64", "gradient_tolerance": ROUNDING}

    def flat(draw, *dtypes):
        logits, _ = logits_and_labels(draw, *dtypes)
        return logits.detach().reshape(-1, logits.shape[-1]).requires_grad_(), draw.size(9)

    return [
        Case(
            name, original, mine, with_masked_columns, "float32 and float64, also with -inf columns, in place and not"
        ),
        Case(name, truth(original), mine, lambda draw: logits_and_labels(draw, *SMALL), **small),
        Case(
            "log_probs_from_logits_response", response(original), response(mine), draw_response, "verl's, calling ours"
        ),
        Difference(
            name, "bf16: verl's result (without flash-attn) is bf16, off by up to {}; ours within 1e-5", rounding, 50
        ),
        Difference(name, "label -100: verl raises without flash-attn, ours gives 0, as with it", ignored, 5),
        Difference(
            name, "a tanh before it, in place: ours raises in backward (flash-attn would be wrong)", tanh_before, 5
        ),
        Case(
            entropy,
            truth(functional.entropy_from_logits),
            ours.entropy_from_logits,
            lambda draw: logits_and_labels(draw, *WIDE)[:1],
            "float32 and float64, against verl on float64",
        ),
        Case(
            entropy,
            truth(functional.entropy_from_logits),
            ours.entropy_from_logits,
            lambda draw: logits_and_labels(draw, *SMALL)[:1],
            **small,
        ),
        Difference(entropy, "one logit is -inf: verl gives NaN, ours the entropy of the others", entropy_of_masked, 50),
        Difference(entropy, "bf16: verl is off by up to {}, ours within 1e-5", entropy_rounding, 50),
        Case(
            chunked,
            getattr(functional, chunked),
            getattr(ours, chunked),
            lambda draw: flat(draw, torch.float32),
            "verl's sums are float32, of logits up to 90",
            5e-5,
            5e-5,
        ),
    ]


def masked(functional):
    def draw_mean(draw):
        shape = draw.size(5), draw.size(40)
        mask = draw.mask(*shape)
        axis = draw.one_of(None, -1, 1, 0, (0, 1))
        return draw.normal(*shape, scale=10.0, grad=True), draw.one_of(mask, mask.long(), mask.float()), axis

    def draw_whiten(draw):
        shape = draw.size(5), draw.size(40, 2)
        mask = draw.mask(*shape, least=2)
        return draw.normal(*shape, scale=10.0, grad=True), draw.one_of(mask, mask.float()), draw.one_of(True, False)

    def on_the_mask(function):
        return lambda values, mask, shift_mean: function(values, mask, shift_mean)[mask != 0]

    def off_the_mask(draw):
        x, mask = draw.normal(3, 4), draw.mask(3, 4, least=2)
        assert (ours.masked_whiten(x, mask)[~mask] == 0).all()
        return functional.masked_whiten(x, mask)[~mask].abs().sum().item()

    def few(draw):
        x = draw.normal(3, 4)
        for count in (0, 1):
            mask = torch.arange(12).view(3, 4) < count
            assert (ours.masked_whiten(x, mask) == 0).all()
            try:
                functional.masked_whiten(x, mask)
            except ValueError:
                continue
            raise AssertionError("verl whitens a single token now")

    return [
        Case(
            "masked_mean",
            functional.masked_mean,
            ours.masked_mean,
            draw_mean,
            "empty masks too; axis None, one, several",
        ),
        Case(
            "masked_whiten",
            *map(on_the_mask, (truth(functional.masked_whiten), ours.masked_whiten)),
            draw_whiten,
            "on the mask, against verl on the same values in float64",
        ),
        Case("masked_mean", truth(functional.masked_mean), ours.masked_mean, bfloat16(draw_mean), **BFLOAT16),
        Case(
            "masked_whiten",
            *map(on_the_mask, (truth(functional.masked_whiten), ours.masked_whiten)),
            bfloat16(draw_whiten),
            **BFLOAT16,
        ),
        Difference("masked_whiten", "off the mask ours is 0, verl whitens what stands there", off_the_mask, 50),
        Difference("masked_whiten", "one token or none: verl raises, ours gives 0", few, 5),
    ]


def fused_head():
    module = importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO(chunk_size=4)
    original, mine = module.forward, lambda *args: ours.fused_linear_for_ppo(module, *args)

    def draw_head(draw):
        rows = (draw.size(3), draw.size(6))[draw.one_of(0, 1) :]
        hidden, vocab = draw.one_of(1, 8, 33), draw.one_of(2, 7, 257)
        kind = draw.one_of(*WIDE)
        return (
            draw.normal(*rows, hidden, dtype=kind, grad=True),
            draw.normal(vocab, hidden, dtype=kind, grad=True),
            draw.integers(vocab, *rows),
            draw.one_of(1.0, 0.7, 2.5),
        )

    def small(draw):
        hidden, weight = (draw.normal(n, 32, dtype=torch.bfloat16) for n in (6, 300))
        labels = draw.integers(300, 6)
        theirs, results = original(hidden, weight, labels)[0], mine(hidden, weight, labels)
        exact = original(hidden.double(), weight.double(), labels)
        for got, want in zip(results, exact, strict=True):
            assert got.dtype == torch.float32 and (got - want).abs().max() < 1e-5
        return (theirs - exact[0]).abs().max().item()

    name = "FusedLinearForPPO.forward"
    return [
        Case(name, original, mine, draw_head, "float32 and float64; two products summed in another order", 2e-5, 1e-4),
        Difference(
            name,
            "bf16: verl rounds the logits, its log-probs are off by up to {}; ours within 1e-5, entropy too",
            small,
            50,
        ),
    ]


def advantages(algos):
    def masked_results(function):
        def run(rewards, values, mask, gamma, lam):
            results = function(rewards, values, mask, gamma, lam)
            return [x[mask != 0] for x in results]

        return run

    def draw_gae(draw):
        shape = draw.size(5), draw.size(40, 2)
        mask = draw.mask(*shape, least=2)
        gamma, lam = draw.one_of(1.0, 0.99, 0.5, 0.0), draw.one_of(1.0, 0.95, 0.3, 0.0)
        return draw.normal(*shape), draw.normal(*shape), draw.one_of(mask.long(), mask.float()), gamma, lam

    def returns_alone(function):
        return lambda *args: masked_results(function)(*args)[1]

    def small(draw):
        rewards, values, mask, *rest = draw_gae(draw)
        rewards, values = rewards.bfloat16(), values.bfloat16()
        exact, mine, theirs = (
            masked_results(f)(*inputs, mask, *rest)[1].double()
            for f, inputs in (
                (algos.compute_gae_advantage_return, (rewards.double(), values.double())),
                (ours.compute_gae_advantage_return, (rewards, values)),
                (algos.compute_gae_advantage_return, (rewards, values)),
            )
        )
        assert ((mine - exact).abs() / exact.abs().clamp(min=1)).max() < 1e-5
        return (theirs - exact).abs().max().item()

    def off_the_mask(draw):
        rewards, values, mask, *rest = draw_gae(draw)
        for result in ours.compute_gae_advantage_return(rewards, values, mask, *rest):
            assert (result[mask == 0] == 0).all()

    def hidden_nan(draw):
        rewards, values, mask, *rest = draw_gae(draw)
        plain = ours.compute_gae_advantage_return(rewards, values, mask, *rest)
        rewards, values = (x.masked_fill(mask == 0, torch.nan) for x in (rewards, values))
        hidden = ours.compute_gae_advantage_return(rewards, values, mask, *rest)
        assert all(torch.equal(a, b) for a, b in zip(plain, hidden, strict=True))

    def reinforce(function):
        config = importlib.import_module("verl.trainer.config").AlgoConfig

        def run(rewards, mask, gamma):
            return [x[mask != 0] for x in function(rewards, mask, config=config(gamma=gamma))]

        return run

    def draw_reinforce(draw):
        rewards, _, mask, gamma, _ = draw_gae(draw)
        return rewards, mask, gamma

    gae, plus = "compute_gae_advantage_return", "compute_reinforce_plus_plus_outcome_advantage"
    return [
        Case(
            gae,
            *(
                masked_results(f)
                for f in (truth(algos.compute_gae_advantage_return, 2), ours.compute_gae_advantage_return)
            ),
            draw_gae,
            "on the mask, gaps and empty rows; against verl in float64, whose whitening loses less",
        ),
        Case(
            f"{gae}, returns",
            *map(returns_alone, (algos.compute_gae_advantage_return, ours.compute_gae_advantage_return)),
            draw_gae,
            "against verl in float32",
        ),
        Difference(gae, "bf16: verl computes in bf16, returns off by up to {}; ours within 1e-5", small, 50),
        Difference(gae, "off the mask ours is 0, verl leaves carried values", off_the_mask),
        Difference(gae, "NaN off the mask is not read (verl: everything is NaN)", hidden_nan),
        Case(
            plus,
            *(reinforce(f) for f in (truth(getattr(algos, plus)), getattr(ours, plus))),
            draw_reinforce,
            "on the mask; against verl in float64",
        ),
    ]


def actor_config(draw: Draw, **options):
    config = importlib.import_module("verl.workers.config").ActorConfig
    return config(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=draw.one_of(0.2, 0.1),
        clip_ratio_low=draw.one_of(0.2, 0.3, 1.0),
        clip_ratio_high=draw.one_of(0.2, 0.28, 5.0),
        **options,
    )


def global_counts(draw: Draw) -> dict:
    kind = draw.one_of("none", "numbers", "tensors")
    if kind == "none":
        return {}
    tokens, sequences = draw.size(500, 50), draw.size(50, 5)
    if kind == "tensors":
        tokens, sequences = torch.tensor(tokens), torch.tensor(float(sequences))
    scale = draw.one_of(None, 17)
    return dict(dp_size=draw.size(4), batch_num_tokens=tokens, global_batch_size=sequences, loss_scale_factor=scale)


def loss_inputs(draw: Draw, count: int, *, least: int = 1) -> tuple:
    """`count` tensors [B, T], the first requiring grad, and a mask with at least one token."""
    shape = draw.size(5), draw.size(30)
    first = draw.normal(*shape, scale=draw.one_of(0.1, 1.0), grad=True)
    others = [draw.normal(*shape, scale=draw.one_of(0.1, 1.0)) for _ in range(count - 1)]
    return first, *others, draw.mask(*shape, least=least)


def policy_losses(algos):
    def named(function):
        def run(new, old, advantages, mask, mode, config, weights):
            loss, metrics = function(old, new, advantages, mask, mode, config, weights)
            return [loss, metrics]

        return run

    def draw_loss(draw, masked_nothing=False, most=None):
        new, old, advantages, mask = loss_inputs(draw, 3)
        if draw.one_of(True, False):  # as in the first epoch, and as after a long way
            old = new.detach().clone() if draw.one_of(True, False) else new.detach() + 8 * draw.normal(*new.shape)
        if most is not None:
            old = new.detach() + (old - new.detach()).clamp(-most, most)
        if draw.one_of(True, False):  # one advantage a sequence
            advantages = advantages[:, :1].expand(advantages.shape).contiguous()
        config = actor_config(draw)
        config.global_batch_info.update(global_counts(draw))
        weights = draw.one_of(None, draw.normal(*new.shape).exp().clamp(max=2.0))
        return new, old, advantages, mask, draw.one_of(*MODES), config, weights

    def draw_deprecated(draw):
        new, old, advantages, mask = loss_inputs(draw, 3)
        return new, old, advantages, mask, draw.one_of(None, 0.3), draw.one_of(None, 0.28), *draw.one_of((3.0,), (1.5,))

    def deprecated(function):
        def run(new, old, advantages, mask, low, high, c):
            loss, *rest = function(old, new, advantages, mask, 0.2, low, high, c)
            return [loss, *(x.detach() for x in rest)]

        return run

    def empty(name):
        def holds(draw):
            new, old, advantages, mask, _, config, _ = draw_loss(draw)
            config.global_batch_info.clear()
            results = [
                getattr(module, name)(old, new, advantages, mask & False, "token-mean", config)[0]
                for module in (algos, ours)
            ]
            assert results[0].isnan() and results[1] == 0
            results[1].backward()
            assert (new.grad == 0).all()

        return holds

    def far_below(draw):
        new, old, advantages, mask, *_ = draw_loss(draw)
        config = actor_config(draw)
        old = new.detach() + 30.0
        theirs, mine = (
            named(module.compute_policy_loss_gspo)(new, old, advantages, mask, "token-mean", config, None)[0]
            for module in (algos, ours)
        )
        return (theirs - mine).abs().item()

    def zero_weights(draw):
        new, old, advantages, mask, _, config, _ = draw_loss(draw)
        config.global_batch_info.clear()
        weights = torch.zeros_like(old)
        results = [
            named(m.compute_policy_loss_vanilla)(new, old, advantages, mask, "token-mean", config, weights)
            for m in (algos, ours)
        ]
        assert results[1][1]["actor/pg_clipfrac"] == 0 and results[0][0] == results[1][0] == 0

    def nan_off_the_mask(draw):
        new, old, advantages, mask, mode, config, _ = draw_loss(draw)
        with torch.no_grad():
            new[~mask] = torch.nan
        loss, _ = ours.compute_policy_loss_vanilla(old, new, advantages, mask, mode, config)
        loss.backward()
        assert loss.isfinite() and (new.grad.isfinite()).all()

    found = []
    for kind in ("vanilla", "gspo", "cispo"):
        name = f"compute_policy_loss_{kind}"
        found += [
            Case(
                name,
                *(named(getattr(module, name)) for module in (algos, ours)),
                lambda draw, kind=kind: draw_loss(draw, most=9.0 if kind == "gspo" else None),
                "5 ways of averaging, global counts, rollout weights, 3 metrics"
                + ("; log-ratios within 9" if kind == "gspo" else ""),
            ),
            Case(
                name,
                truth(named(getattr(algos, name)), 3),
                named(getattr(ours, name)),
                bfloat16(lambda draw, kind=kind: draw_loss(draw, most=8.0 if kind == "gspo" else None), 3),
                **BFLOAT16,
            ),
            Difference(name, "no token: verl gives NaN, ours 0 with gradient 0", empty(name), 5),
        ]
    return [
        *found,
        Difference("compute_policy_loss_gspo", "log-ratio of -30: ours is held at -10, off by up to {}", far_below, 50),
        Difference(
            "compute_policy_loss_vanilla", "rollout weights of 0: nothing counts as clipped here", zero_weights, 5
        ),
        Difference(
            "compute_policy_loss_vanilla", "NaN off the mask is not read (verl: NaN gradients)", nan_off_the_mask, 50
        ),
        Case(
            "compute_policy_loss",
            *(deprecated(f) for f in (inspect.unwrap(algos.compute_policy_loss), ours.compute_policy_loss)),
            draw_deprecated,
            "deprecated in verl; our statistics carry no gradient",
        ),
    ]


def value_loss(algos):
    def draw_loss(draw, clips=(0.5, 0.2, 0.05)):
        values, returns, old, mask = loss_inputs(draw, 3)
        counts = global_counts(draw).values() or (1, None, None, None)
        return values, returns, old, mask, draw.one_of(*clips), draw.one_of(*MODES), *counts

    def small(draw):
        """0.5 is a bf16 number: values would lie exactly on the bound, where the gradients differ, see below."""
        return bfloat16(lambda draw: draw_loss(draw, clips=(0.3, 0.2, 0.05)), 3)(draw)

    def on_the_bound(draw):
        old, returns = draw.normal(1, 6).bfloat16().float(), draw.normal(1, 6)
        values = (old + 0.5).requires_grad_()
        mask = torch.ones(1, 6, dtype=torch.bool)
        theirs, mine = (
            torch.autograd.grad(m.compute_value_loss(values, returns, old, mask, 0.5)[0], values)[0]
            for m in (algos, ours)
        )
        assert torch.allclose(theirs, 0.75 * mine, atol=1e-6)

    def nothing(draw):
        values, returns, old, mask, *_ = draw_loss(draw)
        theirs, mine = (m.compute_value_loss(values, returns, old, mask & False, 0.5)[0] for m in (algos, ours))
        assert theirs.isnan() and mine == 0
        mine.backward()
        assert (values.grad == 0).all()

    name = "compute_value_loss"
    return [
        Case(name, algos.compute_value_loss, ours.compute_value_loss, draw_loss, "5 ways of averaging, global counts"),
        Case(name, truth(algos.compute_value_loss, 3), ours.compute_value_loss, small, **BFLOAT16),
        Difference(name, "no token: verl gives NaN, ours 0 with gradient 0", nothing, 5),
        Difference(name, "a value exactly on the bound: verl's gradient is 3/4 of ours", on_the_bound, 50),
    ]


def kl(algos):
    def draw_kl(draw):
        shape = draw.size(5), draw.size(30)
        scale = draw.one_of(0.1, 1.0, 10.0)
        name = draw.one_of(
            "kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k3+", "low_var_kl+", "abs+", "k2+"
        )
        return draw.normal(*shape, scale=scale, grad=True), draw.normal(*shape, scale=scale, grad=True), name

    def small(draw):
        new, reference, name = draw_kl(draw)
        return new.detach().bfloat16().requires_grad_(), reference.detach().bfloat16().requires_grad_(), name

    return [
        Case("kl_penalty", algos.kl_penalty, ours.kl_penalty, draw_kl, "every name, also with +", 2e-5, 2e-5),
        Case(
            "kl_penalty",
            lambda a, b, name: algos.kl_penalty(a.double(), b.double(), name),
            ours.kl_penalty,
            small,
            "bf16, against verl in float64",
            gradient_tolerance=ROUNDING,
        ),
    ]


def train(draw: Draw) -> list:
    """verl's own way from rewards to both losses of PPO, and their gradients, of unpadded log-probs and values."""
    losses, algos = map(importlib.import_module, ("verl.workers.utils.losses", "verl.trainer.ppo.core_algos"))
    data = importlib.import_module("tensordict").TensorDict
    configs = importlib.import_module("verl.workers.config")
    critic, policy = configs.CriticConfig, configs.PolicyLossConfig
    batch, prompt, length = 3, 4, 7
    mask = draw.mask(batch, length, least=3, gaps=False).long()
    attention = torch.cat([torch.ones(batch, prompt, dtype=torch.int64), mask], 1)
    tokens = int(attention.sum())
    estimator = algos.get_adv_estimator_fn(draw.one_of("gae", "reinforce_plus_plus"))
    rewards, values = draw.normal(batch, length), draw.normal(batch, length)
    algorithm = importlib.import_module("verl.trainer.config").AlgoConfig(gamma=0.9)
    if estimator is algos.compute_gae_advantage_return:
        advantages, returns = estimator(rewards, values, mask, gamma=0.9, lam=0.8)
    else:
        advantages, returns = estimator(token_level_rewards=rewards, response_mask=mask, config=algorithm)
    advantages, returns = advantages * mask, returns * mask  # what stands off the mask differs
    columns = {
        "prompts": draw.integers(9, batch, prompt),
        "responses": draw.integers(9, batch, length),
        "attention_mask": attention,
        "response_mask": mask,
        "old_log_probs": draw.normal(batch, length),
        "ref_log_prob": draw.normal(batch, length),
        "advantages": advantages,
        "values": values,
        "returns": returns,
    }
    rest = draw.one_of((1, None, None), (2, int(mask.sum()) * 2, batch * 2))
    rest = dict(zip(("dp_size", "batch_num_tokens", "global_batch_size"), rest, strict=True))
    inputs = data(columns, batch_size=batch)
    for name, value in rest.items():
        inputs.set_non_tensor(name, value)
    found = [advantages, returns]
    for mode in ("vanilla", "gspo", "cispo"):
        kl_type = draw.one_of("low_var_kl", "kl", "mse")
        config = actor_config(draw, use_kl_loss=True, kl_loss_type=kl_type, policy_loss=policy(loss_mode=mode))
        log_probs, entropy = draw.normal(tokens, scale=0.5, grad=True), draw.normal(tokens, grad=True)
        loss, _ = losses.ppo_loss(config, {"log_probs": log_probs, "entropy": entropy}, inputs)
        found += [loss.detach(), *torch.autograd.grad(loss, (log_probs, entropy))]
    config = critic(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, cliprange_value=0.5)
    predicted = draw.normal(tokens, grad=True)
    loss, metrics = losses.value_loss(config, {"values": predicted}, inputs)
    return [*found, loss.detach(), *torch.autograd.grad(loss, predicted), metrics["critic/vf_clipfrac"]]


RAY = """
import ray, sys

hook = "rlhf_fast.adapters.verl.patch_worker"
runtime_env = {"worker_process_setup_hook": hook, "env_vars": {"PYTHONPATH": sys.argv[1]}}
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env)

@ray.remote
def where():
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    return get_policy_loss_fn("vanilla").__module__

print(ray.get(where.remote()))
"""


def ray_worker(draw):
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [sys.executable, "-c", RAY, str(ROOT)],
            cwd=directory,
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.stdout.split()[-1:] == ["rlhf_fast.adapters.verl"], done.stdout + done.stderr[-2000:]
