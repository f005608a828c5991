"""The loop around the pure step: from the newest checkpoint, or the first step, to the report.

A step's metrics are fetched while the next step runs. A checkpoint is written only after the loss *of the state that it
holds* has been seen to be finite (in the evaluation that is due there, or on the batch just trained on), so that there
is always something good to go back to. Everything that a step reads is in the state or follows from the data position,
both saved together; rows of metrics.jsonl beyond the checkpoint are taken back and made again.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxpeft import compilation, data, distributed, documents, files, recipe, shares
from jaxpeft.checkpoint import DAMAGED, Checkpoints, foreign
from jaxpeft.errors import InputError, RunError
from jaxpeft.method import about
from jaxpeft.model import Batch
from jaxpeft.train import config, ending, memory, several
from jaxpeft.train.compiled import Compiled
from jaxpeft.train.evaluate import Answers, Question, answer
from jaxpeft.train.metrics import MetricsLog, Unwritten
from jaxpeft.train.metrics import read as read_metrics
from jaxpeft.train.prepare import Job
from jaxpeft.train.progress import Progress, ranges, say
from jaxpeft.train.report import SCORES, build_report, write_curve
from jaxpeft.train.run import Run
from jaxpeft.train.signals import Signals
from jaxpeft.train.state import TrainState
from jaxpeft.train.step import make_train_step
from jaxpeft.train.trace import Trace
from jaxpeft.train.uncertainty import PASSES, make_uncertainty, uncertainties


class _Pending(NamedTuple):
    """A step whose metrics have not been fetched yet.

    asked: of several processes, the signal that one of them has received.
    """

    step: int
    metrics: Any
    lines: list[list[int]]
    tokens: int
    asked: Any = None


class _Stopped(Exception):
    """A signal came in during an evaluation."""


class Loop:
    """One run in this process: what its parts share."""

    def __init__(self, args: Run, job: Job, document: Mapping[str, Any], checkpoints: Checkpoints, signals: Signals):
        self.args, self.job, self.checkpoints, self.signals = args, job, checkpoints, signals
        assert args.out is not None
        self.out = args.out
        options: dict[str, Any] = {"rate": job.schedule, "weight_decay": job.weight_decay}
        options["update_in_backward"] = args.update_in_backward
        step = make_train_step(job.model, job.method, job.optimizer, job.task.loss, args.accumulate, **options)
        self.step = Compiled(step, steps=True, mesh=job.mesh, rows=job.rows)
        self.eval_step = Compiled(job.task.eval_step(job.model), mesh=job.mesh, rows=job.rows)
        measure = functools.partial(make_uncertainty, job.model, args.uncertainty or "predictive")
        self.uncertainty = {n: Compiled(measure(n), mesh=job.mesh, rows=job.rows) for n in (0, PASSES)}  # passes
        # Of several processes, one may be asked to stop: all have to hear of it at the same step.
        self._largest = shares.Largest(job.mesh) if job.mesh is not None and job.rows is not None else None
        self._asked = 0
        self.state: TrainState = job.state
        self.trace = Trace(self.out / "trace", args.profile_steps, args.profile_process)
        self.identity, self.has_own = config.identity(document), bool(job.own)
        # What a checkpoint's meta holds beside the data position.
        self.done, self.tokens, self.loss = 0, 0, float("nan")
        self.eval_step_number: int | None = None
        self.scores: dict[str, float | None] = {}  # of the last evaluation
        self.before: dict[str, Any] = {"scores": {}, "overlap": None, "exact": None, "texts": [], "in_context": None}

    def whole(self, started: float) -> dict[str, Any]:
        """From where the newest checkpoint is to the report."""
        resumed = self._restore()
        self.log = MetricsLog(self.out, resumed) if distributed.is_first() else Unwritten(self.out)
        try:
            with self.log:
                if resumed is None:
                    self._begin()
                elif self._evaluation_due() and self.eval_step_number != self.done:
                    self._evaluate_late()
                quiet = None if distributed.is_first() else io.StringIO()
                with contextlib.closing(self.trace), Progress(self.args.steps, self.done, quiet) as self.progress:
                    self._steps()
            return self._finish(started, resumed)
        except (InputError, RunError, OSError):
            self._check_there()  # which says more
            raise

    def _restore(self) -> int | None:
        """Continues from the newest checkpoint; its step, None where there is none."""
        latest = self.checkpoints.latest()
        self._say_damaged(latest)
        if latest is None:
            if self.args.resume:
                what = "no whole checkpoint" if self.checkpoints.damaged else "no checkpoint yet"
                say(f"{self.out}: {what}: from the beginning")
            return None
        if why := foreign(self.checkpoints.folder, latest, self.identity):
            others = [step for step in self.checkpoints.steps() if step != latest]
            left = f"; without it the run goes on from step {others[-1]}" if others else ""
            raise RunError(f"{self.checkpoints.folder / str(latest)}: {why}{left}", 2)
        self.state, meta = self.checkpoints.restore(self.state)
        meta = documents.checked(f"{self.out / 'checkpoints' / str(latest)}: meta", config.Progress, meta)
        self.job = self.job._replace(state=self.state, own={})  # frees what was made for the first step
        self.job.data.train.set_state(meta["data"])
        self.done, self.tokens, self.loss = latest, meta["tokens"], meta["loss"]
        self.before, self.scores, self.eval_step_number = meta["before"], meta["last_scores"], meta["eval_step"]
        say(f"{self.out}: continuing from step {latest}")
        log = self.out / "metrics.jsonl"
        there = {row["step"] for row in read_metrics(log) if row.get("split") == "train"} if log.exists() else set()
        if lost := sorted(set(range(1, latest + 1)) - there):
            say(f"{log}: the rows of steps {ranges([lost])} are missing; the run goes on without them")
        return latest

    def _say_damaged(self, latest: int | None) -> None:
        """The checkpoints that could not be used, and what that costs."""
        lost = max(self.checkpoints.damaged, default=0) - (latest or 0)
        for step, reason in sorted(self.checkpoints.damaged.items()):
            folder = self.out / "checkpoints"
            say(f"{folder / str(step)}: damaged ({reason}); put aside in {folder / DAMAGED}")
        if lost > 0:
            say(f"{self.out}: {lost} steps are lost and taken again")

    def _begin(self) -> None:
        """Scores what training starts from: the base, with what the method or an adapter has put on it."""
        self.checkpoints.save_frozen(self.job.own)
        if self.args.warmup >= self.args.steps > 1:
            say(f"--warmup {self.args.warmup}: the rate reaches its peak in none of the {self.args.steps} steps")
        for spec in self.job.method.specs:
            option = about(spec.name).steps if not self.args.adapter else ""
            if option and spec.config[option] >= self.args.steps:
                took = f"{spec.name}'s {option}={spec.config[option]}"
                say(f"--steps {self.args.steps}: {took} steps are not over by then")
        if self.job.data.validation or self.job.data.asked:
            say("before the first step: compiling, and scoring what training starts from")
        answers = self._answer(self.job.data.asked)
        if self.job.data.validation:
            self._evaluate()
        self.before = {**answers._asdict(), "scores": self.scores, "in_context": self._in_context()}

    def _steps(self) -> None:
        """The steps that are left."""
        pending: _Pending | None = None
        while self.done < self.args.steps:
            self._stop_if_asked()
            self._check_there()
            self._next_round()
            batch, lines = next(self.job.data.train)
            tokens = self.job.data.train.tokens
            self.trace.before(self.done + 1)
            self.state, metrics = self.step(self.state, batch)
            asked = self._largest(self.signals.received or 0) if self._largest else None
            self.done += 1
            if pending:
                self._account(pending)
            pending = _Pending(self.done, metrics, lines, tokens, asked)
            self.trace.after(self.done, metrics)
            self.checkpoints.check()
            if self._evaluation_due() or self._checkpoint_due() or self._stopping():
                self._account(pending)
                self._pause(batch, pending)
                pending = None
        self._stop_if_asked()

    def _next_round(self) -> None:
        """Of data that grow in rounds: those of the round that this step is in (see `jaxpeft.data.rounds`)."""
        if self.args.rounds is None:
            return
        rounds, args = self.job.data.train, self.args
        assert isinstance(rounds, data.Rounds) and args.seq_len is not None
        due = self.done * rounds.rounds // args.steps
        while rounds.base is None or rounds.round < due:
            numbers = rounds.left() if rounds.base is not None else list(range(rounds.count))
            step = self.uncertainty[0 if rounds.base is None else PASSES]
            batches = rounds.of(numbers, args.batch_size, args.seq_len) if numbers else ()
            found = uncertainties(step, self.state, batches, len(numbers))
            if rounds.base is None:
                rounds.base = found
            else:
                rounds.add(found)
                say(f"round {rounds.round + 1} of {rounds.rounds}: {len(rounds.chosen)} examples")

    def _stopping(self) -> int | None:
        """The signal that asks for the end; of several processes, one that all of them know of."""
        return self._asked or None if self._largest else self.signals.received

    def _check_there(self) -> None:
        """Raises RunError if the folder, or something in it, was deleted or moved away: nothing is made there again."""
        if not distributed.is_first():
            return
        there = {
            self.out: self.out.exists(),
            self.checkpoints.folder: self.checkpoints.there(),
            self.log.path: self.log.there(),
            self.out / config.FILE: (self.out / config.FILE).exists(),
        }
        if gone := [path for path, is_there in there.items() if not is_there]:
            what = self.out if len(gone) > 2 else gone[0]  # a checkpoint's write may have made it anew
            raise RunError(f"{what}: deleted or moved while the run was going, which has ended at step {self.done}", 2)

    def _pause(self, batch: Batch, last: _Pending) -> None:
        """Between two steps: what is due of an evaluation and a checkpoint."""
        best = self.checkpoints.loss(self.checkpoints.best())
        if self._evaluation_due():
            with contextlib.suppress(_Stopped):  # it is done when the run is continued
                self._evaluate()
        evaluated = self.eval_step_number == self.done
        loss = self._loss() if evaluated else None
        if loss is None:
            loss = self._score([batch])["loss"]
        if not math.isfinite(loss):
            self._not_finite(last, "loss after the update", loss)
        improved = evaluated and (best is None or loss < best) and self.args.checkpoint_every
        if improved or self._checkpoint_due() or self._stopping():
            self._save()

    def _account(self, pending: _Pending) -> None:
        """Fetches a step's metrics, refuses what is not finite, and writes the row."""
        metrics = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        self._asked = self._asked or int(0 if pending.asked is None else pending.asked)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                self._not_finite(pending, name.replace("grad_norm", "gradient norm"), metrics[name])
        if not self.state.trainable:  # nothing has a gradient
            del metrics["grad_norm"]
        self.loss = metrics.pop("loss")
        self.tokens += pending.tokens
        self.log.write(
            {
                "step": pending.step,
                "split": "train",
                "loss": self.loss,
                "lr": metrics.pop("lr"),
                "tokens": self.tokens,
                self.job.task.counts: metrics.pop("weight"),
                **metrics,
            }
        )
        self.progress.update(pending.step, self.loss, pending.tokens)

    def _not_finite(self, at: _Pending, what: str, value: float) -> None:
        self.checkpoints.wait()
        latest = self.checkpoints.latest()
        good = f"last good checkpoint: step {latest}" if latest is not None else "no checkpoint has been written yet"
        raise RunError(
            f"step {at.step}: {what} is {value}; its batch is {self.job.source.train}, lines {ranges(at.lines)}; {good}"
        )

    def _evaluate(self) -> None:
        assert self.job.data.validation
        self.scores = self._score(self._until_stopped(self.job.data.validation()))
        self.eval_step_number = self.done
        self.log.write({"step": self.done, "split": "eval", **self.scores})

    def _score(self, batches: Iterable[Batch]) -> dict[str, Any]:
        scores = self.job.task.scores(self.eval_step, self.state, batches, len(self.job.data.labels))
        return scores if self.job.adapters is None else several.named(self.job.adapters, scores)

    def _classified(self) -> dict[str, tuple[float | None, float | None]]:
        """Scores of rows that are classified, before and now."""
        return {name: (self.before["scores"].get(name), x) for name, x in self.scores.items() if name in SCORES}

    def _loss(self) -> float | None:
        """The validation loss of the last evaluation."""
        return self.scores.get("loss")

    def _evaluate_late(self) -> None:
        """The evaluation that a signal cut off before the checkpoint; its row may be there from an earlier attempt."""
        log = self.out / "metrics.jsonl"
        wanted = ("eval", self.done)
        rows = lambda: [row for row in read_metrics(log) if (row["split"], row["step"]) == wanted]
        found = distributed.from_first(rows)
        if found:
            self.scores = {name: x for name, x in found[0].items() if name not in ("step", "split")}
            self.eval_step_number = self.done
        else:
            self._evaluate()

    def _until_stopped(self, batches: Iterable[tuple[Batch, Any]]) -> Iterator[Batch]:
        for batch, _ in batches:
            if self._stopping() and self.done:
                raise _Stopped
            yield batch

    def _answer(self, asked: Sequence[Question]) -> Answers:
        state = self.job.whole(self.state) if asked else self.state
        return answer(self.job.model, state, asked, self.job.tokenizer, self.job.data.ends)

    def _in_context(self) -> dict[str, Any] | None:
        """What the model does that is shown the examples of --shots; None without."""
        if self.job.data.in_context is None:
            return None
        given = self.job.data.in_context(self.job.model.config.max_position_embeddings)
        if given.fewer:
            say(f"--shots {self.args.shots}: {given.fewer} of {given.examples} validation examples have room for fewer")
        answers = self._answer(given.asked)
        loss = self._score(batch for batch, _ in given.batches())["loss"]
        return {"shots": self.args.shots, "eval_loss": loss, "overlap": answers.overlap, "exact": answers.exact}

    def _evaluation_due(self) -> bool:
        every = self.args.eval_every
        regular = every and self.done % every == 0
        return bool(self.job.data.validation and (regular or self.done in (0, self.args.steps)))

    def _checkpoint_due(self) -> bool:
        every = self.args.checkpoint_every
        return bool(self.done == self.args.steps or (every and self.done % every == 0))

    def _save(self) -> None:
        self._check_there()
        evaluated = self.eval_step_number == self.done
        meta = {
            "data": self.job.data.train.get_state(),
            "tokens": self.tokens,
            "loss": self.loss,
            "before": self.before,
            "eval_loss": self._loss() if evaluated else None,
            "last_scores": self.scores,
            "eval_step": self.eval_step_number,
            "run": self.identity,
            "frozen": self.has_own,
        }
        self.checkpoints.save(self.state, meta)

    def _stop_if_asked(self) -> None:
        if (number := self._stopping()) is None:
            return
        self.checkpoints.wait()
        where = f"at step {self.checkpoints.latest()}, which is saved" if self.done else "before the first step"
        raise RunError(
            f"{self.out}: stopped by {signal.Signals(number).name} {where}; --resume continues it", 128 + number
        )

    def _finish(self, started: float, resumed: int | None) -> dict[str, Any]:
        """The result, the report and the curve."""
        self.checkpoints.wait()
        answers = self._answer(self.job.data.asked)
        self._check_there()
        state, job = self.state, self.job
        ending.write_result(self.out, job, job.whole(state).params, self.args.rope_scaling)
        # A run that is resumed after its last step has compiled nothing yet.
        batch = next(job.data.train)[0]
        program = self.step.widest() or self.step.program(state, batch)
        batch = shares.shapes_of(batch, job.rows)
        best = self.checkpoints.best()
        report = build_report(
            out=self.out,
            method=recipe.spell(job.method.specs, " + ") if job.adapters is None else job.adapters.spelled(),
            steps=self.done,
            tokens=self.tokens,
            seconds=time.monotonic() - started,
            train_loss=self.loss,
            eval_loss=(self.before["scores"].get("loss"), self._loss()),
            overlap=(self.before["overlap"], answers.overlap),
            scores={"exact": (self.before.get("exact"), answers.exact), **self._classified()},
            in_context=self.before.get("in_context"),
            sample=ending.sample(job, self.before["texts"], answers.texts),
            **ending.counts(job, state),
            **ending.of_adapters(job, self.before["scores"], self.scores),
            memory=memory.step_memory(
                program,
                job.model,
                job.method,
                state,
                batch,
                job.base,
                self.args.accumulate,
                job.task.loss,
                self.args.update_in_backward,
            ),
            dtype=str(self.args.dtype),
            remat=self.args.remat,
            optimizer=job.direction,
            best_step=best,
            best_eval_loss=self.checkpoints.loss(best),
            resumed_from=resumed,
            compile_cache=compilation.in_use(),
            examples={name: report.to_json() for name, report in job.data.reports.items()},
        )
        if distributed.is_first():
            write_curve(self.out / "metrics.jsonl", self.out / "loss.png", job.task.unit)
            files.write_json(self.out / config.REPORT, report, allow_nan=False)
        return report
