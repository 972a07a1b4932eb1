"""DeepSpeed's keys that have no effect beside the others of a configuration.

They tune something that this run does not have: a bucket of another ZeRO stage, an I/O buffer
without NVMe. DeepSpeed accepts and ignores them. So does the trainer, and says so; keys that would
matter, such as the place of an offload, are refused (planning/rules.py).
"""

from __future__ import annotations

from megagpt.schema.deepspeed import (
    ZERO_KEY_STAGES,
    AioConfig,
    OffloadOptimizerConfig,
    OffloadParamConfig,
    ZeroConfig,
)

# Without effect for parameters on NVMe (compat.py, read_when_needed)
NOT_FROM_NVME = {
    "stage3_prefetch_bucket_size": "a parameter on NVMe is read when its module needs it, not "
    "prefetched",
    "stage3_max_live_parameters": "it limits prefetching, and nothing is prefetched from NVMe",
    "stage3_max_reuse_distance": "a parameter on NVMe is read again for each use",
}


def idle_keys(zero: ZeroConfig, aio: AioConfig | None) -> list[tuple[str, str]]:
    """Return each given key that has no effect beside the others, and why."""
    found = [
        (f"zero_optimization.{key}", f"no effect at ZeRO {zero.stage}")
        for key, stages in ZERO_KEY_STAGES.items()
        if getattr(zero, key) is not None and zero.stage not in stages
    ]
    if zero.stage == 3 and zero.parameter_device == "nvme":
        found += [
            (f"zero_optimization.{key}", reason)
            for key, reason in NOT_FROM_NVME.items()
            if getattr(zero, key)
        ]
    for name in ("offload_optimizer", "offload_param"):
        found += _idle_in_offload(name, getattr(zero, name))
    if aio and "nvme" not in (zero.optimizer_device, zero.parameter_device):
        found.append(("aio", 'no effect without offload to "nvme"'))
    return found


def _idle_in_offload(
    name: str, offload: OffloadOptimizerConfig | OffloadParamConfig | None
) -> list[tuple[str, str]]:
    if offload is None or offload.device == "nvme":
        return []
    return [
        (f"zero_optimization.{name}.{key}", f'no effect with device "{offload.device}"')
        for key in offload.nvme_only()
        if getattr(offload, key) is not None
    ]
