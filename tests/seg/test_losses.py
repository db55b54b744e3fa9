"""The loss of an experiment: heads, sums of losses, class weights, micro-batches, and options that would do nothing."""

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.errors import UserError
from seg import losses
from seg.config import DataConfig, LossConfig, ModelConfig, SegConfig
from seg.rare import class_weights


class Fixed(nn.Module):
    """A network whose heads' logits are given."""

    def __init__(self, **heads):
        super().__init__()
        self.heads = heads

    def forward(self, images):
        return self.heads


def config(aux: bool = False, data: DataConfig | None = None, **options) -> SegConfig:
    model, data = ModelConfig(aux=aux), data or DataConfig()
    return SegConfig(length="1 steps", batch_size=1, loss=LossConfig(**options), model=model, data=data)


def batch(target):
    return {"image": torch.zeros(len(target), 3, 4, 4), "target": target, "name": ["a"]}


def plain(logits, target, weights):
    total = count = 0.0
    for n, y, x in torch.cartesian_prod(*(torch.arange(s) for s in target.shape)).tolist():
        label = int(target[n, y, x])
        if label != 255:
            total -= float(logits[n, :, y, x].log_softmax(0)[label]) * weights[label]
            count += weights[label]
    return total, count


def labels(*shape: int) -> torch.Tensor:
    target = torch.randint(0, 19, shape)
    target[0, :2] = 255
    return target


@pytest.mark.parametrize("weights", [None, tuple(0.5 + 0.1 * i for i in range(19))])
def test_cross_entropy_is_a_sum_over_valid_pixels(weights):
    torch.manual_seed(0)
    logits, aux, target = torch.randn(2, 19, 4, 5), torch.randn(2, 19, 4, 5), labels(2, 4, 5)
    cfg = config(True, class_weights=weights, aux_weight=0.4)
    found = losses.build(cfg)(Fixed(out=logits, aux=aux), batch(target))
    main, count = plain(logits, target, weights or [1.0] * 19)
    side, _ = plain(aux, target, weights or [1.0] * 19)
    assert found.total.item() == pytest.approx(main + 0.4 * side, rel=1e-5)
    assert found.weight.item() == pytest.approx(count)
    assert {k: v.item() for k, v in found.parts.items()} == pytest.approx({"main": main, "aux": side}, rel=1e-5)


def test_the_auxiliary_heads_mean_is_its_own():
    """ohem keeps another number of pixels in each head."""
    torch.manual_seed(0)
    logits, aux, target = torch.randn(2, 19, 4, 5), 4 * torch.randn(2, 19, 4, 5), labels(2, 4, 5)
    build = losses.build(config(True, name="ohem", ohem_threshold=0.05))
    found = build(Fixed(out=logits, aux=aux), batch(target))
    side = losses.build(config(name="ohem", ohem_threshold=0.05))(Fixed(out=aux), batch(target))
    assert side.weight != found.weight
    assert found.parts["aux"] / found.weight == pytest.approx((side.total / side.weight).item(), rel=1e-5)
    assert found.total == pytest.approx((found.parts["main"] + 0.5 * found.parts["aux"]).item(), rel=1e-6)


def test_a_sum_of_losses_adds_their_means():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 19, 4, 5), labels(2, 4, 5)
    weights = tuple(0.5 + 0.1 * i for i in range(19))
    cfg = config(terms={"cross_entropy": 1.0, "dice": 0.5, "lovasz": 2.0}, class_weights=weights)
    found = losses.build(cfg)(Fixed(out=logits), batch(target))
    assert found.weight == (target != 255).sum()
    assert list(found.parts) == ["main", "cross_entropy", "dice", "lovasz"]
    alone = {
        "cross_entropy": losses.build(config(class_weights=weights)),
        "dice": losses.build(config(name="dice")),
        "lovasz": losses.build(config(name="lovasz")),
    }
    want = 0.0
    for name, factor in cfg.loss.terms.items():
        one = alone[name](Fixed(out=logits), batch(target))
        assert found.parts[name] / found.weight == pytest.approx((one.total / one.weight).item(), rel=1e-5)
        want += factor * (one.total / one.weight).item()
    assert found.total / found.weight == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name, exact", [("cross_entropy", True), ("focal", True), ("boundary", True), ("dice", False)])
def test_micro_batches_accumulate(name, exact):
    """Losses over pixels: two micro-batches give what both at once do. A region loss: their mean by labelled pixels."""
    torch.manual_seed(0)
    logits, target = torch.randn(2, 19, 4, 5), labels(2, 4, 5)
    loss = losses.build(config(name=name))
    both = loss(Fixed(out=logits), batch(target))
    halves = [loss(Fixed(out=logits[i : i + 1]), batch(target[i : i + 1])) for i in range(2)]
    total, weight = (sum(one[i] for one in halves).item() for i in range(2))
    values, pixels = [(one.total / one.weight).item() for one in halves], [10, 20]
    if exact:
        assert (total, weight) == pytest.approx((both.total.item(), both.weight.item()), rel=1e-5)
    else:
        assert weight == 30
        assert total / weight == pytest.approx(sum(v * n for v, n in zip(values, pixels, strict=True)) / 30, rel=1e-5)
        assert min(values) < total / weight < max(values)


@pytest.mark.parametrize(
    "options", [{}, {"class_weights": (1.0,) * 19}, {"terms": {"ohem": 1, "dice": 1, "lovasz": 1, "focal": 2}}]
)
def test_a_crop_without_labels_gives_a_finite_zero(options):
    logits = torch.randn(1, 19, 4, 4, requires_grad=True)
    found = losses.build(config(**options))(Fixed(out=logits), batch(torch.full((1, 4, 4), 255)))
    found.total.backward()
    assert found.total.item() == 0 and found.weight.item() == 0 and logits.grad.abs().sum() == 0


@pytest.mark.parametrize("name", losses.available())
def test_half_precision_logits_are_summed_in_float32(name):
    torch.manual_seed(0)
    logits = (4 * torch.randn(1, 19, 200, 200)).half()
    target = labels(1, 200, 200)
    loss = losses.build(config(name=name))
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(Fixed(out=logits), batch(target))
    full = loss(Fixed(out=logits.float()), batch(target))
    assert half.total == full.total and half.total.dtype == torch.float32 and half.total.isfinite()


def test_automatic_class_weights_are_counted_and_kept(sample_root: Path, tmp_path: Path):
    torch.manual_seed(0)
    data = DataConfig(root=sample_root)
    cfg = config(data=data, class_weights="auto")
    logits, target = torch.randn(2, 19, 4, 5), labels(2, 4, 5)
    found = losses.build(cfg, cache=tmp_path / "run")(Fixed(out=logits), batch(target))
    total, weight = plain(logits, target, class_weights(cfg))
    assert (found.total.item(), found.weight.item()) == pytest.approx((total, weight), rel=1e-5)
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_unknown_names_and_weights_that_do_not_fit():
    with pytest.raises(UserError, match="loss.name: unknown loss 'focl'; did you mean focal.; known: boundary, cross"):
        losses.build(config(name="focl"))
    with pytest.raises(UserError, match="loss.terms: unknown loss 'jaccard'; known: boundary, cross_entropy, dice"):
        losses.build(config(terms={"dice": 1, "jaccard": 1}))
    with pytest.raises(UserError, match="found 2 weights; expected 19, .* in the order road, sidewalk"):
        losses.build(config(class_weights=(1.0, 2.0)))
    with pytest.raises(UserError, match="found 19 weights, all zero"):
        losses.build(config(class_weights=(0.0,) * 19))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"focal_gamma": 3.0}, "loss.focal_gamma: 3.0 has no effect with the loss cross_entropy; .* use focal"),
        ({"name": "dice", "class_weights": (1.0,) * 19}, "loss.class_weights: .* no effect with the loss dice"),
        ({"name": "lovasz", "class_weights": "auto"}, "loss.class_weights: auto has no effect with the loss lovasz"),
        ({"name": "ohem", "label_smoothing": 0.1}, "label_smoothing: 0.1 .* ohem; .* use cross_entropy or boundary"),
        ({"terms": {"focal": 1, "dice": 1}, "ohem_share": 0.5}, "ohem_share: 0.5 has no effect .* focal . dice"),
        ({"boundary_width": 3}, "loss.boundary_width: 3 has no effect with the loss cross_entropy"),
        ({"aux_weight": 0.4}, "loss.aux_weight: 0.4 has no effect without an auxiliary head; set model.aux=true"),
    ],
)
def test_an_option_without_effect_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        losses.build(config(**options))


def test_a_name_beside_terms_is_refused():
    with pytest.raises(ValueError, match="name: dice has no effect beside terms; name it there"):
        LossConfig(name="dice", terms={"focal": 1.0})
