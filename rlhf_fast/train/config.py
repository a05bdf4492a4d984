"""Configuration: one frozen dataclass is the Python API, the command-line flags and the YAML file at once.

    @dataclass(frozen=True)
    class SFTConfig:
        data: str = required("preference or demonstration file", group="files")
        learning_rate: float = option(1e-4, "peak learning rate", above=0, source="arXiv 2403.17031")

A value comes from the defaults, then the YAML file, then the flags; the later one wins. Field types: str,
int, float, bool, any of these `| None`, or another config dataclass (see `part`).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlhf_fast.train.errors import UserError

Config = TypeVar("Config")

TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def option(
    default: Any,
    help: str,
    *,
    choices: tuple | list | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    source: str | None = None,
    group: str | None = None,
    several: bool = False,
    check: Callable[[Any], object] | None = None,
) -> Any:
    """A key with a default.

    choices: the only values allowed; minimum, maximum: inclusive bounds; above: exclusive lower bound;
    source: where the default was taken from; group: heading in `--help`, until a later key names another;
    several: a YAML list is read as its items with commas between them; check: raises UserError for a value that is none.
    """
    return dataclasses.field(
        default=default,
        kw_only=True,
        metadata={
            "help": help,
            "choices": choices,
            "minimum": minimum,
            "maximum": maximum,
            "above": above,
            "source": source,
            "group": group,
            "several": several,
            "check": check,
        },
    )


def required(help: str, *, choices: tuple | list | None = None, group: str | None = None) -> Any:
    """A key without a default: whoever builds the config has to give it."""
    return dataclasses.field(kw_only=True, metadata={"help": help, "choices": choices, "group": group})


def part(cls: type, help: str, *, filled: tuple[str, ...] = (), group: str | None = None) -> Any:
    """A nested config. `filled` names its keys that the outer one sets: they are neither read nor saved here."""
    placeholders = {key.name: "" for key in keys(cls) if key.required}
    if unfilled := set(placeholders) - set(filled):
        raise TypeError(f"{cls.__name__}: required keys {sorted(unfilled)} have to be filled by the outer config")
    return dataclasses.field(
        default=cls(**placeholders),
        kw_only=True,
        metadata={"help": help, "filled": tuple(filled), "group": group},
    )


@dataclass(frozen=True)
class Key:
    """One key of a config class, with everything that flags, YAML and validation need to know of it."""

    name: str
    type: type
    optional: bool
    default: Any
    info: Mapping[str, Any]

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def nested(self) -> bool:
        return dataclasses.is_dataclass(self.type)

    @property
    def expected(self) -> str:
        if self.nested:
            return "a section of keys"
        if choices := self.info.get("choices"):
            return "one of " + ", ".join(map(str, choices)) + (" or none" if self.optional else "")
        return TYPE_NAMES[self.type] + (" or none" if self.optional else "")


def keys(cls: type, filled: tuple[str, ...] = ()) -> list[Key]:
    """The keys of a config class in the order in which they are written, without those named in `filled`."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        if field.name in filled:
            continue
        kind, optional = _without_none(hints[field.name])
        if kind not in TYPE_NAMES and not dataclasses.is_dataclass(kind):
            raise TypeError(f"{cls.__name__}.{field.name}: type {kind} is not supported in a config")
        found.append(Key(field.name, kind, optional, field.default, field.metadata))
    return found


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`float | None` → (float, True); `float` → (float, False)."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [member for member in members if member is not types.NoneType]
    return (kinds[0] if len(kinds) == 1 else hint), len(kinds) < len(members)


# ---------------------------------------------------------------- checking


def validate(cfg: Any, *, where: str | None = None) -> None:
    """Check every value of a config: type, choices, range, finite. UserError names the key."""
    _validate(cfg, where or section_name(type(cfg)), filled=())


def section_name(cls: type) -> str:
    """`SFTConfig` → `sft`: the name of the command and of the YAML section."""
    return cls.__name__.removesuffix("Config").lower()


def _validate(cfg: Any, where: str, filled: tuple[str, ...]) -> None:
    for key in keys(type(cfg), filled):
        value = getattr(cfg, key.name)
        if key.nested:
            if not isinstance(value, key.type):
                raise _wrong(where, key, value)
            _validate(value, key.name, key.info.get("filled", ()))
        elif value is not None or not key.optional:
            _check_value(value, key, where)


def _check_value(value: Any, key: Key, where: str) -> None:
    accepted = (int, float) if key.type is float else key.type
    if not isinstance(value, accepted) or (isinstance(value, bool) and key.type is not bool):
        raise _wrong(where, key, value)
    choices = key.info.get("choices")
    if choices is not None and value not in choices:
        raise _wrong(where, key, value, suggestion=closest(str(value), map(str, choices)))
    if key.type is str and key.required and not value:
        raise UserError(f"{where}: '{key.name}' is empty; it needs {key.info['help']}")
    if key.type is float and not math.isfinite(value):
        raise UserError(f"{where}: '{key.name}' must be a finite number, got {value}")
    for bound, words, holds in (
        ("minimum", "at least", lambda limit: value >= limit),
        ("maximum", "at most", lambda limit: value <= limit),
        ("above", "above", lambda limit: value > limit),
    ):
        limit = key.info.get(bound)
        if limit is not None and not holds(limit):
            raise UserError(f"{where}: '{key.name}' must be {words} {limit}, got {value}")
    if check := key.info.get("check"):
        try:
            check(value)
        except UserError as error:
            raise UserError(f"{where}: '{key.name}' {error}") from None


def _wrong(where: str, key: Key, value: Any, suggestion: str = "") -> UserError:
    return UserError(f"{where}: '{key.name}' must be {key.expected}, got {value!r}{suggestion}")


def closest(word: str, known: Any) -> str:
    """`: did you mean 'x'?` for the nearest known word, or an empty string if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f": did you mean '{near[0]}'?" if near else ""


# ---------------------------------------------------------------- other libraries' names


class Foreign(Protocol):
    """Names that another library gives to the keys of a config class, which holds this as its attribute `FOREIGN`."""

    names: Collection[str]

    def translate(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`given` without any of `names`. UserError: a name that cannot be honoured, a key given under both names."""

    def help(self) -> str:
        """What `--help` says of them."""


def foreign(cls: type) -> Foreign | None:
    return getattr(cls, "FOREIGN", None)


def in_own_names(cls: type, mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`mapping`, sections included, with every foreign name translated."""
    sections = {key.name: key.type for key in keys(cls) if key.nested}
    own = {
        name: in_own_names(sections[name], value, name) if name in sections and isinstance(value, Mapping) else value
        for name, value in mapping.items()
    }
    return own if foreign(cls) is None else foreign(cls).translate(own, where)


# ---------------------------------------------------------------- mappings and YAML


def from_dict(cls: type[Config], mapping: Mapping[str, Any], *, where: str | None = None) -> Config:
    """Make and validate a config from plain values, as YAML or JSON give them.

    UserError: an unknown key (with the nearest known one), a missing required key, a wrong type, a bad value.
    """
    where = where or section_name(cls)
    _check_names(cls, mapping, where, filled=())
    cfg = _construct(cls, in_own_names(cls, mapping, where), where, filled=())
    validate(cfg, where=where)
    return cfg


def _construct(cls: type, mapping: Mapping[str, Any], where: str, filled: tuple[str, ...], base: Any = None) -> Any:
    _check_names(cls, mapping, where, filled)
    missing = [key for key in keys(cls, filled) if key.required and key.name not in mapping]
    if missing:
        raise UserError(f"{where} needs " + ", ".join(f"'{key.name}' ({key.info['help']})" for key in missing))
    values = {}
    for key in keys(cls, filled):
        if key.name not in mapping:
            continue
        if key.nested:
            inner = key.info.get("filled", ())
            values[key.name] = _construct(key.type, mapping[key.name], key.name, inner, base=key.default)
        else:
            values[key.name] = _convert(mapping[key.name], key)
    return cls(**values) if base is None else dataclasses.replace(base, **values)


def _check_names(cls: type, mapping: Any, where: str, filled: tuple[str, ...]) -> None:
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where} must be a section of keys and values, got {mapping!r}")
    known = {key.name: key for key in keys(cls, filled)}
    others = foreign(cls).names if foreign(cls) else ()
    for name, value in mapping.items():
        if name in others:
            continue
        if name in filled:
            raise UserError(f"key '{name}' in {where} is set by the run itself: give it once, outside of '{where}'")
        if name not in known:
            hint = closest(str(name), known) or f": the keys are {', '.join(known)}"
            raise UserError(f"unknown key '{name}' in {where}{hint}")
        if known[name].nested:
            _check_names(known[name].type, value, name, known[name].info.get("filled", ()))


def _convert(value: Any, key: Key) -> Any:
    """Lossless conversions only; whatever stays wrong is named by `validate`."""
    if key.info.get("several") and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if key.type is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 (no dot) as text.
        try:
            return float(value)
        except ValueError:
            return value
    if key.type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of keys and values. UserError: missing, not YAML, not a mapping, a key given twice."""
    import yaml

    class OnceLoader(yaml.SafeLoader):
        """Refuses a key given twice, of which PyYAML would silently keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"{path}:{node.start_mark.line + 1}: key '{name}' is given twice")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=OnceLoader)
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"config file {path} is a directory; give the YAML file in it") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config file {path} is not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config file {path} must hold 'key: value' lines, it holds {type(content).__name__}")
    return content


def to_dict(cfg: Any) -> dict[str, Any]:
    """Plain nested values, without the keys that an outer config fills; `from_dict` turns them back."""
    return _to_dict(cfg, filled=())


def _to_dict(cfg: Any, filled: tuple[str, ...]) -> dict[str, Any]:
    return {
        key.name: _to_dict(value, key.info.get("filled", ())) if key.nested else value
        for key in keys(type(cfg), filled)
        for value in [getattr(cfg, key.name)]
    }


def dump_yaml(cfg: Any, path: str | Path) -> None:
    """Write all keys of a config as YAML that `--config` reads back to an equal config."""
    import yaml

    text = yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True, width=100)
    Path(path).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- command line


def build(
    cls: type[Config],
    yaml_path: str | Path | None,
    flags: Mapping[str, Any],
    *,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """The config of a command: defaults < `base` < YAML file < flags.

    flags: what `add_flags` left in the namespace by name, nested ones with a dot (`sft.learning_rate`).
    """
    where = section_name(cls)
    from_file = load_yaml(yaml_path) if yaml_path is not None else {}
    try:
        _check_names(cls, from_file, where, filled=())
    except UserError as error:
        raise UserError(f"{yaml_path}: {error}") from None
    given = merge(from_file, nest(flags))
    _check_names(cls, given, where, filled=())
    return from_dict(cls, merge(base or {}, in_own_names(cls, given, where)), where=where)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'sft.seed': 1, 'data': 'x'} → {'sft': {'seed': 1}, 'data': 'x'}."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return nested


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'sft': {'seed': 1}, 'data': 'x'} → {'sft.seed': 1, 'data': 'x'}: what `nest` undoes."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings, section by section; `over` wins."""
    merged = dict(under)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def add_flags(parser: argparse.ArgumentParser, cls: type, prefix: str = "") -> None:
    """Add a flag for every key, grouped; a key of a nested config becomes `--section.key`, not listed here.

    `--learning_rate` and `--learning-rate` are both read. A flag not given leaves nothing in the namespace.
    """
    for title, members in _grouped(cls):
        group = parser.add_argument_group(title)
        for key in members:
            _add_flag(group, key, f"{prefix}{key.name}", help=_help_text(key))
    _add_foreign_flags(parser, cls, prefix)
    for key in keys(cls):
        if key.nested:
            usage = f"--{key.name}.KEY VALUE; the keys are those of `rlhf-fast {key.name} --help`"
            group = parser.add_argument_group(key.name, f"{key.info['help']}: {usage}")
            for name, inner in _leaves(key, f"{prefix}{key.name}."):
                _add_flag(group, inner, name, help=argparse.SUPPRESS)
            _add_foreign_flags(group, key.type, f"{prefix}{key.name}.")


def _grouped(cls: type) -> list[tuple[str, list[Key]]]:
    groups: dict[str, list[Key]] = {}
    title = "settings"
    for key in keys(cls):
        title = key.info.get("group") or title
        if not key.nested:
            groups.setdefault(title, []).append(key)
    return list(groups.items())


def _leaves(section: Key, prefix: str) -> Iterator[tuple[str, Key]]:
    for key in keys(section.type, section.info.get("filled", ())):
        if key.nested:
            yield from _leaves(key, f"{prefix}{key.name}.")
        else:
            yield f"{prefix}{key.name}", key


def _add_flag(group: Any, key: Key, name: str, help: str) -> None:
    shared: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "type": _flag_reader(key)}
    shared["metavar"] = _metavar(key)
    if key.type is bool:
        shared |= {"nargs": "?", "const": True}
    group.add_argument(f"--{name}", help=help, **shared)
    if "_" in name:
        group.add_argument(f"--{name.replace('_', '-')}", help=argparse.SUPPRESS, **shared)


def _add_foreign_flags(group: Any, cls: type, prefix: str) -> None:
    for name in sorted(foreign(cls).names) if foreign(cls) else ():
        shared = {"dest": f"{prefix}{name}", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        spellings = dict.fromkeys((f"--{prefix}{name}", f"--{prefix}{name}".replace("_", "-")))
        group.add_argument(*spellings, nargs="?", const=True, type=_plain_value, **shared)


def _plain_value(text: str) -> Any:
    """What YAML reads in `text`, for a name whose type another library decides."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _metavar(key: Key) -> str:
    if choices := key.info.get("choices"):
        return "|".join(map(str, choices))
    return {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false"}[key.type]


def _help_text(key: Key) -> str:
    notes = ["required"] if key.required else [f"default: {_as_typed(key.default)}"]
    if source := key.info.get("source"):
        notes.append(f"source: {source}")
    return f"{key.info['help']} ({'; '.join(notes)})".replace("%", "%%")


def _as_typed(value: Any) -> str:
    """A value as one would write it behind its flag."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _flag_reader(key: Key) -> Any:
    def read(text: str) -> Any:
        if key.optional and text.lower() in ("none", "null"):
            return None
        try:
            return {"true": True, "false": False}[text.lower()] if key.type is bool else key.type(text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"must be {key.expected}, got {text!r}") from None

    return read
