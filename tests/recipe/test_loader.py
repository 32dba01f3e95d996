from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msqkd.errors import RecipeError
from msqkd.recipe import Recipe, dump_recipe, load_recipe, make_recipe

from .conftest import MINIMAL

Write = Callable[..., str]

TEXT = """\
apiversion: msqkd/v1
name: tiny
model:
  name: lenet5
  checkpoint: lenet5.ckpt
data:
  name: digits
train:
  lr: 0.1
  epoch_size: 2
quantization:
  rules:
    - match: {type: Conv2d}
      weight: {bits: 4}
    - match:
        path: fc*
      precision: float
"""


def complaints(name: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value).split("\n")


def test_load(write: Write) -> None:
    recipe = load_recipe(write(TEXT))
    assert isinstance(recipe, Recipe)
    assert recipe.train.lr == 0.1
    assert recipe.quantization.rules[0].match.type == "Conv2d"
    assert recipe.quantization.rules[0].weight.bits == 4
    assert recipe.quantization.rules[1].precision == "float"
    assert load_recipe(Path("recipe.yaml")) == recipe


def test_every_problem_has_its_line_in_file_order(write: Write) -> None:
    text = TEXT.replace("lr: 0.1", "lr: -1").replace("epoch_size", "epoch_sise").replace("{bits: 4}", "{bits: 1}")
    text = text.replace("path: fc*", "path: 're:('").replace("  name: digits", "  nam: digits")
    lines = complaints(write(text))
    assert [": ".join(line.split(": ")[:2]) for line in lines] == [
        "recipe.yaml:6: data.name",
        "recipe.yaml:7: data.nam",
        "recipe.yaml:9: train.lr",
        "recipe.yaml:10: train.epoch_sise",
        "recipe.yaml:14: quantization.rules[0].weight.bits",
        "recipe.yaml:16: quantization.rules[1].match.path",
    ]
    assert "did you mean 'epoch_size'" in lines[3]


def test_a_missing_section_is_reported_at_the_top(write: Write) -> None:
    assert complaints(write(TEXT.replace("data:\n  name: digits\n", "")))[0].startswith(
        "recipe.yaml:1: data: is missing, allowed: a section, keys name, root"
    )


def test_the_same_key_twice_is_refused(write: Write) -> None:
    assert complaints(write(TEXT + "data:\n  name: mnist\n")) == ["recipe.yaml:18: data: given twice, first on line 6"]
    assert complaints(write(TEXT.replace("lr: 0.1", "epoch_size: 3"))) == [
        "recipe.yaml:10: train.epoch_size: given twice, first on line 9"
    ]


def test_a_key_without_a_value_is_refused(write: Write) -> None:
    assert complaints(write(TEXT + "distillation:\n")) == [
        "recipe.yaml:18: distillation: nothing after the colon, allowed: a value, null or {}"
    ]
    assert load_recipe(write(TEXT + "distillation: null\n")).distillation is None
    assert load_recipe(write(TEXT + "distillation: {}\n")).distillation is not None


def test_a_key_that_is_not_a_text(write: Write) -> None:
    (line,) = complaints(write(TEXT + "1: x\n"))
    assert line.startswith("recipe.yaml:18: ")
    assert "unknown key 1, allowed at the top: apiversion" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml:1: found an empty file, allowed: a mapping"),
        ("# nothing\n", "recipe.yaml:1: found an empty file"),
        ("- a\n- b\n", "recipe.yaml:1: found ['a', 'b'], allowed: a mapping"),
        ("just text", "recipe.yaml:1: found 'just text', allowed: a mapping"),
        ("a: 1\nb: [1, 2\nc: 3\n", "recipe.yaml:3: not valid YAML: "),
        ("a: 1\n\tb: 2\n", "recipe.yaml:2: not valid YAML: "),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2: not valid YAML: "),
        ("a: !!python/object/apply:os.system [ls]\n", "recipe.yaml:1: not valid YAML: "),
        ("a: 1\nb: !!int x\n", "recipe.yaml: not valid YAML: a value that its type cannot hold"),
        ("a: 1\nb: \x07\n", "recipe.yaml:2: not valid YAML: a character (code 7)"),
        ("a: &a [*a]\n", "recipe.yaml: not valid YAML: nested too deeply"),
        ("[" * 3000, "recipe.yaml: not valid YAML: nested too deeply"),
        ("base: &b {lr: 1}\ntrain:\n  <<: *b\n", "recipe.yaml:3: not valid YAML: merge keys (<<)"),
        ("? [a]\n: 1\n", "recipe.yaml:1: not valid YAML: found unhashable key"),
    ],
)
def test_a_file_that_is_no_recipe(write: Write, text: str, expected: str) -> None:
    (line,) = complaints(write(text))
    assert line.startswith(expected)


def test_aliases_that_unfold_without_end_are_refused(write: Write) -> None:
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (line,) = complaints(write("\n".join(layers)))
    assert "entries once its aliases are unfolded" in line


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert complaints(str(path)) == [f"{path}: found bytes that are not text (byte 6), allowed: UTF-8"]
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert load_recipe(path).name == "tiny"


def test_a_missing_file_suggests_its_neighbours_and_the_built_in_recipes(write: Write) -> None:
    write(TEXT, "nets/lenet.yaml")
    (line,) = complaints("nets/lennet.yaml")
    assert line.startswith("nets/lennet.yaml: neither a recipe file nor the name of a built-in recipe")
    assert "did you mean 'nets/lenet.yaml'" in line
    assert "'digits_lenet5'" in complaints("digits_lenet")[0]
    assert complaints("nets") == ["nets: found a folder, allowed: a recipe file or the name of a built-in recipe"]
    assert complaints("no/such/qqq.yaml")[0].endswith("built-in recipe")


def test_a_file_of_that_name_wins_over_a_built_in_recipe(write: Write) -> None:
    assert load_recipe("digits_lenet5").name == "digits_lenet5"
    write(TEXT, "digits_lenet5")
    assert load_recipe("digits_lenet5").name == "tiny"


class TestOverrides:
    def test_values_are_yaml_and_the_last_one_wins(self, write: Write) -> None:
        overrides = [
            "train.epoch_size=3",
            "train.epoch_size=4",
            "distillation.alpha=0.5",
            "model.args.num_classes=10",
            "quantization.rules.0.weight.bits=5",
            "data.augment=[flip, crop]",
        ]
        recipe = load_recipe(write(TEXT), overrides)
        assert recipe.train.epoch_size == 4
        assert recipe.train.lr == 0.1
        assert recipe.distillation is not None
        assert recipe.distillation.alpha == 0.5
        assert recipe.model.args == {"num_classes": 10}
        assert recipe.quantization.rules[0].weight.bits == 5
        assert recipe.data.augment == ["flip", "crop"]

    def test_null_brings_the_default_back(self, write: Write) -> None:
        recipe = load_recipe(write(TEXT), ["train.lr=null", "quantization.rules=null"])
        assert recipe.train.lr == 0.01
        assert recipe.train.epoch_size == 2
        assert recipe.quantization.rules == []

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("data.rot=/x", "unknown key 'rot', allowed in data: name, root"),
            ("dta.root=/x", "unknown key 'dta', allowed at the top: "),
            ("train.lr=-1", "found -1, allowed: a number above 0"),
            ("data.rot=null", "unknown key 'rot'"),
            ("train.lr", "allowed: key.path=value, for instance train.epoch_size=3"),
            ("=3", "allowed: key.path=value"),
            ("train..lr=3", "allowed: key.path=value"),
            ("train.lr=", "nothing after '='"),
            ("train.lr=#1", "nothing after '='"),
            ("train.lr=[1", "the value is not valid YAML: "),
            ("train.lr=@x", "the value is not valid YAML: "),
            ("train={lr: 1, lr: 2}", "lr: given twice, first on line 1"),
            ("name.first=x", "name is 'tiny', not a section"),
            (
                "quantization.rules.7.precision=float",
                "quantization.rules has 2 entries, counted from 0, and no entry 7",
            ),
            (
                "quantization.rules.x.precision=float",
                "quantization.rules has 2 entries, counted from 0, and no entry x",
            ),
        ],
    )
    def test_a_wrong_one_is_named(self, write: Write, override: str, expected: str) -> None:
        (line,) = complaints(write(TEXT), override)
        assert line.startswith(f"--set {override}: {expected}")

    def test_an_entry_of_rules_that_are_not_there(self, minimal: dict[str, Any]) -> None:
        with pytest.raises(RecipeError, match="rules has 0 entries, counted from 0, and no entry 0"):
            make_recipe(minimal, ["quantization.rules.0.weight.bits=4"])

    def test_the_place_of_a_key_below_the_override(self, write: Write) -> None:
        name = write(TEXT.replace("lr: 0.1", "lr: -1"))
        assert complaints(name, "train={batch_size: 0}")[0].startswith(
            "--set train={batch_size: 0}: train.batch_size: found 0"
        )
        assert complaints(name, "seed=1")[0].startswith("recipe.yaml:9: train.lr: found -1")

    def test_problems_of_the_file_come_first(self, write: Write) -> None:
        lines = complaints(write(TEXT.replace("lr: 0.1", "lr: -1")), "seed=x", "oops")
        assert [line.split(":")[0] for line in lines] == ["recipe.yaml", "--set seed=x", "--set oops"]

    def test_an_alias_does_not_carry_an_override_to_another_section(self, write: Write) -> None:
        text = TEXT.replace("  checkpoint: lenet5.ckpt\n", "").replace("train:", "pretrain: &train")
        recipe = load_recipe(write(text + "train: *train\n"), ["train.epoch_size=9"])
        assert recipe.pretrain is not None
        assert (recipe.pretrain.epoch_size, recipe.train.epoch_size) == (2, 9)
        assert (recipe.pretrain.lr, recipe.train.lr) == (0.1, 0.1)

    def test_the_given_mapping_is_not_changed(self, minimal: dict[str, Any]) -> None:
        before = copy.deepcopy(minimal)
        make_recipe(minimal, ["model.args.a=1", "data.augment=[flip]"])
        assert minimal == before


class TestFiles:
    def test_the_working_directory_comes_before_the_recipes_folder(self, write: Write, tmp_path: Path) -> None:
        name = write(TEXT, "sub/recipe.yaml")
        assert load_recipe(name).model.checkpoint == "lenet5.ckpt"  # nowhere: as written
        write("", "sub/lenet5.ckpt")
        assert load_recipe(name).model.checkpoint == str(Path("sub") / "lenet5.ckpt")
        write("", "lenet5.ckpt")
        assert load_recipe(name).model.checkpoint == "lenet5.ckpt"
        absolute = str(tmp_path / "elsewhere.ckpt")
        assert load_recipe(name, [f"model.checkpoint={absolute}"]).model.checkpoint == absolute

    def test_every_key_that_names_a_file(self, write: Write) -> None:
        for file in ("sub/images/a.png", "sub/teacher.ckpt", "sub/nets.py"):
            write("", file)
        overrides = [
            "data={name: image_folder, root: images}",
            "distillation={}",
            "teacher={source: python, target: 'nets.py:big', checkpoint: teacher.ckpt}",
        ]
        recipe = load_recipe(write(TEXT, "sub/recipe.yaml"), overrides)
        assert recipe.data.root == "sub/images"
        assert recipe.teacher.checkpoint == "sub/teacher.ckpt"
        assert recipe.teacher.target == "sub/nets.py:big"

    def test_a_module_is_not_a_file(self, write: Write) -> None:
        write("", "sub/nets/__init__.py")
        overrides = ["model={source: python, target: 'nets:big', checkpoint: a.ckpt}"]
        assert load_recipe(write(TEXT, "sub/recipe.yaml"), overrides).model.target == "nets:big"

    def test_home(self, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        recipe = load_recipe(write(TEXT), ["model.checkpoint=~/a.ckpt"])
        assert recipe.model.checkpoint == str(tmp_path / "a.ckpt")


def test_dump_loads_back_equal(write: Write) -> None:
    overrides = [
        "distillation={hard_loss: label_smoothing}",
        "model.args={norm: null, widths: [1, 2.5], note: '1e-3', flag: 'yes'}",
        "description='Größe: 10 %  # not a comment'",
        "result={accuracy: 0.884, date: '2024-01-01'}",
        "train={scheduler: step_decay, decay_epochs: 3, weight_decay: 1e-10, epoch_size: 4}",
    ]
    recipe = load_recipe(write(TEXT), overrides)
    again = load_recipe(write(dump_recipe(recipe), "again.yaml"))
    assert again == recipe
    assert again.sha() == recipe.sha()
    assert "checkpoint: lenet5.ckpt" in dump_recipe(recipe)
    assert "clip_grad" not in dump_recipe(recipe)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(arguments=st.dictionaries(st.text(), JSON, max_size=4), description=st.text(), lr=st.floats(1e-30, 1e30))
def test_any_recipe_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, arguments: dict[str, Any], description: str, lr: float
) -> None:
    values = {**MINIMAL, "description": description, "train": {"lr": lr}, "result": arguments}
    recipe = make_recipe(values)
    path = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert make_recipe(recipe.to_dict()).sha() == recipe.sha()


KEYS = sorted(set(Recipe.model_fields) | {"lr", "bits", "weight", "rules", "match", "args", "checkpoint"})
WILD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(KEYS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.integers(), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), WILD, max_size=4))
def test_whatever_the_mapping_the_answer_is_a_recipe_or_a_recipe_error(changes: dict[str, Any]) -> None:
    message = ""
    try:
        recipe = make_recipe({**MINIMAL, **changes})
    except RecipeError as error:
        message = str(error)
    else:
        assert make_recipe(recipe.to_dict()) == recipe
    assert all(line.startswith("recipe: ") for line in message.split("\n") if message)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from(list("ab:-[]{}&*!?|>'\"%@`#, \n\t01.e~=<")), max_size=40))
def test_whatever_the_text_the_answer_is_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe(path)
    with pytest.raises(RecipeError):
        make_recipe(MINIMAL, [f"export=[{text}"])
