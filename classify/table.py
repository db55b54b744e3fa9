"""The paper's Tables 1 and 2: every network with every norm, trained one after the other.

What is finished is read from the cells' work directories, what is not goes on there: a table that was stopped goes on
where it was.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from classify import table_files
from classify.table_cells import Cell, Outcome, Outcomes, Request, cells, parameters
from engine import distributed, grid
from engine.errors import UserError
from engine.prepare import session


def listing(wanted: Request) -> str:
    """The plan: every cell, whether it is done, and where it is. Raises UserError as `cells` and `grid.look`."""
    return grid.listing(cells(wanted, wanted.networks))


def make(wanted: Request) -> bool:
    """Train what is missing and write the table's files after each cell; False if a signal stopped it or a cell failed.

    A cell that fails with a UserError, or for want of memory, is named in the table and the next one is trained; among
    several processes it ends the program, since the others would wait.

    Raises:
        UserError: as `cells` and `grid.look`, before anything is trained.
    """
    todo = cells(wanted, wanted.networks)
    known = {cell.key: _known(cell) for cell in todo}
    others = table_files.other_networks(wanted)
    shown = replace(
        wanted,
        variants=(*wanted.variants, *table_files.other_variants(wanted)),
        networks=(*wanted.networks, *others),
    )
    for variant in shown.variants:
        for name in table_files.rows(shown):
            if variant not in wanted.variants or name not in wanted.networks:
                earlier = _earlier(replace(wanted, variants=(variant,)), name)
                known.update({found.cell.key: found for found in earlier})
    there = {part for key, found in known.items() if found.state != "open" for part in key[:2]}
    shown = replace(
        shown,
        variants=tuple(one for one in shown.variants if one in wanted.variants or one.slug in there),
        networks=tuple(one for one in shown.networks if one in wanted.networks or one in there),
    )
    with session(todo[0].loaded.config.runtime):
        known, shown = distributed.gather((known, shown))[0]  # all must train the same cells, whatever each has read
        if grid.train_missing(todo, known, _train, partial(_write, shown, known), _say):
            _say(f"stopped by a signal; the same command goes on. So far: {wanted.folder / 'table.md'}")
            return False
        _say(grid.summary({cell.key: known[cell.key] for cell in todo}, wanted.folder / "table.md"))
    return all(known[cell.key].state == "done" for cell in todo)


def _known(cell: Cell) -> Outcome:
    found = grid.look(cell)
    return replace(found, parameters=parameters(cell)) if found.state == "done" and distributed.is_main() else found


def _earlier(wanted: Request, network: str) -> list[Outcome]:
    """What earlier starts left of a network's cells, if they were made with the same settings."""
    try:
        return [_known(cell) for cell in cells(wanted, [network])]
    except UserError:
        return []


def _train(cell: Cell) -> tuple[Outcome, bool]:
    """The outcome, the same on all processes, and whether a signal stopped it."""
    from classify import train

    try:
        result = train.run(cell.loaded, cell.run, "auto")
    except (UserError, torch.OutOfMemoryError) as error:
        if distributed.world_size() > 1:
            raise
        _say(f"failed: {error}")
        return Outcome(cell, "failed", reason=str(error).strip().splitlines()[0]), False
    return distributed.gather(_known(cell))[0], result.stopped


def _write(wanted: Request, known: Outcomes) -> None:
    if distributed.is_main():
        table_files.write(wanted, known)


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)
