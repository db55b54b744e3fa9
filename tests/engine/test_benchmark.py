"""What the benchmark counts is what there is; times are only asked to be there."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import norm
from engine import benchmark
from engine.benchmark import Case, Settings, Variant
from engine.config import NormConfig
from engine.errors import UserError
from engine.prepare import convert_norm
from norm.other_layers import ChannelAffine
from tools.benchmark import main, parse_case, parse_norm

QUICK = Settings(rounds=1)


def variants(*names: str) -> list[Variant]:
    return [Variant(name, NormConfig(name=name)) for name in names]


def layer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))


def test_bytes_kept_for_the_backward():
    """Batch norm keeps its input (the convolution's output) and its statistics; none keeps nothing of its own."""
    bn, none = benchmark.measure(Case("x", layer, (2, 4, 16, 16)), variants("bn", "none"), QUICK)
    output = 2 * 8 * 16 * 16 * 4
    assert none.saved is not None and bn.saved is not None
    assert output <= bn.saved - none.saved < output + 1000
    assert bn.peak is not None and bn.peak >= output


def test_operations_of_a_step():
    """A convolution and its weight's gradient; its input's where it lies between others, but not of images."""
    product = 2 * (2 * 16 * 16 * 8) * (4 * 9)
    for between, products in ((True, 3), (False, 2)):
        case = Case("x", layer, (2, 4, 16, 16), between)
        (row,) = benchmark.measure(case, variants("bn"), QUICK)
        assert row.flops == products * product


def test_a_layer_lies_between_others_and_a_network_takes_images():
    assert parse_case("conv:4,8,3:2x4x16x16")[0].between
    assert not any(parse_case(text)[0].between for text in ("vgg11:2x3x32x32", "seg/unet_resnet18:1x3x64x64"))


@pytest.mark.parametrize(
    ("layer", "options", "block", "n_iter"),
    [
        ("conv:64,32,1", "", 64, 5),
        ("conv:64,32,1", ":block=32", 32, 5),
        ("conv:64,32,1", ":block=32,last_block=16", 16, 5),
        ("conv:96,32,1", ":block_features=50", 48, 5),
        ("conv:64,32,3", ":n_iter=7,block=16", 16, 7),
        ("conv:64,32,3", ":n_iter=7,stem_n_iter=3", 64, 3),
    ],
)
def test_options_hold_for_a_layer_alone(layer: str, options: str, block: int, n_iter: int):
    """It is no network's first nor last one, whose options are others."""
    case, known = parse_case(f"{layer}:1x{layer[5:7]}x8x8")
    model = case.build()
    convert_norm(model, parse_norm(f"deconv{options}", known).section)
    assert isinstance(model[0], norm.FastDeconv) and not model[0].freeze
    assert (model[0].block, model[0].n_iter) == (block, n_iter)


def test_what_cannot_be_had_of_a_layer_alone_is_refused():
    _, known = parse_case("conv:64,32,1:1x64x8x8")
    with pytest.raises(UserError, match="a layer alone counts as a network's last one"):
        parse_norm("gn:weight_standardisation=true", known)
    with pytest.raises(UserError, match="block is 'a'"):
        parse_norm("deconv:block=a", known)
    assert parse_norm("deconv:freeze_iter=50", known).section.options["freeze_iter"] == 50


def test_nothing_is_folded_where_the_norm_stays():
    rows = benchmark.measure(
        Case("x", layer, (2, 4, 16, 16)),
        [Variant("gn", NormConfig(name="gn", groups=2)), *variants("in", "none", "bn")],
        Settings(rounds=1, memory=False),
    )
    assert [row.folded is None for row in rows] == [True, True, True, False]


def test_every_variant_is_timed_and_folded_to_the_same_layers():
    rows = benchmark.measure(Case("x", layer, (2, 4, 16, 16)), variants("bn", "deconv", "deconv_fast"), QUICK)
    assert [row.ratio for row in rows][0] == 1 and all(row.step > 0 and row.evaluation and row.folded for row in rows)
    assert rows[1].ratio == pytest.approx(rows[1].step / rows[0].step)
    assert json.loads(json.dumps(benchmark.to_json(rows)))[2]["variant"] == "deconv_fast"
    lines = benchmark.table(rows).splitlines()
    assert len(lines) == 4 and lines[1].split()[:2] == ["x", "bn"] and "(1.00)" in lines[1]


def test_a_round_holds_whole_cycles():
    with pytest.raises(UserError, match="--steps 3: deconv_fast does in every 4th step .*give a multiple of 4"):
        benchmark.measure(Case("x", layer, (2, 4, 16, 16)), variants("bn", "deconv_fast"), Settings(rounds=1, steps=3))


class Odd(nn.Module):
    """What torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > -1e9 else x


def test_a_network_that_cannot_be_traced_is_folded_by_running_it():
    network, images = Odd(), torch.randn(4, 4, 8, 8)
    for _ in range(3):
        network(images)  # running statistics that are not 0 and 1
    network.eval()
    folded = benchmark._folded(network, images)
    assert folded is not None
    assert not any(isinstance(module, nn.BatchNorm2d | norm.FastDeconv | ChannelAffine) for module in folded.modules())
    torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-4)
    (row,) = benchmark.measure(Case("x", Odd, (2, 4, 8, 8)), variants("bn"), Settings(rounds=1, memory=False))
    assert row.folded and row.evaluation and row.saved is None


def test_a_network_that_cannot_be_folded_has_no_such_time():
    class Untracked(Odd):
        def __init__(self) -> None:
            super().__init__()
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.track_running_stats, module.running_mean, module.running_var = False, None, None

    (row,) = benchmark.measure(Case("x", Untracked, (2, 4, 8, 8)), variants("bn"), Settings(rounds=1, memory=False))
    assert row.folded is None and row.evaluation and row.saved is None
    assert benchmark.table([row]).splitlines()[1].split()[-1] == "-"


def test_an_input_that_the_network_does_not_take_is_an_error():
    with pytest.raises(UserError, match="x: cannot compute an input of 2x3x16x16: .*channels"):
        benchmark.measure(Case("x", layer, (2, 3, 16, 16)), variants("bn"), QUICK)


def test_a_profile_is_written(tmp_path):
    benchmark.trace(Case("x", layer, (2, 4, 8, 8)), variants("deconv")[0], QUICK, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event["name"]).startswith("step ")}
    assert steps == {f"step {number + 1}" for number in range(QUICK.steps)}


def test_a_file_that_cannot_be_written_is_told_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("timed"))
    for option in ("--json", "--trace"):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "vgg11:2x3x32x32", option, str(tmp_path)])
        assert main() == 2
        assert f"error: {tmp_path}" in capsys.readouterr().err


def test_an_unknown_network_is_told_before_another_one_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "conv:8,8,3:2x8x8x8", "vgg12:2x3x32x32"])
    assert main() == 2
    assert "vgg12" in capsys.readouterr().err


def test_a_case_without_images_is_an_error():
    with pytest.raises(UserError, match="resnet18:0x3x32x32': the sizes must be at least 1"):
        parse_case("resnet18:0x3x32x32")


@pytest.mark.parametrize("name", ["unet", "deeplabv3plus"])
def test_networks_of_smp_have_the_output_stride_of_their_own(name):
    case, _ = parse_case(f"seg/smp/{name}/resnet18:1x3x64x64")
    assert case.build()(torch.zeros(case.shape).expand(2, -1, -1, -1))["out"].shape[2:] == (64, 64)


@pytest.mark.parametrize(("layer", "said"), [("0,8,3", "in_channels is 0"), ("8,8,3,padding=-1", "padding is -1")])
def test_a_convolution_of_no_size_is_named(layer, said, recwarn):
    with pytest.raises(UserError, match=f"no convolution: {said}; it must be at least"):
        parse_case(f"conv:{layer}:2x8x8x8")
    assert not recwarn.list


def test_options_of_a_norm_are_written_as_for_a_training():
    assert parse_norm("deconv:eps=1e-3,every=4", {}).section.options == {"eps": 1e-3, "every": 4}
    nested = parse_norm("deconv:overrides={a: {n_iter: 2, block: 8}, b: {n_iter: 1}},eps=0.1", {}).section
    assert nested.overrides == {"a": {"n_iter": 2, "block": 8}, "b": {"n_iter": 1}} and nested.options == {"eps": 0.1}
    with pytest.raises(UserError, match="norm 'bn:precise_batches=4': precise_batches has no effect on a step"):
        parse_norm("bn:precise_batches=4", {})


def test_the_peak_is_that_of_the_largest_step_of_a_round():
    """The one that renews the shape gathers the patches: all windows of all images here, in float32."""

    def one() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))

    settings = Settings(rounds=1, evaluation=False)
    (row,) = benchmark.measure(Case("x", one, (32, 16, 8, 8)), variants("deconv_fast"), settings)
    assert row.peak is not None and row.peak > 32 * 8 * 8 * 16 * 9 * 4


def test_memory_and_operations_are_those_of_a_round_however_many_come_before(tmp_path: Path):
    def two() -> nn.Module:
        layers = [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))

    case, (variant,) = Case("x", two, (4, 16, 16, 16)), variants("deconv_fast")
    found = set()
    for rounds in (1, 2, 3, 4):
        (row,) = benchmark.measure(case, [variant], Settings(rounds=rounds, evaluation=False))
        found.add((row.flops, row.saved, row.peak))
    assert len(found) == 1
    benchmark.trace(case, variant, Settings(rounds=1), tmp_path / "trace.json")
    assert (tmp_path / "trace.json").read_text().count('"aten::linalg_cholesky_ex"') == 2 * 2, "a renewal a layer"


def test_rows_tell_their_input():
    rows = benchmark.measure(Case("x", layer, (2, 4, 8, 8)), variants("bn"), Settings(rounds=1, memory=False))
    assert json.loads(json.dumps(benchmark.to_json(rows)))[0]["shape"] == [2, 4, 8, 8]
    assert benchmark.table(rows).splitlines()[1].split()[:3] == ["x", "bn", "2x4x8x8"]


def test_both_evaluations_of_compiled_networks_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda network, mode: compiled.append(type(network)))
    settings = Settings(rounds=1, memory=False, compile="default")
    benchmark.measure(Case("x", layer, (2, 4, 8, 8)), variants("deconv"), settings)
    assert len(compiled) == 2


def test_networks_with_several_outputs():
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]], int]:
            found = self.inner(x)
            return found, {"rest": [found[:, :1]]}, 7

    settings = Settings(rounds=1, memory=False, evaluation=False)
    (row,) = benchmark.measure(Case("x", Several, (2, 4, 8, 8)), variants("deconv"), settings)
    assert row.step > 0


def test_a_network_without_outputs_to_train_is_an_error():
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer()

        def forward(self, x: torch.Tensor) -> str:
            return str(self.inner(x).shape)

    with pytest.raises(UserError, match="x: gives no tensor of floats but str; the steps measured need one"):
        benchmark.measure(Case("x", Nothing, (2, 4, 8, 8)), variants("deconv"), QUICK)


def test_two_outputs_in_one_file_are_refused(tmp_path, monkeypatch, capsys):
    file = str(tmp_path / "x.json")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "vgg11:2x3x32x32", "--json", file, "--trace", file])
    with pytest.raises(SystemExit):
        main()
    assert "--json and --trace must be two files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("8,8,3,1,1,1,1,2", "8 numbers without a name; at most in_channels, out_channels, kernel_size, stride"),
        ("8,8,3,paddin=1", "unknown 'paddin'; known: in_channels, .*, bias"),
        ("8,8", "kernel_size is missing; expected conv:IN,OUT,KERNEL"),
    ],
)
def test_a_convolution_that_is_written_wrongly_is_told_how(layer, said):
    with pytest.raises(UserError, match=f"no convolution: {said}"):
        parse_case(f"conv:{layer}:2x8x8x8")
    assert parse_case("conv:8,8,3,padding=1,bias=0:2x8x8x8")[0].build()[0].bias is None
