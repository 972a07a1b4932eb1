"""Check whether a run is legal, and find the nearest legal one if it is not. No torch.

`planning/rules.py` lists what is refused and the remedies. A remedy may break another rule or make
the batch indivisible. So a configuration is printed as legal only after it has passed the whole
check in the same world.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace

from megagpt.config import ConfigError, ResolvedConfig, RunConfig, unexpected_world
from megagpt.planning.rules import Rule, refusals
from megagpt.schema.arithmetic import nearest_first

# the vocabulary of data that are not prepared; all other rules can be checked
ANY_VOCABULARY = 0
ANY_SAMPLES = 10**12  # longer than any warm-up
MOST_TRIED = 500  # configurations to search for a legal one; each takes about 1 ms

Items = tuple[str, ...]  # `--set` items


def any_samples(written: RunConfig) -> int:
    """Return a stand-in for the samples of an epoch, where the data are not known."""
    return ANY_SAMPLES


@dataclass(frozen=True)
class World:
    """What a file does not say about a run.

    `ranks`: the number of ranks (None: those of one replica). `vocabulary`: the number of
    tokens of the data (None: that of the model; ANY_VOCABULARY: not known). `bf16_native`:
    whether the device multiplies bf16 matrices in hardware (None: not known). `samples`: the
    samples of an epoch of a run, asked only of one with a length in epochs.
    """

    ranks: int | None
    vocabulary: int | None
    bf16_native: bool | None = None
    fp16_native: bool = True
    samples: Callable[[RunConfig], int] = any_samples

    def resolve(self, written: RunConfig) -> ResolvedConfig:
        """Return the resolved run in this world; raise ConfigError if there is none.

        If `bf16_native` is not known, assume the value with which the run is legal.
        """
        if self.bf16_native is None:
            devices = [(False, False), (True, True), (False, True)]
            runs = [
                replace(self, bf16_native=bf16, fp16_native=fp16).resolve(written)
                for bf16, fp16 in (devices if leaves_format_to_device(written) else devices[:1])
            ]
            return next((run for run in runs if not self.refusals(run, written)), runs[0])
        return written.resolved(
            world_size=self.ranks or written.megagpt.parallel.model_parallel_size,
            vocabulary=self.vocabulary
            if self.vocabulary != ANY_VOCABULARY
            else self._stand_in(written),
            bf16_native=self.bf16_native,
            fp16_native=self.fp16_native,
            samples_per_epoch=None
            if written.megagpt.training.total_epochs is None
            else self.samples(written),
        )

    def refusals(self, config: RunConfig, written: RunConfig) -> list[Rule]:
        """Return the rules that refuse this run.

        Rules that depend on the rows of the embedding are left out while the vocabulary is
        not known.
        """
        return refusals(
            config, rows_known=self.vocabulary != ANY_VOCABULARY or self._stand_in(written) is None
        )

    @staticmethod
    def _stand_in(written: RunConfig) -> int | None:
        """Return a provisional vocabulary, or None if the configuration gives one."""
        return None if written.megagpt.model.vocab_size or written.megagpt.model.vocabulary else 1


@dataclass(frozen=True)
class LegalRun:
    """A run that has been judged, with nothing left open but what its device decides.

    `config` is the run on a device where it is legal: all but `bf16.enabled` and `fp16.enabled`
    holds on any device.
    """

    written: RunConfig
    world: World
    config: ResolvedConfig

    def on_device(self, *, bf16_native: bool, fp16_native: bool = False) -> ResolvedConfig:
        """Return the run with a number format of "auto" decided by the device.

        Raises ConfigError where that makes it illegal.
        """
        if not leaves_format_to_device(self.written):
            return self.config
        world = replace(self.world, bf16_native=bf16_native, fp16_native=fp16_native)
        return resolve(self.written, world=world).config

    def require_format(self, supported: Container[str], source: str = "") -> None:
        """Raise ConfigError if the device does not support the run's 16-bit format.

        DeepSpeed would raise ValueError while it builds the engine (engine.py:2003). `supported`
        holds bf16, fp16, both or none; a format that it does hold is offered, or fp32.
        """
        chosen = next((name for name in FORMATS if getattr(self.config, name).enabled), None)
        if chosen is None or chosen in supported:
            return
        off = f"{chosen}.enabled=false"
        offers: list[Items] = [(off,), *((off, f"{name}.enabled=true") for name in FORMATS)]
        found = next((items for items in offers if self._is_offer(items, supported)), None)
        offer = f"; nearest legal: --set {' '.join(found)}" if found else ""
        _refuse([f"{chosen}.enabled: true is refused: the device has no {chosen}{offer}"], source)

    def _is_offer(self, items: Items, supported: Container[str]) -> bool:
        """Return whether the run is legal with these items, in a supported format or fp32."""
        enabled = [item.partition(".")[0] for item in items if item.endswith("=true")]
        return all(name in supported for name in enabled) and not problems(
            self.written.changed(items), self.world
        )


FORMATS = ("bf16", "fp16")


def leaves_format_to_device(written: RunConfig) -> bool:
    """Return whether a number format is "auto"."""
    return "auto" in (written.bf16.enabled, written.fp16.enabled)


def precision_notes(written: RunConfig, config: ResolvedConfig) -> list[str]:
    """Return a line for each number format that was "auto": what was chosen, and why."""
    lines = []
    for name in FORMATS:
        if getattr(written, name).enabled != "auto":
            continue
        if getattr(config, name).enabled:
            what = f"on, the device multiplies {name} in hardware"
        elif config.zero_optimization.stage == 0:
            what = "off, ZeRO 0 computes in fp32"
        elif name == "fp16":
            what = "off, it is for GPUs without native bf16"
        else:
            what = "off, the device does not multiply bf16 in hardware"
        lines.append(f'{name}.enabled: "auto" is {what}')
    return lines


def resolve(written: RunConfig, source: str = "", *, world: World) -> LegalRun:
    """Judge the run and resolve it, once for all; raises ConfigError as `require_legal` does."""
    verdict = judge(written, world)
    _refuse(_lines(written, world, verdict), source)
    assert isinstance(verdict.config, ResolvedConfig)  # or it was impossible
    return LegalRun(written, world, verdict.config)


def require_legal(written: RunConfig, source: str = "", world: World | None = None) -> None:
    """Raise ConfigError with all problems; `source` (the file) precedes each line."""
    _refuse(problems(written, world), source)


def _refuse(lines: list[str], source: str) -> None:
    prefix = f"{source}: " if source else ""
    if lines:
        raise ConfigError(prefix + line for line in lines)


def problems(written: RunConfig, world: World | None = None) -> list[str]:
    """Return a line for each rule that refuses and each impossible number; empty for a legal run.

    The last line offers the nearest legal run.
    """
    return _lines(written, world, judge(written, world))


def _lines(written: RunConfig, world: World | None, verdict: Legality) -> list[str]:
    lines = [rule.line(verdict.config) for rule in verdict.refused] + verdict.impossible
    if not lines or (found := nearest_legal(written, world)) is None:
        return lines
    offer = f"nearest legal: --set {' '.join(found)}"
    return [f"{lines[0]}; {offer}"] if len(lines) == 1 else [*lines, offer]


@dataclass(frozen=True)
class Legality:
    """The rules that refuse a configuration, and why it could not be resolved.

    If the number of ranks differs from `megagpt.parallel.world_size`, the configuration is
    resolved for the number that it states, so that other problems show too.
    """

    config: RunConfig
    refused: list[Rule]
    impossible: list[str]


def judge(written: RunConfig, world: World | None) -> Legality:
    """Return the result of the whole check that a run passes before it starts."""
    if world is None:
        return Legality(written, refusals(written), [])
    parallel = written.megagpt.parallel
    if world.ranks and (unexpected := unexpected_world(parallel, world.ranks)):
        as_stated = judge(written, replace(world, ranks=parallel.world_size))
        return replace(as_stated, impossible=[*as_stated.impossible, unexpected.line("")])
    try:
        config = world.resolve(written)
    except ConfigError as error:
        return Legality(written, refusals(written), error.errors)
    return Legality(config, world.refusals(config, written), [])


def nearest_legal(written: RunConfig, world: World | None) -> Items | None:
    """Return the `--set` items of a legal run with the fewest remedies, or None."""
    queue: deque[Items] = deque([()])
    seen: set[Items] = {()}
    tried = 0
    while queue and tried < MOST_TRIED:
        items = queue.popleft()
        tried += 1
        try:
            changed = written.changed(items)
        except ConfigError:
            continue
        verdict = judge(changed, world)
        if not verdict.refused and not verdict.impossible:
            return items
        for remedy in _remedies(changed, verdict, world):
            more = _with(items, tuple(remedy.split()))
            if more not in seen:
                seen.add(more)
                queue.append(more)
    return None


def _remedies(written: RunConfig, verdict: Legality, world: World | None) -> Iterator[str]:
    """Yield remedies to try.

    If a rule refuses: its remedies. Else if another number of ranks started: that number. Else
    if the ranks do not divide: smaller axes of the mesh. Else other ways to split the batch,
    then other batches.
    """
    if verdict.refused:
        yield from verdict.refused[0].remedies_for(verdict.config)
        return
    parallel = written.megagpt.parallel
    replica = parallel.model_parallel_size
    ranks = replica if world is None or world.ranks is None else world.ranks
    if parallel.world_size not in (None, ranks):
        yield f"megagpt.parallel.world_size={ranks}"
        return
    if ranks % replica:
        for axis, size in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline)):
            yield from (f"megagpt.parallel.{axis}={fewer}" for fewer in range(size - 1, 0, -1))
        return
    yield from _other_batches(written, ranks // replica)


def _other_batches(written: RunConfig, replicas: int) -> Iterator[str]:
    """Yield other batch settings: any accumulation, smaller micro-batches, nearest batches."""
    micro_batch = written.train_micro_batch_size_per_gpu
    steps = written.gradient_accumulation_steps
    any_steps = "gradient_accumulation_steps=null"
    if steps is not None:
        yield any_steps
    for fewer in range((micro_batch or 1) - 1, 0, -1):
        if micro_batch and micro_batch % fewer == 0:
            yield f"train_micro_batch_size_per_gpu={fewer}"
    if written.train_batch_size is not None:
        unit = replicas * (micro_batch or steps or 1)
        below = written.train_batch_size // unit * unit
        for batch in nearest_first(
            written.train_batch_size, among=[max(below, unit), below + unit]
        ):
            yield (
                f"train_batch_size={batch} {any_steps}"
                if micro_batch and steps
                else f"train_batch_size={batch}"
            )


def _with(items: Items, more: Items) -> Items:
    """Return the items with `more` added; later items replace earlier ones of the same key."""
    by_key = {item.partition("=")[0]: item for item in (*items, *more)}
    return tuple(by_key.values())
