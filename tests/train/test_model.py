import math
import shutil

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf_fast.train.checkpoint import save_model
from rlhf_fast.train.errors import UserError
from rlhf_fast.train.model import (
    context_length,
    create_llama,
    disable_dropout,
    load_policy,
    load_scalar_model,
    position_ids,
    reward_from_policy,
    sequence_scores,
    token_values,
)
from rlhf_fast.train.policy import response_logprobs

ARCHITECTURES = list(tiny.CONFIGS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: tiny.save_base(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


def random_ids(rows=3, columns=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, len(tiny.tokenizer()), (rows, columns), generator=generator)


def padded(ids, left, right):
    mask = torch.ones_like(ids, dtype=torch.bool)
    return torch.nn.functional.pad(ids, (left, right)), torch.nn.functional.pad(mask, (left, right))


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_no_logprob_value_or_score(bases, architecture):
    policy, _ = load_policy(bases[architecture])
    torch.manual_seed(0)
    scalar, _ = reward_from_policy(bases[architecture])
    ids = random_ids()
    tight, loose = padded(ids, 0, 0), padded(ids, 3, 0)
    for function in (response_logprobs, token_values):
        model = policy if function is response_logprobs else scalar
        torch.testing.assert_close(function(model, *loose, 4), function(model, *tight, 4), rtol=1e-4, atol=1e-5)
    for left, right in ((3, 0), (0, 3), (2, 2)):
        scores = sequence_scores(scalar, *padded(ids, left, right))
        torch.testing.assert_close(scores, sequence_scores(scalar, *tight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_read_before_each_token_and_scores_at_the_last(bases, architecture):
    scalar, _ = reward_from_policy(bases[architecture])
    ids = random_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    values = token_values(scalar, ids, mask, 4)
    for t in range(4):
        before = ids.shape[1] - 4 + t
        alone = sequence_scores(scalar, ids[:, :before], mask[:, :before])
        torch.testing.assert_close(values[:, t], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_is_off_even_in_training_mode(bases, architecture):
    model, _ = load_policy(bases[architecture])
    ids = random_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    before = response_logprobs(model, ids, mask, 4)
    model.train()
    assert response_logprobs(model, ids, mask, 4).equal(before)


def test_dropout_of_a_model_that_has_it_would_show():
    model = tiny.model("gpt2").train()
    ids = random_ids()
    assert not model(ids).logits.equal(model(ids).logits)
    disable_dropout(model)
    model.train()
    assert model(ids).logits.equal(model(ids).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_drawn_as_published_and_its_bias_survives_saving(bases, architecture, tmp_path):
    torch.manual_seed(0)
    model, tokenizer = reward_from_policy(bases[architecture])
    width = model.score.in_features
    assert model.score.weight.shape == (1, width) and model.score.bias.item() == 0
    draws = []
    for seed in range(20):
        torch.manual_seed(seed)
        draws.append(reward_from_policy(bases["gpt2"])[0].score.weight.detach())
    torch.manual_seed(0)
    wide = reward_from_policy(bases["gpt2"], std=3.0)[0].score.weight
    torch.manual_seed(0)
    torch.testing.assert_close(wide, reward_from_policy(bases["gpt2"])[0].score.weight * 3 * math.sqrt(17))
    assert torch.cat(draws).std().item() == pytest.approx(1 / math.sqrt(17), rel=0.15)
    with torch.no_grad():
        model.score.bias.fill_(-2.5)
    save_model(tmp_path, model, tokenizer)
    loaded, _ = load_scalar_model(tmp_path)
    ids, mask = padded(random_ids(), 0, 2)
    scores = sequence_scores(model, ids, mask)
    torch.testing.assert_close(sequence_scores(loaded, ids, mask), scores, rtol=1e-6, atol=1e-6)
    # Plain transformers knows no bias in this head: the same scores but for a constant.
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    logits = plain(input_ids=ids, attention_mask=mask.long()).logits.squeeze(1)
    torch.testing.assert_close(logits - 2.5, scores, rtol=1e-4, atol=1e-5)


def test_a_new_llama_is_the_same_for_the_same_seed_only():
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context_length": 32}
    first, again, other = (create_llama(tiny.tokenizer(), seed=seed, **sizes) for seed in (3, 3, 4))
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    assert context_length(first) == 32
    assert first.get_input_embeddings().weight is first.get_output_embeddings().weight
    with pytest.raises(UserError, match="multiple of 2 x num_heads = 6"):
        create_llama(tiny.tokenizer(), seed=0, **(sizes | {"num_heads": 3}))


@pytest.mark.parametrize("pad", [None, "<eos>"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_missing_or_shared_pad_token_gets_a_row_of_its_own(tmp_path, architecture, pad):
    tokenizer = tiny.tokenizer()
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items()}
    directory = tiny.save_base(tmp_path / "base", architecture)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    text = (directory / "tokenizer.json").read_text(encoding="utf-8").replace('"<pad>"', '"<unused>"')
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    loaded, loaded_tokenizer = load_policy(directory)
    new = loaded_tokenizer.pad_token_id
    assert new == len(vocabulary) and new != loaded_tokenizer.eos_token_id
    assert loaded.get_input_embeddings().num_embeddings == new + 1
    ids = random_ids()
    before, after = model.eval()(ids).logits, loaded(ids).logits
    torch.testing.assert_close(after[..., :new], before, rtol=1e-4, atol=1e-4)
    # The new token is an average one: it takes no more probability than the likeliest old token.
    assert (after[..., new] <= before.max(-1).values).all()


def test_a_pad_token_with_its_own_row_is_left_alone(bases):
    model, tokenizer = load_policy(bases["llama"])
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == len(tiny.tokenizer())


def directory_without(source, target, *patterns):
    shutil.copytree(source, target)
    for pattern in patterns:
        for path in target.glob(pattern):
            path.unlink()
    return target


def test_every_directory_that_cannot_be_a_policy_is_refused_with_its_reason(bases, tmp_path):
    base = bases["llama"]
    (tmp_path / "file").write_text("x")
    damaged = shutil.copytree(base, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}")
    half = shutil.copytree(base, tmp_path / "half")
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    bad_tokenizer = shutil.copytree(base, tmp_path / "bad_tokenizer")
    (bad_tokenizer / "tokenizer.json").write_text("{")
    no_eos = shutil.copytree(base, tmp_path / "no_eos")
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(no_eos)
    reward = tmp_path / "reward"
    save_model(reward, *reward_from_policy(base))
    t5 = tmp_path / "t5"
    size = {"vocab_size": 300, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    save_model(t5, T5ForConditionalGeneration(T5Config(**size)), tiny.tokenizer())
    bert = tmp_path / "bert"
    body = BertModel(BertConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    save_model(bert, body, tiny.tokenizer())
    bigger = shutil.copytree(base, tmp_path / "bigger")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save_pretrained(bigger)
    expected = {
        tmp_path / "absent": "is not a directory",
        tmp_path / "file": "is not a directory",
        directory_without(base, tmp_path / "no_config", "config.json"): "no config.json",
        directory_without(base, tmp_path / "no_weights", "*.safetensors"): "no .safetensors weights",
        directory_without(base, tmp_path / "no_tokenizer", "tokenizer*"): "no tokenizer",
        damaged: "cannot be loaded",
        half: "cannot be loaded",
        bad_tokenizer: "no tokenizer that can be loaded",
        no_eos: "no end-of-sequence token",
        reward: "no weights for lm_head.weight",
        t5: "cannot be loaded as a causal language model",
        bert: "no weights for",
        bigger: "do not belong together",
    }
    for directory, words in expected.items():
        with pytest.raises(UserError, match=words):
            load_policy(directory)


def test_a_policy_is_not_taken_for_a_reward_model(bases):
    with pytest.raises(UserError, match=r"not a reward model: it has no weights for score\.weight"):
        load_scalar_model(bases["llama"])


def test_half_precision_models_score_in_float32(bases):
    model, _ = reward_from_policy(bases["llama"], dtype="bfloat16")
    ids, mask = padded(random_ids(), 0, 0)
    assert sequence_scores(model, ids, mask).dtype == torch.float32
    policy, _ = load_policy(bases["llama"], dtype="bfloat16")
    assert response_logprobs(policy, ids, mask, 4).dtype == torch.float32
