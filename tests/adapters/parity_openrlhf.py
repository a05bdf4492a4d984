"""OpenRLHF 0.11.2 beside rlhf_fast.adapters.openrlhf; flash-attn and vLLM, which it imports, are stand-ins."""

import importlib
from types import SimpleNamespace

import torch

from rlhf_fast.adapters import openrlhf as ours
from tests.adapters.parity import Case, Difference, Draw, bfloat16, installed, truth

WIDE, SMALL = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
ROUNDING = 2.0**-8  # of a bf16 gradient that either side rounds
BFLOAT16 = {"remark": "bf16, against OpenRLHF on the same in float64", "gradient_tolerance": ROUNDING}


def cases() -> list:
    utils, losses = map(importlib.import_module, ("openrlhf.models.utils", "openrlhf.models.loss"))
    maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    return [
        *log_probs(utils),
        *kl_and_rewards(utils),
        *policy_loss(losses),
        *other_losses(losses),
        *advantages(maker),
        *actor(),
        *installed(
            "openrlhf",
            [
                "openrlhf.models.actor",
                "openrlhf.models.loss",
                "openrlhf.trainer.ppo_utils.experience_maker",
                "openrlhf.trainer.ray.ppo_actor",
                "openrlhf.trainer.ray.ppo_critic",
            ],
            train,
            "OpenRLHF's experience maker, actor and losses give the same",
        ),
    ]


def logits_and_labels(draw: Draw, *dtypes: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shape = [draw.size(4), draw.size(9), draw.one_of(1, 2, 7, 33, 257, 1000)]
    logits = draw.normal(*shape, scale=draw.one_of(0.1, 1.0, 3.0, 20.0), dtype=draw.one_of(*dtypes), grad=True)
    return logits, draw.integers(shape[-1], *shape[:-1])


def eager(function):
    return getattr(function, "_torchdynamo_orig_callable", function)


def log_probs(utils):
    name, entropy = "log_probs_from_logits", "compute_entropy"
    original, mine = utils.log_probs_from_logits, ours.log_probs_from_logits
    their_entropy = eager(utils.compute_entropy)

    def with_temperature(draw, *dtypes):
        return *logits_and_labels(draw, *dtypes), draw.one_of(1.0, 0.7, 2.5)

    def rounding(draw):
        logits, labels = draw.normal(2, 8, 5000, scale=3.0, dtype=torch.bfloat16), draw.integers(5000, 2, 8)
        exact = original(logits.double(), labels)
        assert (mine(logits, labels) - exact).abs().max() < 1e-5
        return (original(logits, labels) - exact).abs().max().item()

    def untouched(draw):
        logits, labels = (x.detach() for x in logits_and_labels(draw, torch.float32))
        before = logits.clone()
        mine(logits, labels, 0.7)
        assert torch.equal(before, logits)
        original(logits, labels, 0.7)
        assert not torch.equal(before, logits)

    def one_masked(draw):
        logits = draw.normal(3, 9)
        logits[:, 4] = -torch.inf
        assert their_entropy(logits).isnan().all()
        assert torch.allclose(ours.compute_entropy(logits), their_entropy(logits[:, torch.arange(9) != 4]), atol=1e-5)

    small = {"remark": "bf16 and fp16, against OpenRLHF on float64", "gradient_tolerance": ROUNDING}
    return [
        Case(
            name,
            truth(original),
            mine,
            lambda draw: with_temperature(draw, *WIDE),
            "float32 and float64, with temperature",
        ),
        Case(name, truth(original), mine, lambda draw: with_temperature(draw, *SMALL), **small),
        Difference(name, "bf16: OpenRLHF's result is bf16, off by up to {}; ours within 1e-5", rounding, 50),
        Difference(name, "OpenRLHF divides the logits by the temperature in place, ours leaves them", untouched, 5),
        Case(
            entropy,
            truth(their_entropy),
            ours.compute_entropy,
            lambda draw: logits_and_labels(draw, *WIDE)[:1],
            "float32 and float64",
        ),
        Case(
            entropy,
            truth(their_entropy),
            ours.compute_entropy,
            lambda draw: logits_and_labels(draw, *SMALL)[:1],
            **small,
        ),
        Difference(entropy, "one logit is -inf: OpenRLHF gives NaN, ours the entropy of the others", one_masked, 50),
    ]


def kl_and_rewards(utils):
    def draw_kl(draw, unbiased):
        shape, scale = (draw.size(5), draw.size(30)), draw.one_of(0.1, 1.0, 10.0, 100.0)
        new, base, old = (draw.normal(*shape, scale=scale, grad=i < 2) for i in range(3))
        return new, base, draw.one_of(None, old), draw.one_of("k1", "k2", "k3"), unbiased

    def draw_reward(draw):
        mask = draw.mask(draw.size(5), draw.size(30))
        mask[:, 0] |= ~mask.any(1)  # no empty row
        kl = draw.normal(*mask.shape, grad=True)
        mask = draw.one_of(mask, mask.long(), mask.float())
        clip = draw.one_of(None, (-1.0, 1.0), (-10.0, 0.5))
        return draw.normal(len(mask), scale=3.0, grad=True), draw.one_of(0.1, 0.0, -1.0), kl, mask, clip

    def empty_row(draw):
        r, kl, mask = draw.normal(2), draw.normal(2, 5), torch.tensor([[1, 1, 0, 0, 0], [0] * 5])
        theirs, mine = (f(r, 0.0, kl * mask, mask) for f in (utils.compute_reward, ours.compute_reward))
        assert theirs[1, -1] == r[1] and (mine[1] == 0).all() and torch.equal(theirs[0], mine[0])

    def wide_rewards(draw):
        theirs, mine = (
            f(draw.normal(2).double(), 0.1, torch.zeros(2, 5), torch.ones(2, 5))
            for f in (utils.compute_reward, ours.compute_reward)
        )
        assert theirs.dtype == mine.dtype == torch.float32

    def draw_mean(draw):
        mask = draw.mask(draw.size(5), draw.size(40))
        mask[:, 0] |= ~mask.any(1)
        x = draw.normal(*mask.shape, scale=10.0, grad=True)
        return x, draw.one_of(None, mask, mask.long(), mask.float()), draw.one_of(None, -1, 1)

    def nothing(draw):
        x, mask = draw.normal(3, 4), torch.zeros(3, 4)
        assert utils.masked_mean(x, mask).isnan() and ours.masked_mean(x, mask) == 0

    def masked_first(function):
        """Its KL comes from log-probs that Actor.forward has masked."""
        return lambda r, coef, kl, mask, clip: function(r, coef, kl * (mask != 0), mask, clip)

    def unbiased(new, base, old, estimator, _):
        value = utils.compute_approx_kl(new, base, None, estimator).detach()
        way = utils.compute_approx_kl(new, base, old, estimator, True)
        return value + (way - way.detach())

    kl, both = "compute_approx_kl", (utils.compute_approx_kl, ours.compute_approx_kl)
    rewards = [*map(masked_first, (utils.compute_reward, ours.compute_reward))]
    return [
        Case(kl, *both, lambda draw: draw_kl(draw, False), "k1, k2, k3", 2e-5),
        Case(
            kl,
            unbiased,
            ours.compute_approx_kl,
            lambda draw: draw_kl(draw, True),
            "unbiased, with importance weights; values against OpenRLHF's without, which lose nothing to a difference",
            2e-5,
        ),
        Case(kl, *both, bfloat16(lambda draw: draw_kl(draw, False), 2), "bf16", 2e-5, ROUNDING),
        Case("compute_reward", *rewards, draw_reward, "gaps, clipped rewards"),
        Case(
            "compute_reward",
            truth(rewards[0], 1, 2),
            rewards[1],
            bfloat16(bfloat16(draw_reward, 1, 2)),
            **BFLOAT16,
        ),
        Difference("compute_reward", "float64 rewards: float32, as the KL", wide_rewards, 5, verdict="holds"),
        Difference(
            "compute_reward",
            "a row without a token: OpenRLHF puts its reward in the last column, ours drops it",
            empty_row,
            5,
        ),
        Case("masked_mean", utils.masked_mean, ours.masked_mean, draw_mean, "without a mask too"),
        Case("masked_mean", truth(utils.masked_mean), ours.masked_mean, bfloat16(draw_mean), **BFLOAT16),
        Difference("masked_mean", "nothing kept: OpenRLHF gives NaN, ours 0", nothing, 5),
    ]


def counts(draw: Draw) -> tuple:
    """dp_size, batch_num_tokens, global_batch_size."""
    tokens, sequences = draw.size(500, 50), draw.size(50, 5)
    return draw.one_of(
        (), (2,), (draw.size(4), tokens, sequences), (2, torch.tensor(tokens), torch.tensor(sequences * 1.0))
    )


def policy_loss(losses):
    original = losses.PolicyLoss.forward
    patched = ours._policy_loss_or(original)

    def draw_loss(draw, **fixed):
        shape = draw.size(5), draw.size(30)
        new = draw.normal(*shape, grad=True)
        old = draw.one_of(new.detach().clone(), new.detach() + draw.one_of(0.1, 1.0, 15.0) * draw.normal(*shape))
        mask = draw.mask(*shape, least=1)
        options = {
            "clip_eps_low": draw.one_of(0.2, 0.1, 1.5),
            "clip_eps_high": draw.one_of(0.2, 0.28),
            "dual_clip": draw.one_of(None, 3.0, 1.5),
            "token_level_loss": draw.one_of(True, False),
        }
        mask = draw.one_of(mask, mask.long(), mask.float())
        return losses.PolicyLoss(**options | fixed), new, old, draw.normal(*shape), mask, None, *counts(draw)

    def draw_kept(draw):
        kept = ({"policy_loss_type": "gspo"}, {"is_correction_level": "token"}, {"is_correction_level": "seq"})
        loss, new, old, advantages, mask, _, *rest = draw_loss(draw, **draw.one_of(*kept))
        return loss, new, old, advantages, mask.float(), old + draw.normal(*old.shape, scale=0.1), *rest

    def nothing(draw):
        loss, new, old, advantages, mask, *_ = draw_loss(draw)
        theirs, mine = (f(loss, new, old, advantages, torch.zeros_like(mask)) for f in (original, patched))
        assert theirs[0].isnan() and mine[0] == mine[1] == mine[2] == 0

    def hidden_nan(draw):
        loss, new, old, advantages, mask, *rest = draw_loss(draw)
        with torch.no_grad():
            new[mask == 0] = torch.nan
        result = patched(loss, new, old, advantages, mask, *rest)[0]
        result.backward()
        assert result.isfinite() and new.grad.isfinite().all()

    name = "PolicyLoss.forward"
    return [
        Case(name, original, patched, draw_loss, "token and sequence means, dual clip, global counts, both statistics"),
        Case(name, original, patched, draw_kept, "gspo and is_correction: OpenRLHF's own code, under the patch too"),
        Case(name, truth(original, 3, 1), patched, bfloat16(draw_loss, 3, 1), **BFLOAT16),
        Difference(name, "no token: OpenRLHF gives NaN, ours 0", nothing, 5),
        Difference(name, "NaN off the mask is not read (OpenRLHF: NaN)", hidden_nan, 50),
    ]


def other_losses(losses):
    def draw_value(draw):
        shape = draw.size(5), draw.size(30)
        values, old, returns = (draw.normal(*shape, scale=draw.one_of(0.1, 1.0), grad=i < 2) for i in range(3))
        loss = losses.ValueLoss(draw.one_of(None, 0.2, 0.5), draw.one_of(True, False))
        return loss, values, old, returns, draw.mask(*shape, least=1), *counts(draw)

    def draw_pairs(draw):
        n, scale = draw.size(20), draw.one_of(0.1, 1.0, 10.0)
        chosen, rejected = (draw.normal(n, scale=scale, grad=True) for _ in range(2))
        return None, chosen, rejected, draw.one_of(None, draw.normal(n).abs())

    def overflow(draw):
        chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (-100.0, 100.0))
        theirs, mine = (f(None, chosen, rejected) for f in (losses.LogExpLoss.forward, ours.log_exp_loss))
        assert theirs.isinf() and mine == 200

    def draw_dpo(draw):
        loss = losses.DPOLoss(draw.one_of(0.1, 0.5), draw.one_of(0.0, 0.1, 0.4), draw.one_of(True, False))
        n = draw.size(20)
        return loss, *(draw.normal(n, scale=draw.one_of(1.0, 30.0), grad=i < 2) for i in range(4))

    def no_value(draw):
        loss, values, old, returns, mask, *_ = draw_value(draw)
        theirs, mine = (f(loss, values, old, returns, mask & False) for f in (value, ours.value_loss))
        assert theirs.isnan() and mine == 0

    value, dpo = losses.ValueLoss.forward, losses.DPOLoss.forward

    def exact_dpo(loss, *log_probs):
        return dpo(loss, *(x.double() for x in log_probs))

    return [
        Case("ValueLoss.forward", value, ours.value_loss, draw_value, "clipped and not, global counts"),
        Case("ValueLoss.forward", truth(value, 3, 1), ours.value_loss, bfloat16(draw_value, 3, 1), **BFLOAT16),
        Difference("ValueLoss.forward", "no token: OpenRLHF gives NaN, ours 0", no_value, 5),
        Case(
            "PairWiseLoss.forward",
            losses.PairWiseLoss.forward,
            ours.pairwise_loss,
            draw_pairs,
            "with and without margin",
        ),
        Case("LogExpLoss.forward", losses.LogExpLoss.forward, ours.log_exp_loss, draw_pairs),
        Difference("LogExpLoss.forward", "rejected 200 ahead: OpenRLHF gives inf, ours 200", overflow, 1),
        Case("DPOLoss.forward", exact_dpo, ours.dpo, draw_dpo, "label smoothing, ipo; against OpenRLHF on float64"),
        Case("DPOLoss.forward", exact_dpo, ours.dpo, bfloat16(draw_dpo, 4, 1), **BFLOAT16),
    ]


def advantages(maker):
    def masked_results(function):
        return lambda values, rewards, mask, *options: [
            x if mask is None else x[mask != 0] for x in function(None, values, rewards, mask, *options)
        ]

    def draw_gae(draw):
        shape = draw.size(5), draw.size(40)
        mask = draw.mask(*shape)
        options = draw.one_of(1.0, 0.99, 0.5, 0.0), draw.one_of(1.0, 0.95, 0.3, 0.0)
        return draw.normal(*shape), draw.normal(*shape), draw.one_of(None, mask, mask.long(), mask.float()), *options

    def sums(function):
        return lambda _, rewards, mask, gamma, lam: function(None, rewards, mask, gamma)[
            ... if mask is None else mask != 0
        ]

    def off_the_mask(draw):
        values, rewards, mask, *options = draw_gae(draw)
        mask = torch.ones_like(rewards) if mask is None else mask
        for x in ours.get_advantages_and_returns(None, values, rewards, mask, *options):
            assert (x[mask == 0] == 0).all()

    name, returns = "get_advantages_and_returns", "get_cumulative_returns"
    pairs = ((getattr(maker, n), getattr(ours, n)) for n in (name, returns))
    gae = [*map(masked_results, next(pairs))]
    return [
        Case(name, *gae, draw_gae, "on the mask, gaps and empty rows"),
        Case(name, truth(gae[0], 2), gae[1], bfloat16(draw_gae, 2), **BFLOAT16),
        Difference(
            name, "off the mask ours is 0; OpenRLHF leaves a decaying tail before and in gaps", off_the_mask, 50
        ),
        Case(returns, *map(sums, next(pairs)), draw_gae, "on the mask"),
    ]


def actor():
    kind = importlib.import_module("openrlhf.models.actor").Actor
    actor_module = importlib.import_module("openrlhf.models.actor")
    actor_module.compute_entropy = eager(actor_module.compute_entropy)  # what is compiled for each shape takes minutes
    original = kind.forward
    patched = ours._actor_forward_or(original)

    def run(forward):
        def call(table, tokens, attention, actions, temperature, packed, entropy):
            model = kind(ours._TableModel(table), temperature=temperature)
            model.packing_samples = packed
            result = forward(
                model,
                tokens,
                actions,
                attention_mask=attention,
                return_output=entropy is not None,
                return_logprobs=actions is None,
                return_entropy=bool(entropy),
            )
            if entropy is None:
                return result
            log_probs, output = result
            return [log_probs, output.entropy] if entropy else log_probs

        return call

    def draw_actor(draw, dtype=torch.float32):
        vocab, shape = draw.one_of(2, 11, 257), (draw.size(4), draw.size(12, 2))
        attention = draw.mask(*shape, gaps=False).flip(draw.one_of(0, 1))
        attention[:, -2:] = True
        actions = draw.one_of(None, draw.mask(shape[0], draw.size(shape[1] - 1)).float())
        table = draw.normal(vocab, vocab, scale=draw.one_of(1.0, 3.0), dtype=dtype, grad=True)
        entropy = draw.one_of(None, False, True)
        return (
            table,
            draw.integers(vocab, *shape),
            attention.long(),
            actions,
            draw.one_of(1.0, 0.7),
            draw.one_of(0, 1),
            entropy,
        )

    def for_logits(draw):
        table, tokens, attention, *_ = draw_actor(draw)
        model = kind(ours._TableModel(table), temperature=0.7)
        model.packing_samples = False
        theirs, mine = (
            f(model, tokens, attention_mask=attention, return_output=True)["logits"] for f in (original, patched)
        )
        assert torch.equal(theirs, mine)

    def copies(draw):
        """Of a forward and backward pass over bf16 logits."""
        made = []
        for forward in (original, patched):
            tokens = draw.integers(1000, 4, 64)
            model = kind(_Head(draw.normal(1000, 8, dtype=torch.bfloat16, grad=True)))
            model.packing_samples = False
            with _Allocated() as allocated:
                forward(model, tokens, torch.ones(4, 63), torch.ones_like(tokens)).sum().backward()
            logits = tokens.numel() * 1000
            made.append(sum(n for n in allocated.sizes if n >= 1.5 * logits) / logits)
        assert made[0] > 11 and made[1] < 5, made
        return made[0] - made[1]

    name = "Actor.forward"
    return [
        Case(
            name,
            run(original),
            run(patched),
            draw_actor,
            "log-probs, entropy, padded and packed, temperature",
            2e-5,
            2e-5,
        ),
        Case(
            name,
            run(original),
            run(patched),
            lambda draw: draw_actor(draw, torch.bfloat16),
            "bf16 logits: what OpenRLHF's float32 copy gives",
            2e-5,
            2 * ROUNDING,
        ),
        Difference(name, "asked for logits: OpenRLHF's own code", for_logits, 5, verdict="holds"),
        Difference(name, "tensors of the size of the logits: {} bytes a logit fewer are made", copies, 1),
    ]


def train(draw: Draw) -> list:
    """OpenRLHF's own way from rewards and an actor to both losses of PPO, and their gradients."""
    models, experiences = map(
        importlib.import_module, ("openrlhf.models", "openrlhf.trainer.ppo_utils.experience_maker")
    )
    actor_module = importlib.import_module("openrlhf.models.actor")
    actor_module.compute_entropy = eager(actor_module.compute_entropy)
    batch, prompt, length, vocab = 4, 3, 6, 11
    sequences, mask = draw.integers(vocab, batch, prompt + length), draw.mask(batch, length, gaps=False).float()
    mask[:, 0] = 1
    attention = torch.cat([torch.ones(batch, prompt), mask], 1).long()
    table = draw.normal(vocab, vocab, grad=True)
    actor = models.Actor(ours._TableModel(table), temperature=0.7)
    actor.packing_samples = bool(draw.one_of(0, 1))

    estimator = draw.one_of("gae", "reinforce", "rloo", "group_norm")
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=0.9, no_std_norm=False)
    maker = experiences.RemoteExperienceMaker.__new__(experiences.RemoteExperienceMaker)
    maker.advantage_estimator, maker.kl_ctl = estimator, SimpleNamespace(value=0.05)
    maker.strategy = SimpleNamespace(
        args=SimpleNamespace(
            rollout=SimpleNamespace(n_samples_per_prompt=2),
            reward=SimpleNamespace(clip_range=(-5.0, 5.0), overlong_buffer_len=None, stop_properly_penalty_coef=None),
            algo=SimpleNamespace(advantage=advantage),
        )
    )
    old, base, values = (draw.normal(batch, length) * mask for _ in range(3))
    kl = experiences.compute_approx_kl(old, base)
    experience = SimpleNamespace(
        index=list(range(batch)), rewards=draw.normal(batch), action_mask=mask, kl=kl, values=values, info={}
    )
    maker.compute_advantages_and_returns([experience])
    advantages, returns = experience.advantages * mask, experience.returns * mask

    new, output = actor(
        sequences, mask, attention_mask=attention, return_output=True, return_logprobs=True, return_entropy=True
    )
    policy, clipped, approximate, *_ = models.PolicyLoss()(new, old, advantages, mask)
    entropy = output.entropy[:, -length:]
    total = policy - 0.01 * (entropy * mask).sum() / mask.sum()
    predicted = draw.normal(batch, length, grad=True)
    value = models.ValueLoss(0.2)(predicted, values, returns, mask)
    gradients = torch.autograd.grad(total + value, (table, predicted))
    return [kl, advantages, returns, new.detach(), total.detach(), clipped, approximate, value.detach(), *gradients]


class _Head(torch.nn.Module):
    """Logits as a product makes them, whose backward pass does not read them."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, tokens, **_):
        outputs = importlib.import_module("transformers.modeling_outputs")
        return outputs.CausalLMOutputWithPast(logits=torch.nn.functional.linear(self.weight[tokens], self.weight))


class _Allocated(torch.utils._python_dispatch.TorchDispatchMode):
    """The bytes of each new tensor."""

    def __init__(self):
        super().__init__()
        self.sizes, self.seen = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.seen:
                self.seen.add(x.untyped_storage().data_ptr())
                self.sizes.append(x.untyped_storage().nbytes())
        return result
