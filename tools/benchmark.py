"""Step time, memory, images per second and evaluation of networks and layers with several norms, measured in turn.

python tools/benchmark.py                                           # the layers and networks of docs/performance.md
python tools/benchmark.py resnet18:32x3x32x32 --norms bn deconv deconv:every=4,max_rows=4000
python tools/benchmark.py seg/deeplabv3_resnet50:2x3x256x256 torchvision/resnet50:8x3x224x224 --json costs.json
python tools/benchmark.py conv:64,64,3,padding=1:4x64x64x64         # a convolution and its norm alone
python tools/benchmark.py resnet18:128x3x32x32 --device cuda --amp bf16 --channels-last --compile --trace trace.json

A case is NETWORK:NxCxHxW, where NETWORK is a classifier's name (torchvision/NAME and timm/NAME too), seg/NAME
(seg/smp/ARCHITECTURE/ENCODER too), or conv:IN,OUT,KERNEL[,padding=P][,dilation=D][,stride=S][,groups=G][,bias=0]. A
norm is NAME[:option=value,...]; ratios are over the first one. A round has --steps steps; norm options that skip steps
(every=4) need as many or a multiple. A training's first ones (fresh_steps) are left out; every=1 shows what they take.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import UserError, program

SUITE = [
    "conv:64,64,3,padding=1:4x64x64x64",
    "conv:512,512,3,padding=1:32x512x4x4",
    "conv:256,256,3,padding=2,dilation=2:2x256x64x128",
    "conv:1024,256,1:2x1024x64x128",
    "resnet18:32x3x32x32",
    "vgg11:128x3x32x32",
    "seg/deeplabv3_resnet50:2x3x256x256",
]

_ARGUMENTS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
"""Of a convolution, in the order in which conv: takes them."""
_OF_A_TRAINING = {"calibrate_batches", "precise_batches"}


def parse_case(text: str) -> tuple[Any, dict[str, Any]]:
    """The case, and of a layer alone what a recipe must know of it, since it is no network's first nor last one."""
    from engine.benchmark import Case

    found = re.fullmatch(r"(\S+?):(\d+)x(\d+)x(\d+)x(\d+)", text)
    if found is None:
        raise UserError(f"case {text!r}: expected NETWORK:NxCxHxW, such as resnet18:32x3x32x32")
    name, shape = found[1], tuple(map(int, found.groups()[1:]))
    if min(shape) < 1:
        raise UserError(f"case {text!r}: the sizes must be at least 1")
    if name.startswith("conv:"):
        parts = name[5:].split(",")
        by_place = [part for part in parts if "=" not in part]
        try:
            if len(by_place) > len(_ARGUMENTS):
                raise ValueError(f"{len(by_place)} numbers without a name; at most {', '.join(_ARGUMENTS)}")
            named = (part.split("=", 1) for part in parts if "=" in part)
            numbers = {key: int(value) for key, value in [*zip(_ARGUMENTS, by_place, strict=False), *named]}
            if unknown := sorted(numbers.keys() - {*_ARGUMENTS, "bias"}):
                raise ValueError(f"unknown {unknown[0]!r}; known: {', '.join(_ARGUMENTS)}, bias")
            if missing := [key for key in _ARGUMENTS[:3] if key not in numbers]:
                raise ValueError(f"{missing[0]} is missing; expected conv:IN,OUT,KERNEL")
            for key, value in numbers.items():
                least = 0 if key in ("padding", "bias") else 1
                if value < least:
                    raise ValueError(f"{key} is {value}; it must be at least {least}")
            build = partial(_layer, **numbers)
            build()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"case {text!r}: no convolution: {error}") from None
        return Case(name, build, shape, between=True), {"channels": numbers["in_channels"]}
    if name.startswith("seg/"):
        return Case(name, partial(_segmentation, name[4:]), shape), {}
    return Case(name, partial(_classifier, name, shape), shape), {}


def _layer(**options: int) -> Any:
    from torch import nn

    conv: Any = nn.Conv2d(**options)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


def _segmentation(name: str) -> Any:
    from seg import models
    from seg.config import ModelConfig

    return models.build(ModelConfig(name=name), pretrained=False)


def _classifier(name: str, shape: tuple[int, ...]) -> Any:
    from classify import models

    return models.build(name, in_channels=shape[1], size=shape[2])


def _between(section: dict[str, Any], channels: int) -> dict[str, Any]:
    """Options with which a recipe takes the first or last convolution as any other."""
    from norm.recipes import largest_block

    features = section.get("block_features")
    if isinstance(features, int) and features > 0:  # else refused later, or off
        block = largest_block(channels, features)
    else:
        block = section.get("block", 64)
    of_first = {} if "freeze_iter" in section else {"stem_freeze": False}
    of_last = {"last_block": block} if isinstance(block, int) else {}
    return {**of_first, "stem_n_iter": section.get("n_iter", 5), **of_last}


def parse_norm(text: str, layer: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from engine.benchmark import Variant
    from engine.config import NormConfig
    from engine.grid import split_keys
    from engine.yaml_layers import parse_overrides, to_plain

    name, _, rest = text.partition(":")
    section = to_plain(parse_overrides([part for part in split_keys(rest) if part]))  # as on tools/train.py's line
    if idle := sorted(_OF_A_TRAINING & section.keys()):
        raise UserError(f"norm {text!r}: {idle[0]} has no effect on a step; leave it out")
    if layer and name == "gn" and section.get("weight_standardisation"):
        raise UserError(
            f"norm {text!r}: a layer alone counts as a network's last one, whose weight is not standardised; measure "
            "it in a network"
        )
    try:
        more = _between(section, **layer) if layer and name.startswith("deconv") else {}
        return Variant(text, NormConfig(**{**more, **section, "name": name}))
    except ValidationError as error:
        raise UserError(f"norm {text!r}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def settings(args: argparse.Namespace) -> Any:
    import torch

    from engine.benchmark import Settings
    from engine.precision import dtype_of

    chosen = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if chosen == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    return Settings(
        rounds=args.rounds,
        steps=args.steps,
        device=torch.device(chosen),
        amp=dtype_of(args.amp or "none"),
        channels_last=args.channels_last,
        compile=args.compile,
        memory=not args.no_memory,
        evaluation=not args.no_evaluation,
    )


@program
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=SUITE, metavar="CASE", help="NETWORK:NxCxHxW (default: a list)")
    parser.add_argument("--norms", nargs="+", metavar="NORM", help="recipes with options (bn deconv deconv_fast)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps in a round (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU")
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="mixed precision")
    parser.add_argument(
        "--matmul-precision",
        choices=("highest", "high"),
        default="highest",
        help="high: float32 products in TF32 where a GPU can (%(default)s)",
    )
    parser.add_argument("--channels-last", action="store_true", help="memory layout of convolutions")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "reduce-overhead", "max-autotune"),
        help="torch.compile the networks, in this mode",
    )
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--no-evaluation", action="store_true", help="training steps only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="torch's profile of a round of steps of the last case and norm"
    )
    args = parser.parse_args()
    if min(args.rounds, args.steps) < 1:
        parser.error("--rounds and --steps must be at least 1")
    if args.threads is not None and args.threads < 1:
        parser.error("--threads must be at least 1")
    if args.json is not None and args.json == args.trace:
        parser.error("--json and --trace must be two files")
    import torch

    from engine import benchmark
    from engine.images import check_file, check_writable, write_bytes
    from engine.memory import keep_freed_memory

    for file in (file for file in (args.json, args.trace) if file is not None):
        check_file(file)
        check_writable(file.parent)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    how = settings(args)
    torch.backends.cudnn.benchmark = True  # as in trainings, like the next
    if how.device.type == "cpu":
        keep_freed_memory()
    parsed = [parse_case(text) for text in args.cases]
    work = [
        (case, [parse_norm(text, layer) for text in args.norms or ["bn", "deconv", "deconv_fast"]])
        for case, layer in parsed
    ]
    for case, _ in work[1:]:  # before the first one is measured for minutes
        benchmark.check(case, how.device)
    rows = []
    for case, norms in work:
        rows += benchmark.measure(case, norms, how)
        print(benchmark.table(rows[-len(norms) :]), flush=True)
        if args.json:  # after each: a later one may be stopped
            write_bytes(args.json, (json.dumps(benchmark.to_json(rows), indent=1) + "\n").encode())
    if args.trace:
        benchmark.trace(case, norms[-1], how, args.trace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
