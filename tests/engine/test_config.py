from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import ValidationError

from engine import yaml_layers
from engine.config import ExperimentConfig, Length, Loaded, OptimConfig, Section, from_dict, load, show
from engine.errors import UserError


class DataConfig(Section):
    root: Path = Path("data")
    crop: tuple[int, int] = (64, 64)


class ToyConfig(ExperimentConfig):
    task: Literal["toy"] = "toy"
    data: DataConfig = DataConfig()


MINIMAL = "task: toy\nlength: 3 epochs\nbatch_size: 8\n"


def write(folder: Path, text: str, name: str = "x.yaml") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def read(folder: Path, text: str, *overrides: str) -> Loaded[ToyConfig]:
    return load(write(folder, text), overrides, ToyConfig)


def error(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("30 epochs", 30, "epochs"), ("1 epoch", 1, "epochs"), (" 40000  steps ", 40000, "steps"), ("1 step", 1, "steps")],
)
def test_length_reads_words(text: str, value: int, unit: str) -> None:
    length = Length.parse(text)
    assert (length.value, length.unit) == (value, unit)
    assert Length.parse(str(length)) == length
    assert str(length) == " ".join(text.split())


def test_length_in_steps() -> None:
    assert Length.parse("3 epochs").steps(7) == 21
    assert Length.parse("5 steps").steps(7) == 5


@pytest.mark.parametrize(
    "bad", ["30", 30, "epochs", "-1 epochs", "1.5 epochs", "3 epo", "3 stepss", "x steps", None, "² steps"]
)
def test_length_refuses(bad: object) -> None:
    with pytest.raises(ValueError, match="expected a whole number and 'epochs' or 'steps', such as '30 epochs'"):
        Length.parse(bad)


def test_sections_are_read_only_and_documented() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        OptimConfig().lr = 1.0  # type: ignore[misc]
    assert OptimConfig.model_fields["lr"].description


def every_field(section: type[Any]) -> list[tuple[str, Any]]:
    return [(f"{section.__name__}.{name}", field) for name, field in section.model_fields.items()]


def test_every_shared_field_has_a_docstring() -> None:
    config = ToyConfig(length=Length(1, "epochs"), batch_size=1)
    sections = [type(value) for _, value in config if isinstance(value, Section) and not isinstance(value, DataConfig)]
    assert len(sections) == 4
    missing = [name for section in sections for name, field in every_field(section) if not field.description]
    assert not missing


def test_minimal(tmp_path: Path) -> None:
    loaded = read(tmp_path, MINIMAL)
    assert loaded.config.length == Length(3, "epochs")
    assert loaded.config.norm.name == "bn"
    assert loaded.origins["batch_size"] == f"{tmp_path}/x.yaml:3"
    assert loaded.origins["optim.lr"] == "default"


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    loaded = read(tmp_path, MINIMAL + "optim: {weight_decay: 1e-4, lr: 1}\n", "optim.min_lr_factor=5e-1")
    assert loaded.config.optim.weight_decay == 1e-4
    assert loaded.config.optim.lr == 1.0
    assert loaded.config.optim.min_lr_factor == 0.5


def test_bases_merge_and_remember_their_place(tmp_path: Path) -> None:
    write(tmp_path, "task: toy\noptim:\n  lr: 0.1\n  momentum: 0.8\ndata: {crop: [32, 32]}\n", "base/root.yaml")
    write(tmp_path, "base: root.yaml\noptim:\n  lr: 0.2\nlength: 1 epoch\n", "base/mid.yaml")
    path = write(tmp_path, "base: base/mid.yaml\nbatch_size: 4\ndata:\n  crop: [48, 96]\n")
    loaded = load(path, ["optim.nesterov=true", "optim.nesterov=false"], ToyConfig)
    optim = loaded.config.optim
    assert (optim.lr, optim.momentum, optim.nesterov, loaded.config.data.crop) == (0.2, 0.8, False, (48, 96))
    assert loaded.origins["optim.lr"] == f"{tmp_path}/base/mid.yaml:3"
    assert loaded.origins["optim.momentum"] == f"{tmp_path}/base/root.yaml:4"
    assert loaded.origins["data.crop"] == f"{tmp_path}/x.yaml:4"
    assert loaded.origins["optim.nesterov"] == "override"


@pytest.mark.parametrize("text", ["010", "1:30", "0b11", "1_0:30.5", "08"])
def test_numbers_of_yaml_1_1_are_none(tmp_path: Path, text: str) -> None:
    """Where a loop over 008 009 010 would train the seed 8 twice."""
    with pytest.raises(UserError, match=rf"batch_size: found '{text}'"):
        read(tmp_path, MINIMAL, f"batch_size={text}")
    assert yaml_layers.load_plain(yaml_layers.dump_line(text), "x") == text


def test_yaml_merge_keys(tmp_path: Path) -> None:
    optim = read(tmp_path, MINIMAL + "optim:\n  <<: {lr: 0.5, power: 1}\n  power: 2\n").config.optim
    assert (optim.lr, optim.power) == (0.5, 2)


def test_text_reads_back_equal(tmp_path: Path) -> None:
    loaded = read(tmp_path, MINIMAL + "data: {root: '/data: odd # name'}\n", "optim.warmup=5 steps")
    again = read(tmp_path, loaded.text)
    assert again.config == loaded.config
    assert again.text == loaded.text


@pytest.mark.parametrize("folder", ["1e5", "-1e-3", "0x10", "yes", "1_000", "null", "2026-01-01", "a: b", "é"])
def test_words_that_look_like_something_else_read_back(tmp_path: Path, folder: str) -> None:
    loaded = read(tmp_path, MINIMAL + f"data: {{root: {json.dumps(folder)}}}\n")
    assert read(tmp_path, loaded.text).config == loaded.config


def test_show_says_where_each_key_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, MINIMAL)
    text = show(load("x.yaml", ["optim.lr=0.05"], ToyConfig))
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["batch_size"].startswith("batch_size: 8 ") and lines["batch_size"].endswith("  # x.yaml:3")
    assert lines["lr"].startswith("  lr: 0.05 ") and lines["lr"].endswith("  # override")
    assert lines["nesterov"].endswith("  # default")
    assert yaml.safe_load(text)["optim"]["lr"] == 0.05
    assert all("#" in line or line.endswith(":") for line in text.splitlines())


def test_schema_by_task(tmp_path: Path) -> None:
    def schema(task: str) -> type[ToyConfig]:
        if task != "toy":
            raise UserError(f"task: found {task!r}, expected 'toy'")
        return ToyConfig

    path = write(tmp_path, MINIMAL)
    assert isinstance(load(path, [], schema).config, ToyConfig)
    with pytest.raises(UserError, match="found 'boat', expected 'toy'"):
        load(path, ["task=boat"], schema)
    with pytest.raises(UserError, match="task: found None, expected the name of a trainer"):
        load(write(tmp_path, "length: 1 epoch\n", "y.yaml"), [], schema)


# ---- the norm section


DECONV = MINIMAL + "norm:\n  name: deconv\n  block: 32\n  n_iter: 3\n  overrides: {'x.*': {n_iter: 2}}\n"


def test_recipe_options_are_kept(tmp_path: Path) -> None:
    norm = read(tmp_path, DECONV, "norm.block=16").config.norm
    assert (norm.name, norm.options, norm.overrides) == ("deconv", {"block": 16, "n_iter": 3}, {"x.*": {"n_iter": 2}})


def test_another_recipe_drops_the_options_of_the_first(tmp_path: Path) -> None:
    loaded = read(tmp_path, DECONV, "norm.name=gn", "norm.overrides={}")
    assert (loaded.config.norm.options, loaded.config.norm.overrides) == ({}, {})
    assert loaded.origins["norm.name"] == "override"
    assert "block" not in loaded.text


def test_options_set_with_the_switch_stay_whatever_the_order(tmp_path: Path) -> None:
    base = MINIMAL + "norm: {name: gn, groups: 4}\n"
    for overrides in (["norm.name=deconv", "norm.block=8"], ["norm.block=8", "norm.name=deconv"]):
        assert read(tmp_path, base, *overrides).config.norm.options == {"block": 8}


def test_naming_the_same_recipe_again_drops_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, DECONV, "norm.name=deconv").config.norm.options == {"block": 32, "n_iter": 3}


def test_unknown_recipe_and_option(tmp_path: Path) -> None:
    text = error(tmp_path, MINIMAL + "norm:\n  name: deconf\n")
    assert text.startswith("x.yaml:5: norm: ") and "deconf" in text and "deconv" in text
    text = error(tmp_path, DECONV, "norm.blok=3")
    assert text.startswith("override: norm: ") and "blok" in text and "block" in text


def test_show_gives_the_defaults_of_the_recipe(tmp_path: Path) -> None:
    text = show(read(tmp_path, MINIMAL + "norm: {name: deconv, block: 32}\n"))
    line = next(line for line in text.splitlines() if "n_iter" in line)
    assert line.startswith("  n_iter: 5") and line.endswith("# default of the recipe deconv")


# ---- the global batch


def test_split_of_the_batch() -> None:
    config = ToyConfig(length=Length(1, "epochs"), batch_size=16, micro_batch=2)
    assert config.split(2) == (2, 4)
    assert ToyConfig(length=Length(1, "epochs"), batch_size=16).split(4) == (4, 1)


@pytest.mark.parametrize(("batch", "micro", "world"), [(16, 3, 1), (10, None, 4), (2, None, 4), (4, 4, 2)])
def test_uneven_split_is_refused(batch: int, micro: int | None, world: int) -> None:
    config = ToyConfig(length=Length(1, "epochs"), batch_size=batch, micro_batch=micro)
    with pytest.raises(UserError, match=f"batch_size: {batch} images cannot be divided evenly among {world} processes"):
        config.split(world)


# ---- imports


@pytest.fixture
def restored_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


@pytest.mark.usefixtures("restored_imports")
def test_imports_next_to_the_config(tmp_path: Path) -> None:
    write(tmp_path, "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n", "my_recipe_of_this_test.py")
    loaded = read(tmp_path, MINIMAL + "imports: [my_recipe_of_this_test]\n")
    assert loaded.config.imports == ("my_recipe_of_this_test",)
    assert (tmp_path / "ran").exists()


@pytest.mark.usefixtures("restored_imports")
def test_imports_that_fail(tmp_path: Path) -> None:
    text = error(tmp_path, MINIMAL + "imports: [no_such_module_here]\n")
    assert "imports: cannot import 'no_such_module_here'" in text and "ModuleNotFoundError" in text
    write(tmp_path, "1 / 0\n", "broken_of_this_test.py")
    assert "ZeroDivisionError" in error(tmp_path, MINIMAL + "imports: [broken_of_this_test]\n")


@pytest.mark.usefixtures("restored_imports")
def test_stored_config_imports_nothing_unless_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "open('ran', 'w').close()\n", "stored_of_this_test.py")
    data = {**yaml.safe_load(MINIMAL), "imports": ["stored_of_this_test"]}
    assert from_dict(data, ["batch_size=2"], ToyConfig, "best.pt").config.batch_size == 2
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="stored_of_this_test.* were not imported, which --allow-imports permits"):
        from_dict({**data, "norm": {"name": "mine"}}, [], ToyConfig, "best.pt")
    from_dict(data, [], ToyConfig, "best.pt", allow_imports=True)
    assert (tmp_path / "ran").exists()


# ---- bad input


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim:\n  lrr: 0.1\n", "x.yaml:5: optim.lrr: unknown key; did you mean optim.lr?"),
        ("optim.lr: 0.1\n", "x.yaml:4: optim.lr: unknown key; did you mean optim: {lr: ...}?"),
        ("lr: 0.1\n", "x.yaml:4: lr: unknown key; did you mean optim.lr?"),
        ("optimizer: {lr: 1}\n", "x.yaml:4: optimizer: unknown key; did you mean optim?"),
        ("data: {qqqq: 1}\n", "x.yaml:4: data.qqqq: unknown key"),
        ("optim: {lr: fast}\n", "x.yaml:4: optim.lr: found 'fast', expected a valid number"),
        ("optim: {lr: -1}\n", "x.yaml:4: optim.lr: found -1, expected greater than 0"),
        ("optim: {lr: .nan}\n", "x.yaml:4: optim.lr: found nan, expected a finite number"),
        ("runtime: {threads: 100000000000}\n", "x.yaml:4: runtime.threads: found 100000000000, expected less than"),
        ("runtime: {ddp_timeout_minutes: 1e9}\n", "x.yaml:4: runtime.ddp_timeout_minutes: found 1000000000.0, expec"),
        ("optim: {nesterov: 1}\n", "x.yaml:4: optim.nesterov: found 1, expected a valid boolean"),
        ("micro_batch: true\n", "x.yaml:4: micro_batch: found True, expected a valid integer"),
        ("micro_batch: 2.5\n", "x.yaml:4: micro_batch: found 2.5, expected a valid integer"),
        ("optim: {name: sgdd}\n", "x.yaml:4: optim.name: found 'sgdd', expected 'sgd', 'adam', 'amsgrad' or 'adamw'"),
        ("optim: fast\n", "x.yaml:4: optim: found 'fast', expected a section with keys"),
        ("optim: {lr: {a: 1}}\n", "x.yaml:4: optim.lr: found {'a': 1}, expected a valid number"),
        ("data: {crop: [1, x]}\n", "x.yaml:4: data.crop[1]: found 'x', expected a valid integer"),
        ("optim: {warmup: 5}\n", "x.yaml:4: optim.warmup: found 5, expected a whole number and 'epochs' or 'steps'"),
        ("report: {log_every: 0 steps}\n", "x.yaml:4: report.log_every: found '0 steps', expected more than 0"),
        ("optim: {schedule: multistep}\n", "x.yaml:4: optim: schedule: multistep needs milestones"),
        ("optim: {nesterov: true, momentum: 0}\n", "x.yaml:4: optim: nesterov: true needs name: sgd and momentum"),
        (
            "optim: {milestones: [1 epoch]}\n",
            "x.yaml:4: optim: milestones have no effect with schedule: poly; set schedule: multistep",
        ),
        (
            "optim: {betas: [0.8, 0.9]}\n",
            "x.yaml:4: optim: betas have no effect with name: sgd; set name: adam, amsgrad or adamw",
        ),
        (
            "optim: {schedule: cosine, power: 2}\n",
            "x.yaml:4: optim: power has no effect with schedule: cosine; set schedule: poly",
        ),
        ("optim: {gamma: 0.7}\n", "x.yaml:4: optim: gamma has no effect with schedule: poly; set sch"),
        (
            "optim: {schedule: constant, min_lr_factor: 0.5}\n",
            "x.yaml:4: optim: min_lr_factor has no effect with schedule: const",
        ),
        ("optim: {warmup_factor: 0.3}\n", "x.yaml:4: optim: warmup_factor has no effect with no warmup; set"),
        ("optim: {name: adam, momentum: 0.3}\n", "x.yaml:4: optim: momentum has no effect with name: adam; set"),
        ("optim:\n  lr: 1\n  lr: 2\n", "x.yaml: line 6: the key 'lr' is written twice"),
        ("imports: [{a: 1, a: 2}]\n", "x.yaml: line 4: the key 'a' is written twice"),
        ("data: {root: !!python/name:os.system ''}\n", "x.yaml: line 4: not a value this config may hold"),
        ("data: [\n", "x.yaml: not valid YAML: line 5, column 1:"),
        ("? [a]\n: 1\n", "x.yaml: line 4: a key must be a word"),
        ("imports: os\n", "x.yaml:4: imports: found 'os', expected a valid array"),
    ],
)
def test_bad_value(tmp_path: Path, text: str, expected: str) -> None:
    assert error(tmp_path, MINIMAL + text).startswith(expected)


BILLIONS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("imports: &i [*i]\n", "line 4: this value holds itself through an anchor"),
        ("norm: &n {name: bn, x: *n}\n", "line 4: this value holds itself through an anchor"),
        (BILLIONS, "stands for more than 100000 values, by anchors (&) within anchors"),
        ("optim: " + "[" * 20_000, "nested too deep to be read"),
        ("optim: {lr: 1\0}\n", "not valid YAML"),
        ("data: {crop: [32]}\n", "data.crop[1]: missing"),
    ],
)
def test_documents_that_would_hang_or_break_the_reader(tmp_path: Path, text: str, expected: str) -> None:
    said = error(tmp_path, MINIMAL + text)
    assert said.startswith("x.yaml") and expected in said


def test_all_problems_in_one_message(tmp_path: Path) -> None:
    text = error(tmp_path, "task: toy\nbatch_size: many\noptim: {lrr: 1}\n", "report.images=-1")
    assert text.splitlines() == [
        "x.yaml: 4 problems in the configuration",
        "  x.yaml: length: missing, and it has no default",
        "  x.yaml:2: batch_size: found 'many', expected a valid integer",
        "  x.yaml:3: optim.lrr: unknown key; did you mean optim.lr?",
        "  override: report.images: found -1, expected greater than or equal to 0",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr", "override 'lr': expected key=value, such as optim.lr=0.05"),
        ("=3", "override '=3': expected key=value"),
        ("optim..lr=3", "override 'optim..lr=3': expected key=value"),
        ("data.crop=[1", "override 'data.crop=[1': not valid YAML"),
        ("base=other.yaml", "override 'base=other.yaml': base can only be written in a config file"),
        ("optim.lr=", "override: optim.lr: found None, expected a valid number"),
        ("optim.lr.x=3", "override: optim.lr: found {'x': 3}, expected a valid number"),
    ],
)
def test_bad_override(tmp_path: Path, override: str, expected: str) -> None:
    assert error(tmp_path, MINIMAL, override).startswith(expected)


def test_bad_files(tmp_path: Path) -> None:
    assert error(tmp_path, "") == "x.yaml: the config is empty, expected keys such as 'task: seg'"
    assert error(tmp_path, "- a\n").startswith("x.yaml: found a list, expected a mapping of keys")
    assert error(tmp_path, "hello\n").startswith("x.yaml: found a single value, expected a mapping of keys")
    with pytest.raises(UserError, match=r"nothing.yaml: no such config file"):
        load(tmp_path / "nothing.yaml", [], ToyConfig)
    with pytest.raises(UserError, match=r"cannot read the config: Is a directory"):
        load(tmp_path, [], ToyConfig)
    (tmp_path / "x.pt").write_bytes(b"\x80\x02\xff\xfe")
    with pytest.raises(UserError, match=r"x.pt: not a text file in UTF-8, expected a YAML config"):
        load(tmp_path / "x.pt", [], ToyConfig)


def test_bad_bases(tmp_path: Path) -> None:
    assert error(tmp_path, "base: gone.yaml\n") == "gone.yaml: no such config file (named by base: in x.yaml)"
    assert error(tmp_path, "base: [a, b]\n").startswith("x.yaml: base: found ['a', 'b'], expected the path of one")
    assert error(tmp_path, "base: {a: b}\n").startswith("x.yaml: base: found a mapping, expected the path of one")
    write(tmp_path, "base: x.yaml\n", "y.yaml")
    assert error(tmp_path, "base: y.yaml\n") == ("x.yaml: its base files go in a circle: x.yaml -> y.yaml -> x.yaml")
    for name, base in (("a", "b"), ("b", "c")):
        write(tmp_path, f"base: {base}.yaml\n", f"{name}.yaml")
    write(tmp_path, MINIMAL, "c.yaml")
    assert error(tmp_path, "base: a.yaml\n") == (
        "x.yaml: base files may be nested 2 deep, this goes deeper: x.yaml -> a.yaml -> b.yaml -> c.yaml"
    )
    assert load(tmp_path / "a.yaml", [], ToyConfig).config.batch_size == 8


def test_recipes_give_a_norm_its_options_when_it_is_chosen(tmp_path):
    text = "task: t\nlength: 1 epoch\nbatch_size: 2\nrecipes:\n  deconv: {fc_block: 8, overrides: {a.*: {n_iter: 1}}}\n"
    (tmp_path / "x.yaml").write_text(text)
    assert load(tmp_path / "x.yaml", [], ExperimentConfig).config.norm.options == {}
    loaded = load(tmp_path / "x.yaml", ["norm.name=deconv", "norm.block=16"], ExperimentConfig)
    assert loaded.config.norm.options == {"fc_block": 8, "block": 16}
    assert loaded.config.norm.overrides == {"a.*": {"n_iter": 1}}
    assert loaded.origins["norm.fc_block"] == f"{tmp_path / 'x.yaml'}:5" and "x.yaml:5" in show(loaded)
    won = load(tmp_path / "x.yaml", ["norm.name=deconv", "norm.fc_block=0"], ExperimentConfig)
    assert won.config.norm.options == {"fc_block": 0}
    (tmp_path / "saved.yaml").write_text(loaded.text)
    assert load(tmp_path / "saved.yaml", [], ExperimentConfig).config == loaded.config


def test_recipes_give_a_norm_its_rate_when_it_is_chosen(tmp_path):
    text = "task: t\nlength: 1 epoch\nbatch_size: 2\noptim: {momentum: 0.8}\nrecipes:\n"
    text += "  bn: {optim: {lr: 0.02}}\n  deconv: {block: 8, optim: {lr: 0.1, head_lr_factor: 3, momentum: 0.5}}\n"
    (tmp_path / "x.yaml").write_text(text)
    assert load(tmp_path / "x.yaml", [], ExperimentConfig).config.optim.lr == 0.02
    loaded = load(tmp_path / "x.yaml", ["norm.name=deconv", "optim.lr=0.3"], ExperimentConfig)
    optim = loaded.config.optim
    assert (optim.lr, optim.head_lr_factor, optim.momentum) == (0.3, 3.0, 0.8) and loaded.config.norm.options[
        "block"
    ] == 8
    assert loaded.origins["optim.head_lr_factor"] == f"{tmp_path / 'x.yaml'}:7"
    (tmp_path / "saved.yaml").write_text(loaded.text)
    assert load(tmp_path / "saved.yaml", [], ExperimentConfig).config == loaded.config


@pytest.mark.parametrize("optim, found", [("{rate: 1}", "'rate'"), ("3", "3")])
def test_rates_of_recipes_are_checked_though_another_is_chosen(tmp_path, optim, found):
    (tmp_path / "x.yaml").write_text(
        f"task: t\nlength: 1 epoch\nbatch_size: 2\nrecipes: {{deconv: {{optim: {optim}}}}}\n"
    )
    with pytest.raises(UserError, match=f"x.yaml:4: recipes.*deconv: optim: found {found}, expected keys of .* optim"):
        load(tmp_path / "x.yaml", [], ExperimentConfig)


def test_recipes_are_checked_though_another_is_chosen(tmp_path):
    text = "task: t\nlength: 1 epoch\nbatch_size: 2\nrecipes: {deconv: {blocks: 8}}\n"
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match="x.yaml:4: recipes.*deconv.*no option 'blocks' .did you mean 'block'"):
        load(tmp_path / "x.yaml", [], ExperimentConfig)
