"""NeMo-RL, of a checkout, beside rlhf_fast.adapters.nemo_rl; its loggers, and where it sends ids to a GPU, are stand-ins."""

import importlib
from unittest import mock

import torch
import torch.distributed

from rlhf_fast.adapters import nemo_rl as ours
from tests.adapters.parity import Case, Difference, Draw, bfloat16, installed, truth

SMALL = torch.bfloat16, torch.float16
ROUNDING = 2.0**-7  # of a bf16 gradient, which both sides round


def cases() -> list:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    by_name = ["nemo_rl.algorithms.loss.loss_functions", "nemo_rl.algorithms.loss.utils"]
    remark = "NeMo-RL's loss input, policy loss, advantages and value loss give the same"
    return [*log_probs(), *kl(), *advantages(), *value_loss(), *installed("nemo_rl", by_name, train, remark)]


def log_probs():
    model = importlib.import_module("nemo_rl.distributed.model_utils")
    sampling = importlib.import_module("nemo_rl.algorithms.logits_sampling_utils").TrainingSamplingParams
    alone = torch.distributed.new_group([0])
    patched = {r.name: r.function for r in ours.replacements()}

    def on_the_cpu(function):
        def call(*args):
            with mock.patch.object(torch.Tensor, "cuda", lambda x: x):
                return function(*args)

        return call

    def draw_ids(draw, *dtypes):
        shape = [draw.size(4), draw.size(9, 2), draw.one_of(1, 2, 7, 33, 257, 1000)]
        logits = draw.normal(*shape, scale=draw.one_of(0.1, 1.0, 3.0, 20.0), dtype=draw.one_of(*dtypes), grad=True)
        return draw.integers(shape[-1], *shape[:-1]), logits

    def parallel(draw, *dtypes):
        ids, logits = draw_ids(draw, *dtypes)
        ids = ids[:, : ids.shape[1] - draw.one_of(0, 1)]  # logits may be longer, by the padding of context parallelism
        rest = draw.one_of(True, False), draw.one_of(None, alone), draw.one_of(None, 3), draw.one_of(None, sampling())
        return logits, ids, 0, logits.shape[-1], alone, *rest

    def filtered(draw):
        ids, logits = draw_ids(draw, torch.float32)
        return ids, logits, None, None, None, None, sampling(top_k=1)

    def plain(draw):
        return *draw_ids(draw, torch.float32), *draw.one_of(
            (), (None, 0, alone), (None, 0, alone, alone, sampling(), 3)
        )

    one, many = "get_next_token_logprobs_from_logits", "from_parallel_logits_to_logprobs"
    originals = {name: on_the_cpu(getattr(model, name)) for name in (one, many)}
    small = "bf16 and fp16: NeMo-RL takes a float32 copy first"

    def with_gradient(function):
        """NeMo-RL keeps nothing for the backward pass where `inference_only` is set; a case asks for gradients."""
        return lambda *args: function(*args[:5], False, *args[6:])

    pairs = with_gradient(originals[many]), with_gradient(patched[many])
    return [
        Case(one, originals[one], patched[one], plain, "float32, also vocabulary-parallel with one process"),
        Case(
            one, originals[one], patched[one], lambda draw: draw_ids(draw, *SMALL), small, gradient_tolerance=ROUNDING
        ),
        Case(one, originals[one], on_the_cpu(patched[one]), filtered, "top-k: NeMo-RL's own code, under the patch too"),
        Case(
            many,
            *pairs,
            lambda draw: parallel(draw, torch.float32),
            "float32, groups of one process, whole and in chunks",
        ),
        Case(many, *pairs, lambda draw: parallel(draw, *SMALL), small, gradient_tolerance=ROUNDING),
    ]


def kl():
    utils = importlib.import_module("nemo_rl.algorithms.utils")
    patched = next(r.function for r in ours.replacements() if r.name == "calculate_kl")

    def draw_kl(draw, weighted=False):
        shape, scale = (draw.size(5), draw.size(30)), draw.one_of(0.1, 1.0, 10.0)
        new, reference, weights = (draw.normal(*shape, scale=scale, grad=True) for _ in range(3))
        kind = draw.one_of("k1", "k2", "k3")
        clamps = draw.one_of((20.0, 10.0), (None, None), (2.0, None), (None, 1.0)) if scale < 10 else (20.0, 10.0)
        return new, reference, kind, *clamps, weights if weighted else None

    name = "calculate_kl"
    return [
        Case(
            name,
            truth(utils.calculate_kl, 2),
            patched,
            draw_kl,
            "k1, k2, k3, clamped or not; against NeMo-RL on float64",
        ),
        Case(
            name,
            utils.calculate_kl,
            patched,
            lambda draw: draw_kl(draw, True),
            "importance weights: NeMo-RL's own code, under the patch too",
        ),
        Case(
            name,
            truth(utils.calculate_kl, 2),
            patched,
            bfloat16(draw_kl, 2),
            "bf16, against NeMo-RL on the same in float64",
            gradient_tolerance=ROUNDING,
        ),
    ]


def advantages():
    kind = importlib.import_module("nemo_rl.algorithms.advantage_estimator").GeneralizedAdvantageEstimator
    loss = importlib.import_module("nemo_rl.algorithms.loss").ClippedPGLossConfig()
    settings = {
        "gae_lambda": 0.95,
        "gae_gamma": 0.99,
        "normalize_advantages": True,
        "gae_lambda_value": None,
        "gae_lambda_policy": None,
        "length_adaptive_alpha": 0.0,
    }

    def estimator(**options):
        return kind(settings | options, loss)

    def masked_results(function):
        def run(own, *args):
            results = function(own, *args)
            mask = args[-2]
            return [x[mask != 0] for x in (results if isinstance(results, tuple) else (results,))]

        return run

    def draw_gae(draw):
        shape = draw.size(5), draw.size(40)
        own = estimator(gae_lambda=draw.one_of(1.0, 0.95, 0.3, 0.0), gae_gamma=draw.one_of(1.0, 0.99, 0.5, 0.0))
        lam = draw.one_of(None, 0.5, draw.normal(shape[0]).sigmoid())
        mask = draw.mask(*shape)
        return own, draw.normal(*shape), draw.normal(*shape), draw.one_of(mask.long(), mask.float()), lam

    def draw_whiten(draw):
        shape = draw.size(5), draw.size(40, 2)
        return estimator(), draw.normal(*shape, scale=3.0), draw.mask(*shape, least=2).float(), draw.one_of(True, False)

    def whiten(function):
        """NeMo-RL multiplies the values by the mask: what stands off it must be finite, and is compared nowhere."""
        return masked_results(lambda own, x, mask, shift_mean: function(own, x, mask, shift_mean))

    def exact_whiten(own, x, mask, shift_mean):
        return kind._reward_whiten(own, x.double(), mask.double(), shift_mean)

    def whole(draw):
        """compute_advantage, that calls both, with each of VAPO's lambdas."""
        options = draw.one_of({}, {"gae_lambda_value": 1.0}, {"gae_lambda_policy": 0.5}, {"length_adaptive_alpha": 0.3})
        own = estimator(**options)
        shape = draw.size(5), draw.size(40, 2)
        rewards, values, mask = draw.normal(shape[0]), draw.normal(*shape), draw.mask(*shape, least=2).long()
        theirs = own.compute_advantage(None, rewards, mask, values)
        with mock.patch.multiple(kind, _compute_gae=ours.compute_gae, _reward_whiten=ours.reward_whiten):
            mine = own.compute_advantage(None, rewards, mask, values)
        worst = max((a - b)[mask != 0].abs().max().item() for a, b in zip(theirs, mine, strict=True))
        if mask.sum() > 3:  # of two or three values the variance may be next to nothing
            assert worst < 1e-4, worst
        return worst if mask.sum() > 3 else 0.0

    return [
        Case(
            "_compute_gae",
            *map(masked_results, (kind._compute_gae, ours.compute_gae)),
            draw_gae,
            "on the mask, lambda [B] too",
        ),
        Case(
            "_compute_gae",
            masked_results(truth(kind._compute_gae, 2, 1)),
            masked_results(ours.compute_gae),
            bfloat16(draw_gae, 2, 1),
            "bf16, against NeMo-RL on the same in float64",
        ),
        Case(
            "_reward_whiten",
            *map(whiten, (exact_whiten, ours.reward_whiten)),
            draw_whiten,
            "on the mask, against NeMo-RL in float64",
        ),
        Difference(
            "compute_advantage", "NeMo-RL's, calling ours, decoupled lambdas too: within {}", whole, verdict="holds"
        ),
    ]


def value_loss():
    losses = importlib.import_module("nemo_rl.algorithms.loss.loss_functions")
    kind, config = losses.MseValueLossFn, losses.MseValueLossConfig

    def draw_loss(draw: Draw):
        shape = draw.size(5), draw.size(30)
        loss = kind(config(scale=draw.one_of(1.0, 0.5), cliprange=draw.one_of(None, 0.2, 0.5)))
        data = {
            "token_mask": draw.mask(*shape).float(),
            "sample_mask": draw.integers(4, shape[0]).clamp(max=1).float(),
            "returns": draw.normal(*shape),
            "values": draw.normal(*shape),
        }
        logits = draw.normal(*shape, *draw.one_of((), (1,)), grad=True)
        return loss, logits, data, torch.tensor(float(draw.size(9))), torch.tensor(float(draw.size(500, 50)))

    return [
        Case(
            "MseValueLossFn.__call__",
            kind.__call__,
            ours.value_loss,
            draw_loss,
            "clipped and not, masked samples and batches, all nine metrics",
        ),
        Case(
            "MseValueLossFn.__call__",
            truth(kind.__call__, 1, 1),
            ours.value_loss,
            bfloat16(draw_loss, 1, 1),
            "bf16 values, against NeMo-RL on the same in float64",
            gradient_tolerance=ROUNDING,
        ),
    ]


def train(draw: Draw) -> list:
    """NeMo-RL's own way from logits, rewards and values to both losses of PPO, and their gradients."""
    loss, utils = map(importlib.import_module, ("nemo_rl.algorithms.loss", "nemo_rl.algorithms.loss.utils"))
    functions, estimators = map(
        importlib.import_module,
        ("nemo_rl.algorithms.loss.loss_functions", "nemo_rl.algorithms.advantage_estimator"),
    )
    batch, length, vocab = 3, 7, 11
    logits, mask = draw.normal(batch, length, vocab, grad=True), draw.mask(batch, length, least=3, gaps=False).float()
    config = loss.ClippedPGLossConfig(reference_policy_kl_penalty=0.1, reference_policy_kl_type=draw.one_of("k1", "k3"))
    policy = loss.ClippedPGLossFn(config)
    settings = {"gae_lambda": 0.95, "gae_gamma": 0.99, "normalize_advantages": True}
    settings |= {"gae_lambda_value": None, "gae_lambda_policy": None, "length_adaptive_alpha": 0.0}
    estimator = estimators.GeneralizedAdvantageEstimator(settings, config)
    values = draw.normal(batch, length)
    advantages, returns = estimator.compute_advantage(None, draw.normal(batch), mask.long(), values)
    data = importlib.import_module("nemo_rl.distributed.batched_data_dict").BatchedDataDict(
        {
            "input_ids": draw.integers(vocab, batch, length),
            "token_mask": mask,
            "sample_mask": torch.ones(batch),
            "advantages": advantages * mask,
            "returns": returns * mask,
            "values": values,
            "prev_logprobs": draw.normal(batch, length),
            "generation_logprobs": draw.normal(batch, length),
            "reference_policy_logprobs": draw.normal(batch, length),
        }
    )
    counts = torch.tensor(float(batch)), mask.sum()
    with mock.patch.object(torch.Tensor, "cuda", lambda x: x):
        inputs, data = utils.prepare_loss_input(logits, data, policy)
    first, metrics = policy(data=data, global_valid_seqs=counts[0], global_valid_toks=counts[1], **inputs)
    predicted = draw.normal(batch, length, 1, grad=True)
    second, more = functions.MseValueLossFn(functions.MseValueLossConfig(cliprange=0.2))(predicted, data, *counts)
    gradients = torch.autograd.grad(first + second, (logits, predicted))
    numbers = [x for x in (*metrics.values(), *more.values()) if isinstance(x, float)]
    return [advantages * mask, returns * mask, first.detach(), second.detach(), *gradients, numbers]
