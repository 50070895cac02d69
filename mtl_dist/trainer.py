"""The loop: rounds, validation, checkpoints, and when to stop."""

import dataclasses
import logging
import signal

from accelerate import Accelerator

from mtl_dist.data.faults import DataError
from mtl_dist.data.workers import Rounds
from mtl_dist.engines import make_engine
from mtl_dist.evaluation import Evaluation, evaluate, examples, too_many_bad
from mtl_dist.experiment import Experiment, Plan
from mtl_dist.keeper import Keeper
from mtl_dist.monitor import Monitor
from mtl_dist.optim import make_optimizer, schedules, set_learning_rates
from mtl_dist.phases import Phases
from mtl_dist.round import RoundReport, run_round
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import StopRequest, precision_asked_for, world_of
from mtl_dist.stragglers import Stragglers
from mtl_dist.tables import results_table

log = logging.getLogger("mtl_dist")


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what to do. Raised by all ranks together."""


class Trainer:
    """One run of one experiment on one process of a world."""

    def __init__(
        self,
        experiment: Experiment,
        plan: Plan,
        accelerator: Accelerator,
        folder: RunFolder,
        stop: StopRequest,
        phases: Phases | None = None,
    ):
        self.experiment, self.plan, self.accelerator = experiment, plan, accelerator
        self.phases = phases or Phases()
        self.config, self.folder, self.stop = experiment.config, folder, stop
        self.main_clips = experiment.clips(self.config.train.main_task)
        self.rates = schedules(
            self.config.optim, {n: t.config for n, t in experiment.tasks.items()}
        )
        self.engine = make_engine(
            accelerator,
            experiment.build_model,
            lambda model: make_optimizer(model, self.config.optim, self.rates),
            clip_norm=self.config.optim.clip_norm,
            precision=precision_asked_for(self.config.train.mixed_precision),
        )
        self.keeper = Keeper(experiment, self.engine, folder, self.phases)
        self.state = self.keeper.resume_or_start()
        self.stragglers = Stragglers(accelerator, self.phases, folder, self.state.round)
        self.before = dataclasses.replace(self.state)  # bad files mended since then are forgiven
        self.is_main = accelerator.is_main_process
        metric, self.higher_is_better = experiment.tasks[self.config.train.main_task].best_metric
        self.best_metric = metric
        self.monitor: Monitor | None = None
        if self.is_main:
            self.save_status("running")
            folder.keep_lines_until(self.state.round)
            self.monitor = Monitor(
                folder, self.config, self.state.round, self.plan.rounds, self.plan.rounds_per_epoch
            )
            missing = [p for c in experiment.corpora.values() for p in c.all_missing()]
            if missing and self.state.round == 0:
                self.monitor.note(self.state.round, "missing_files", missing, len(missing))

    def train(self) -> dict[str, dict[str, dict[str, float]]] | None:
        """Train to the end and return {split: {task: {metric: number}}}, or None if it was asked to stop before.

        Raises:
            TrainingError: too many bad files, or too many rounds in a row with a non-finite loss.
            DataError: a shard cannot be read; on all ranks.
        """
        state, train = self.state, self.config.train
        rounds = self._rounds()
        first = state.round
        try:
            while state.round < self.plan.rounds and self._patient():
                report = self._one_round(rounds)
                self._watch(report)
                if self._due(train.validate_every or max(1, round(self.plan.rounds_per_epoch))):
                    self._validate()
                    due = not train.checkpoint_every or state.best_round == state.round
                else:
                    due = False
                stopping = report.stop or state.round - first == train.stop_after_rounds
                if due or stopping or not self._patient() or self._due(train.checkpoint_every):
                    self._save()
                if stopping and state.round < self.plan.rounds:
                    self.keeper.settle(state)
                    self._say(f"stopped after round {state.round}; go on with --run.resume auto")
                    return None
        finally:
            rounds.close()
        if not self._patient():
            self._say(
                f"no better validation in {train.patience}: stopped after round {state.round}"
            )
        return self._finish()

    def _one_round(self, rounds) -> RoundReport:
        """Take the next round from the loader, step, and count it. Where a rank has none, all save and raise DataError."""
        self.phases.enter("data", self.state.round + 1)
        round_ = next(rounds)
        assert round_.number == self.state.round, "the loader yields the rounds in order"
        done = self.state.round / self.plan.rounds
        rates = set_learning_rates(self.engine.inner_optimizer, self.rates, self.epoch(), done)
        try:
            report = run_round(
                self.engine,
                self.experiment.tasks,
                round_,
                schedule=self.config.train.schedule,
                stop=lambda: self.stop.signal is not None,
                phases=self.phases,
            )
        except DataError:
            if self.state.round > self.before.round:
                self._save()
            raise
        self.phases.enter("reporting")
        self.keeper.advance(round_.positions)
        self.state.advance(int(report.clips), len(report.bad), bool(report.nonfinite))
        due = self._due(self.config.train.log_every)
        times = self.stragglers.compare(self.state.round) if due else None
        if self.monitor is not None:
            self.monitor.round(self.state.round, report, rates, times)
        return report

    def _patient(self) -> bool:
        """Whether early stopping lets the run go on."""
        patience = self.config.train.patience
        return patience is None or self.state.validations_since_best < patience

    def epoch(self) -> int:
        """Return the number of whole passes over the main task's training clips so far."""
        return self.state.round * self.config.train.global_batch // self.main_clips

    def close(self) -> None:
        """Close what is open; a checkpoint that is being written becomes whole."""
        self.keeper.writer.shutdown()
        if self.monitor is not None:
            self.monitor.close()

    def save_status(self, state: str) -> None:
        """Say in status.json how the run stands."""
        if self.is_main:
            asked = self.stop.signal and signal.Signals(self.stop.signal).name
            self.folder.save_status(
                state, round=self.state.round, rounds=self.plan.rounds, signal=asked
            )

    def _say(self, text: str) -> None:
        if self.monitor is not None:
            self.monitor.say(text)

    def _rounds(self) -> Rounds:
        stream = self.experiment.rounds(
            world_of(self.accelerator),
            self.plan.accumulation,
            self.state.round,
            self.keeper.positions,
        )
        return stream.rounds(self.config.data.workers, self.accelerator.device.type == "cuda")

    def _due(self, every: int | None) -> bool:
        return self.state.round == self.plan.rounds or (
            bool(every) and self.state.round % every == 0
        )

    def _watch(self, report: RoundReport) -> None:
        """Report bad files and skipped rounds; when there are too many, save and end the run on all ranks."""
        state = self.state
        if report.bad and self.monitor is not None:
            self.monitor.trouble(state.round, "bad_files", report.bad, state.bad_clips)
        if report.nonfinite and self.monitor is not None:
            in_a_row = state.nonfinite_in_a_row
            self.monitor.trouble(state.round, "nonfinite_losses", report.nonfinite, in_a_row)
        if report.bad:
            clips = state.clips - self.before.clips
            bad = state.bad_clips - self.before.bad_clips
            self._end_if(too_many_bad(report.bad, bad, clips, self.config.data.max_bad_share))
        if report.nonfinite and state.nonfinite_in_a_row >= self.config.train.max_nonfinite:
            self._end_if(
                f"{state.nonfinite_in_a_row} rounds in a row had a loss that is not finite "
                f"({'; '.join(report.nonfinite)}); try another --train.mixed_precision, or start anew with lower learning "
                "rates or optim.clip_norm"
            )

    def _end_if(self, problem: str | None) -> None:
        """Save and end the run on all ranks if there is a problem."""
        if problem is not None:
            self._save()
            self.keeper.settle(self.state)
            raise TrainingError(f"{problem}, and go on with --run.resume auto")

    def _save(self) -> None:
        pause = self.keeper.save(self.state)
        self.save_status("running")
        if self.monitor is not None:
            self.monitor.checkpoint(self.state.round, pause)

    def _evaluate(self, model, split: str) -> Evaluation:
        with self.engine.autocast():
            return evaluate(self.accelerator, model, self.experiment, split, self.phases)

    def _validate(self) -> None:
        self.phases.enter("validation")
        model = self.engine.plain_model()
        result = self._evaluate(model, "validation")
        self.keeper.settle(self.state)  # whether the best so far is on the disk
        self.phases.enter("reporting")
        measured = result.metrics[self.config.train.main_task].get(self.best_metric)
        if measured is not None:
            self.state.note_validation(float(measured), self.higher_is_better)
        if self.monitor is not None:
            number = self.state.round
            classes = self.experiment.classes()
            self.monitor.validation(number, result, classes, self.best_metric)
            several = self.config.evaluation.examples
            shown = examples(self.accelerator, model, self.experiment, "validation", several)
            try:
                for task, place, waves in shown:
                    self.monitor.example(number, task, place, waves, self.experiment.reader.rate)
            except DataError as error:  # the ranks end together, in the next round, if it stays
                log.warning("no examples to hear: %s", error)
        self.phases.enter("collective")
        self.accelerator.wait_for_everyone()
        self._end_if(result.too_many_bad(self.config.data.max_bad_share))

    def _finish(self) -> dict[str, dict[str, dict[str, float]]]:
        """Evaluate the best or the last checkpoint, write results.json and the final table."""
        self.keeper.settle(self.state)
        best = self.keeper.best_model() if self.config.evaluation.checkpoint == "best" else None
        scored, model = best or (None, self.engine.plain_model())
        results = {split: self._evaluate(model, split) for split in ("validation", "test")}
        self.phases.enter("reporting")
        numbers = {split: result.numbers() for split, result in results.items()}
        if self.is_main:
            self.monitor.final(numbers)
            self.monitor.say(
                f"\nresults of {scored or f'round {self.state.round}'}\n\n{results_table(numbers)}\n"
            )
            self._write_results(results)
            if results["test"].bad:
                bad = results["test"].bad
                after = (
                    self.state.round + 1
                )  # like the final metrics: dropped when a run ends again
                self.monitor.trouble(after, "bad_files_in_test", bad, len(bad))
        problem = results["test"].too_many_bad(self.config.data.max_bad_share)
        if problem is not None:
            raise TrainingError(f"the test results are not to be trusted: {problem}")
        return numbers

    def _write_results(self, results: dict[str, Evaluation]) -> None:
        try:
            for split, result in results.items():
                classes = self.experiment.classes()
                self.folder.save_predictions(split, result.predictions, classes)
            self.folder.save_results({split: r.numbers() for split, r in results.items()})
        except OSError as error:
            raise TrainingError(
                f"{error}; training is done and the table above holds the results: make room, and write them with "
                f"mtl-dist evaluate {self.folder.path}"
            ) from error
