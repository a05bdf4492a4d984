import importlib

import pytest
import torch

from rlhf_fast import gather_logprobs, kl_penalty, linear_logprobs, linear_ppo_loss, masked_mean, ppo_policy_loss
from rlhf_fast.ops import _common, linear
from rlhf_fast.ops.linear_ppo_loss import linear_ppo_loss_reference
from tests.cases import EPS, assert_close
from tests.test_linear import Watch

module = importlib.import_module("rlhf_fast.ops.linear_ppo_loss")  # the function of its name stands before it


def draw(rows=3, length=5, width=16, vocab=100, dtype=torch.float32, seed=0, device="cpu") -> dict:
    """A call whose policy has moved a little, a third of its tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 1.5 / width**0.5).to(dtype)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    near = gather_logprobs(hidden.double() @ weight.double().t(), labels).float()
    call = {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "old_logprobs": near + torch.randn(rows, length, generator=generator) * 0.3,
        "advantages": torch.randn(rows, length, generator=generator),
        "mask": torch.rand(rows, length, generator=generator) < 0.7,
    }
    return {k: v.to(device) for k, v in call.items()}


FULL = {"entropy_coef": 0.1, "kl_coef": 0.2, "temperature": 0.7, "dual_clip": 3.0}


def with_reference(call: dict) -> dict:
    return call | FULL | {"ref_logprobs": call["old_logprobs"] - 0.2}


def outcome(function, call: dict, dtype=None, upstream=1.0, **changes):
    """Loss, stats and the gradients of hidden, weight and bias."""
    call = {k: v.to(dtype) if dtype and torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
    leaves = {k: call[k].detach().requires_grad_() for k in ("hidden", "weight", "bias") if call.get(k) is not None}
    loss, stats = function(**call | leaves | changes)
    return loss.detach(), stats, torch.autograd.grad(loss * upstream, list(leaves.values()))


@pytest.fixture
def small_workspace(monkeypatch):
    """4 or so tokens at a time."""
    for m in (linear, module):
        monkeypatch.setattr(m, "WORKSPACE", {"cpu": 4 * 256 * 4, "cuda": 4 * 256 * 4})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tiles_give_what_the_whole_gives(dtype, chunk, level, small_workspace, device):
    call = with_reference(draw(vocab=600, dtype=dtype, device=device)) | {"importance_sampling_level": level}
    call["bias"] = torch.linspace(-1, 1, 600, device=device).to(dtype)
    got = outcome(linear_ppo_loss, call, chunk_tokens=chunk)
    want = outcome(linear_ppo_loss_reference, call, torch.float64)
    assert_close("loss", got[0], want[0], 16.0)
    assert got[1].keys() == want[1].keys()
    for name, value in got[1].items():
        assert not value.requires_grad
        assert_close(name, value, want[1][name].to(value.dtype).double(), 16.0)
    for name, mine, theirs in zip(("hidden", "weight", "bias"), got[2], want[2], strict=True):
        assert_close(name, mine, theirs, 16.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_are_rounded_once_whatever_the_tiles(dtype):
    call = draw(rows=50, length=10, dtype=dtype)
    call |= {"aggregate": "token-sum", "mask": None}
    want = outcome(linear_ppo_loss_reference, call, torch.float64)[2]
    for chunk in (500, 7):
        for mine, theirs in zip(outcome(linear_ppo_loss, call, chunk_tokens=chunk)[2], want, strict=True):
            # Half a unit of the last place of each number, and what float32 sums of 500 terms lose.
            unit = torch.maximum(theirs.abs(), mine.double().abs()).log2().floor().exp2() * EPS[dtype] / 2
            assert ((mine.double() - theirs).abs() <= 0.51 * 2 * unit + 2e-5).all()


def test_it_is_the_composition_of_the_ops_it_names():
    call = with_reference(draw())

    def composed(hidden, weight, labels, old_logprobs, advantages, mask, ref_logprobs, **options):
        logprobs, entropy = linear_logprobs(
            hidden, weight, labels, mask=mask, temperature=options["temperature"], with_entropy=True
        )
        loss, stats = ppo_policy_loss(logprobs, old_logprobs, advantages, mask, dual_clip=options["dual_clip"])
        entropy, kl = (
            masked_mean(x, mask) for x in (entropy, kl_penalty(logprobs, ref_logprobs, estimator="k3", mask=mask))
        )
        stats |= {"policy_loss": loss.detach(), "entropy": entropy.detach(), "kl": kl.detach()}
        return loss - options["entropy_coef"] * entropy + options["kl_coef"] * kl, stats

    got, want = outcome(linear_ppo_loss, call), outcome(composed, call)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
    for name, value in want[1].items():
        torch.testing.assert_close(got[1][name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-6)


def test_the_upstream_gradient_scales_what_the_forward_call_made(device):
    call = draw(device=device)
    one, three = (outcome(linear_ppo_loss, call, upstream=u)[2] for u in (1.0, 3.0))
    for a, b in zip(one, three, strict=True):
        torch.testing.assert_close(3 * a, b, rtol=1e-6, atol=0)


def test_a_second_backward_is_refused_and_not_wrong():
    call = draw()
    hidden = call.pop("hidden").requires_grad_()
    loss, _ = linear_ppo_loss(hidden, **call)
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match="linear_ppo_loss: the gradient was made by the forward call and used by the"
    ):
        loss.backward()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_frozen_head_and_frozen_hidden_states(level):
    call = draw() | {"importance_sampling_level": level}
    whole = outcome(linear_ppo_loss, call)
    for i, name in enumerate(("hidden", "weight")):
        leaf = call[name].clone().requires_grad_()
        loss, _ = linear_ppo_loss(**call | {name: leaf})
        loss.backward()
        assert loss.equal(whole[0])
        torch.testing.assert_close(leaf.grad, whole[2][i], rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        loss, _ = linear_ppo_loss(**call | {"hidden": call["hidden"].clone().requires_grad_()})
    assert not loss.requires_grad
    assert_close("loss", loss, whole[0], 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


def arguments(call: dict, monkeypatch, **needs) -> tuple:
    """Of the op behind the function."""
    seen = []
    with monkeypatch.context() as patch:
        original = _common.Kernel.__call__

        def noted(self, *args):
            if self.name == "linear_ppo_loss":
                seen.append(args)
            return original(self, *args)

        patch.setattr(_common.Kernel, "__call__", noted)
        leaves = {k: call[k].detach().requires_grad_() for k, need in needs.items() if need}
        linear_ppo_loss(**call | leaves)
    return seen[0]


def watched(call: dict, monkeypatch, **needs) -> Watch:
    """The op seen from within: a mode that is on when the op is called sees the op alone."""
    given = arguments(call, monkeypatch, **needs)
    with torch.no_grad(), Watch() as watch:
        module._loss_and_gradients(*given)
    return watch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "vocab"), [(2100, 4, 20_000), (3, 500, 40_000)])
def test_no_tensor_is_larger_than_the_workspace(tokens, width, vocab, dtype, monkeypatch):
    workspace = 8 << 20
    monkeypatch.setattr(module, "WORKSPACE", {"cpu": workspace})
    call = draw(1, tokens, width, vocab=vocab, dtype=dtype)
    largest = max(workspace, 4 * call["weight"].numel())  # its gradient, in float32
    for chunk in (None, 100, 10**9):
        seen = watched(call | {"chunk_tokens": chunk}, monkeypatch, hidden=True, weight=True)
        assert workspace // 16 < seen.bytes <= largest


def test_what_is_frozen_or_does_not_count_costs_no_product(monkeypatch):
    call = draw(2, 4) | {"mask": None}
    one = call["hidden"].numel() * len(call["weight"])
    for hidden, weight, products in ((1, 1, 3), (1, 0, 2), (0, 1, 2), (0, 0, 1)):
        assert watched(call, monkeypatch, hidden=hidden, weight=weight).multiplications == products * one
    call["mask"] = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]])
    assert watched(call, monkeypatch, hidden=True, weight=True).multiplications == 3 * one * 2 // 8
    call["labels"].flatten()[1:] = -100
    assert watched(call, monkeypatch, hidden=True, weight=True).multiplications == 3 * one // 8
    assert watched(call | {"mask": call["mask"] * 0}, monkeypatch, hidden=True, weight=True).multiplications == 0


# ---------------------------------------------------------------------------------------------------------------------


def test_tokens_that_do_not_count_are_not_read_where_nobody_may_look(device, monkeypatch):
    """A GPU computes masked tokens and drops them: what stands there may not reach the weight's gradient."""
    call = draw(device=device)
    call["labels"][0, 1] = -100
    want = outcome(linear_ppo_loss, call)
    spoilt = {k: v.clone() for k, v in call.items()}
    off = (call["labels"] == -100) | ~call["mask"]
    for name in ("hidden", "old_logprobs", "advantages"):
        spoilt[name][off] = torch.nan
    for m in (linear, module):
        monkeypatch.setattr(m, "waits", lambda t: True)
    got = outcome(linear_ppo_loss, spoilt)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not got[2][0][off].any() and off.any()


def test_labels_are_refused_before_there_is_a_product(monkeypatch):
    for m in (linear, module):
        monkeypatch.setattr(m, "product", lambda *args: pytest.fail("a product"))
    call = draw() | {"mask": None}
    call["labels"][1, 2] = 100
    for level in ("token", "sequence"):
        with pytest.raises(
            ValueError, match=r"linear_ppo_loss: `labels` holds 100 at flat position 7; a label must be"
        ):
            linear_ppo_loss(**call, importance_sampling_level=level)


def test_nothing_that_counts_gives_zeros_that_can_be_differentiated():
    call = draw()
    for change in ({"labels": torch.full_like(call["labels"], -100)}, {"mask": torch.zeros(3, 5)}):
        loss, stats, gradients = outcome(linear_ppo_loss, call | change)
        assert loss == 0 and stats["tokens"] == 0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ()])
def test_its_registration_holds_for_what_is_frozen(needs, monkeypatch):
    call = draw(vocab=7) | {"bias": torch.zeros(7)}
    torch.library.opcheck(
        torch.ops.rlhf_fast.linear_ppo_loss.default, arguments(call, monkeypatch, **dict.fromkeys(needs, True))
    )


def test_tied_weights_get_both_gradients():
    call = draw(vocab=30)
    grads = []
    for tied in (True, False):
        table, head = (call["weight"].clone().requires_grad_() for _ in range(2))
        hidden = table[call["labels"]]
        linear_ppo_loss(**call | {"hidden": hidden, "weight": table if tied else head})[0].backward()
        grads.append(table.grad if tied else table.grad + head.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_casts_as_linear_does(inside):
    call = draw()
    weight = call["weight"].clone().requires_grad_()
    narrow = weight.detach().bfloat16().requires_grad_()
    want = linear_ppo_loss(**call | {"hidden": call["hidden"].bfloat16(), "weight": narrow})[0]
    want.backward()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_ppo_loss(**call | {"weight": weight})[0]
        if inside:
            got.backward()
    if not inside:
        got.backward()
    assert got.equal(want) and got.dtype == torch.float32
    assert weight.grad.dtype == torch.float32 and weight.grad.equal(narrow.grad.float())


def test_a_weight_of_another_class_than_linear_logprobs_takes_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    call = draw()
    with pytest.raises(TypeError, match="linear_ppo_loss: `weight` must be a plain tensor, got a TwoTensor"):
        linear_ppo_loss(**call | {"weight": TwoTensor(call["weight"], call["weight"])})


def test_constants_and_options_that_are_wrong_are_named():
    call = draw()
    for name in ("old_logprobs", "advantages", "ref_logprobs"):
        value = call.get(name, call["old_logprobs"]).clone().requires_grad_()
        with pytest.raises(ValueError, match=f"linear_ppo_loss: `{name}` requires grad"):
            linear_ppo_loss(**call | {name: value})
    wrong = [
        ({"kl_coef": 0.1}, "`ref_logprobs` must be given where `kl_coef` is not 0"),
        ({"hidden": call["hidden"][..., :3]}, "`weight` has shape"),
        ({"hidden": call["hidden"].flatten(0, 1)}, "`labels` has shape"),
        ({"advantages": torch.zeros(7)}, "`advantages` has shape"),
        ({"advantages": torch.zeros(3, 4)}, "`advantages` has shape"),
        ({"old_logprobs": torch.zeros(3, 1)}, "`old_logprobs` has shape"),
        ({"ref_logprobs": torch.zeros(5)}, "`ref_logprobs` has shape"),
        ({"mask": torch.ones(3)}, "`mask` has shape"),
        ({"temperature": torch.ones(3)}, "`temperature` has shape"),
        ({"normalizer": torch.ones(2)}, "`normalizer`"),
        ({"chunk_tokens": 0}, "`chunk_tokens` must be at least 1"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "`labels`"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=f"linear_ppo_loss: {message}"):
            linear_ppo_loss(**call | change)
