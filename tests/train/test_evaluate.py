import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from rlhf_fast.train.data import Preference, train_tokenizer
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.evaluate import (
    Sample,
    compare_policies,
    distinct_n,
    reward_agreement,
    reward_judge,
    wilson_interval,
    win_rate,
)

WORDS = ["the", "fox", "bear", "owl", "was", "happy", "old", "brave", "went", "to", "hill", "river", "found", "honey"]


# ---------------------------------------------------------------------------------------------------- intervals


def outcomes(wins: int, ties: int, losses: int):
    return win_rate([0.0] * (wins + ties + losses), [1.0] * wins + [0.0] * ties + [-1.0] * losses)


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [  # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval_matches_published_values(successes, n, expected):
    assert wilson_interval(successes, n) == pytest.approx(expected, abs=5e-5)


def test_wilson_interval_at_the_edges():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(5, 5)[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="6 of 5"):
        wilson_interval(6, 5)


@pytest.mark.parametrize(("wins", "losses"), [(1, 0), (20, 0), (0, 7), (13, 7), (470, 42)])
def test_win_rate_without_ties_is_wilsons_interval(wins, losses):
    result = outcomes(wins, 0, losses)
    assert (result.low, result.high) == pytest.approx(wilson_interval(wins, wins + losses), abs=1e-9)


def score_statistic(wins: int, ties: int, losses: int, delta: float) -> float:
    """z of the score test of P(win) - P(loss) = delta, the likelihood maximised over P(loss) by ternary search."""

    def log_likelihood(loss: float) -> float:
        shares = (loss + delta, 1 - 2 * loss - delta, loss)
        counts = (wins, ties, losses)
        return sum(k * math.log(max(p, 1e-300)) for k, p in zip(counts, shares, strict=True) if k)

    low, high = max(0.0, -delta), (1 - delta) / 2
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if log_likelihood(left) < log_likelihood(right) else (low, right)
    n = wins + ties + losses
    return (wins - losses - n * delta) / math.sqrt(n * (2 * low + delta - delta * delta))


@pytest.mark.parametrize("counts", [(12, 36, 2), (2, 36, 12), (1, 43, 0), (30, 100, 30), (90, 9, 1)])
def test_win_rate_with_ties_ends_where_the_score_test_rejects(counts):
    """Tango's interval, by its definition and without its closed form."""
    result = outcomes(*counts)
    assert score_statistic(*counts, 2 * result.low - 1) == pytest.approx(1.96, abs=1e-3)
    assert score_statistic(*counts, 2 * result.high - 1) == pytest.approx(-1.96, abs=1e-3)


@pytest.mark.parametrize("counts", [(12, 36, 2), (5, 0, 0), (0, 5, 0), (1, 1, 1)])
def test_win_rate_is_symmetric(counts):
    result, mirrored = outcomes(*counts), outcomes(*reversed(counts))
    assert (result.low, result.rate, result.high) == pytest.approx(
        (1 - mirrored.high, 1 - mirrored.rate, 1 - mirrored.low), abs=1e-9
    )


def test_win_rate_counts():
    result = win_rate([1, 2, 3, 4], [2, 2, 2, 5])
    assert (result.wins, result.ties, result.losses, result.rate) == (2, 1, 1, 0.625)
    assert 0 < result.low < 0.625 < result.high < 1


def test_only_ties_leave_an_interval_around_one_half():
    result = outcomes(0, 50, 0)
    assert result.rate == 0.5
    assert 0.4 < result.low < 0.5 < result.high < 0.6


def test_no_prompt_says_nothing():
    result = win_rate([], [])
    assert (result.rate, result.low, result.high) == (0.5, 0.0, 1.0)


def test_win_rate_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="got 1 and 2"):
        win_rate([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        win_rate([1.0], [math.nan])


@pytest.mark.parametrize("tie_share", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("rate", [0.5, 0.7, 0.9])
def test_interval_covers_the_true_rate_in_95_percent_of_experiments(rate, tie_share):
    """Coverage over 4,000 simulated experiments of 200 prompts; its own sampling error is 0.35 %."""
    tie_share = min(tie_share, 2 * (1 - rate))
    shares = (rate - tie_share / 2, tie_share, 1 - rate - tie_share / 2)
    draws = torch.multinomial(
        torch.tensor(shares).clamp(min=0).expand(4000, 3),
        200,
        replacement=True,
        generator=torch.Generator().manual_seed(7),
    )
    counts = torch.stack([(draws == kind).sum(1) for kind in range(3)], 1)
    different, times = counts.unique(dim=0, return_counts=True)
    covered = sum(
        repeats
        for (wins, ties, losses), repeats in zip(different.tolist(), times.tolist(), strict=True)
        if (result := outcomes(wins, ties, losses)).low <= rate <= result.high
    )
    assert covered / 4000 == pytest.approx(0.95, abs=0.02)


# ---------------------------------------------------------------------------------------------------- diversity


def test_distinct_n():
    texts = ["a b a b", "a b c"]
    assert distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert distinct_n(texts, 2) == pytest.approx(3 / 5)  # ab, ba, bc
    assert distinct_n(["", "a"], 2) == 0.0


# --------------------------------------------------------------------------------------------------- comparison


class Counting:
    """A judge that likes a word; remembers what it was asked."""

    def __init__(self, word: str) -> None:
        self.name, self.word, self.asked = f"the friend of {word}", word, []

    def __call__(self, samples):
        self.asked += samples
        return [float(sample.response.split().count(self.word)) for sample in samples]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of two tiny policies and a reward model over one tokenizer."""
    from rlhf_fast.train.checkpoint import save_model
    from rlhf_fast.train.model import create_llama, load_policy, reward_from_policy

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    pick = random.Random(0)
    texts = [" ".join(pick.choices(WORDS, k=8)) for _ in range(200)]
    tokenizer = train_tokenizer(texts, 300)
    for seed, name in enumerate(("sft", "ppo")):
        model = create_llama(tokenizer, hidden_size=16, num_layers=1, num_heads=2, context_length=64, seed=seed)
        save_model(root / name, model, tokenizer)
    torch.manual_seed(0)
    save_model(root / "reward", *reward_from_policy(root / "sft"))
    assert load_policy(root / "ppo")
    return root


PROMPTS = [f"the {a} {b}" for a, b in itertools.product(WORDS[1:4], WORDS[5:8])]
OPTIONS = {"response_length": 12, "temperature": 1.0, "batch_size": 4}


def test_compare_policies_ends_replies_where_it_is_told(models):
    result = compare_policies(models / "sft", models / "ppo", PROMPTS, Counting("the"), stop_token=None, **OPTIONS)
    assert [(result[f"length_{side}"], result[f"eos_rate_{side}"]) for side in ("before", "after")] == [(12, 0)] * 2


def test_compare_policies_gives_what_the_report_needs(models):
    judge = Counting("the")
    preferences = [Preference(prompt, "the fox", "rain", i) for i, prompt in enumerate(PROMPTS)]
    result = compare_policies(
        models / "sft",
        models / "ppo",
        PROMPTS,
        judge,
        reward_dir=models / "reward",
        preferences=preferences,
        kl=1.5,
        samples=3,
        **OPTIONS,
    )
    assert result["judge"] == "the friend of the"
    assert result["judge_is_training_reward"] is False
    assert result["pairs"] == len(PROMPTS) == result["wins"] + result["ties"] + result["losses"]
    assert result["low"] <= result["win_rate"] <= result["high"]
    assert result["kl"] == 1.5
    assert result["reward_agreement"]["pairs"] == len(PROMPTS)
    for side in ("before", "after"):
        assert len(result[f"scores_{side}"]) == len(PROMPTS)
        assert result[f"score_{side}"] == pytest.approx(sum(result[f"scores_{side}"]) / len(PROMPTS))
        assert 0 < result[f"length_{side}"] <= 12
        assert 0 <= result[f"eos_rate_{side}"] <= 1
        assert 0 < result[f"distinct_1_{side}"] <= 1
        assert math.isfinite(result[f"reward_{side}"])
    assert [row["prompt"] for row in result["samples"]] == PROMPTS[:3]
    assert all(row["judge_after"] < row["judge_before"] for row in result["worst_samples"])


def test_comparison_is_repeatable_and_leaves_the_random_state_alone(models):
    first = compare_policies(models / "sft", models / "ppo", PROMPTS, Counting("the"), **OPTIONS)
    state = torch.get_rng_state()
    second = compare_policies(models / "sft", models / "ppo", PROMPTS, Counting("the"), **OPTIONS)
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    other = compare_policies(models / "sft", models / "ppo", PROMPTS, Counting("the"), seed=1, **OPTIONS)
    assert [row["before"] for row in other["samples"]] != [row["before"] for row in first["samples"]]


def test_a_policy_ties_with_itself(models):
    """Same weights, same seed: every reply is the same, whatever the judge and however it rounds."""
    result = compare_policies(models / "sft", models / "sft", PROMPTS, None, reward_dir=models / "reward", **OPTIONS)
    assert (result["wins"], result["ties"], result["losses"]) == (0, len(PROMPTS), 0)
    assert result["worst_samples"] == []


def test_without_a_judge_the_reward_model_judges_and_the_result_says_so(models):
    result = compare_policies(models / "sft", models / "ppo", PROMPTS, None, reward_dir=models / "reward", **OPTIONS)
    assert result["judge_is_training_reward"] is True
    assert result["judge"] == "the reward model in reward/"
    assert result["reward_agreement"] is None
    assert result["score_after"] == result["reward_after"]
    with pytest.raises(UserError, match="needs a judge or a reward model"):
        compare_policies(models / "sft", models / "ppo", PROMPTS, None, **OPTIONS)


@pytest.mark.parametrize(
    ("scores", "message"),
    [(lambda n: [1.0] * (n - 1), "one for each"), (lambda n: [math.nan] * n, "scored nan")],
)
def test_a_broken_judge_is_named(models, scores, message):
    def broken(samples):
        return scores(len(samples))

    with pytest.raises(UserError, match=f"judge 'broken'.*{message}"):
        compare_policies(models / "sft", models / "ppo", PROMPTS, broken, **OPTIONS)


def test_no_prompt_is_refused(models):
    with pytest.raises(UserError, match="no held-out prompt"):
        compare_policies(models / "sft", models / "ppo", [], Counting("the"), **OPTIONS)


# ----------------------------------------------------------------------------------------------------- judges


def test_reward_judge_scores_do_not_depend_on_the_company(models):
    samples = [Sample("the fox", "was happy " * i, True) for i in range(7)]
    together, alone = reward_judge(models / "reward", batch_size=3), reward_judge(models / "reward", batch_size=1)
    assert together(samples) == pytest.approx(alone(samples), abs=1e-5)


def test_reward_judge_scores_an_unfinished_reply_without_its_end(models):
    judge = reward_judge(models / "reward")
    finished, unfinished = judge([Sample("the fox", "was", True), Sample("the fox", "was", False)])
    assert finished != unfinished


def test_reward_judge_takes_text_longer_than_its_context(models):
    judge = reward_judge(models / "reward")
    scores = judge([Sample("happy " * 200, "the fox", True), Sample("the fox", "happy " * 200, True)])
    assert all(map(math.isfinite, scores))


def test_reward_agreement_counts_only_pairs_the_judge_decides():
    def by_length(samples):
        return [float(len(sample.response)) for sample in samples]

    def by_first_letter(samples):
        return [float(ord(sample.response[0])) for sample in samples]

    pairs = [
        Preference("p", "bbb", "aa", 1),  # both prefer the first
        Preference("p", "aaa", "bb", 2),  # opposite
        Preference("p", "cc", "dd", 3),  # the judge (length) is undecided
        Preference("p", "ccc", "cd", 4),  # the reward model (letter) is undecided: half
    ]
    result = reward_agreement(by_first_letter, by_length, pairs)
    assert result["pairs"] == 3
    assert result["agreement"] == float(Fraction(3, 2) / 3)
    assert result["low"] < 0.5 < result["high"]
    assert reward_agreement(by_first_letter, by_length, pairs[2:3]) is None
    assert reward_agreement(by_first_letter, by_length, []) is None
