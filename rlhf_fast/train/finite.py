"""NaN and infinity stop a run before they reach a weight: the tensor and the row are named, the batch is kept on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf_fast.train import distributed, fsdp
from rlhf_fast.train.checkpoint import numbered, write_directory, write_json
from rlhf_fast.train.config import to_dict
from rlhf_fast.train.data import collate
from rlhf_fast.train.errors import NotFinite
from rlhf_fast.train.generate import Sample
from rlhf_fast.train.loop import NOT_FINITE_ADVICE

Item = TypeVar("Item")

DIRECTORY = "not-finite"
TENSORS, FACTS = "batch.safetensors", "batch.json"


def check_finite(
    tensors: Mapping[str, Tensor], *, samples: Sequence[Sample] = (), beside: Mapping[str, Tensor] | None = None
) -> None:
    """NotFinite, naming the first of `tensors` [B, ...] that holds NaN or infinity and its row; one look of the host in all.

    samples: what the rows say. beside: what else of the batch to keep.
    """
    if torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).all():
        return
    name, broken = next((name, ~x.isfinite()) for name, x in tensors.items() if not x.isfinite().all())
    row, *place = broken.nonzero()[0].tolist()
    number = tensors[name][(row, *place)].item()
    where = f" at place {place[0]}" if place else ""
    raise NotFinite(
        f"the {name} are not finite ({number}{where})",
        row=row,
        tensors=dict(beside or {}) | dict(tensors),
        texts=_texts(samples, row),
    )


@contextmanager
def blaming(
    models: Mapping[str, nn.Module],
    batch: Mapping[int, Item],
    gradient: Callable[[Item], Mapping[str, Tensor]],
    tensors: Callable[[], Mapping[str, Tensor]],
    samples: Callable[[], Sequence[Sample]] = tuple,
    part: str | None = None,
) -> Iterator[None]:
    """A NotFinite raised inside gets the row that is at fault: the first whose own loss or gradient is not finite.

    batch: the row of `tensors` and of `samples` for each item; gradient: adds the gradient of one item and gives its losses.
    part: what these rows are of a batch that has others, too. Each part gets a `blaming`, one inside another: the innermost
    that finds a row names it, and the tensors of all are kept.
    """
    try:
        yield
    except NotFinite as error:
        told = {"tensors": error.tensors | dict(tensors())}
        if error.row is not None:
            told |= {"row": error.row, "texts": error.texts, "part": error.part}
        else:
            row = next((row for row, item in batch.items() if not _is_finite(item, models, gradient)), None)
            if row is not None:
                told |= {"row": row, "texts": _texts(samples(), row), "part": part}
        raise NotFinite(str(error), **told) from None


def _texts(samples: Sequence[Sample], row: int) -> dict[str, str]:
    return {"prompt": samples[row].prompt, "reply": samples[row].response} if samples else {}


def _is_finite(item: Item, models: Mapping[str, nn.Module], gradient: Callable[[Item], Mapping[str, Tensor]]) -> bool:
    parameters = [parameter for model in models.values() for parameter in model.parameters()]
    for parameter in parameters:
        parameter.grad = None
    losses = gradient(item)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return all(fsdp.is_finite(x) for x in (*losses.values(), *gradients))


def padded(sequences: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Sequences of a batch as tensors to keep."""
    return dict(zip(("ids", "mask"), collate(sequences, pad_id, side="right"), strict=True))


@contextmanager
def keeping(out: Path, where: str, prompts: Sequence[str], config: Any) -> Iterator[None]:
    """A NotFinite raised inside gets told `where` (stage and step) it was, and its batch is written to `out`/not-finite/.

    batch.safetensors holds the tensors as they were; batch.json the row at fault with its text, what is not finite in which
    tensor, and the config.
    """
    try:
        yield
    except NotFinite as error:
        texts = error.texts or ({} if error.row is None else {"prompt": prompts[error.row]})
        message = str(error).removeprefix(f"{where}: ").removesuffix(f"; nothing was updated. {NOT_FINITE_ADVICE}")
        part = {} if error.part is None else {"part": error.part}
        facts = {"where": where, "message": message, "row": error.row, **part, **texts}
        directory = _write(out, where, error, facts | {"config": to_dict(config)})
        said = ", ".join(f"{name} {text[:40]!r}" for name, text in texts.items())
        row = f"row {error.row}" if error.part is None else f"{error.part} row {error.row}"
        at = "in no single row" if error.row is None else f"in {row} ({said})"
        raise NotFinite(
            f"{where}: {message} {at}; nothing was updated and the batch is kept in {directory}. {NOT_FINITE_ADVICE}",
            row=error.row,
            tensors=error.tensors,
            texts=texts,
            part=error.part,
        ) from None


def _write(out: Path, where: str, error: NotFinite, facts: Mapping[str, Any]) -> Path:
    from safetensors.torch import save_file

    process = f"-process-{distributed.rank()}" if distributed.rank() else ""
    places = numbered(out / DIRECTORY / (re.sub(r"\W+", "-", where) + process))
    directory = next(path for path in places if not path.exists())
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in error.tensors.items()}
    with write_directory(directory) as partial:
        save_file(tensors, str(partial / TENSORS))
        write_json(partial / FACTS, {**facts, "tensors": {name: _count(x) for name, x in tensors.items()}})
    return directory


def _count(tensor: Tensor) -> dict[str, Any]:
    rows = (~tensor.isfinite()).flatten(1).any(1) if tensor.dim() > 1 else ~tensor.isfinite()
    return {
        "shape": list(tensor.shape),
        "nan": int(tensor.isnan().sum()),
        "infinite": int(tensor.isinf().sum()),
        "rows": rows.nonzero().flatten().tolist(),
    }
