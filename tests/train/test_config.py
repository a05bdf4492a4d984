"""The config dataclass as Python API, YAML file and command-line flags."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
from dataclasses import dataclass

import pytest

from rlhf_fast.train.config import (
    add_flags,
    build,
    dump_yaml,
    flatten,
    from_dict,
    keys,
    load_yaml,
    nest,
    option,
    part,
    required,
    to_dict,
    validate,
)
from rlhf_fast.train.errors import UserError


@dataclass(frozen=True)
class BakeConfig:
    flour: str = required("which flour", group="ingredients")
    eggs: int = option(2, "number of eggs", minimum=0, maximum=12)
    heat: float = option(180.0, "oven, in °C", above=0, source="grandmother, page 5", group="oven")
    limit: float | None = option(None, "stop above 90 %", minimum=0)
    place: str = option("middle", "tray", choices=("top", "middle", "bottom"))
    fan: bool = option(False, "blow")


@dataclass(frozen=True)
class MealConfig:
    guests: int = option(1, "how many eat", minimum=1)
    bake: BakeConfig = part(BakeConfig, "the bread", filled=("flour",))  # noqa: RUF009 (part returns a field)


GOOD = {"flour": "rye"}


def refusal(make, *arguments, **keywords) -> str:
    """The message of the UserError that a call has to raise; always one line."""
    with pytest.raises(UserError) as caught:
        make(*arguments, **keywords)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_defaults_and_given_values():
    cfg = from_dict(BakeConfig, {"flour": "rye", "eggs": 3})
    assert cfg == BakeConfig(flour="rye", eggs=3)
    assert (cfg.heat, cfg.limit, cfg.place, cfg.fan) == (180.0, None, "middle", False)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BakeConfig(flour="rye").eggs = 5


def test_unknown_key_suggests_the_nearest():
    assert refusal(from_dict, BakeConfig, GOOD | {"egs": 1}) == "unknown key 'egs' in bake: did you mean 'eggs'?"


def test_unknown_key_far_from_all_lists_them():
    message = refusal(from_dict, BakeConfig, GOOD | {"zzz": 1})
    assert message == "unknown key 'zzz' in bake: the keys are flour, eggs, heat, limit, place, fan"


def test_unknown_key_in_a_section_names_the_section():
    assert refusal(from_dict, MealConfig, {"bake": {"egs": 1}}) == "unknown key 'egs' in bake: did you mean 'eggs'?"


def test_missing_required_key_says_what_it_is():
    assert refusal(from_dict, BakeConfig, {}) == "bake needs 'flour' (which flour)"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("flour", 5, "must be text, got 5"),
        ("flour", "", "is empty"),
        ("flour", None, "must be text, got None"),
        ("eggs", 1.5, "must be a whole number, got 1.5"),
        ("eggs", "2", "must be a whole number, got '2'"),
        ("eggs", True, "must be a whole number, got True"),
        ("eggs", -1, "must be at least 0, got -1"),
        ("eggs", 13, "must be at most 12, got 13"),
        ("heat", 0, "must be above 0, got 0.0"),
        ("heat", math.nan, "must be a finite number, got nan"),
        ("heat", math.inf, "must be a finite number, got inf"),
        ("heat", "hot", "must be a number, got 'hot'"),
        ("heat", False, "must be a number, got False"),
        ("limit", -0.1, "must be at least 0, got -0.1"),
        ("limit", "x", "must be a number or none, got 'x'"),
        ("place", "botom", "must be one of top, middle, bottom, got 'botom': did you mean 'bottom'?"),
        ("fan", 1, "must be true or false, got 1"),
        ("fan", "yes", "must be true or false, got 'yes'"),
    ],
)
def test_bad_value_names_the_key_and_what_is_needed(key, value, expected):
    message = refusal(from_dict, BakeConfig, GOOD | {key: value})
    assert message.startswith(f"bake: '{key}' ")
    assert expected in message


def test_validate_checks_a_config_made_in_python():
    assert "'eggs' must be at most 12" in refusal(validate, BakeConfig(flour="rye", eggs=99))


def test_validate_reaches_into_a_section_but_not_into_filled_keys():
    meal = MealConfig(bake=BakeConfig(flour="", eggs=99))
    assert refusal(validate, meal) == "bake: 'eggs' must be at most 12, got 99"
    validate(MealConfig(bake=BakeConfig(flour="")))


def test_validate_refuses_another_object_as_section():
    assert "'bake' must be a section of keys" in refusal(validate, MealConfig(bake={"eggs": 1}))


def test_whole_numbers_become_floats_where_a_float_is_meant():
    heat = from_dict(BakeConfig, GOOD | {"heat": 200}).heat
    assert isinstance(heat, float) and heat == 200.0


def test_key_that_the_outer_config_fills_is_refused():
    assert "'flour' in bake is set by the run itself" in refusal(from_dict, MealConfig, {"bake": {"flour": "rye"}})


def test_section_that_is_no_mapping():
    assert refusal(from_dict, MealConfig, {"bake": 3}) == "bake must be a section of keys and values, got 3"


def test_part_needs_every_required_key_filled():
    with pytest.raises(TypeError, match="flour"):
        part(BakeConfig, "the bread")


def test_unsupported_field_type_is_a_programming_error():
    @dataclass(frozen=True)
    class ListConfig:
        names: tuple[str, ...] = option((), "names")

    with pytest.raises(TypeError, match="names"):
        keys(ListConfig)


# ---------------------------------------------------------------- YAML


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("number", ["1e-5", "1.0e-5", "0.00001"])
def test_yaml_number_without_dot_is_a_number(tmp_path, number):
    path = write(tmp_path / "c.yaml", f"flour: rye\nheat: {number}\n")
    assert build(BakeConfig, path, {}).heat == 1e-5


def test_effective_config_comes_back_equal(tmp_path):
    cfg = MealConfig(guests=4, bake=BakeConfig(flour="", heat=3e-6, limit=0.25, place="top", fan=True))
    dump_yaml(cfg, tmp_path / "c.yaml")
    assert build(MealConfig, tmp_path / "c.yaml", {}) == cfg


def test_to_dict_leaves_out_filled_keys():
    assert to_dict(MealConfig()) == {
        "guests": 1,
        "bake": {"eggs": 2, "heat": 180.0, "limit": None, "place": "middle", "fan": False},
    }


def test_empty_yaml_gives_the_defaults(tmp_path):
    assert build(MealConfig, write(tmp_path / "c.yaml", "# nothing\n"), {}) == MealConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("eggs: [1", "is not valid YAML"),
        ("- eggs\n- flour\n", "must hold 'key: value' lines, it holds list"),
        ("eggs: 1\nflour: rye\neggs: 2\n", "key 'eggs' is given twice"),
        ("egs: 1\n", "unknown key 'egs' in bake: did you mean 'eggs'?"),
        ("!!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ],
)
def test_bad_yaml_is_refused_with_its_path(tmp_path, text, expected):
    path = write(tmp_path / "c.yaml", text)
    message = refusal(build, BakeConfig, path, GOOD)
    assert str(path) in message and expected in message


def test_yaml_that_cannot_be_read(tmp_path):
    assert "does not exist" in refusal(load_yaml, tmp_path / "none.yaml")
    assert "is a directory" in refusal(load_yaml, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"flour: m\xfcsli\n")
    assert "is not valid YAML" in refusal(load_yaml, tmp_path / "latin.yaml")


# ---------------------------------------------------------------- flags


def parse(cls, *words: str) -> dict:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_flags(parser, cls)
    return vars(parser.parse_args(words))


def test_only_given_flags_are_in_the_namespace():
    assert parse(BakeConfig) == {}
    assert parse(BakeConfig, "--eggs", "4", "--heat", "1e2") == {"eggs": 4, "heat": 100.0}


def test_dash_and_underscore_are_the_same():
    @dataclass(frozen=True)
    class NameConfig:
        long_name: int = option(1, "a name")

    assert parse(NameConfig, "--long-name", "2") == parse(NameConfig, "--long_name", "2") == {"long_name": 2}


def test_nested_flags_carry_their_section():
    flags = parse(MealConfig, "--guests", "3", "--bake.heat", "90")
    assert build(MealConfig, None, flags) == MealConfig(guests=3, bake=BakeConfig(flour="", heat=90.0))


def test_filled_keys_have_no_flag():
    with pytest.raises(argparse.ArgumentError):
        parse(MealConfig, "--bake.eggs", "many")
    parser = argparse.ArgumentParser()
    add_flags(parser, MealConfig)
    assert parser.parse_known_args(["--bake.flour", "rye"])[1] == ["--bake.flour", "rye"]


@pytest.mark.parametrize(
    ("words", "value"), [(["--fan"], True), (["--fan", "false"], False), (["--fan", "True"], True)]
)
def test_bool_flags(words, value):
    assert parse(BakeConfig, *words) == {"fan": value}


def test_none_switches_an_optional_key_off():
    assert parse(BakeConfig, "--limit", "none") == {"limit": None}


@pytest.mark.parametrize("words", [["--eggs", "two"], ["--heat", "hot"], ["--fan", "maybe"], ["--eggs", "none"]])
def test_flag_of_the_wrong_type_is_refused(words):
    with pytest.raises(argparse.ArgumentError, match="must be"):
        parse(BakeConfig, *words)


def test_defaults_then_base_then_yaml_then_flags(tmp_path):
    path = write(tmp_path / "c.yaml", "guests: 3\nbake:\n  eggs: 3\n  heat: 3\n")
    cfg = build(
        MealConfig,
        path,
        {"bake.heat": 4.0},
        base={"guests": 2, "bake": {"eggs": 2, "heat": 2.0, "fan": True}},
    )
    assert (cfg.guests, cfg.bake.eggs, cfg.bake.heat, cfg.bake.fan, cfg.bake.place) == (
        3,
        3,
        4.0,
        True,
        "middle",
    )


def test_flatten_and_nest_undo_each_other():
    nested = {"a": 1, "b": {"c": 2, "d": {"e": None}}}
    assert flatten(nested) == {"a": 1, "b.c": 2, "b.d.e": None}
    assert nest(flatten(nested)) == nested


def test_help_shows_group_default_and_source():
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=200))
    add_flags(parser, BakeConfig)
    text = parser.format_help()
    assert "ingredients:" in text and "oven:" in text
    assert "which flour (required)" in text
    assert "oven, in °C (default: 180.0; source: grandmother, page 5)" in text
    assert "stop above 90 % (default: none)" in text
    assert "blow (default: false)" in text


# ---------------------------------------------------------------- the stages' own configs


STAGES = {"sft": "SFTConfig", "reward": "RewardConfig", "ppo": "PPOConfig", "dpo": "DPOConfig"}


@pytest.mark.parametrize(("module", "name"), STAGES.items())
def test_every_stage_has_few_keys_and_explains_each(module, name):
    stage_keys = keys(getattr(importlib.import_module(f"rlhf_fast.train.{module}"), name))
    assert 5 < len(stage_keys) <= (85 if module == "ppo" else 55)
    assert [key.name for key in stage_keys if len(key.info["help"]) < 5] == []


@pytest.mark.parametrize(("module", "name"), STAGES.items())
def test_every_default_of_a_stage_is_valid(module, name):
    cls = getattr(importlib.import_module(f"rlhf_fast.train.{module}"), name)
    needed = {key.name: "x" for key in keys(cls) if key.required}
    cfg = from_dict(cls, needed)
    assert from_dict(cls, to_dict(cfg)) == cfg
