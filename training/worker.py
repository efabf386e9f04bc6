"""What runs in each worker of a stage: build, go on from the last checkpoint, train, hand over.

The order of starts: the run's own checkpoint, else the parent's weights under the init policy,
else fresh ones.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from infra.errors import UserError
from infra.same_code import check_same_code
from infra.tracking import RestTracker
from model import ModelError
from training.checkpoint_store import CheckpointStore, Loaded, load_together
from training.encoding_news import EncodingNews
from training.fit import fit
from training.guard import WentBack
from training.job import Job
from training.journal import Journal, ProgressFile, Tracker
from training.keeper import Keeper
from training.masked_run import MaskedRun
from training.session import RaySession, Session
from training.stall import StallWatch, keep_report
from training.suspects import SuspectWatch
from training.tokenizer_run import TokenizerRun
from training.utilisation import peak_teraflops
from training.waste import LOST_WORKER, Start, record_start


def train_worker(raw: dict[str, Any]) -> None:
    """Run a stage as a worker of Ray Train; ``raw`` is what ``Job.parse`` reads.

    A configuration or a model that does not fit, and a loss that is not finite, raise
    ``UserError``: trying again would end the same.
    """
    check_same_code()
    train(Job.parse(raw), RaySession())


def train(job: Job, session: Session, tracker: Tracker | None = None) -> None:
    """Run a stage to its end in this session; its last checkpoint holds ``export/``."""
    use_threads(job.cpus)
    try:
        run = build_run(job, session, tracker)
        store = CheckpointStore(job.run_uri)
        found = find_checkpoint(job, session, store)
        if found is not None:
            run.restore(found.checkpoint)
            if found.is_finished:
                return
        limit = run.config.max_step_minutes
        stall = StallWatch(
            job.run_uri, session.rank, None if limit is None else 60.0 * limit, job.local_dir
        )
        start = _record_start(job, run, found, bool(stall.found)) if session.rank == 0 else None
        was_lost = session.from_first(start is not None and start.cause in LOST_WORKER)
        suspects = SuspectWatch(job.run_uri, session.rank, job.attempt, run.step, was_lost)
        journal = _journal(job, run, session, tracker)
        keeper = Keeper(job, session, run, journal, store, stall, suspects)
        try:
            if stall.found:
                uri = keep_report(job.run_uri, job.attempt, session.rank, run.step, stall.found)
                journal.note("hung", f"no step for {limit:g} minutes; its threads: {uri}")
            if suspects.found is not None:
                journal.note("lost", f"the worker before was lost in {suspects.found}")
            if start is not None:
                journal.note("started", f"attempt {start.attempt}: {start.how}")
            if found is not None:
                keeper.restored(found)
            del found  # as large as all weights, their average and their moments
            _train(run, keeper, session)
        finally:
            keeper.close()
            journal.close()
    except ModelError as error:
        raise UserError(str(error)) from error


def _train(run: MaskedRun | TokenizerRun, keeper: Keeper, session: Session) -> None:
    """All steps, from earlier ones again when the guard says so."""
    keeper.start()
    while run.step < run.num_steps:
        try:
            fit(run, keeper, session.world_size, session.in_ray)
        except WentBack as why:
            keeper.go_back(why)
    keeper.finish()


def _record_start(
    job: Job, run: MaskedRun | TokenizerRun, found: Loaded | None, was_hung: bool
) -> Start:
    """Whether this goes on or begins, and with what, as a fact of the run."""
    init = run.init_record
    if found is not None:
        how = f"RESUME from the checkpoint of step {found.stored.step}"
    elif init.get("num_inherited"):
        whose = "the parent" if init.get("source") == "parent" else "a published folder"
        num_new = len(init.get("new_keys", ()))
        how = f"INIT with {init['num_inherited']} parameters of {whose} and {num_new} new"
    else:
        how = f"INIT with {init.get('source')} weights"
    damaged = None if found is None else found.newest_damaged
    return record_start(job.run_uri, job.attempt, how, run.step, was_hung, damaged)


def use_threads(cpus: int | None) -> None:
    """As many threads as the worker was given; Ray says it by OMP_NUM_THREADS."""
    given = cpus if cpus is not None else int(os.environ.get("OMP_NUM_THREADS") or 0)
    if given > 0:
        torch.set_num_threads(given)


def build_run(
    job: Job, session: Session, tracker: Tracker | None = None
) -> MaskedRun | TokenizerRun:
    """The stage with its networks where they start, and all that it trains on encoded."""
    if job.kind == "masked":
        news = EncodingNews(job, int(job.configs["stage"]["steps"]), tracker)
        try:
            return MaskedRun.build(job, session, news.tell)
        finally:
            news.close()
    if session.world_size > 1:
        raise UserError("the tokenizer stage trains on one worker; set its number of workers to 1")
    return TokenizerRun.build(job)


def find_checkpoint(job: Job, session: Session, store: CheckpointStore) -> Loaded | None:
    """The run's own newest checkpoint whose bytes are right: the same one for every worker.

    Raises ``UserError`` when the plan saw one and none is there: a run that is to go on never
    begins anew without a word.
    """
    found = load_together(store, session, job.stage_key)
    if found is None and job.resume_step is not None:
        raise UserError(
            expected=f"the checkpoint of step {job.resume_step} under {store.uri}",
            got="none",
            remedy="restore it, or run the same command again to train the stage anew",
        )
    return found


def _journal(
    job: Job, run: MaskedRun | TokenizerRun, session: Session, tracker: Tracker | None
) -> Journal:
    interval = run.config.log_interval_steps
    if session.rank != 0:
        return Journal(run.num_steps, interval)
    if tracker is None and job.tracking_uri is not None and job.mlflow_run_id is not None:
        tracker = RestTracker(job.tracking_uri, job.mlflow_run_id)
    progress = ProgressFile(job.progress_uri, run.num_steps, job.attempt)
    progress.update(num_workers=session.world_size)
    peak = peak_teraflops()
    return Journal(
        run.num_steps,
        interval,
        tracker,
        progress,
        run.flops_per_image(),
        None if peak is None else peak * session.world_size,
    )
