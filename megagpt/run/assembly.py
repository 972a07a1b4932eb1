"""A run put together on its ranks: engine, data, newest checkpoint, monitor."""

import logging
from functools import partial
from pathlib import Path

from megagpt.checkpoint.base import open_base
from megagpt.checkpoint.collective import everyones, together
from megagpt.checkpoint.directory import collect_leftovers
from megagpt.checkpoint.format import DamagedCheckpointError, OtherFormatError
from megagpt.checkpoint.resume import Resumed, resume
from megagpt.checkpoint.resume_proof import NEXT_STEP, NextStep
from megagpt.cluster.launchers import adopt_launch
from megagpt.config import ResolvedConfig
from megagpt.dataset import SampleStream
from megagpt.health.agreement import require_agreement
from megagpt.health.watch import Pulse
from megagpt.inference.generate import open_tokenizer
from megagpt.monitoring.monitor import Monitor
from megagpt.parallel import device, internals
from megagpt.parallel.batches import BatchLoader
from megagpt.parallel.engine import (
    Engine,
    build_engine,
    build_mesh,
    compute_dtype,
    join_ranks,
    training_device,
)
from megagpt.parallel.validation import ValidationSet
from megagpt.planning.flops import adapter_elements
from megagpt.planning.legality import LegalRun, precision_notes
from megagpt.planning.stages import cut, describe_stage
from megagpt.rundir import directory as directories
from megagpt.rundir.base import BasePlace, find_base, record_base
from megagpt.rundir.changes import UNCHANGED, Changes
from megagpt.rundir.data import require_same_data, validation_name
from megagpt.train import Run
from megagpt.utils import human_count

log = logging.getLogger(__name__)


def assemble(
    legal: LegalRun,
    streams: dict[str, SampleStream],
    directory: Path,
    pulse: Pulse,
    changes: Changes = UNCHANGED,
) -> Run:
    """Join the ranks, build the engine and load the newest checkpoint; every rank must call it.

    ``pulse`` is told each activity. ``changes`` are what the run may differ in from its
    checkpoints.
    """
    pulse.beat("joining the other ranks")
    resolved = legal.on_device(
        bf16_native=device.multiplies_bf16_natively(training_device()),
        fp16_native=device.multiplies_fp16_natively(training_device()),
    )
    join_ranks(resolved)
    require_agreement(resolved, [*streams.values()], changes.as_text())
    pulse.beat("building the engine")
    mesh = build_mesh(resolved)
    place = find_base(resolved, directory)
    base = open_base(place.checkpoint, mesh, place.sha256) if place is not None else None
    engine = build_engine(resolved, mesh, base)
    _announce(engine, directory, device.describe_device(training_device()))
    if mesh.rank == 0:
        for line in (*legal.written.notes, *precision_notes(legal.written, resolved)):
            print(f"note: {line}", flush=True)
    run = Run(
        config=resolved,
        engine=engine,
        training=BatchLoader(streams["train"], resolved, mesh, training_device()),
        validation=[
            ValidationSet(validation_name(key), stream, resolved, mesh, training_device())
            for key, stream in streams.items()
            if key != "train"
        ],
        tokenizer=open_tokenizer(resolved.megagpt, directory),
        directory=directory,
        peak_flops=device.peak_flops(training_device(), compute_dtype(resolved)),
        pulse=pulse,
        changes=changes,
    )
    pulse.beat("loading the checkpoint")
    found = _resume(run)
    together(partial(_record, run, place))
    run.monitor = Monitor.open(
        resolved,
        directory,
        total_steps=resolved.megagpt.training.total_steps,
        start_step=run.state.step,
        is_writer=mesh.rank == 0,
    )
    if found:
        changed = found.describe_changes()
        run.monitor.event(
            "resume",
            step=run.state.step,
            written_by=found.manifest.topology,
            passed_over=found.passed_over,
        )
        if changed:
            run.monitor.event("change", step=run.state.step, changes=changed)
    elif changes.now:  # before the first checkpoint
        run.monitor.event("change", step=0, changes=changes.lines())
    for message in _unknown_internals(resolved):
        run.monitor.event("warning", step=run.state.step, message=message)
    return run


def _record(run: Run, place: BasePlace | None) -> None:
    """Write on rank 0 what the run is."""
    if run.engine.mesh.rank != 0:
        return
    directories.record(run.directory, run.config, run.changes, run.state.step)
    if place is not None and run.engine.base_sha256 is not None:
        record_base(run.directory, place, run.engine.base_sha256)


def _unknown_internals(config: ResolvedConfig) -> list[str]:
    """Return the hosts' messages on unknown internals; every rank must call it.

    There are some only with MEGAGPT_ALLOW_UNKNOWN=1.
    """
    here = internals.require_known_internals(internals.parts_used(config, adopt_launch().launcher))
    return sorted({message for message in everyones(here) if message is not None})


def _resume(run: Run) -> Resumed | None:
    """Load the newest sound checkpoint, if there is one, into the run."""
    if run.engine.mesh.rank == 0:
        for name in collect_leftovers(run.saver.checkpoints):
            log.warning("removed %s, left by an interrupted save", name)
    known = run.changes.known()
    resumed = resume(run.engine, run.directory, known, run.training.stream.fingerprint)
    if resumed is None:
        return None
    run.state = resumed.state
    run.saver.goes_on_from(run.state, changed=resumed.differs)
    if run.engine.mesh.rank == 0:
        run.unproven = None if resumed.differs else _next_step(resumed.directory)
        print(resumed.describe(provable=run.unproven is not None), flush=True)
    require_same_data(
        run.directory,
        run.state.step,
        resumed.manifest.data_fingerprint,
        run.training.stream,
        run.changes,
    )
    return resumed


def _next_step(checkpoint: Path) -> NextStep | None:
    """Return the record of the step that followed a checkpoint, or None.

    A damaged record is removed, and the next step is recorded again. One of another format stays
    and is not used.
    """
    try:
        return NextStep.read(checkpoint)
    except DamagedCheckpointError as error:
        log.warning("%s", error)
        (checkpoint / NEXT_STEP).unlink(missing_ok=True)
    except OtherFormatError as error:
        log.warning("%s", error)
    return None


def _announce(engine: Engine, directory: Path, hardware: str) -> None:
    """Print one paragraph before the first step: what trains, how and where."""
    if engine.mesh.rank != 0:
        return
    config = engine.config
    zero = config.zero_optimization
    model = config.megagpt.model
    optimizer_on, parameters_on = (
        "the device" if place == "none" else place
        for place in (zero.optimizer_device, zero.parameter_device)
    )
    lora = config.megagpt.training.lora
    adapters = ""
    if lora is not None:
        elements = model.num_layers * adapter_elements(lora, model)
        adapters = f"{human_count(elements)} parameters of adapters of rank {lora.rank} on "
    print(
        f"{directory}: {adapters}{human_count(model.num_parameters)} parameters "
        f"({model.num_layers} layers, "
        f"width {model.hidden_size}, {model.num_heads} heads, {model.vocab_size} tokens, length "
        f"{model.sequence_length})\n"
        f"{engine.mesh.world_size} x {hardware}; ZeRO {zero.stage}, optimizer on {optimizer_on}, "
        f"parameters on {parameters_on}; batch {config.train_batch_size} = "
        f"{config.train_micro_batch_size_per_gpu} x {config.gradient_accumulation_steps} "
        f"micro-batches x {engine.mesh.data_size} replicas",
        flush=True,
    )
    if engine.num_stages > 1:
        print(
            f"pipeline, {config.megagpt.parallel.schedule}: {_describe_stages(config)}", flush=True
        )


def _describe_stages(config: ResolvedConfig) -> str:
    """Return what each pipeline stage holds, and its shares of work and parameters."""
    model = config.megagpt.model
    parallel = config.megagpt.parallel
    stages = cut(model, parallel.pipeline * parallel.virtual_stages)
    return "; ".join(
        f"stage {index}: {describe_stage(model, layers)}" for index, layers in enumerate(stages)
    )
