import torch
import torch.nn.functional as F

from rlhf_fast import reward_pair_loss


def test_bradley_terry(device):
    chosen, rejected = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).to(device)
    margin = torch.rand(9, generator=torch.Generator().manual_seed(1)).to(device)
    loss, stats = reward_pair_loss(chosen, rejected, margin=margin, center_coef=0.01)
    want = (-F.logsigmoid(chosen - rejected - margin)).mean() + 0.01 * ((chosen + rejected) ** 2).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(stats["accuracy"], (chosen > rejected).float().mean())
    torch.testing.assert_close(stats["margin"], (chosen - rejected).mean())
    torch.testing.assert_close(stats["reward_max"], torch.cat([chosen, rejected]).max())


def test_a_tie_is_half_right(device):
    same = torch.zeros(4, device=device)
    loss, stats = reward_pair_loss(same, same)
    torch.testing.assert_close(loss.cpu(), torch.tensor(2.0).log())
    assert stats["accuracy"] == 0.5
