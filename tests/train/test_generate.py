import pytest
import tiny
import torch

from rlhf_fast.train.errors import UserError
from rlhf_fast.train.generate import Completions, Sample, generate, generation_config, stop_ids
from rlhf_fast.train.model import load_policy
from rlhf_fast.train.policy import response_logprobs

PROMPTS = [[1, 5, 6, 7], [1, 8], [1, 9, 10]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_policy(tiny.save_base(tmp_path_factory.mktemp("base")))


def sample(policy, prompts=PROMPTS, seed=0, **options):
    torch.manual_seed(seed)
    return generate(*policy, prompts, **({"max_new_tokens": 12, "temperature": 1.0, "batch_size": 8} | options))


def test_prompts_are_padded_on_the_left_and_nothing_follows_the_end(policy):
    _, tokenizer = policy
    made = sample(policy, PROMPTS * 40, max_new_tokens=30)
    assert made.query_ids[0].tolist() == PROMPTS[0] and made.query_ids[1].tolist() == [0, 0, *PROMPTS[1]]
    assert made.query_mask.sum(1).tolist() == [4, 2, 3] * 40
    rows = zip(made.response_ids.tolist(), made.response_mask.tolist(), made.finished.tolist(), strict=True)
    lengths = set()
    for ids, mask, finished in rows:
        length = ids.index(tokenizer.eos_token_id) + 1 if finished else len(ids)
        assert tokenizer.eos_token_id not in ids[: length - finished]
        assert mask == [True] * length + [False] * (len(ids) - length)
        assert ids[length:] == [tokenizer.pad_token_id] * (len(ids) - length)
        lengths.add((length, finished))
    assert {finished for _, finished in lengths} == {True, False} and len(lengths) > 5


def test_the_first_of_several_stop_tokens_ends_a_reply(policy):
    _, tokenizer = policy
    stop = stop_ids(tokenizer, "}")
    assert len(stop) == 2 and tokenizer.eos_token_id in stop
    made = sample(policy, PROMPTS * 40, max_new_tokens=30, stop=stop)
    last = set()
    rows = zip(made.response_ids.tolist(), made.response_mask.sum(1).tolist(), made.finished.tolist(), strict=True)
    for ids, length, finished in rows:
        assert not set(ids[: length - finished]) & set(stop)
        assert set(ids[length:]) <= {tokenizer.pad_token_id}
        last |= {ids[length - 1]} if finished else set()
    assert last == set(stop)


def test_without_stop_tokens_every_reply_has_full_length(policy):
    _, tokenizer = policy
    made = sample(policy, PROMPTS * 40, max_new_tokens=30, batch_size=50, stop=stop_ids(tokenizer, None))
    assert made.response_mask.all() and made.response_mask.shape == (120, 30) and not made.finished.any()
    assert (made.response_ids == tokenizer.eos_token_id).any()


def test_a_stop_token_has_to_be_one_token(policy):
    _, tokenizer = policy
    assert stop_ids(tokenizer, "eos") == [tokenizer.eos_token_id] and stop_ids(tokenizer, None) == []
    with pytest.raises(UserError, match="stop_token 'sat on' is not one token of this tokenizer but"):
        stop_ids(tokenizer, "sat on")


def test_the_state_of_the_generator_decides_the_replies(policy):
    first, again, other = sample(policy, seed=1), sample(policy, seed=1), sample(policy, seed=2)
    assert first.response_ids.equal(again.response_ids)
    assert not first.response_ids[:, :4].equal(other.response_ids[:, :4])


def test_batches_of_different_length_are_joined(policy):
    made = sample(policy, PROMPTS * 10, batch_size=4)
    assert made.response_ids.shape[0] == made.query_ids.shape[0] == 30
    assert made.response_mask.any(1).all()


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
def test_greedy_replies_are_the_most_likely_tokens_whatever_the_padding(tmp_path, architecture):
    model, tokenizer = load_policy(tiny.save_base(tmp_path, architecture))
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=0, batch_size=3)
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(int(together.response_mask[row].sum())):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert together.response_ids[row][together.response_mask[row]].tolist() == ids[len(prompt) :]


def test_the_samples_follow_the_distribution_whose_logprobs_ppo_uses(policy):
    """The models' own generation defaults would bend it: here top_k 1 and a list of tokens never to use."""
    model, tokenizer = policy
    own = model.generation_config
    plain = sample(policy, seed=3)
    model.generation_config = generation_config(tokenizer, 3, 0.2, top_k=1)
    model.generation_config.suppress_tokens = plain.response_ids.unique().tolist()
    try:
        bent_defaults = model.generation_config
        assert sample(policy, seed=3).response_ids.equal(plain.response_ids)
        assert model.generation_config is bent_defaults
    finally:
        model.generation_config = own
    count, temperature = 4000, 0.7
    made = sample(policy, [PROMPTS[0]] * count, max_new_tokens=1, temperature=temperature, batch_size=count)
    ids = torch.tensor([PROMPTS[0] + [token] for token in range(len(tokenizer))])
    logprobs = response_logprobs(model, ids, torch.ones_like(ids, dtype=torch.bool), 1, temperature=temperature)
    expected = logprobs[:, 0].exp()
    seen = torch.bincount(made.response_ids[:, 0], minlength=len(tokenizer)) / count
    assert (seen - expected).abs().max() < 5 * (0.25 / count) ** 0.5
    assert expected.max() > 0.02


def test_the_defaults_come_back_when_sampling_fails(policy):
    model, _ = policy
    own = model.generation_config
    with pytest.raises(Exception, match="temperature"):
        sample(policy, temperature=-1.0)
    assert model.generation_config is own


def test_replies_can_take_part_in_a_backward_pass(policy):
    model, _ = policy
    made = sample(policy)
    ids = torch.cat([made.query_ids, made.response_ids], 1)
    mask = torch.cat([made.query_mask, made.response_mask], 1)
    response_logprobs(model, ids, mask, made.response_ids.shape[1], response_mask=made.response_mask).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.zero_grad(set_to_none=True)


def test_texts_hold_neither_the_end_nor_what_follows(policy):
    _, tokenizer = policy
    reply = tokenizer.encode(" the cat", add_special_tokens=False)
    ids = torch.tensor([[*reply, tokenizer.eos_token_id, 0, 0], [*reply, *reply[:3]]])[:, : len(reply) + 3]
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(reply) + 1], [ids.shape[1]]])
    made = Completions(ids[:, :0], mask[:, :0], ids, mask, mask.all(1))
    texts = made.texts(tokenizer)
    assert texts[0] == " the cat" and texts[1].startswith(" the cat")
    assert Sample("p", texts[0], True) == Sample("p", " the cat", True)
