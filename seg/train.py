"""Train a segmentation network: the central chapter. Everything it uses has a file of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from engine.config import Loaded
from engine.config_help import passed_over
from engine.distributed import rank, world_size
from engine.errors import UserError
from engine.loop import Evaluation, Result, fit
from engine.optim import parameter_groups
from engine.prepare import Prepared, prepare, session
from engine.report import Log
from engine.resume import check_data, open_work_dir, starts_anew
from seg import losses, models, start, weights
from seg.config import SegConfig
from seg.data import EvalBatches, TrainBatches, eval_batches, train_batches
from seg.evaluate import check_scorable, evaluate_model
from seg.label_tables import LabelTable
from seg.labels import check_unchanged, table
from seg.own_data import division


def run(
    loaded: Loaded[SegConfig], work_dir: Path | str, resume: str | None = None, accept_changes: bool = False
) -> Result:
    """Train, evaluate and save as the config says; goes on from a checkpoint if `resume` names one ("auto" or a path),
    with `accept_changes` where the keys of `engine.resume.ACCEPTED` differ too.

    Raises:
        UserError: bad data, config, checkpoint or work directory, or a loss that is not finite.
    """
    cfg = loaded.config
    if cfg.model.weights is None:
        weights.check_normalisation(cfg.model.backbone_weights, cfg.data.mean, cfg.data.std)
    with session(cfg.runtime):
        if cfg.model.weights is not None and starts_anew(work_dir, resume):
            start.check(cfg.model.weights)
        loss = losses.build(cfg, cache=Path(work_dir))
        labels = table(cfg.data)
        if labels.num_classes < 2:
            raise UserError(
                f"{labels.name}: has the class {labels.classes[0]!r} alone, so there is nothing to tell apart; give "
                "the rest a train_id of its own in place of ignoring it"
            )
        training = train_batches(cfg, world_size(), rank(), cache=Path(work_dir))
        validation = eval_batches(cfg, world=world_size(), rank=rank())
        check_scorable(cfg.data)
        with (
            open_work_dir(work_dir, loaded, resume, accept_changes) as state,
            Log(work_dir, cfg.report, resume=state) as log,
        ):
            images_of = {"train": training.digest, "val": validation.digest}
            check_data(images_of, state)
            if state:
                check_unchanged(cfg.data, state["meta"], state["path"])  # the file of labels may have changed
            prepared, started = _network(cfg, labels, training, resumed=state is not None)
            log.attach("norm.txt", prepared.report)  # a row for each layer; the lines that sum it up are printed
            summary = [line for line in prepared.report.splitlines() if " | " not in line]
            seen, split = _seen(training, validation), cfg.data.val_split
            note = [f"note: {split!r} is trained on too, so its scores are not those of other images"] if seen else []
            note += filter(None, [division(cfg.data)])
            log.message("\n".join([*started, *summary, *note, *passed_over(loaded), f"work directory: {work_dir}"]))

            def evaluate(network: nn.Module, max_batches: int | None) -> Evaluation:
                scores, panels = evaluate_model(network, cfg, batches=validation, max_batches=max_batches)
                scalars = {**scores.means(), **{f"IoU/{name}": value for name, value in scores.class_iou.items()}}
                text = scores.table() if max_batches is None else ""
                return Evaluation(scores.mean_iou, scalars, panels, text, "mIoU")

            return fit(
                prepared,
                cfg,
                training,
                loss=loss,
                evaluate=evaluate,
                groups=prepared.groups,
                log=log,
                work_dir=work_dir,
                resume=state,
                meta={"classes": list(labels.classes), "labels": labels.to_plain(), "data": images_of},
            )


def _network(cfg: SegConfig, labels: LabelTable, training: TrainBatches, resumed: bool) -> tuple[Prepared, list[str]]:
    """The network, ready to train, and lines for the log about the weights that it starts from; those of a run that is
    resumed come later."""
    given = None if resumed else cfg.model.weights
    model, said = models.build_and_tell(cfg.model, labels.num_classes, pretrained=not resumed and given is None)
    begun = None if given is None else start.Start(cfg, labels.classes, model)
    if begun is not None and not begun.converted:
        begun.fill(model)
    late = begun.fill if begun is not None and begun.converted else None
    images = models.blank_images() if resumed or late else (batch["image"] for batch in training.epoch(0))
    groups = partial(parameter_groups, cfg=cfg.optim, is_backbone=models.is_backbone)
    prepared = prepare(model, cfg, groups=groups, images=images, blank=models.blank_images()[0], fill=late)
    return prepared, begun.report(prepared.raw) if begun is not None else [said] if said else []


def _seen(training: TrainBatches, validation: EvalBatches) -> bool:
    """Whether images are both trained on and scored; a split such as VOC's trainval holds another one."""
    return not {sample.image for sample in training.samples}.isdisjoint(sample.image for sample in validation.samples)
