"""TRL 1.12 and 1.16 beside rlhf_fast.adapters.trl."""

import importlib
import importlib.metadata
import os

import torch

from rlhf_fast.adapters import trl as ours
from tests.adapters.parity import Case, Difference, Draw

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
WIDE, SMALL = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
ROUNDING = 2.0**-8  # of a bf16 gradient that either side rounds


def cases() -> list:
    utils = importlib.import_module("trl.trainer.utils")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return kernel(utils)
    new = importlib.metadata.version("trl") != "1.12.0"
    return [*log_probs(utils, new), *entropies(utils, new), *(both(utils) + chunked(utils) if new else ppo())]


def logits(draw: Draw, *dtypes: torch.dtype, masked_columns: bool = False) -> torch.Tensor:
    shape = [draw.size(4), draw.size(9), draw.one_of(1, 2, 7, 33, 257, 1000)]
    x = draw.normal(*shape[draw.size(2, 1) - 1 :], scale=draw.one_of(0.1, 1.0, 3.0, 20.0), dtype=draw.one_of(*dtypes))
    if masked_columns:
        x[..., draw.integers(2, shape[-1]).bool() & (torch.arange(shape[-1]) > 0)] = -torch.inf
    return x.requires_grad_()


def options(draw: Draw, new: bool, *shape: int) -> tuple:
    """temperature and row_mask, which 1.16 has."""
    if not new or draw.one_of(True, False):
        return ()
    return draw.one_of(1.0, 0.7, 2.5), draw.one_of(None, draw.mask(*shape), draw.mask(*shape).int())


def truth(function):
    """The library's function without the rounding of 16-bit logits."""
    return lambda x, *rest: function(x.double(), *rest)


def log_probs(utils, new):
    original, mine = utils.selective_log_softmax, ours.selective_log_softmax

    def one(draw, *dtypes):
        x = logits(draw, *dtypes, masked_columns=draw.one_of(True, False))
        return x, draw.integers(x.shape[-1], *x.shape[:-1]), *options(draw, new, *x.shape[:-1])

    def several(draw, *dtypes):
        x = logits(draw, *dtypes)
        index = draw.integers(x.shape[-1], *x.shape[:-1], draw.size(5))
        return x, index, *options(draw, new, *index.shape)

    def rounding(draw):
        x = draw.normal(2, 8, 5000, scale=3.0, dtype=torch.bfloat16)
        index = draw.integers(5000, 2, 8)
        exact = original(x.double(), index)
        assert (mine(x, index) - exact).abs().max() < 1e-5
        return (original(x, index) - exact).abs().max().item()

    def ignored(draw):
        x = draw.normal(2, 3, 7)
        index = draw.integers(7, 2, 3).index_fill(1, torch.tensor([1]), -100)
        assert (mine(x, index)[:, 1] == 0).all()
        try:
            original(x, index)
        except (RuntimeError, IndexError):
            return
        raise AssertionError("TRL takes -100 now")

    name = "selective_log_softmax"
    cases = [
        Case(name, original, mine, lambda draw: one(draw, *WIDE), "float32 and float64, also with -inf columns"),
        Case(
            name,
            truth(original),
            mine,
            lambda draw: one(draw, *SMALL),
            "bf16 and fp16, against TRL on the same logits in float64",
            gradient_tolerance=ROUNDING,
        ),
        Case(f"{name}, K a row", original, mine, lambda draw: several(draw, *WIDE)),
        Case(
            f"{name}, K a row",
            truth(original),
            mine,
            lambda draw: several(draw, *SMALL),
            "bf16 and fp16, likewise",
            gradient_tolerance=ROUNDING,
        ),
        Difference(name, "bf16: TRL's result is bf16, off by up to {}; ours float32, within 1e-5", rounding, inputs=50),
        Difference(name, "index -100: TRL raises, ours gives 0", ignored, inputs=5),
    ]
    if new:
        cases.append(
            Difference(
                name, "rows masked out may hold any label (TRL raises on the CPU)", any_label(original, mine), inputs=5
            )
        )
    return cases


def any_label(original, mine):
    def holds(draw):
        x, index = draw.normal(2, 3, 7), draw.integers(7, 2, 3)
        index[:, 1] = 99
        mask = torch.tensor([1, 0, 1]).expand(2, 3)
        assert (mine(x, index, 1.0, mask)[:, 1] == 0).all()
        try:
            original(x, index, 1.0, mask)
        except (RuntimeError, IndexError):
            return
        raise AssertionError("TRL takes them now")

    return holds


def entropies(utils, new):
    original, mine = utils.entropy_from_logits, ours.entropy_from_logits

    def masked_column(draw):
        x = draw.normal(3, 9)
        x[:, 4] = -torch.inf
        keep = torch.arange(9) != 4
        assert original(x).isnan().all()
        assert torch.allclose(mine(x), original(x[:, keep]), atol=1e-5)

    def rounding(draw):
        x = draw.normal(16, 5000, scale=3.0, dtype=torch.bfloat16)
        exact = original(x.double())
        assert (mine(x) - exact).abs().max() < 1e-5
        return (original(x) - exact).abs().max().item()

    name = "entropy_from_logits"
    return [
        Case(name, original, mine, lambda draw: (logits(draw, *WIDE), draw.size(9)), "float32 and float64"),
        Case(
            name,
            truth(original),
            mine,
            lambda draw: (logits(draw, *SMALL), 128),
            "bf16 and fp16, against TRL on float64",
            gradient_tolerance=ROUNDING,
        ),
        Difference(name, "one logit is -inf: TRL gives NaN, ours the entropy of the others", masked_column, inputs=50),
        Difference(name, "bf16: TRL is off by up to {}, ours within 1e-5", rounding, inputs=50),
    ]


def both(utils):
    original, mine = utils.selective_log_softmax_and_entropy, ours.selective_log_softmax_and_entropy

    def draw_both(draw, *dtypes):
        x = logits(draw, *dtypes)
        rest = options(draw, True, *x.shape[:-1])
        return x, draw.integers(x.shape[-1], *x.shape[:-1]), draw.one_of(True, False), *rest

    name = "selective_log_softmax_and_entropy"
    return [
        Case(name, original, mine, lambda draw: draw_both(draw, *WIDE), "float32 and float64"),
        Case(
            name,
            truth(original),
            mine,
            lambda draw: draw_both(draw, *SMALL),
            "bf16 and fp16, against TRL on float64",
            gradient_tolerance=ROUNDING,
        ),
    ]


def chunked(utils):
    theirs, mine = utils._ChunkedLogProbFunction, ours._ChunkedLogProbFunction
    sums = ("log_sum_sq_probs", "mean_logits", "is_top1")

    def draw_chunked(draw, dtype, *more):
        n, h, v = draw.size(20, 0), draw.size(24), draw.one_of(2, 7, 33, 257, 1000)
        hidden = draw.normal(n, h, dtype=dtype, grad=draw.one_of(True, True, False))
        weight = draw.normal(v, h, scale=draw.one_of(0.1, 1.0), dtype=dtype, grad=draw.one_of(True, False))
        bias = draw.one_of(None, draw.normal(v, dtype=dtype, grad=True))
        options = draw.one_of(1.0, 0.7, 2.5), draw.one_of(v, 1 + v // 3), draw.one_of(None, 5.0), draw.one_of(1.0, 0.3)
        return hidden, weight, bias, draw.integers(v, n), *options, (*draw.one_of((), ("entropy",)), *more)

    def exact(hidden, weight, bias, targets, temperature, _, cap, scale, outputs):
        logits = torch.nn.functional.linear(*(x if x is None else x.double() for x in (hidden, weight, bias))) * scale
        log_p = ((logits if cap is None else cap * torch.tanh(logits / cap)) / temperature).log_softmax(-1)
        logprobs = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return logprobs, -(log_p.exp() * log_p).sum(-1) if "entropy" in outputs else None

    def rounded(draw):
        arguments = draw_chunked(draw, torch.bfloat16)
        truth = exact(*arguments)
        leaves = [x for x in arguments[:3] if x is not None and x.requires_grad]
        distance = {}
        for whose, found in (("exact", truth), ("TRL", theirs.apply(*arguments)), ("ours", mine.apply(*arguments))):
            upstream = torch.autograd.grad(sum(x.sum() for x in found[:2] if x is not None), leaves) if leaves else ()
            distance[whose] = torch.cat([x.double().flatten() for x in (*found[:2], *upstream) if x is not None])
        ours, trl = ((distance[whose] - distance["exact"]) for whose in ("ours", "TRL"))
        assert ours.norm() <= 1.5 * trl.norm() + 2.0**-8 * distance["exact"].norm(), (ours.norm(), trl.norm())
        return ours[: len(arguments[3])].abs().max().item() if len(arguments[3]) else None

    def float64(draw):
        arguments = draw_chunked(draw, torch.float64)
        truth = exact(*arguments)[0]
        trl, ours = (f(*arguments)[0] for f in (theirs.apply, mine.apply))
        assert not len(truth) or (ours - truth).abs().max() < 1e-12
        return (trl - truth).abs().max().item() if len(truth) else None

    name = "_ChunkedLogProbFunction.apply"
    return [
        Case(
            name,
            theirs.apply,
            mine.apply,
            lambda draw: draw_chunked(draw, torch.float32),
            "log-probs and entropy; its sums are float32",
            gradient_tolerance=3e-5,
        ),
        Case(
            name,
            theirs.apply,
            mine.apply,
            lambda draw: draw_chunked(draw, torch.float32, draw.one_of(*sums)),
            "with outputs that ours leaves to TRL's own",
        ),
        Difference(
            name,
            "bf16: both round the logits to bf16; {} is the furthest that ours lies from float64",
            rounded,
            inputs=100,
        ),
        Difference(name, "float64: TRL computes in float32, off by up to {}; ours within 1e-12", float64, inputs=50),
    ]


def kernel(utils):
    """TRL's Triton kernel, where Triton interprets it."""
    original, mine = utils._fused_logprob_entropy, ours._fused_logprob_entropy

    def draw_kernel(draw):
        x = logits(draw, torch.float32)
        return x, draw.integers(x.shape[-1], *x.shape[:-1]), *options(draw, True, *x.shape[:-1])

    def masked_column(draw):
        x = draw.normal(3, 9)
        x[:, 4] = -torch.inf
        index = draw.integers(4, 3)
        assert original(x, index)[1].isnan().all()
        assert mine(x, index)[1].isfinite().all()

    name, remark = "_fused_logprob_entropy", "the Triton kernel, interpreted; its sums are float32, of logits up to 100"
    return [
        Case(name, original, mine, draw_kernel, remark, tolerance=3e-5, gradient_tolerance=3e-5),
        Difference(
            name, "one logit is -inf: the kernel's entropy is NaN, ours that of the others", masked_column, inputs=5
        ),
    ]


def ppo():
    trainer = importlib.import_module("trl.experimental.ppo.ppo_trainer")

    def values_and_mask(draw, least):
        shape = draw.size(5), draw.size(40)
        mask = draw.mask(*shape, least=min(least, shape[0] * shape[1]))
        return draw.normal(*shape, scale=draw.one_of(1.0, 10.0), grad=True), draw.one_of(mask, mask.int(), mask.float())

    def draw_mean(draw):
        values, mask = values_and_mask(draw, 1)
        rows = bool((mask != 0).any(1).all())
        return values, mask, draw.one_of(None, 1) if rows else None

    def draw_whiten(draw):
        values, mask = values_and_mask(draw, 2)
        return (values, mask, draw.one_of(True, False)) if mask.numel() > 1 else draw_whiten(draw)

    def on_the_mask(function):
        return lambda values, mask, shift_mean: function(values, mask, shift_mean)[mask != 0]

    def nearly_equal(draw):
        x, mask = 5 + draw.normal(2, 1, scale=1e-3), torch.ones(2, 1)
        exact = trainer.masked_whiten(x.double(), mask)
        assert (ours.masked_whiten(x, mask) - exact).abs().max() < 1e-5
        return (trainer.masked_whiten(x, mask) - exact).abs().max().item()

    def empty(draw):
        x, mask = draw.normal(3, 4), torch.zeros(3, 4)
        assert trainer.masked_mean(x, mask).isnan() and ours.masked_mean(x, mask) == 0

    def off_the_mask(draw):
        x, mask = draw.normal(3, 4), draw.mask(3, 4, least=2)
        assert (ours.masked_whiten(x, mask)[~mask] == 0).all()

    def hidden_nan(draw):
        x, mask = draw.normal(3, 4), torch.arange(12).view(3, 4) != 5
        x[~mask] = torch.nan
        assert trainer.masked_mean(x, mask).isnan() and ours.masked_mean(x, mask).isfinite()

    def few(draw):
        x, mask = draw.normal(3, 4), torch.arange(12).view(3, 4) == 5
        assert trainer.masked_whiten(x, mask).isnan().any() and (ours.masked_whiten(x, mask) == 0).all()
        assert (ours.masked_whiten(x, mask & False) == 0).all()
        try:
            trainer.masked_whiten(x, mask & False)
        except ValueError:
            return
        raise AssertionError("TRL whitens nothing now")

    return [
        Case("masked_mean", trainer.masked_mean, ours.masked_mean, draw_mean),
        Difference("masked_mean", "nothing kept: TRL gives NaN, ours 0", empty, inputs=5),
        Difference("masked_mean", "NaN off the mask: TRL gives NaN, ours does not read it", hidden_nan, inputs=5),
        Case(
            "masked_whiten",
            *map(on_the_mask, (truth(trainer.masked_whiten), ours.masked_whiten)),
            draw_whiten,
            "on the mask, against TRL on the same values in float64",
        ),
        Difference(
            "masked_whiten", "values nearly equal: TRL is off by up to {}, ours within 1e-5", nearly_equal, inputs=50
        ),
        Difference(
            "masked_whiten", "off the mask ours is 0, which PPOTrainer then writes there", off_the_mask, inputs=50
        ),
        Difference("masked_whiten", "one token: TRL gives NaN; none: it raises; ours gives 0", few, inputs=5),
    ]
