"""Train a classifier: the central chapter. Everything it uses has a file of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from classify import losses, network
from classify.config import ClassifyConfig
from classify.data import describe, eval_batches, train_batches
from classify.evaluate import check_classes, evaluate_model
from classify.scores import left_out
from engine import distributed
from engine.config import Loaded
from engine.config_help import passed_over
from engine.loop import Evaluation, Result, fit
from engine.prepare import prepare, session
from engine.report import Log
from engine.resume import check_data, open_work_dir


def run(
    loaded: Loaded[ClassifyConfig], work_dir: Path | str, resume: str | None = None, accept_changes: bool = False
) -> Result:
    """Train, evaluate and save as the config says; goes on from a checkpoint if `resume` names one ("auto" or a path),
    with `accept_changes` where the keys of `engine.resume.ACCEPTED` differ too.

    Raises:
        UserError: bad data, config, checkpoint or work directory, or a loss that is not finite.
    """
    cfg = loaded.config
    with session(cfg.runtime) as device:
        info = describe(cfg.data)
        training = train_batches(cfg, device, distributed.world_size(), distributed.rank())
        validation = eval_batches(cfg, device, world=distributed.world_size(), rank=distributed.rank())
        with (
            open_work_dir(work_dir, loaded, resume, accept_changes) as state,
            Log(work_dir, cfg.report, resume=state) as log,
        ):
            images_of = {"train": training.digest, "val": validation.digest}
            if state is not None:  # a class folder that was renamed would give the others' images to other outputs
                check_classes(network.from_facts(state["meta"]), info, state["path"])
            check_data(images_of, state)
            later = state is None and network.fits_converted(cfg)
            model, weights = network.build(cfg.model, info, pretrained=state is None and not later)
            images = network.blank_images(info) if state else (batch["image"] for batch in training.epoch(0))
            groups = partial(network.parameter_groups, cfg=cfg.optim)
            prepared = prepare(model, cfg, groups=groups, images=images, blank=network.blank_images(info)[0])
            weights = network.fill(prepared.raw, cfg.model, info) if later else weights
            log.attach("norm.txt", prepared.report)  # a row for each layer; the lines that sum it up are printed
            summary = [line for line in prepared.report.splitlines() if " | " not in line]
            notes = [*([weights] if weights else []), *summary, *passed_over(loaded)]
            log.message("\n".join([*notes, f"work directory: {work_dir}"]))

            def evaluate(net: nn.Module, max_batches: int | None) -> Evaluation:
                scores = evaluate_model(net, cfg, info, validation, max_batches=max_batches)
                problems = {one for part in distributed.gather(training.problems) for one in part}
                lines = [scores.line(), *left_out(sorted({*problems, *scores.problems}))]
                text = "\n".join(lines) if max_batches is None else ""
                return Evaluation(scores.top1, scores.scalars(), {}, text, "top-1")

            return fit(
                prepared,
                cfg,
                training,
                loss=losses.build(cfg.loss),
                evaluate=evaluate,
                groups=prepared.groups,
                log=log,
                work_dir=work_dir,
                resume=state,
                meta={**network.facts(info), "data": images_of},
            )
