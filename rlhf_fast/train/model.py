"""Hugging Face models as RLHF needs them: a policy, and a scalar model that serves as reward and as value model.

Letters: B rows, S tokens of prompt and response together, C of them the (padded) prompt, T = S - C the response.
`mask` is true at real tokens, wherever the padding stands. Dropout is off in everything that leaves this module:
with dropout PPO's ratio is not 1 before the first update (arXiv 2403.17031, detail 7).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from rlhf_fast.train import distributed, fsdp
from rlhf_fast.train.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_fast.train.data import Renderer

Result = TypeVar("Result")

PAD_TOKEN = "<pad>"
HEAD_BIAS = "score.bias"


# ----------------------------------------------------------------------------------------------------- loading


def load_policy(
    name_or_dir: str | Path, *, dtype: str = "float32", device: str | torch.device = "cpu", chat: Renderer | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a directory or the local Hugging Face cache or hub.

    A tokenizer without a pad token, or whose pad token is its end token, is given one of its own (a policy whose
    ends are masked as padding never learns to stop). chat: what the model's data were rendered with, if they are
    conversations; the tokenizer gets its template and its end of a turn. UserError: no such directory, no config.json,
    no safetensors weights, not a causal language model, weights missing, no tokenizer or one that does not belong to
    the model.
    """
    from transformers import AutoModelForCausalLM

    model, tokenizer = _load(AutoModelForCausalLM, name_or_dir, "a causal language model", dtype=dtype, chat=chat)
    return model.to(device), tokenizer


def load_scalar_model(
    directory: str | Path, *, dtype: str = "float32", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward or value model, its head `score` with the bias that `transformers` alone would drop, and its tokenizer.

    UserError: as `load_policy`, or a directory without a trained head, such as a policy.
    """
    model, tokenizer = _load_scalar(directory, "a reward model", dtype=dtype)
    with torch.no_grad():
        model.score.bias.copy_(_stored_bias(directory))
    return model.to(device), tokenizer


def reward_from_policy(
    directory: str | Path,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    chat: Renderer | None = None,
    std: float | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A policy's body under a new head with one output: weight drawn from N(0, std^2), 1/sqrt(d+1) if std is None, bias 0.

    Initialisation of Ziegler et al. 2019 (arXiv 1909.08593) and arXiv 2403.17031. Draws from torch's global generator.
    chat: as of `load_policy`.
    """
    body = "the body of a reward model"
    model, tokenizer = _load_scalar(directory, body, dtype=dtype, new=("score.weight",), chat=chat)
    nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1) if std is None else std)
    return model.to(device), tokenizer


def create_llama(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    context_length: int,
    seed: int,
) -> LlamaForCausalLM:
    """A randomly initialised Llama for `tokenizer`: tied embeddings, SwiGLU of 8/3 of the width (arXiv 2302.13971)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if hidden_size % (2 * num_heads):
        raise UserError(f"hidden_size {hidden_size} must be a multiple of 2 x num_heads = {2 * num_heads}")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=16 * math.ceil(hidden_size / 6),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of `model` to 0, whether a module or a functional dropout reads it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
    model.eval()


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens the model's positions allow, None where there is no such limit."""
    return getattr(model.config, "max_position_embeddings", None)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the bars and remarks of `transformers`: what matters in them is checked and reported by the caller."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load_scalar(
    directory: str | Path, kind: str, *, dtype: str, new: tuple[str, ...] = (), chat: Renderer | None = None
) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification

    options = {"dtype": dtype, "new": new, "chat": chat, "num_labels": 1}
    model, tokenizer = _load(AutoModelForSequenceClassification, directory, kind, **options)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(f"model {directory} ({type(model).__name__}) has no head 'score' with one output per token")
    add_head_bias(model)
    return model, tokenizer


def add_head_bias(model: PreTrainedModel) -> None:
    """Give the head `score` a bias, 0, unless it has one: `transformers` makes it without."""
    if model.score.bias is None:
        model.score.bias = nn.Parameter(model.score.weight.new_zeros(1))


def _load(
    auto: Any,
    name_or_dir: str | Path,
    kind: str,
    *,
    dtype: str,
    new: tuple[str, ...] = (),
    chat: Renderer | None = None,
    **config: Any,
) -> tuple[Any, Any]:
    """Model and tokenizer, checked against each other; the files need not have the weights `new`."""
    from safetensors import SafetensorError

    tokenizer = load_tokenizer(name_or_dir)
    ends_anew = chat is not None and chat.adopt(tokenizer, name_or_dir)
    try:
        with quiet_transformers():
            model, loaded = auto.from_pretrained(
                name_or_dir, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **config
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model {name_or_dir} cannot be loaded as {kind}: {error}") from None
    if missing := sorted(set(loaded["missing_keys"]) - set(new)):
        raise UserError(f"model {name_or_dir} is not {kind}: it has no weights for {', '.join(missing[:3])}")
    _add_pad_token(model, tokenizer, name_or_dir)
    if ends_anew:
        for settings in filter(None, (model.config, getattr(model, "generation_config", None))):
            settings.eos_token_id = tokenizer.eos_token_id
    disable_dropout(model)
    return model, tokenizer


def check_directory(name_or_dir: str | Path) -> None:
    """UserError for a path that is no directory with a model; a name of the hub is taken as it is."""
    path = Path(name_or_dir)
    if not path.is_dir():
        if path.exists() or path.is_absolute() or str(name_or_dir).startswith(".") or len(path.parts) > 2:
            raise UserError(f"model {path} is not a directory; give one that holds config.json and model.safetensors")
        return
    if not (path / "config.json").is_file():
        raise UserError(f"model {path} has no config.json; give a directory in Hugging Face format")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"model {path} has no .safetensors weights; other formats are not read, convert them first")


def load_tokenizer(name_or_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, as its files have it. UserError: none, a damaged one, or one without an end token."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_directory(name_or_dir)
    # For some architectures AutoTokenizer prefers its own class, which adds tokens, to the one the directory declares.
    declared = Path(name_or_dir) / "tokenizer_config.json"
    generic = declared.is_file() and '"TokenizersBackend"' in declared.read_text(encoding="utf-8")
    try:
        with quiet_transformers():
            tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(name_or_dir)
    except Exception as error:  # tokenizers raises no narrower one for a damaged file
        raise UserError(f"model {name_or_dir} has no tokenizer that can be loaded: {error}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name_or_dir} has no end-of-sequence token; set eos_token in its config")
    return tokenizer


def _add_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | Path) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens but the model has embeddings for {rows}; "
            "they do not belong together"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # A random row gives a logit near 0, and in models whose logits are all far below 0 all the probability.
        with torch.no_grad():
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                layer.weight[rows:] = layer.weight[:rows].mean(0)
    model.config.pad_token_id = tokenizer.pad_token_id


def _stored_bias(directory: str | Path) -> Tensor:
    from safetensors import safe_open

    for file in Path(directory).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            if HEAD_BIAS in set(tensors.keys()):
                return tensors.get_tensor(HEAD_BIAS)
    return torch.zeros(1)


# ----------------------------------------------------------------------------------------------------- forward


def position_ids(mask: Tensor) -> Tensor:
    """mask bool [B, S] -> int64 [B, S]: 0, 1, 2, ... over the real tokens of each row, so padding moves nothing."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def forward_pass(model: PreTrainedModel, function: Callable[[], Result]) -> Result:
    """function(), as a forward pass of `model`, or part of one: with its weights there and in the precision that was asked for.

    Everything that reads weights of a model goes through here, as `fsdp.run` says.
    """
    with in_precision(model):
        return fsdp.run(model, function)


def in_precision(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Products in bfloat16 where the launcher asked for mixed precision, else as the weights are."""
    return torch.autocast(model.device.type, torch.bfloat16) if distributed.mixed_precision() else nullcontext()


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """To what the numbers that `model` makes are rounded."""
    return torch.bfloat16 if distributed.mixed_precision() else model.dtype


def sequence_scores(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Score of each row, read at its last real token: ids int64 [B, S], mask bool [B, S] -> [B]."""
    last = (torch.arange(ids.shape[1], device=ids.device) * mask).argmax(1)
    rows = torch.arange(len(ids), device=ids.device)
    return forward_pass(model, lambda: _head(model, hidden_states(model, ids, mask)[rows, last]))


def token_values(model: PreTrainedModel, ids: Tensor, mask: Tensor, response_length: int) -> Tensor:
    """Value of the state before each of the last T tokens: ids, mask [B, S] -> [B, T], read at positions C-1 … S-2."""

    def read() -> Tensor:
        return _head(model, hidden_states(model, ids[:, :-1], mask[:, :-1])[:, -response_length:])

    return forward_pass(model, read)


def hidden_states(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """What the body makes of each token, before any head: ids int64 [B, S], mask bool [B, S] -> [B, S, H]."""
    body = model.base_model
    with remembering_little(model):
        return forward_pass(model, lambda: body(**forward_inputs(body, ids, mask)).last_hidden_state)


_checkpointed: WeakSet[nn.Module] = WeakSet()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let `model` keep only the inputs of its layers where it is trained. UserError: an architecture that cannot."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"'gradient_checkpointing' does not fit {type(model).__name__}: {error}") from None
    _checkpointed.add(model)


@contextmanager
def remembering_little(model: PreTrainedModel) -> Iterator[None]:
    """`transformers` checkpoints activations in training mode alone, which is nothing else to a model without dropout."""
    if model not in _checkpointed or not torch.is_grad_enabled():
        yield
        return
    model.train()
    try:
        yield
    finally:
        model.eval()


def _head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    # In bfloat16 two rewards near 1 are equal unless they differ by 0.8 %.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.to(wide), model.score.weight.to(wide), model.score.bias.to(wide)).squeeze(-1)


def forward_inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """The arguments of a forward pass: padding moves no position, nothing is cached."""
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if accepts(type(model), "position_ids"):
        inputs["position_ids"] = position_ids(mask)
    return inputs


@functools.cache
def accepts(model_class: type, argument: str) -> bool:
    return argument in inspect.signature(model_class.forward).parameters
