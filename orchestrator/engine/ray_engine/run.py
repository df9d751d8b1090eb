"""The Ray engine: start Ray or connect to it, check every node, build artifacts, run one Tune trial
per shard.

Ray does the scheduling, the reservation of resources, retries, and the handling of lost nodes. It
stores no progress: the table and the journal do. So a run continues in the same way however the
last one ended.
"""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.experiment import Trial

from orchestrator.engine.causes import Cause
from orchestrator.engine.endings import signals_kept
from orchestrator.engine.ray_engine import ENVIRONMENT
from orchestrator.engine.ray_engine.builders import build_artifacts
from orchestrator.engine.ray_engine.causes import cause_of
from orchestrator.engine.ray_engine.loss import noticing_loss
from orchestrator.engine.ray_engine.preflight import ClusterError, check_nodes
from orchestrator.engine.ray_engine.private import credentials_stay, on_loopback, own_token, private_folder
from orchestrator.engine.ray_engine.trial import ShardTrial
from orchestrator.engine.run_state import RunState
from orchestrator.engine.worker import StepReport
from orchestrator.planning.spec import RaySpec
from orchestrator.storage.lock import LockLost
from workers.types import EditSweepError


def run_ray(
    run_state: RunState, max_actors: int | None = None, runtime_env: Mapping[str, Any] | None = None
) -> None:
    """Run every shard of the plan on Ray. ``runtime_env``: what the user gives the workers besides
    the spec's own."""
    plan = run_state.plan
    with _ctrl_c(run_state), private_folder() as folder, _connected(run_state, folder, runtime_env or {}):
        try:
            actors = check_nodes(run_state)
            wanted = max_actors or plan.spec.engine.max_actors or actors
            build_artifacts(run_state, min(wanted, actors))
            if run_state.artifacts_only:
                return
            _tune(run_state, min(wanted, len(plan.shards)), folder)
        except KeyboardInterrupt:
            run_state.interrupted = True


# --- connecting -----------------------------------------------------------------------------


@contextlib.contextmanager
def _connected(run_state: RunState, folder: Path, runtime_env: Mapping[str, Any]) -> Iterator[None]:
    """Connect to Ray at the spec's address, or start a local Ray whose files are in ``folder``.
    Afterwards disconnect, and shut the local Ray down."""
    spec, threads = run_state.plan.spec.ray, run_state.plan.common.threads
    runtime = _runtime_env(spec, threads, runtime_env)
    if "working_dir" not in runtime:
        # Without a working_dir, Ray's workers first import from the driver's working directory.
        # A folder `workers` there would hide our package.
        (folder / "empty").mkdir()
        runtime["working_dir"] = str(folder / "empty")
    options: dict[str, Any] = {
        "runtime_env": runtime,
        "namespace": f"editsweep-{run_state.run_id}",
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    with contextlib.ExitStack() as stack:
        if spec.address:
            _check_reachable(spec)
            run_state.view.note(f"connecting to Ray at {spec.address}")
            options["address"] = spec.address
        else:
            run_state.view.note("starting a local Ray")
            (folder / "ray").mkdir()
            stack.enter_context(own_token(folder))
            options |= {"address": "local", "include_dashboard": False, "object_store_memory": 256 << 20}
            options["_temp_dir"] = str(folder / "ray")
        try:
            with contextlib.nullcontext() if spec.address else on_loopback(), signals_kept():
                ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError, SystemExit) as error:
            what = (
                f"ray.address: {spec.address} cannot be used" if spec.address else "a local Ray did not start"
            )
            raise ClusterError(f"{what}: {type(error).__name__}: {error}") from error
        with _ray_output_to_log(run_state):
            try:
                with noticing_loss(run_state, spec.address is None):
                    yield
            finally:
                ray.shutdown()


def _runtime_env(spec: RaySpec, threads: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Ray's ``runtime_env`` of the workers: what the sweep needs, the spec's variables, and what the
    user gave on the command line, which counts most."""
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        **ENVIRONMENT,
        **spec.runtime_env.get("env_vars", {}),
        **given.get("env_vars", {}),
    }
    return {**given, "env_vars": variables}


@contextlib.contextmanager
def _ray_output_to_log(run_state: RunState) -> Iterator[None]:
    """Redirect what Ray and Tune print (such as the traceback of every lost worker) from the
    terminal to a log of the run."""
    text = io.StringIO()
    logger = logging.getLogger("ray")
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.handlers, logger.propagate = [logging.StreamHandler(text)], False
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        if text.getvalue():
            with contextlib.suppress(EditSweepError):
                run_state.store.replace(
                    run_state.paths.log(f"ray-{run_state.run_id}"), text.getvalue().encode()
                )


def _check_reachable(spec: RaySpec) -> None:
    """Raise :class:`ClusterError` if no Ray cluster answers at the address.

    If nothing answers, ``ray.init`` waits two minutes and then ends the process. A child process
    therefore tries first.
    """
    address = str(spec.address)
    hint = "check that the cluster runs (`ray status`), or leave ray.address out to start a local Ray"
    host, _, port = address.rpartition(":")
    if address != "auto":
        try:
            socket.create_connection(
                (host.strip("[]"), int(port)), timeout=min(5.0, spec.connect_seconds)
            ).close()
        except OSError as error:
            raise ClusterError(
                f"ray.address: {address} does not answer ({error.strerror or error}); {hint}"
            ) from None
    # The alarm starts after the import, which alone can take many seconds on a busy machine.
    code = (
        "import ray, signal, sys\n"
        "signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))\n"
        "ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
    )
    no_answer = ClusterError(
        f"ray.address: {address} did not answer as a Ray cluster within {spec.connect_seconds:.0f} "
        f"seconds; {hint}"
    )
    try:
        tried = subprocess.run(
            [sys.executable, "-c", code, address, str(spec.connect_seconds)],
            timeout=spec.connect_seconds + 60,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise no_answer from None
    if tried.returncode and "InvalidAuthToken" in tried.stderr:
        raise ClusterError(
            f"ray.address: {address} asks for an authentication token; set RAY_AUTH_MODE=token and put the "
            f"cluster's token "
            "where Ray looks for it (RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)"
        )
    if tried.returncode == -signal.SIGALRM:
        raise no_answer
    if tried.returncode:
        said = [line for line in tried.stderr.strip().splitlines() if line.strip()]
        raise ClusterError(
            f"ray.address: {address} cannot be used ({said[-1][:300] if said else 'no reason given'}); {hint}"
        )


@contextlib.contextmanager
def _ctrl_c(run_state: RunState) -> Iterator[None]:
    """Handle Ctrl-C. The first one makes Tune stop after the current steps, by the signal SIGUSR1
    that Tune handles. The second one, or one before Tune runs, raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        listening = signal.getsignal(signal.SIGUSR1) not in (signal.SIG_DFL, signal.SIG_IGN, None)
        if run_state.interrupted or not listening:
            raise KeyboardInterrupt
        run_state.interrupted = True
        run_state.view.note("stopping: the current steps are being committed (Ctrl-C again to leave at once)")
        signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGINT, handle)
    before_user = signal.getsignal(signal.SIGUSR1)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGUSR1, before_user)


# --- shards ---------------------------------------------------------------------------------


def _tune(run_state: RunState, actors: int, folder: Path) -> None:
    """One trial per shard, in the plan's order. ``folder`` takes Tune's own files, which are never
    read."""
    plan = run_state.plan
    engine = plan.spec.engine
    trainable = tune.with_resources(
        tune.with_parameters(
            ShardTrial, work=plan.work, root=run_state.store.where(), run_id=run_state.run_id
        ),
        {"cpu": engine.resources.cpu, "gpu": engine.resources.gpu},
    )
    listener = _Listener(run_state)
    tuner = tune.Tuner(
        trainable,
        param_space={"shard": tune.grid_search(list(range(len(plan.shards))))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=max(1, actors),
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder / "tune"),
            failure_config=tune.FailureConfig(max_failures=engine.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
            callbacks=[listener],
            verbose=0,
        ),
    )
    with credentials_stay():
        tuner.fit()
    if listener.stopped_by is not None:
        raise listener.stopped_by


def _trial_name(trial: Trial) -> str:
    return f"shard-{trial.config['shard']:06d}"


class _Listener(tune.Callback):
    """Passes Tune's events on to the run_state. Tune calls it in the driver's main thread."""

    def __init__(self, run_state: RunState) -> None:
        self.run_state = run_state
        self.stopped_by: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks into a file that is never read, and a run's state cannot
        be pickled."""
        return {}

    def _shard(self, trial: Trial) -> str:
        index: int = trial.config["shard"]
        return self.run_state.plan.shards[index].shard_id

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Stop Tune after an error in the driver (the lock is lost, the disk is full), and keep the
        error, which is raised when Tune has ended."""
        try:
            yield
        except (LockLost, EditSweepError, OSError) as error:
            if self.stopped_by is None:
                self.stopped_by = error
                signal.raise_signal(signal.SIGUSR1)

    def on_trial_start(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        with self._guard():
            self.run_state.started(self._shard(trial))

    def on_trial_result(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, result: Mapping[str, Any], **info: Any
    ) -> None:
        report = result.get("report")
        if report:
            with self._guard():
                self.run_state.stepped(StepReport(**report))

    def on_trial_complete(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        failed = (trial.last_result or {}).get("failed")
        with self._guard():
            if failed:
                self.run_state.failed(self._shard(trial), trial.num_failures + 1, Cause(**failed))
            else:
                self.run_state.finished(self._shard(trial))

    def on_trial_recover(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        with self._guard():
            self.run_state.retrying(self._shard(trial), trial.num_failures, _cause(trial))

    def on_trial_error(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        with self._guard():
            self.run_state.failed(self._shard(trial), trial.num_failures, _cause(trial))

    def on_step_end(self, iteration: int, trials: Sequence[Trial], **info: Any) -> None:
        with self._guard():
            self.run_state.tick()


def _cause(trial: Trial) -> Cause:
    """The cause of a trial's last failure.

    Tune has stored it in a file on the driver's disk. ``trial.get_pickled_error()`` reads a copy
    that may not exist yet.
    """
    path = trial.pickled_error_file
    if path is None:
        return cause_of(None)
    try:
        return cause_of(cloudpickle.loads(Path(path).read_bytes()))
    except OSError:  # the driver's own disk may be full
        return cause_of(None)
