import math
import random
import sys

import pytest
import torch

from rlhf_fast import gather_logprobs, kl_penalty, ppo_loss_from_logits, ppo_policy_loss
from rlhf_fast.ops import _common
from rlhf_fast.ops.ppo_loss_from_logits import STATS, plan, ppo_loss_from_logits_reference
from tests.cases import OPS, assert_close, examine

module = sys.modules["rlhf_fast.ops.ppo_loss_from_logits"]  # the package has the function by this name
PLANS = {"stream": 0, "block": 1, "cluster of 2": 2, "cluster of 4": 4, "cluster of 8": 8}


def draw(*batch, vocab=50, dtype=torch.float32, device="cpu", seed=0, moved=0.3):
    """logits, labels, and old log-probs and advantages a token."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*batch, vocab, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, vocab, batch, generator=generator)
    new = logits.double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    old = (new + moved * torch.randn(batch, generator=generator)).float()
    return [t.to(device) for t in (logits, labels, old, torch.randn(batch, generator=generator))]


def with_gradient(logits, *rest, upstream=1.0, **options):
    x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss, stats = ppo_loss_from_logits(x, *rest, **options)
    (loss * upstream).backward()
    return loss.detach(), stats, x.grad


# ---------------------------------------------------------------------------------------------------------------------
# What it computes


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_is_the_composition_of_three_ops(level, device):
    logits, labels, old, advantages = draw(3, 7, device=device)
    reference = old - 0.2
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(3)).to(device) < 0.7
    options = {"importance_sampling_level": level, "aggregate": "seq-mean-token-mean", "dual_clip": 3.0}
    loss, stats, gradient = with_gradient(
        logits,
        labels,
        old,
        advantages,
        mask,
        temperature=0.7,
        entropy_coef=0.1,
        ref_logprobs=reference,
        kl_coef=0.3,
        **options,
    )

    x = logits.clone().requires_grad_()
    logprobs, entropies = gather_logprobs(x, labels, temperature=0.7, mask=mask, with_entropy=True)
    policy_loss, policy_stats = ppo_policy_loss(logprobs, old, advantages, mask, **options)
    kl = kl_penalty(logprobs, reference, estimator="k3", mask=mask)
    means = [(t.sum(-1) / mask.sum(-1)).mean() for t in (entropies, kl)]
    whole = policy_loss - 0.1 * means[0] + 0.3 * means[1]
    whole.backward()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss, whole.detach(), **close)
    torch.testing.assert_close(gradient, x.grad, **close)
    assert list(stats) == [*STATS, "logprobs", "entropies"]
    expected = {**policy_stats, "policy_loss": policy_loss, "entropy": means[0], "kl": means[1], "logprobs": logprobs}
    for name, value in {**expected, "entropies": entropies}.items():
        torch.testing.assert_close(stats[name], value.detach(), **close, msg=name)
        assert not stats[name].requires_grad


def test_the_loss_is_made_of_its_parts(device):
    logits, labels, old, advantages = draw(2, 5, device=device)
    for aggregate in ("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        loss, stats = ppo_loss_from_logits(
            logits, labels, old, advantages, aggregate=aggregate, entropy_coef=0.5, ref_logprobs=old, kl_coef=2.0
        )
        parts = stats["policy_loss"] - 0.5 * stats["entropy"] + 2.0 * stats["kl"]
        torch.testing.assert_close(loss, parts, rtol=1e-6, atol=1e-6)


def test_first_minibatch_has_ratio_one(device):
    logits, labels, _, advantages = draw(3, 8, device=device)
    old = ppo_loss_from_logits(logits, labels, advantages, advantages)[1]["logprobs"]
    _, stats, _ = with_gradient(logits, labels, old, advantages)
    torch.testing.assert_close(stats["ratio_mean"], torch.ones_like(stats["ratio_mean"]), rtol=0, atol=1e-6)
    assert stats["clip_fraction"] == 0 and stats["kl"] == 0


def test_ignored_labels_count_as_masked(device):
    logits, labels, old, advantages = draw(2, 6, device=device)
    mask = torch.ones(2, 6, device=device)
    mask[0, 3] = mask[1, 0] = 0
    want = with_gradient(logits, labels, old, advantages, mask, aggregate="seq-mean-token-mean", entropy_coef=0.1)
    labels[mask == 0] = -100
    old[mask == 0] = math.nan
    got = with_gradient(logits, labels, old, advantages, aggregate="seq-mean-token-mean", entropy_coef=0.1)
    for a, b in zip((got[0], *got[1].values(), got[2]), (want[0], *want[1].values(), want[2]), strict=True):
        assert torch.equal(a, b)
    assert (got[2][mask == 0] == 0).all() and (got[1]["logprobs"][mask == 0] == 0).all()


@pytest.mark.parametrize("aggregate", ["token-mean", "seq-mean-token-mean"])
def test_micro_batches_with_a_normalizer_add_up(aggregate, device):
    logits, labels, old, advantages = draw(4, 6, device=device)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)).to(device) < 0.6
    options = {"aggregate": aggregate, "entropy_coef": 0.1, "ref_logprobs": old, "kl_coef": 0.5}
    loss, _, gradient = with_gradient(logits, labels, old, advantages, mask, **options)
    count = mask.sum() if aggregate == "token-mean" else mask.any(-1).sum()
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        tensors = [t[rows] for t in (logits, labels, old, advantages, mask)]
        parts.append(with_gradient(*tensors, normalizer=count, **{**options, "ref_logprobs": old[rows]}))
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([parts[0][2], parts[1][2]]), gradient, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The gradient that the forward call makes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_backward_multiplies_by_the_upstream_gradient(dtype, device):
    logits, *rest = draw(2, 5, dtype=dtype, device=device)
    *_, gradient = with_gradient(logits, *rest)
    for upstream in (3.0, -0.25, 0.0, 65536.0):
        *_, scaled = with_gradient(logits, *rest, upstream=upstream)
        torch.testing.assert_close(scaled, (gradient.double() * upstream).to(dtype))


def test_an_infinite_upstream_gradient_leaves_masked_rows_at_zero(device):
    logits, *rest = draw(2, 5, device=device)
    mask = torch.ones(2, 5, device=device)
    mask[0] = 0
    *_, gradient = with_gradient(logits, *rest, mask, upstream=math.inf)
    assert (gradient[0] == 0).all() and gradient[1].isinf().any() and not gradient.isnan().any()


@pytest.mark.parametrize("inplace", [False, True])
def test_there_is_one_backward_pass(inplace, device):
    logits, *rest = draw(2, 5, device=device)
    loss, _ = ppo_loss_from_logits(logits.requires_grad_() * 1, *rest, inplace=inplace)
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match=r"ppo_loss_from_logits: the gradient was made by the forward call.* call the function again"
    ):
        loss.backward()


def test_nothing_is_made_where_no_gradient_is_asked_for(device):
    logits, *rest = draw(2, 5, device=device)
    before = logits.clone()
    for inplace in (False, True):
        loss, _ = ppo_loss_from_logits(logits, *rest, inplace=inplace)
        assert not loss.requires_grad
        with torch.no_grad():
            assert torch.equal(ppo_loss_from_logits(logits.clone().requires_grad_(), *rest, inplace=inplace)[0], loss)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_gives_the_same_bits_in_the_memory_of_the_logits(dtype, level, device):
    logits, labels, old, advantages = draw(3, 6, vocab=37, dtype=dtype, device=device)
    options = {"importance_sampling_level": level, "entropy_coef": 0.2}
    rest = [t[:, :-1] for t in (labels, old, advantages)]
    want = with_gradient(logits[:, :-1], *rest, **options)
    leaf = logits.clone().requires_grad_()
    whole = leaf * 1  # MulBackward by a number keeps nothing
    loss, stats = ppo_loss_from_logits(whole[:, :-1], *rest, inplace=True, **options)
    assert torch.equal(whole.detach()[:, :-1], want[2]), "not where the logits were"
    assert torch.equal(whole.detach()[:, -1], logits[:, -1]), "written beside the rows"
    loss.backward()
    assert torch.equal(leaf.grad[:, :-1], want[2]) and (leaf.grad[:, -1] == 0).all()
    assert torch.equal(loss, want[0]) and all(torch.equal(stats[k], want[1][k]) for k in stats)


def test_inplace_is_refused_by_an_op_that_kept_the_logits(device):
    leaf, *rest = draw(2, 5, device=device)
    logits = leaf.requires_grad_().exp()  # which needs its result in backward
    loss, _ = ppo_loss_from_logits(logits, *rest, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_refuses_logits_that_cannot_be_written(device):
    logits, labels, old, advantages = draw(2, 5, device=device)
    leaf = logits.requires_grad_()
    for bad in (leaf[:1].expand(2, -1, -1), (leaf * 1).transpose(-1, -2).contiguous().transpose(-1, -2)):
        before = bad.detach().clone()
        with pytest.raises(ValueError, match="ppo_loss_from_logits: `inplace` needs"):
            ppo_loss_from_logits(bad * 1 if bad is leaf else bad, labels, old, advantages, inplace=True)
        assert torch.equal(bad.detach(), before)


# ---------------------------------------------------------------------------------------------------------------------
# Bits


def test_threads_do_not_change_the_bits():
    logits, *rest = draw(64, 2, vocab=5003)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            loss, stats, gradient = with_gradient(logits, *rest, entropy_coef=0.1)
            results.append((loss, *stats.values(), gradient))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_row_has_the_same_bits_alone_and_in_any_batch(device):
    logits, labels, old, advantages = draw(3, 4, vocab=2503, device=device)
    options = {"aggregate": "token-sum", "entropy_coef": 0.1}
    _, stats, gradient = with_gradient(logits, labels, old, advantages, **options)
    for b, t in ((0, 0), (2, 3)):
        row = torch.cat([logits.new_zeros(1), logits[b, t]])[1:].view(1, 1, -1)  # off 16-byte alignment, too
        rest = [v[b, t].view(1, 1) for v in (labels, old, advantages)]
        _, alone, g = with_gradient(row, *rest, **options)
        assert torch.equal(g[0, 0], gradient[b, t])
        assert all(torch.equal(alone[k][0, 0], stats[k][b, t]) for k in ("logprobs", "entropies"))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("vocab", [32_000, 50_257, 151_936])
def test_bfloat16_logits_of_real_vocabularies(vocab, device):
    logits, labels, old, advantages = draw(1, 2, vocab=vocab, dtype=torch.bfloat16, device=device)
    options = {"aggregate": "token-sum", "entropy_coef": 0.1}
    _, stats, gradient = with_gradient(logits, labels, old, advantages, **options)
    exact = logits.double().log_softmax(-1)
    found = exact.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert (stats["logprobs"].double() - found).abs().max() <= 1e-5
    torch.testing.assert_close(stats["entropies"].double(), -(exact.exp() * exact).sum(-1), rtol=1e-6, atol=1e-6)
    x = logits.double().requires_grad_()
    ppo_loss_from_logits_reference(x, labels, old.double(), advantages.double(), **options)[0].backward()
    assert_close("gradient", gradient, x.grad, 0.51)


def test_rows_beyond_2_to_the_31(device, tmp_path):
    """The offsets of rows are 64-bit, reading and writing."""
    vocab, far = 64, 2**31 + 8192
    logits, labels, old, advantages = draw(2, 1, vocab=vocab, dtype=torch.bfloat16, device=device)
    want = with_gradient(logits, labels, old, advantages, entropy_coef=0.1)
    if device == "cuda":
        storage = torch.empty(far + vocab, dtype=torch.bfloat16, device=device)
    else:  # 4.3 GB of a file of which only the touched pages exist
        storage = torch.from_file(str(tmp_path / "logits"), shared=True, size=far + vocab, dtype=torch.bfloat16)
    for name, strides in (("far rows", (far, vocab, 1)), ("far sequences", (far, 1, 1))):
        view = storage.as_strided((2, 1, vocab), strides)
        view.copy_(logits)
        x = view.detach().requires_grad_()
        loss, _ = ppo_loss_from_logits(x, labels, old, advantages, entropy_coef=0.1)
        loss.backward()
        assert torch.equal(loss, want[0]) and torch.equal(x.grad, want[2]), name
    made = view.detach().requires_grad_().view_as(view)
    assert torch.equal(ppo_loss_from_logits(made, labels, old, advantages, entropy_coef=0.1, inplace=True)[0], want[0])
    assert torch.equal(view, want[2])


@pytest.mark.parametrize("part", [slice(None, -1), slice(-5, -1), slice(2, None, 3)])
def test_slices_of_a_sequence_are_read_where_they_are(part, device):
    logits, labels, old, advantages = draw(3, 9, vocab=257, dtype=torch.bfloat16, device=device)
    rest = [t[:, part].contiguous() for t in (labels, old, advantages)]
    want = with_gradient(logits[:, part].contiguous(), *rest)
    leaf = logits.clone().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss, _ = ppo_loss_from_logits(leaf[:, part], *rest)
        (gradient,) = torch.autograd.grad(loss, leaf)
    assert [e.key for e in profile.key_averages() if e.key in ("aten::clone", "aten::contiguous")] == []
    assert torch.equal(loss, want[0]) and torch.equal(gradient[:, part], want[2])


# ---------------------------------------------------------------------------------------------------------------------
# Its steps


def test_rows_a_tile_at_a_time_are_those_of_the_whole(device):
    """As linear_ppo_loss calls the steps: weights of the whole batch, logits of a few rows, the objective at the end."""
    logits, labels, old, advantages = draw(3, 5, vocab=41, device=device)
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)).to(device) < 0.8
    want = with_gradient(logits, labels, old, advantages, mask, entropy_coef=0.1, ref_logprobs=old, kl_coef=0.2)

    ops = {
        name: _common.Kernel(f"ppo_{name}") for name in ("token_weights", "loss_rows", "loss_rows_inplace", "objective")
    }
    weights, scale, dealt = ops["token_weights"](labels, advantages.double(), mask, None, -100, 0, None, math.nan)
    assert torch.equal(weights, mask.double()) and torch.equal(dealt, advantages.double())
    torch.testing.assert_close(scale, mask.double() / mask.sum())
    policy, logit_options = (0.2, 0.2, math.inf, 20.0), (None, 1.0, 0.0, 1.0, -100)
    coefs = (0.1, 0.2, 2, False)
    flat = [t.flatten() for t in (labels, old.double(), dealt, old.double(), weights, scale)]
    rows = logits.flatten(0, 1).clone()
    found = []
    for part in (slice(0, 4), slice(4, 5), slice(5, 15)):
        tile, beside = rows[part], [t[part] for t in flat]
        shared = (*beside, *logit_options, *policy, 0, *coefs)
        logprobs, entropies, gradient = ops["loss_rows"](tile, *shared, True, module.AUTO_PLAN)
        again = ops["loss_rows_inplace"](tile, *shared, module.AUTO_PLAN)
        assert torch.equal(tile, gradient) and torch.equal(again[0], logprobs) and torch.equal(again[1], entropies)
        found.append((logprobs, entropies))
    assert torch.equal(rows.view_as(logits), want[2])
    logprobs, entropies = (torch.cat(t).view(3, 5) for t in zip(*found, strict=True))
    loss, stats, *tokens = ops["objective"](
        logprobs,
        entropies,
        old.double(),
        dealt,
        old.double(),
        weights,
        None,
        *policy,
        False,
        0,
        *coefs,
        0,
        None,
        math.nan,
        False,
    )
    assert torch.equal(loss, want[0]) and all(torch.equal(s, want[1][k]) for s, k in zip(stats, STATS, strict=True))
    assert torch.equal(tokens[0], want[1]["logprobs"]) and torch.equal(tokens[1], want[1]["entropies"])


# ---------------------------------------------------------------------------------------------------------------------
# How a GPU holds the rows


def force(monkeypatch, name, device, dtype=torch.float32):
    if dtype == torch.float64 and name != "stream":
        pytest.skip("float64 has one plan")
    if device == "cpu" and _common._namespace == "rlhf_fast":
        pytest.skip("of the CUDA kernels alone")
    if name.startswith("cluster") and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no clusters on this GPU")
    monkeypatch.setattr(module, "AUTO_PLAN", PLANS[name])


@pytest.mark.parametrize("name", PLANS)
def test_random_calls_match_the_reference_by_every_plan(name, device, monkeypatch):
    force(monkeypatch, name, device)
    rng, calls = random.Random(f"plan {name}"), 0
    while calls < 25:
        call = OPS["ppo_loss_from_logits"].draw(rng)
        if call.args[1].numel() < 300 and (name == "stream" or call.args[0].dtype != torch.float64):
            examine("ppo_loss_from_logits", call, device)
            calls += 1


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [1, 9, 130, 2050, 4500])
def test_rows_of_any_alignment_have_the_same_bits_in_place_and_not(vocab, dtype, name, device, monkeypatch):
    force(monkeypatch, name, device, dtype)
    size = dtype.itemsize
    logits, *rest = draw(1, 2, vocab=vocab, dtype=dtype, device=device)
    options = {"entropy_coef": 0.1, "aggregate": "token-sum"}
    wide = [t.double() if t.is_floating_point() else t for t in (logits, *rest)]
    leaf = wide[0].requires_grad_()
    ppo_loss_from_logits_reference(leaf, *wide[1:], **options)[0].backward()
    results = []
    for offset in {0, 1, 16 // size - 1} | ({3} if size < 4 else set()):
        storage = torch.full((2 * vocab + offset + 3,), math.nan, dtype=dtype, device=device)
        rows = storage.as_strided((1, 2, vocab), (0, vocab + 1, 1), storage_offset=offset)
        rows.copy_(logits)
        loss, stats, gradient = with_gradient(rows, *rest, **options)
        assert_close("gradient", gradient, leaf.grad, 4.0 if size >= 4 else 0.51)
        if device == "cpu":
            inplace, _ = ppo_loss_from_logits(rows.requires_grad_().view_as(rows), *rest, inplace=True, **options)
            assert torch.equal(inplace, loss) and torch.equal(rows.detach(), gradient)
            assert storage[:offset].isnan().all() and storage[offset + vocab].isnan() and storage[-2:].isnan().all()
        results.append((loss, gradient, stats["logprobs"], stats["entropies"]))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", PLANS)
def test_nan_inf_and_masked_rows_stay_in_their_rows(name, device, monkeypatch):
    force(monkeypatch, name, device)
    logits, labels, old, advantages = draw(1, 7, vocab=2100, device=device)
    options = {"aggregate": "token-sum", "entropy_coef": 0.1}
    want = with_gradient(logits, labels, old, advantages, **options)
    logits[0, 0, 700], logits[0, 1, 2000] = math.nan, math.inf
    logits[0, 2, :1500] = -math.inf  # whole slices of it
    labels[0, 2], labels[0, 3], labels[0, 4] = 1600, 2100, -100
    _, stats, gradient = with_gradient(logits, labels, old, advantages, **options)
    assert stats["logprobs"][0, [0, 1, 3]].isnan().all() and gradient[0, [0, 3]].isnan().all()
    assert (gradient[0, 2, :1500] == 0).all() and torch.isfinite(gradient[0, 2]).all() and (gradient[0, 4] == 0).all()
    for i in (5, 6):
        assert torch.equal(gradient[0, i], want[2][0, i]) and stats["logprobs"][0, i] == want[1]["logprobs"][0, i]


def test_block_and_stream_agree_with_clusters_to_rounding(device, monkeypatch):
    logits, *rest = draw(2, 3, vocab=5003, device=device)
    results = {}
    for name in PLANS:
        force(monkeypatch, name, device)
        loss, _, gradient = with_gradient(logits, *rest, entropy_coef=0.1)
        results[name] = loss, gradient
    for loss, gradient in results.values():
        torch.testing.assert_close(loss, results["block"][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, results["block"][1], rtol=1e-6, atol=1e-7)


def test_a_plan_that_the_gpu_does_not_have_is_refused(device, monkeypatch):
    force(monkeypatch, "block", device)
    monkeypatch.setattr(module, "AUTO_PLAN", 3)
    with pytest.raises(ValueError, match="ppo_loss_from_logits: this GPU has no plan 3 for rows of 50 logits"):
        ppo_loss_from_logits(*draw(2, 3, device=device))


@pytest.mark.parametrize(
    ("vocab", "dtype", "capability", "expected"),
    [
        (82, torch.float32, (9, 0), ("warp", 1)),
        (82, torch.float64, (9, 0), ("stream", 1)),
        (2048, torch.bfloat16, (8, 0), ("warp", 1)),
        (2049, torch.bfloat16, (8, 0), ("block", 1)),
        (32000, torch.bfloat16, (9, 0), ("block", 1)),
        (50257, torch.bfloat16, (9, 0), ("cluster", 2)),
        (128256, torch.bfloat16, (9, 0), ("cluster", 4)),
        (151936, torch.bfloat16, (9, 0), ("cluster", 4)),
        (151936, torch.bfloat16, (10, 0), ("cluster", 4)),
        (151936, torch.float32, (9, 0), ("cluster", 8)),
        (262144, torch.bfloat16, (9, 0), ("cluster", 8)),
        (1_000_000, torch.bfloat16, (9, 0), ("stream", 1)),
        (32000, torch.bfloat16, (8, 0), ("block", 1)),
        (50257, torch.bfloat16, (8, 0), ("stream", 1)),
        (24000, torch.bfloat16, (8, 9), ("block", 1)),
        (32000, torch.bfloat16, (8, 9), ("stream", 1)),
        (151936, torch.bfloat16, (12, 0), ("stream", 1)),
    ],
)
def test_the_plan_follows_from_the_vocabulary_and_the_gpu(vocab, dtype, capability, expected):
    found = plan(vocab, dtype, capability)
    assert (found["name"], found["blocks"]) == expected
    assert found["blocks"] * found["row_bytes"] >= vocab * dtype.itemsize or found["name"] in ("warp", "stream")
    limit = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99)
    assert found["row_bytes"] + 768 <= limit * 1024


def test_no_plan_for_nonsense():
    with pytest.raises(ValueError, match="plan: `vocab` must be at least 1, got 0"):
        plan(0, torch.bfloat16, (9, 0))
    with pytest.raises(
        TypeError, match=r"plan: `dtype` must be float32, bfloat16, float16 or float64, got torch\.int64"
    ):
        plan(82, torch.int64, (9, 0))
