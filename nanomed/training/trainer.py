"""fit(): the training loop of every stage."""

from pathlib import Path

from torch import nn
from tqdm import tqdm

from nanomed.batches.loader import Loader
from nanomed.config import InputError, Run
from nanomed.distributed import from_main
from nanomed.run import checkpoint
from nanomed.run.log import Meter, RunFolder, step_line
from nanomed.run.progress import is_terminal
from nanomed.training.dropout import say_dropout
from nanomed.training.faults import Signals, Spikes, Stopped, note_bad, note_spike
from nanomed.training.optim import adamw, lr_at
from nanomed.training.step import Loss, Step, evaluate, reduced, train_step


def fit(c: Run, model: nn.Module, loader: Loader, loss: Loss, run: RunFolder) -> None:
    """Trains the sharded model in place, from run.resume_from if there is one. The best
    checkpoint by validation loss is run.checkpoints/best. Every rank calls it.

    Raises SystemExit if a signal asked it to end (it has saved then), and InputError after
    c.max_bad steps in a row that could not be applied (or if the run has no other), or if the
    last save failed."""
    from nanomed.run.saves import Saver  # slow to import: not before training begins

    optimizer = adamw(model, c.weight_decay)  # before the first forward: see shard()
    checkpoint.check_space(run.checkpoints, model, _most_checkpoints(c, loader))
    saver, start = Saver(c, model, optimizer, run), 0
    if run.resume_from:
        start = checkpoint.load(run.resume_from, model, optimizer)["step"]
        run.print(f"resumed from {run.resume_from} after step {start}")
        validated = from_main(checkpoint.is_validated(run.resume_from))
        if _due(c.eval_every, loader, start) and not validated:
            saver.validated(evaluate(model, loader, loss, run, start))
    else:
        if c.dropout:
            say_dropout(c.dropout, model, loader, run)
        evaluate(model, loader, loss, run, start)

    meter, spikes = Meter(model.config, run.world.size), Spikes()
    n_bad, shown = 0, run.world.is_main and is_terminal()
    bar = tqdm(total=loader.n_steps, initial=start, unit="step", disable=not shown)
    with Signals() as signals, saver, bar:
        for step in range(start, loader.n_steps):
            lr = lr_at(c, step, loader.n_steps)
            stop = bool(signals.received)
            result = train_step(c, model, optimizer, loader, loss, step, lr, meter, stop)
            done = step + 1
            bar.update()
            n_bad = 0 if result.applied else n_bad + 1
            if not result.applied:
                saver.wait()  # it names the last checkpoint before the step
                note_bad(run, loader, step, lr, result)
            elif done % c.log_every == 0 or done in (1, loader.n_steps):
                _log(run, loader, meter, bar, step, lr, result)
            if result.applied and spikes.is_spike(result.loss):
                note_spike(run, loader, step, result.loss)

            too_many = n_bad == min(c.max_bad, loader.n_steps)
            ends = result.stop or too_many
            evaluates = _due(c.eval_every, loader, done) and not ends
            saves = evaluates or ends or (c.save_every > 0 and done % c.save_every == 0)
            if saves:
                saver.save(done)  # before what may fail
            if evaluates:
                try:
                    saver.validated(evaluate(model, loader, signals.heeded_in(loss), run, done))
                except Stopped:  # a resume begins with this validation
                    ends = True
            saver.poll()
            if saves:
                meter.restart()
            if ends:
                saver.wait()
                _end(run, signals, done, saver.saved, n_bad if too_many else 0)
    # All ranks hear it from rank 0, so none of them looks for `best` before that has moved it.
    if from_main(saver.saved is None):
        raise InputError(
            f"the last checkpoint could not be saved; make room and go on with --out {run.path} "
            "--resume"
        )


def _due(every: int, loader: Loader, done: int) -> bool:
    """Whether something that happens every `every` steps (0: at each epoch's end), and always at
    the end, happens after `done` steps."""
    return done % (every or loader.steps_per_epoch) == 0 or done == loader.n_steps


def _most_checkpoints(c: Run, loader: Loader) -> int:
    """That are on the disk at once: those kept, the best one, and the one being written."""
    every = filter(None, (c.save_every, c.eval_every or loader.steps_per_epoch))
    saved = {step for n in every for step in (*range(n, loader.n_steps, n), loader.n_steps)}
    return min(c.keep_last + 2, len(saved))


def _log(
    run: RunFolder, loader: Loader, meter: Meter, bar: tqdm, step: int, lr: float, result: Step
) -> None:
    values = {"step": step + 1, "lr": lr, **reduced(result, loader.divisor(step), meter)}
    run.metrics(**values)
    run.print(step_line(step + 1, loader.n_steps, values))
    bar.set_postfix_str(
        f"loss {values['loss']:.3f}, lr {lr:.1e}, {values['tokens_per_s']:,.0f} tok/s"
    )


def _end(run: RunFolder, signals: Signals, done: int, saved: Path | None, n_bad: int) -> None:
    where = f"saved in {saved}" if saved else "NOT saved"
    again = f"go on with the same command and --out {run.path} --resume"
    if n_bad:
        raise InputError(
            f"{n_bad} steps in a row (--max_bad), the last of them {done}, had a loss or gradient "
            f"that is not finite; look into {run.path / 'bad_batches'}. The weights before them "
            f"are {where}; {again}, or start again with a lower --lr"
        )
    run.print(f"ended by a signal after step {done}, {where}; {again}")
    raise SystemExit(128 + (signals.received or Signals.NUMBERS[0]))
