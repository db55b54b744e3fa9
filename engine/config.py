"""Typed experiment configurations: the sections that trainers share, and their reader.

A configuration is YAML (`safe_load` rules), may start from another file (`base:`), takes `key.sub=value` overrides and
is validated by a schema that the task brings (a subclass of `ExperimentConfig`).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import core_schema

import norm
from engine import recipe_layers, yaml_layers
from engine.config_errors import explain
from engine.errors import UserError
from engine.yaml_layers import Layer


@dataclass(frozen=True)
class Length:
    """A duration in words: `30 epochs`, `1 epoch`, `40000 steps`. A step is one update of the weights."""

    value: int
    unit: Literal["epochs", "steps"]

    def steps(self, steps_per_epoch: int) -> int:
        """The number of steps, for an epoch of `steps_per_epoch` steps."""
        return self.value * (steps_per_epoch if self.unit == "epochs" else 1)

    def __str__(self) -> str:
        return f"{self.value} {self.unit[:-1] if self.value == 1 else self.unit}"

    @classmethod
    def parse(cls, text: object) -> Length:
        """Read the words.

        Raises:
            ValueError: they are not a whole number and `epochs` or `steps`.
        """
        if isinstance(text, Length):
            return text
        number, _, unit = text.strip().partition(" ") if isinstance(text, str) else ("", "", "")
        unit = unit.strip()
        word: Literal["epochs", "steps"] = "epochs" if unit.startswith("epoch") else "steps"
        if number.isascii() and number.isdigit() and unit in (word, word[:-1]):
            return cls(int(number), word)
        raise ValueError(f"found {text!r}, expected a whole number and 'epochs' or 'steps', such as '30 epochs'")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=core_schema.to_string_ser_schema())


def _not_zero(length: Length) -> Length:
    if length.value == 0:
        raise ValueError(f"found '{length}', expected more than 0")
    return length


SomeLength = Annotated[Length, AfterValidator(_not_zero)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
HomePath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
"""A path in which ~ is the home folder, as a shell leaves it in data.root=~/x; that of an unknown user stays."""
HomeText = Annotated[str, AfterValidator(os.path.expanduser)]
"""The same for a path that may also be a word, such as `pretrained`."""


class Section(BaseModel):
    """A group of keys: unknown keys are errors, values are read-only, the docstring under a field describes it."""

    # "constants" is for options that no type restricts: what is saved reads back as it was
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


class OptimConfig(Section):
    name: Literal["sgd", "adam", "amsgrad", "adamw"] = "sgd"
    """Optimiser; amsgrad is adam with the largest second moment so far."""
    lr: Positive = 0.01
    """Learning rate after warm-up, for the global batch size."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd."""
    nesterov: bool = False
    """Nesterov momentum of sgd; needs momentum > 0."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the two moments of adam, amsgrad and adamw."""
    weight_decay: NotNegative = 1e-4
    """Weight decay: added to the gradient, but decoupled in adamw."""
    decay_norm_bias: bool = True
    """Decay one-dimensional parameters (norm weights and biases) too; false leaves them undecayed."""
    backbone_lr_factor: NotNegative = 1.0
    """Factor on the learning rate of the backbone's parameters; 0 freezes them: no gradients are computed for
    them, and no weight decay moves them. The statistics of its norms move on: the recipe frozen_bn holds them."""
    head_lr_factor: Positive = 1.0
    """Factor on the learning rate of all other parameters."""
    schedule: Literal["poly", "cosine", "multistep", "constant"] = "poly"
    """Course of the learning rate after warm-up."""
    power: Positive = 0.9
    """Exponent of poly: factor = (1 - progress) ** power."""
    milestones: tuple[SomeLength, ...] = ()
    """Where multistep multiplies the rate by gamma, each a length from the start."""
    gamma: Positive = 0.1
    """Factor of multistep at each milestone."""
    min_lr_factor: Fraction = 0.0
    """The share of lr at which poly and cosine end."""
    warmup: Length = Length(0, "steps")
    """Linear rise of the rate from warmup_factor * lr to lr at the start."""
    warmup_factor: Fraction = 0.1
    """The share of lr with which the warm-up begins."""
    clip_norm: Positive | None = None
    """Largest L2 norm of the gradient of what has a rate above 0; larger ones are scaled down. null: no clipping."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the exponential moving average of the weights, which is then what is evaluated. null: no average."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov: true needs name: sgd and momentum above 0")
        name, schedule = f"name: {self.name}", f"schedule: {self.schedule}"
        steps = self.schedule == "multistep"
        for key, read, now, wanted in (
            ("betas", self.name != "sgd", name, "name: adam, amsgrad or adamw"),
            ("momentum", self.name == "sgd", name, "name: sgd"),
            ("milestones", steps, schedule, "schedule: multistep"),
            ("gamma", steps, schedule, "schedule: multistep"),
            ("power", self.schedule == "poly", schedule, "schedule: poly"),
            ("min_lr_factor", self.schedule in ("poly", "cosine"), schedule, "schedule: poly or cosine"),
            ("warmup_factor", self.warmup.value > 0, "no warmup", "warmup, such as '500 steps'"),
        ):
            if not read and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} {'have' if key[-1] == 's' else 'has'} no effect with {now}; set {wanted}")
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError("schedule: multistep needs milestones, such as ['20 epochs', '25 epochs']")
        return self


class NormConfig(Section):
    """The normalization; keys that are not listed here are the named recipe's own options."""

    model_config = ConfigDict(extra="allow")

    name: str = "bn"
    """Recipe, one of norm.available()."""
    overrides: dict[str, dict[str, Any]] = {}
    """Options for some layers only: a pattern of layer names -> options of the recipe."""
    calibrate_batches: Annotated[int, Field(ge=0)] = 0
    """Training batches shown to the network while it is converted, so that a trained batch-norm network keeps its
    function; 0: convert without data."""
    precise_batches: Annotated[int, Field(ge=0)] = 0
    """Micro-batches over which running statistics are averaged anew before each evaluation, always the same ones, kept
    in memory; 0: they are the running averages. Of several processes those of the first count, with norm.sync or
    sync_bn those of all."""

    @property
    def options(self) -> dict[str, Any]:
        """The recipe's own options that were set."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known_recipe(self) -> NormConfig:
        norm.recipe(self.name, **self.options)  # a NormError is a ValueError that lists what is known
        return self


Amp = Literal["none", "bf16", "fp16"]


class RuntimeConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initial weights, order and augmentation."""
    amp: Amp = "none"
    """Mixed precision by autocast, in the evaluations of the training too; fp16 scales the loss. Scores and predictions
    of a checkpoint are computed by the programs in full precision, but those of segmentation as this says. On a CPU
    without instructions for it, which is told at the start, it is many times slower than none."""
    matmul_precision: Literal["highest", "high"] = "highest"
    """torch.set_float32_matmul_precision: high multiplies float32 matrices in TF32 where a GPU can."""
    compile: Literal[False, True, "reduce-overhead", "max-autotune"] = False
    """torch.compile the network; reduce-overhead starts its kernels as CUDA graphs, which pays where a GPU waits for
    the host (small networks or images)."""
    channels_last: bool = False
    """Channels-last memory layout (faster convolutions on GPUs with mixed precision)."""
    checkpointing: bool = False
    """Activation checkpointing: compute what is inside the network's blocks again in the backward instead of keeping
    it; the same results with less memory, in about a third more time."""
    deterministic: bool = False
    """Only deterministic algorithms; slower, an operation without one is an error."""
    workers: Annotated[int, Field(ge=0)] = 4
    """Processes that load data, for each rank; 0 loads in the training process."""
    threads: Annotated[int, Field(ge=1, le=2**15)] | None = None
    """Threads of torch on the CPU; null leaves torch's choice."""
    ddp_timeout_minutes: Annotated[float, Field(gt=0, le=1e6)] = 30.0
    """How long a rank waits for the others before it gives up."""

    @model_validator(mode="after")
    def _consistent(self) -> RuntimeConfig:
        if self.compile and self.checkpointing:
            raise ValueError("compile and checkpointing exclude each other (the compiler decides itself what is kept)")
        return self


class ReportConfig(Section):
    log_every: SomeLength = Length(20, "steps")
    """Interval of the progress line and of the check that the loss is finite."""
    eval_every: SomeLength = Length(1, "epochs")
    """Interval of validation; it also runs at the end."""
    checkpoint_every: SomeLength = Length(1, "epochs")
    """Interval at which last.pt is written; it is also written at the end."""
    keep_all: bool = False
    """Keep each periodic checkpoint, as step-00001000.pt, beside last.pt."""
    tensorboard: bool = True
    """Write TensorBoard files to the work directory."""
    images: Annotated[int, Field(ge=0)] = 4
    """Validation images drawn in each report."""


class Split(NamedTuple):
    """How a global batch is computed: `ranks x accumulation x micro_batch` images."""

    micro_batch: int
    accumulation: int


class ExperimentConfig(Section):
    task: str
    """Which trainer the experiment is for."""
    length: SomeLength
    """Length of the training, such as '30 epochs' or '40000 steps'."""
    batch_size: Count
    """Images in a step, over all processes and accumulated micro-batches."""
    micro_batch: Count | None = None
    """Images a process computes at once; null: its whole share of the batch. A smaller one accumulates gradients."""
    optim: OptimConfig = OptimConfig()
    norm: NormConfig = NormConfig.model_construct()
    recipes: dict[str, dict[str, Any]] = {}
    """What `norm` holds for this network when norm.name is a certain recipe: its name -> options, overrides, and under
    `optim` what that section holds then, such as its own rate. It wins over the base files' `norm` and `optim`; keys
    that this file or the command line writes there win over it."""
    runtime: RuntimeConfig = RuntimeConfig()
    report: ReportConfig = ReportConfig()
    imports: tuple[str, ...] = ()
    """Python modules to import first, such as one that registers a norm recipe or a network."""

    @field_validator("recipes")
    @classmethod
    def _known_recipes(cls, recipes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, section in recipes.items():
            rates, options = section.get("optim", {}), {key: one for key, one in section.items() if key != "optim"}
            unknown = sorted(set(rates) - set(OptimConfig.model_fields)) if isinstance(rates, dict) else [rates]
            if unknown:
                raise ValueError(f"{name}: optim: found {unknown[0]!r}, expected keys of the section optim")
            try:
                NormConfig(**{**options, "name": name})
            except ValidationError as error:
                raise ValueError(f"{name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
        return recipes

    def split(self, world_size: int) -> Split:
        """Divide the global batch among `world_size` processes.

        Raises:
            UserError: it cannot be divided evenly.
        """
        micro = self.micro_batch or self.batch_size // world_size or 1
        if self.batch_size % (world_size * micro):
            raise UserError(
                f"batch_size: {self.batch_size} images cannot be divided evenly among {world_size} processes with "
                f"micro-batches of {micro}; choose a batch_size that is a multiple of {world_size * micro}, or "
                f"{'another' if self.micro_batch else 'set'} micro_batch"
            )
        return Split(micro, self.batch_size // (world_size * micro))


C = TypeVar("C", bound=ExperimentConfig)
Schema = type[C] | Callable[[str], type[C]]


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A validated configuration and how it came about."""

    config: C
    origins: dict[str, str]
    """Dotted key of each leaf -> `file:line`, `override` or `default`."""
    text: str
    """The resolved configuration as YAML, which `load` reads back."""
    recipe_rates: dict[str, yaml_layers.Leaf] = dataclasses.field(default_factory=dict)
    """What `recipes` says about the chosen norm under `optim`, and where, whether it is in force or not."""


def load(path: str | Path, overrides: Sequence[str], schema: Schema[C]) -> Loaded[C]:
    """Read a config file with its bases, lay the overrides over it and validate.

    `schema` is a configuration class, or a function from the value of `task` to one. The modules under `imports:` are
    imported (the config's folder and the current one are importable), so only pass files that the user named.

    Raises:
        UserError: anything wrong, all problems of a config in one message, each with its place.
    """
    layers = [*yaml_layers.read_chain(path), yaml_layers.parse_overrides(overrides)]
    return _resolve(layers, schema, str(path), import_from=os.path.dirname(os.path.abspath(path)))


def from_dict(
    data: Mapping[str, Any], overrides: Sequence[str], schema: Schema[C], source: str, allow_imports: bool = False
) -> Loaded[C]:
    """Validate a configuration that was stored as plain containers, such as the one in the checkpoint `source`.

    Its `imports:` are carried out only when `allow_imports` is true: a file from elsewhere must not run code.

    Raises:
        UserError: as `load`.
    """
    layers = [yaml_layers.from_plain(dict(data), source), yaml_layers.parse_overrides(overrides)]
    return _resolve(layers, schema, source, import_from=os.getcwd() if allow_imports else None)


def _resolve(layers: list[Layer], schema: Schema[C], source: str, import_from: str | None) -> Loaded[C]:
    layer = recipe_layers.combine(layers, NormConfig.model_fields["name"].default)
    data = yaml_layers.to_plain(layer)
    imports = data.get("imports") or []
    if import_from is not None and isinstance(imports, list | tuple):
        _import(imports, source, import_from)
    kind: type[C]
    if isinstance(schema, type):
        kind = cast("type[C]", schema)
    elif isinstance(data.get("task"), str):
        kind = schema(data["task"])
    else:
        raise UserError(f"{source}: task: found {data.get('task')!r}, expected the name of a trainer, such as 'seg'")
    try:
        # As JSON, since strict types (no true for 1, no "3" for 3) then still take a list for a tuple, text for a path.
        config = kind.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        problems = [explain(one, kind, layer, data, source) for one in error.errors(include_url=False)]
        if imports and import_from is None:
            problems.append(f"{source}: imports: {imports} were not imported, which --allow-imports permits")
        head = "" if len(problems) == 1 else f"{source}: {len(problems)} problems in the configuration\n  "
        raise UserError(head + "\n  ".join(problems)) from None
    written = {path: leaf.origin for path, leaf in yaml_layers.leaves(layer)}
    chosen = ("recipes", config.norm.name)
    said = config.recipes.get(config.norm.name, {}).get("optim", {})
    rates = {key: yaml_layers.Leaf(one, written.get((*chosen, "optim", key), "")) for key, one in said.items()}
    config = _settled(config)
    plain = config.model_dump(mode="json")
    in_force = {(*chosen, *path[1:]): origin for path, origin in written.items() if path[0] == "norm"}
    in_force |= {(*chosen, *path): origin for path, origin in written.items() if path[0] == "optim"}
    written |= in_force
    everything = yaml_layers.leaves(yaml_layers.from_plain(plain, "default"))
    origins = {".".join(path): written.get(path, "default") for path, _ in everything}
    return Loaded(config, origins, "".join(f"{text}\n" for text, _ in _lines(plain)), rates)


def _settled(config: C) -> C:
    """With what is in force in the place of what `recipes` said about the chosen norm: who reads the configuration back
    gets the same one, in the same order, also where something was taken out of a section."""
    name = config.norm.name
    if name not in config.recipes:
        return config
    section = config.norm.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    rates, used = config.recipes[name].get("optim", {}), config.optim.model_dump(mode="json")
    if rates:
        section["optim"] = {key: used[key] for key in rates}
    return config.model_copy(update={"recipes": {**config.recipes, name: section}})


def _import(names: Sequence[Any], source: str, folder: str) -> None:
    if not names:
        return
    sys.path.extend(place for place in dict.fromkeys((folder, os.getcwd())) if place not in sys.path)
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # the user's module may raise anything
            raise UserError(
                f"{source}: imports: cannot import {name!r} (looked in {folder}, {os.getcwd()} and the installed "
                f"packages): {type(error).__name__}: {error}"
            ) from error


def show(loaded: Loaded[Any]) -> str:
    """The resolved configuration as YAML, with the recipe's own defaults; a comment on each line says where its value
    comes from."""
    plain = loaded.config.model_dump(mode="json")
    recipe = recipe_defaults(loaded.config.norm)
    plain["norm"] = {"name": plain["norm"]["name"], **recipe, **plain["norm"]}
    lines = [
        (text, "" if path is None else loaded.origins.get(path, f"default of the recipe {loaded.config.norm.name}"))
        for text, path in _lines(plain)
    ]
    column = min(max(len(text) for text, _ in lines), 60) + 2
    return "\n".join(f"{text:<{column}}# {origin}" if origin else text for text, origin in lines) + "\n"


def _lines(plain: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str | None]]:
    """YAML, a line for each key, with its dotted path; None for the head of a section."""
    for key, value in plain.items():
        head = "  " * len(path) + yaml_layers.dump_line(key) + ":"
        if isinstance(value, dict) and value:
            yield head, None
            yield from _lines(value, (*path, key))
        else:
            yield f"{head} {yaml_layers.dump_line(value)}", ".".join((*path, key))


def recipe_defaults(section: NormConfig) -> dict[str, Any]:
    """The options of the section's recipe, those that were set and the others."""
    recipe = norm.recipe(section.name, **section.options)
    fields = dataclasses.fields(recipe) if dataclasses.is_dataclass(recipe) else ()
    return {field.name: getattr(recipe, field.name) for field in fields}
