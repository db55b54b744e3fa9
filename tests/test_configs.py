"""Every config in the repository loads, and its network builds and converts."""

import shlex
from pathlib import Path

import pytest
import torch

import classify.models
import classify.sets
from classify.config import ClassifyConfig
from engine.config import load, show
from engine.config_help import describe
from engine.prepare import convert_norm
from seg import losses, models
from seg.config import SegConfig

ROOT = Path(__file__).resolve().parent.parent
SEG = sorted((ROOT / "configs/seg").rglob("*.yaml"))
CLASSIFY = sorted((ROOT / "configs/classify").rglob("*.yaml"))
EXPERIMENTS = [path for path in SEG + CLASSIFY if path.parent.name != "base"]
IMAGE = {"folder": (1000, 3, 224), "mnist": (10, 1, 28), "cifar10": (10, 3, 32), "cifar100": (100, 3, 32)}


@pytest.mark.parametrize("path", SEG, ids=lambda path: path.stem)
def test_loads_builds_and_converts(path):
    loaded = load(path, [], SegConfig)
    cfg = loaded.config
    with torch.device("meta"):
        model = models.build(cfg.model, pretrained=False)
        convert_norm(model, cfg.norm)
    losses.build(cfg)
    assert f"name: {cfg.model.name}" in show(loaded)


@pytest.mark.parametrize("path", CLASSIFY, ids=lambda path: path.stem)
def test_classifiers_load_build_and_convert(path):
    assert load(path, ["norm.name=bn"], ClassifyConfig).config.norm.options.get("fc_block") is None
    loaded = load(path, ["norm.name=deconv"], ClassifyConfig)
    cfg = loaded.config
    classes, channels, size = IMAGE[cfg.data.name]
    with torch.device("meta"):
        model = classify.models.build(cfg.model.name, classes, channels, size=size, **cfg.model.options)
        convert_norm(model, cfg.norm)
    assert f"name: {cfg.model.name}" in show(loaded)
    assert cfg.norm.options.get("fc_block") == (64 if size == 224 else 512)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_head_says_what_how_and_what_to_expect(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(head)
    assert f"python tools/train.py {path.relative_to(ROOT)}" in text
    assert "not measured" in text or "mIoU" in text


@pytest.mark.parametrize("norm", ["deconv_fast", "bn", "gn", "in", "keep"])
@pytest.mark.parametrize(("path", "schema"), [(SEG[-1], SegConfig), (CLASSIFY[-1], ClassifyConfig)])
def test_every_key_has_a_meaning(path, schema, norm):
    lines = describe(load(path, [f"norm.name={norm}"], schema)).splitlines()
    heads = [number for number, line in enumerate(lines) if not line.startswith("    ")]
    assert len(heads) > 60
    assert all(lines[number + 1].startswith("    ") and lines[number + 1].strip() for number in heads)


def test_every_network_has_a_config():
    stems = {path.stem for path in CLASSIFY}
    for network in classify.models.available():
        wanted = ["mnist"] if network in ("lenet", "mlp") else ["cifar10", "cifar100"]
        assert {f"{network}_{data}" for data in wanted} <= stems
    assert {"vgg11_imagenet", "resnet18_imagenet", "densenet121_imagenet"} <= stems


def test_the_papers_recipes_for_classification():
    cifar = load(ROOT / "configs/classify/vgg16_cifar100.yaml", ["norm.name=deconv"], ClassifyConfig).config
    optim = cifar.optim
    assert (str(cifar.length), cifar.batch_size, optim.lr, optim.weight_decay) == ("20 epochs", 128, 0.1, 1e-3)
    assert (optim.schedule, optim.momentum, cifar.data.crop_padding) == ("cosine", 0.9, 4)
    assert classify.sets.flip(cifar.data) == 0.5
    assert cifar.norm.options == {"fc_block": 512} and cifar.data.name == "cifar100"
    imagenet = load(ROOT / "configs/classify/resnet18_imagenet.yaml", [], ClassifyConfig).config
    assert (str(imagenet.length), imagenet.batch_size, imagenet.optim.weight_decay) == ("90 epochs", 256, 1e-4)


@pytest.mark.parametrize("norm", ["bn", "deconv"])
def test_the_rates_of_the_papers_table_2(norm: str) -> None:
    """As "[Re] Network Deconvolution" (arXiv 2410.01189) lists them; VGG-11's is also in the authors' README."""
    for network, rate in (("vgg11", 0.01), ("resnet18", 0.1), ("densenet121", 0.1)):
        path = ROOT / f"configs/classify/{network}_imagenet.yaml"
        optim = load(path, [f"norm.name={norm}"], ClassifyConfig).config.optim
        assert (optim.lr, optim.momentum, optim.schedule) == (rate, 0.9, "cosine")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_cheap_method_converts_the_same_layers_by_the_same_options(path: Path):
    schema = SegConfig if path in SEG else ClassifyConfig
    exact, cheap = (load(path, [f"norm.name={name}"], schema).config for name in ("deconv", "deconv_fast"))
    assert exact.norm.model_dump(exclude={"name"}) == cheap.norm.model_dump(exclude={"name"})
    assert exact.optim == cheap.optim


def test_mobilenets_own_settings():
    cfg = load(ROOT / "configs/classify/mobilenet_v2_cifar10.yaml", ["norm.name=deconv"], ClassifyConfig).config
    model = classify.models.build("mobilenet_v2")
    convert_norm(model, cfg.norm)
    assert model.stem[0].n_iter == 10 and model.blocks[3].expand[0].n_iter == 5
    for block in model.blocks:
        inputs = block.expand[0].in_channels
        assert block.depthwise[0].n_iter == block.project[0].n_iter == 1 and block.project[0].block == inputs


def test_the_named_networks_have_both_norms_in_both_recipes():
    stems = {path.stem for path in SEG}
    for network in ("deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet50", "fcn_resnet101"):
        for norm in ("bn", "deconv"):
            assert {f"{network}_{norm}", f"{network}_40k_{norm}", f"{network}_80k_{norm}"} <= stems


def test_the_documented_way_to_another_network():
    """What must be set for other networks than torchvision's is documented, and converts the decoder alone."""
    lines = (ROOT / "docs/segmentation.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith("python tools/train.py") and "model.name=smp/" in line]
    _, _, path, *words = shlex.split(line)
    cfg = load(ROOT / path, words, SegConfig).config
    with torch.device("meta"):
        model = models.build(cfg.model, pretrained=False)
        convert_norm(model, cfg.norm)
    losses.build(cfg)
    normed = [name for name, one in model.named_modules() if isinstance(one, torch.nn.BatchNorm2d)]
    assert normed and all(name.startswith("network.encoder.") for name in normed)
    assert cfg.optim.head_lr_factor == 3


def test_published_recipe():
    cfg = load(ROOT / "configs/seg/deeplabv3_resnet50_deconv.yaml", [], SegConfig).config
    assert (str(cfg.length), cfg.batch_size, cfg.optim.lr, cfg.optim.weight_decay) == ("30 epochs", 8, 0.1, 1e-4)
    assert (cfg.data.base_size, cfg.data.crop, cfg.data.scale) == (520, (480, 480), (0.5, 2.0))
    assert (cfg.optim.schedule, cfg.optim.power, cfg.norm.name) == ("poly", 0.9, "deconv")


def test_strong_recipe():
    cfg = load(ROOT / "configs/seg/fcn_resnet101_80k_bn.yaml", [], SegConfig).config
    assert (str(cfg.length), cfg.batch_size, cfg.optim.lr, cfg.optim.weight_decay) == ("80000 steps", 8, 0.01, 5e-4)
    assert cfg.data.crop == (512, 1024) and cfg.model.aux and cfg.model.backbone_weights == "torchvision"


@pytest.mark.parametrize("schema", [SegConfig, ClassifyConfig])
def test_a_data_sets_path_may_begin_at_home(schema: type[SegConfig | ClassifyConfig]) -> None:
    """Since a shell leaves data.root=~/x as it is."""
    plain = {"length": "1 epoch", "batch_size": 1, "data": {"root": "~/x"}}
    assert schema.model_validate(plain).data.root == Path.home() / "x"


@pytest.mark.parametrize(
    ("schema", "key"), [(SegConfig, "weights"), (SegConfig, "backbone_weights"), (ClassifyConfig, "weights")]
)
def test_the_path_of_weights_too(schema: type[SegConfig | ClassifyConfig], key: str) -> None:
    for given, path in (("~/x.pth", str(Path.home() / "x.pth")), ("pretrained", "pretrained")):
        plain = {"length": "1 epoch", "batch_size": 1, "model": {key: given}}
        assert getattr(schema.model_validate(plain).model, key) == path
