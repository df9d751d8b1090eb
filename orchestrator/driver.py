"""The Ray engine: connect or start, prove every node, build artifacts, one Tune trial per shard.

Ray gives scheduling, resources, retries and the handling of lost nodes. It is told nothing of progress: what is done is
what the table and the journal say, so every way a run can end is followed by the same next run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from orchestrator.execute import Bench, Books, StepReport, artifact_title, check_memory, versions
from orchestrator.lock import LockLost
from orchestrator.paths import ResultsPaths
from orchestrator.spec import RaySpec, Resources
from orchestrator.store import StoreError, open_store
from workers.artifacts import ArtifactSpec
from workers.models import ModelConfig, fingerprint_model
from workers.types import EditSweepError

_ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours remembers that it was Ctrl-C
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",  # Tune's own snapshots are never read
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",
    "TUNE_MAX_PENDING_TRIALS_PG": "auto",
}
# Ray and Tune read these when they are imported.
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.experiment import Trial  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from orchestrator.trial import ShardTrial  # noqa: E402

PREFLIGHT_SECONDS = 180.0
STOP_SECONDS = 60.0
"""How long builders may take to save what they have."""


class ClusterError(EditSweepError):
    """Ray cannot be reached, or a node cannot do the work. The message names node and cause."""


def run_ray(books: Books, max_actors: int | None = None) -> None:
    """Run every shard of the plan on Ray."""
    plan = books.plan
    threads = plan.common.threads
    with _ctrl_c(books), _connected(plan.spec.ray, threads, books):
        try:
            actors = _preflight(books)
            wanted = max_actors or plan.spec.engine.max_actors or actors
            _build_artifacts(books, min(wanted, actors))
            if books.artifacts_only:
                return
            _tune(books, min(wanted, len(plan.shards)))
        except KeyboardInterrupt:
            books.interrupted = True


# --- connecting ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _connected(spec: RaySpec, threads: int, books: Books) -> Iterator[None]:
    """Ray, started here or reached at ``spec.address``; left (and if it is ours, ended) afterwards."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        **_ENVIRONMENT,
    }
    runtime: dict[str, Any] = {**spec.runtime_env, "env_vars": {**environment, **spec.runtime_env.get("env_vars", {})}}
    options: dict[str, Any] = {
        "runtime_env": runtime,
        "namespace": f"editsweep-{books.run_id}",
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    if spec.address:
        _answers(spec)
        books.view.note(f"connecting to Ray at {spec.address}")
        options["address"] = spec.address
    else:
        books.view.note("starting a local Ray")
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": 256 << 20}
    try:
        with tempfile.TemporaryDirectory() as empty:
            # Without one, Ray lets its workers import from the driver's working directory first: a `workers` there hides ours.
            runtime.setdefault("working_dir", empty)
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError, SystemExit) as error:
        what = f"ray.address: {spec.address} cannot be used" if spec.address else "a local Ray did not start"
        raise ClusterError(f"{what}: {type(error).__name__}: {error}") from error
    try:
        with _chatter_kept(books):
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _chatter_kept(books: Books) -> Iterator[None]:
    """Ray and Tune print tracebacks of every lost worker; they go into a log of the run instead of the view."""
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
                books.store.replace(books.paths.log(f"ray-{books.run_id}"), text.getvalue().encode())


def _answers(spec: RaySpec) -> None:
    """Raise :class:`ClusterError` if nothing, or something else than Ray, is at the address.

    ``ray.init`` waits two minutes for a silent address and then ends the process; so a child process tries first.
    """
    address = str(spec.address)
    hint = "check that the cluster runs (`ray status`), or leave ray.address out to start a local Ray"
    wrong = f"ray.address: {address!r} is not host:port or auto"
    if address.startswith("ray://"):
        raise ClusterError(f"{wrong}: Ray Client is not supported; run editsweep on a node of the cluster")
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(5.0, spec.connect_seconds)).close()
        except OSError as error:
            raise ClusterError(f"ray.address: {address} does not answer ({error.strerror or error}); {hint}") from None
    elif address != "auto":
        raise ClusterError(f"{wrong}; {hint}")
    # The alarm starts after the import, which alone can take many seconds on a busy machine.
    code = (
        "import ray, signal, sys\n"
        "signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))\n"
        "ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
    )
    silent = ClusterError(
        f"ray.address: {address} did not answer as a Ray cluster within {spec.connect_seconds:.0f} seconds; {hint}"
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
        raise silent from None
    if tried.returncode and "InvalidAuthToken" in tried.stderr:
        raise ClusterError(
            f"ray.address: {address} asks for an authentication token; set RAY_AUTH_MODE=token and put the cluster's token "
            "where Ray looks for it (RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)"
        )
    if tried.returncode == -signal.SIGALRM:
        raise silent
    if tried.returncode:
        said = [line for line in tried.stderr.strip().splitlines() if line.strip()]
        raise ClusterError(
            f"ray.address: {address} cannot be used ({said[-1][:300] if said else 'no reason given'}); {hint}"
        )


@contextlib.contextmanager
def _ctrl_c(books: Books) -> Iterator[None]:
    """First Ctrl-C: Tune ends in good order (it listens to SIGUSR1); second, or before Tune runs: KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        listening = signal.getsignal(signal.SIGUSR1) not in (signal.SIG_DFL, signal.SIG_IGN, None)
        if books.interrupted or not listening:
            raise KeyboardInterrupt
        books.interrupted = True
        books.view.note("stopping: the steps at hand are being committed (Ctrl-C again to leave at once)")
        signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGINT, handle)
    before_user = signal.getsignal(signal.SIGUSR1)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGUSR1, before_user)


# --- preflight -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    """What every node is asked before the first shard."""

    root: str
    nonce: str
    run_id: str
    model: ModelConfig
    weight_bytes: int
    resources: Resources


@dataclass(frozen=True)
class _Answer:
    host: str
    nonce: str
    versions: dict[str, str]
    fingerprint: str
    problem: str = ""


@ray.remote(num_cpus=0, max_retries=1)
def _prove(question: _Question, node: str) -> _Answer:
    """Runs on a node: reads and writes the results folder, hashes the model, looks at memory."""
    host = socket.gethostname()
    paths = ResultsPaths()
    store = open_store(question.root)
    try:
        nonce = store.read(paths.log(f"preflight-{question.run_id}")).decode()
    except StoreError as error:
        return _Answer(host, "", versions(), "", f"it does not see the results folder ({error})")
    try:
        store.replace(paths.log(f"preflight-{question.run_id}-{node}"), nonce.encode())
        fingerprint = fingerprint_model(question.model)
        resources = question.resources
        check_memory(question.model, question.weight_bytes, resources.gpu, resources.memory_gb, where=host)
    except EditSweepError as error:
        return _Answer(host, nonce, versions(), "", str(error))
    return _Answer(host, nonce, versions(), f"{fingerprint.model}:{fingerprint.tokenizer}")


def _preflight(books: Books) -> int:
    """Let every node that can hold an actor prove itself; how many actors they hold together."""
    plan, store, paths = books.plan, books.store, books.paths
    resources = plan.spec.engine.resources
    if plan.common.model.device == "cuda" and not resources.gpu:
        raise ClusterError("model.device is cuda, but engine.resources.gpu is 0; set it to 1 (or a fraction)")
    alive: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = {n["NodeID"]: n for n in alive if n["Alive"]}
    room = {node: _actors_on(info["Resources"], resources) for node, info in nodes.items()}
    able = {node: count for node, count in room.items() if count}
    if not able:
        have = ", ".join(
            f"{n['NodeManagerHostname']}: {n['Resources'].get('CPU', 0):g} cpu, {n['Resources'].get('GPU', 0):g} gpu"
            for n in nodes.values()
        )
        raise ClusterError(
            f"engine.resources: an actor needs {resources.cpu:g} cpu and {resources.gpu:g} gpu; no node has them ({have})"
        )
    nonce = os.urandom(16).hex()
    store.replace(paths.log(f"preflight-{books.run_id}"), nonce.encode())
    question = _Question(
        store.where(), nonce, books.run_id, plan.common.model, plan.weight_bytes, plan.spec.engine.resources
    )
    asked = {
        node: _prove.options(
            num_gpus=resources.gpu, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(question, node)
        for node in able
    }
    problems = []
    mine = versions()
    expected = f"{plan.common.model_fingerprint}:{plan.common.tokenizer_fingerprint}"
    for node, ref in asked.items():
        name = nodes[node]["NodeManagerHostname"]
        try:
            answer: _Answer = ray.get(ref, timeout=PREFLIGHT_SECONDS)
        except ray.exceptions.GetTimeoutError:
            problems.append(f"{name}: no answer within {PREFLIGHT_SECONDS:.0f} seconds")
            continue
        except ray.exceptions.RayError as error:
            problems.append(f"{name}: {str(error).strip().splitlines()[-1][:500]}")
            continue
        problems += [f"{name}: {problem}" for problem in _problems(answer, nonce, mine, expected)]
        back = paths.log(f"preflight-{books.run_id}-{node}")
        if not answer.problem:
            if not store.exists(back):
                problems.append(f"{name}: what it writes into {store.where()} is not seen here; use a shared folder")
            store.delete(back)
    store.delete(paths.log(f"preflight-{books.run_id}"))
    if problems:
        raise ClusterError("the cluster is not ready:\n  " + "\n  ".join(problems))
    return sum(able.values())


def _problems(answer: _Answer, nonce: str, mine: Mapping[str, str], fingerprint: str) -> Iterator[str]:
    """What is wrong with one node's answer."""
    different = [
        f"{name} {answer.versions.get(name)} (here {version})"
        for name, version in mine.items()
        if answer.versions.get(name) != version
    ]
    if different:
        yield f"other versions than the driver's: {', '.join(different)}"
    if answer.problem:
        yield answer.problem
    elif answer.nonce != nonce:
        yield "the results folder of this name is another one there; results must be on a folder that all nodes share"
    elif answer.fingerprint != fingerprint:
        yield "the model's files differ from the driver's (another version of the weights or the tokenizer)"


def _actors_on(have: Mapping[str, float], need: Resources) -> int:
    counts = [have.get("CPU", 0) // need.cpu]
    if need.gpu:
        gpus = have.get("GPU", 0)
        counts.append(gpus // need.gpu if need.gpu >= 1 else gpus * (1 // need.gpu))
    return int(min(counts))


# --- artifacts -------------------------------------------------------------------------------------------------------


class _Builder:
    """An actor that builds artifacts with one loaded model; a second thread answers while it does."""

    def __init__(self, root: str, run_id: str, save_seconds: float) -> None:
        self.bench = Bench(root, run_id, save_seconds)
        self.told: tuple[int, int, str] | None = None
        self.stopped = threading.Event()

    def build(self, spec: ArtifactSpec, model: ModelConfig, threads: int) -> None:
        self.told = None
        self.bench.build(spec, model, threads, self._tell, self.stopped.is_set)

    def _tell(self, done: int, total: int, what: str) -> None:
        self.told = (done, total, what)

    def progress(self) -> tuple[int, int, str] | None:
        return self.told

    def stop(self) -> None:
        self.stopped.set()


@dataclass
class _Site:
    """One builder, what it builds at present, and the question after its progress that is not answered yet."""

    actor: Any
    spec: ArtifactSpec | None = None
    asked: Any = None

    def look(self, books: Books) -> None:
        """Pass on what the builder told since the last look; never wait for it."""
        if self.asked is not None and ray.wait([self.asked], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):
                told = ray.get(self.asked)
                if told is not None and self.spec is not None:
                    books.artifact_step(self.spec, *told)
            self.asked = None
        if self.asked is None:
            self.asked = self.actor.progress.remote()


def _build_artifacts(books: Books, actors: int) -> None:
    """Build what the plan's shards need and the store lacks, each by one actor, what it needs before it.

    A failure is told; the shards that need the artifact fail with its cause.
    """
    missing = books.missing_artifacts()
    if not missing:
        return
    engine, common = books.plan.spec.engine, books.plan.common
    builder: Any = ray.remote(_Builder)
    make = builder.options(
        num_cpus=engine.resources.cpu,
        num_gpus=engine.resources.gpu,
        max_concurrency=2,
        max_restarts=engine.max_failures,
        max_task_retries=engine.max_failures,
    )
    keys = {spec.key for spec in missing}
    at_once = sum(not any(need.key in keys for need in spec.needs) for spec in missing)
    sites = [
        _Site(make.remote(books.store.where(), books.run_id, engine.checkpoint_seconds))
        for _ in range(min(actors, at_once))
    ]
    todo, failed = list(missing), set[str]()
    running: dict[Any, _Site] = {}
    done = 0
    try:
        while todo or running:
            waiting = {spec.key for spec in todo} | {site.spec.key for site in running.values() if site.spec}
            for spec in list(todo):
                lost = [need for need in spec.needs if need.key in failed]
                if lost:
                    todo.remove(spec)
                    failed.add(spec.key)
                    books.artifact_failed(spec, f"it needs {artifact_title(lost[0])}, which failed")
                elif not any(need.key in waiting for need in spec.needs):
                    free = next((site for site in sites if site.spec is None), None)
                    if free is None:
                        break
                    todo.remove(spec)
                    free.spec = spec
                    running[free.actor.build.remote(spec, common.model, common.threads)] = free
            for ref in ray.wait(list(running), num_returns=1, timeout=1.0)[0] if running else ():
                site = running.pop(ref)
                built, site.spec = site.spec, None
                assert built is not None
                try:
                    ray.get(ref)
                    done += 1
                    books.artifact_built(built, done, len(missing))
                except ray.exceptions.RayError as error:
                    failed.add(built.key)
                    books.artifact_failed(built, str(error).strip().splitlines()[-1])
            for site in running.values():
                site.look(books)
            books.tick()
    except KeyboardInterrupt:
        for site in running.values():
            site.actor.stop.remote()
        if running:
            books.view.note("stopping: unfinished artifacts are being saved (Ctrl-C again to leave at once)")
            ray.wait(list(running), num_returns=len(running), timeout=STOP_SECONDS)
        raise
    finally:
        books.artifacts_ended()
        for site in sites:
            ray.kill(site.actor)


# --- shards ----------------------------------------------------------------------------------------------------------


def _tune(books: Books, actors: int) -> None:
    """One trial per shard, in the plan's order."""
    plan = books.plan
    engine = plan.spec.engine
    trainable = tune.with_resources(
        tune.with_parameters(ShardTrial, plan=plan, root=books.store.where(), run_id=books.run_id),
        {"cpu": engine.resources.cpu, "gpu": engine.resources.gpu},
    )
    folder = tempfile.mkdtemp(prefix=f"editsweep-{books.run_id}-")  # Tune's own files, which nobody reads
    listener = _Listener(books)
    try:
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
                storage_path=folder,
                failure_config=tune.FailureConfig(max_failures=engine.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
                callbacks=[listener],
                verbose=0,
            ),
        )
        tuner.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if listener.stopped_by is not None:
        raise listener.stopped_by


def _trial_name(trial: Trial) -> str:
    return f"shard-{trial.config['shard']:06d}"


class _Listener(tune.Callback):
    """Passes what Tune learns on to the books. Called in the driver's main thread."""

    def __init__(self, books: Books) -> None:
        self.books = books
        self.stopped_by: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks into a file that nobody reads; the books stay here."""
        return {}

    def _shard(self, trial: Trial) -> str:
        index: int = trial.config["shard"]
        return self.books.plan.shards[index].shard_id

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """An error of ours (the lock is lost, the disk is full) ends the run in good order and is raised after it."""
        try:
            yield
        except (LockLost, EditSweepError, OSError) as error:
            if self.stopped_by is None:
                self.stopped_by = error
                signal.raise_signal(signal.SIGUSR1)

    def on_trial_start(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        with self._guard():
            self.books.started(self._shard(trial))

    def on_trial_result(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, result: Mapping[str, Any], **info: Any
    ) -> None:
        report = result.get("report")
        if report:
            with self._guard():
                self.books.stepped(StepReport(**report))

    def on_trial_complete(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        failed = (trial.last_result or {}).get("failed")
        with self._guard():
            if failed:
                self.books.failed(self._shard(trial), trial.num_failures + 1, str(failed))
            else:
                self.books.finished(self._shard(trial))

    def on_trial_recover(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        with self._guard():
            self.books.retrying(self._shard(trial), trial.num_failures, _cause(trial))

    def on_trial_error(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        with self._guard():
            self.books.failed(self._shard(trial), trial.num_failures, _cause(trial))

    def on_step_end(self, iteration: int, trials: Sequence[Trial], **info: Any) -> None:
        with self._guard():
            self.books.tick()


def _cause(trial: Trial) -> str:
    """The last line of what Tune knows about a failure, which names the exception."""
    text = ""
    with contextlib.suppress(Exception):
        error = trial.get_pickled_error() or trial.get_error()
        text = str(error or "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "the worker process or its node was lost"
