"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) through peft: small matrices are trained, the weights stay.

The adapter is put into the model in place, so that it stays the Hugging Face model it was: body, head and `generate` are
where they were. Switched off, it is the model before training, which is what PPO holds the policy against: no second copy.
Dropout has no place in an adapter here, for the reason given in `model`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_fast.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "default"  # peft's, of an adapter that was given none
ALL_LINEAR = "all-linear"  # peft's word
HEAD = "score"
FILES = "adapter"  # a directory beside the merged weights, as peft loads it


def check(config: Any, where: str) -> None:
    """UserError for keys of an adapter where there is none, or if peft is not installed. config: a `loop.TrainConfig`."""
    if not config.lora_rank:
        for name in ("lora_alpha", "lora_target_modules"):
            if (value := getattr(config, name)) != (default := getattr(type(config), name)):
                raise UserError(
                    f"{where}: '{name}' means nothing without 'lora_rank'; leave it at {default}, got {value}"
                )
        return
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError(f"{where}: 'lora_rank' needs peft, which is not installed: pip install peft") from None


def attach(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """Put a new adapter into `model`, as `config` asks (lora_rank 0: none), and return the model.

    From then on only the adapter is trained and, in a reward or value model, the head. It is float32 also where the weights
    are narrower. Draws from torch's global generator. UserError: a target that is no layer of the model.
    """
    if not config.lora_rank:
        return model
    from peft import LoraConfig, inject_adapter_in_model

    asked = [name.strip() for name in config.lora_target_modules.split(",") if name.strip()]
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=ALL_LINEAR if asked == [ALL_LINEAR] else asked,
        exclude_modules=[HEAD] if hasattr(model, HEAD) and asked == [ALL_LINEAR] else None,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that store their weight the other way round
            inject_adapter_in_model(settings, model, NAME)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _fits(module)})
        raise UserError(
            f"'lora_target_modules' {config.lora_target_modules} does not fit {type(model).__name__}: {error}; its layers are "
            f"{', '.join(names)}, and {ALL_LINEAR} takes all but the head"
        ) from None
    head = model.get_output_embeddings()
    if model.config.get_text_config().tie_word_embeddings and head in adapted_layers(model).values():
        raise UserError(
            f"'lora_target_modules' {config.lora_target_modules}: the head of this {type(model).__name__} is its embedding, so "
            "no adapter on it could be merged; leave the head out"
        )
    if hasattr(model, HEAD):
        model.score.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return model


def _fits(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of `model` that hold an adapter, by name; none where peft has not been at work."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """`model` without its adapter: the weights it was loaded with."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The state of `model` with the adapter added to its weights, under the names of a model without one; None: it has none.

    The model itself stays as it is: adding and taking away again would not give the same bits.
    """
    layers = adapted_layers(model)
    if not layers:
        return None
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        place, _, kind = name.rpartition(".")
        owner = next((layer for layer in (place, place.removesuffix(".base_layer")) if layer in layers), None)
        if owner is None:
            if not any(place.startswith(f"{layer}.lora_") for layer in layers):
                state[name] = tensor
        elif kind == "weight":
            delta = layers[owner].get_delta_weight(NAME)
            wide = torch.promote_types(tensor.dtype, delta.dtype)
            state[f"{owner}.weight"] = (tensor.to(wide) + delta.to(wide)).to(tensor.dtype)
        else:
            state[f"{owner}.{kind}"] = tensor
    return state


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What `save_adapter` writes. Nothing of a reward model: it would lack the head, which was trained with the adapter."""
    if hasattr(model, HEAD) or not adapted_layers(model):
        return {}
    return {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if ".lora_" in name
    }


def save_adapter(directory: Path, model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Write the adapter of a policy alone, as peft.PeftModel.from_pretrained reads it over the weights it was trained on.

    weights: its `adapter_weights`, whole.
    """
    from safetensors.torch import save_file

    directory.mkdir()
    settings = model.peft_config[NAME]
    settings.base_model_name_or_path, settings.inference_mode = model.name_or_path, True
    settings.target_modules = sorted(settings.target_modules)  # of a set, each process has an order of its own
    settings.save_pretrained(str(directory))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of `model` that an optimizer changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
