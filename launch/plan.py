#!/usr/bin/env python3
"""Check whether a configuration is legal, fits and how fast it would be, without torch.

python launch/plan.py --deepspeed_config F --hostfile hosts
python launch/plan.py --search --deepspeed_config F --hostfile hosts
python launch/plan.py --model llama3-70b --tokens 1e12 --hosts 16 --device h100 --cost 2.5
python launch/plan.py --explain megagpt.training.recompute
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megagpt.common.arguments import (
    DEFAULT_CONFIG,
    add_config_option,
    add_set_option,
    command_parser,
    non_negative,
    positive,
    probability,
    user_path,
    whole_number,
)
from megagpt.schema.synonyms import SYNONYMS
from megagpt.utils import ExitCode, UserError, abandon, run_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from megagpt.cluster.hosts import Host
    from megagpt.config import RunConfig
    from megagpt.planning.cost.accelerators import Accelerator
    from megagpt.planning.cost.performance import Assumptions
    from megagpt.planning.plan import Limits, Plan
    from megagpt.planning.price import Budget

PINS = "DS_PIN_MEMORY_BACKEND"  # DeepSpeed's variable: who page-locks host memory
RATES = {
    "peak_tflops": "TFLOP/s of a device in 16 bit",
    "link_gb_per_s": "GB/s per direction between the devices of a host",
    "network_gb_per_s": "GB/s per direction from a device to other hosts",
    "host_gb_per_s": "GB/s per direction between a device and its host",
    "host_memory_gb_per_s": "GB/s of a host's memory",
    "nvme_gb_per_s": "GB/s of a host's NVMe",
}


def main() -> int:
    arguments = parse_arguments()
    from megagpt.planning.plan import assume
    from megagpt.planning.price import Budget

    device = accelerator(arguments.device, arguments.devices)
    hosts = hosts_of_arguments(arguments)
    rates = {name: getattr(arguments, name) for name in ("efficiency", *RATES)}
    assumed = assume(device, max(host.slots for host in hosts), **rates)
    asked = (hosts, limits_of(arguments, device), assumed, device)
    budget = Budget(arguments.tokens, arguments.cost)
    if arguments.explain:
        return explain(arguments, *asked)
    if arguments.search or arguments.model:
        return search(arguments, budget, *asked)
    return plan(arguments, budget, *asked)


def plan(
    arguments: argparse.Namespace,
    budget: "Budget",
    hosts: "list[Host]",
    limits: "Limits",
    assumed: "Assumptions",
    device: "Accelerator",
) -> int:
    """Plan the configuration; the exit code has the verdict."""
    from megagpt.planning.plan import as_json, make_plan
    from megagpt.planning.report import text

    found = make_plan(
        arguments.deepspeed_config,
        arguments.set,
        hosts,
        limits,
        assumed,
        bf16_native=device.bf16_native,
    )
    budget = with_length(budget, found.config)
    show(arguments, lambda: as_json(found), lambda: text(found, budget))
    return ExitCode.DONE if found.good else ExitCode.BAD_INPUT


def search(
    arguments: argparse.Namespace,
    budget: "Budget",
    hosts: "list[Host]",
    limits: "Limits",
    assumed: "Assumptions",
    device: "Accelerator",
) -> int:
    """Search the fastest layouts; the exit code is 2 if nothing fits."""
    from megagpt.planning.search.ask import search_file, search_preset
    from megagpt.planning.search.report import as_json, text, write_winner

    if arguments.model:
        answer = search_preset(
            arguments.model,
            arguments.set,
            hosts,
            limits,
            assumed,
            device=device,
            tokens=arguments.tokens,
        )
    else:
        answer = search_file(
            arguments.deepspeed_config,
            arguments.set,
            hosts,
            limits,
            assumed,
            bf16_native=device.bf16_native,
        )
    budget = with_length(budget, answer.written)
    show(arguments, lambda: as_json(answer, budget), lambda: text(answer, budget))
    if arguments.write:
        write_winner(answer, arguments.write)
        print(f"wrote {arguments.write}", file=sys.stderr if arguments.json else sys.stdout)
    return ExitCode.DONE if answer.found else ExitCode.BAD_INPUT


def explain(
    arguments: argparse.Namespace,
    hosts: "list[Host]",
    limits: "Limits",
    assumed: "Assumptions",
    device: "Accelerator",
) -> int:
    """Print what a key does, with what it costs the configuration."""
    from megagpt.planning.explain import explain as explanation
    from megagpt.planning.plan import make_plan

    def planned(items: "Sequence[str]") -> "Plan":
        return make_plan(
            arguments.deepspeed_config,
            [*arguments.set, *items],
            hosts,
            limits,
            assumed,
            bf16_native=device.bf16_native,
        )

    print(explanation(arguments.explain, arguments.deepspeed_config, arguments.set, planned))
    return ExitCode.DONE


def show(
    arguments: argparse.Namespace, as_json: "Callable[[], Any]", text: "Callable[[], str]"
) -> None:
    """Print a result; a reader may leave early (`| head`), the exit code has the verdict too."""
    try:
        print(json.dumps(as_json(), indent=2) if arguments.json else text(), flush=True)
    except BrokenPipeError:
        abandon(sys.stdout)


def stated_world_size(arguments: argparse.Namespace) -> int:
    """Return the configuration's `megagpt.parallel.world_size`.

    Raises UserError if neither it nor an option gives the number of ranks.
    """
    from megagpt.config import load_config

    config = load_config(arguments.deepspeed_config, arguments.set, for_plan=True)
    stated = config.megagpt.parallel.world_size
    if stated is None and not arguments.hostfile:
        raise UserError(
            f"{arguments.deepspeed_config}: the number of ranks is unknown (no "
            "megagpt.parallel.world_size); give --hostfile hosts or --ranks 8"
        )
    return stated or 0


def with_length(budget: "Budget", config: "RunConfig") -> "Budget":
    """Return the budget with the configuration's own length, if a price is asked without tokens."""
    from dataclasses import replace

    training = config.megagpt.training
    if budget.tokens is not None or budget.per_device_hour is None:
        return budget
    tokens = training.total_tokens
    if tokens is None and training.total_steps and config.train_batch_size:
        model = config.megagpt.model
        tokens = training.total_steps * config.train_batch_size * model.sequence_length
    return replace(budget, tokens=tokens)


def hosts_of_arguments(arguments: argparse.Namespace) -> "list[Host]":
    """Return the hosts of the hostfile, or made-up ones for the number of hosts or ranks."""
    from megagpt.cluster.hosts import read_hostfile
    from megagpt.planning.placement import hosts_of

    if arguments.hostfile:
        return read_hostfile(arguments.hostfile)
    if arguments.hosts:
        return hosts_of(arguments.hosts * arguments.slots, arguments.slots)
    if arguments.model and not arguments.ranks:
        raise UserError(
            f"--model {arguments.model}: the number of ranks is unknown; give --hosts 4"
        )
    if arguments.explain and not arguments.ranks:
        return hosts_of(arguments.slots, arguments.slots)
    return hosts_of(arguments.ranks or stated_world_size(arguments), arguments.slots)


def limits_of(arguments: argparse.Namespace, device: "Accelerator") -> "Limits":
    """Return the memory of a device and of a host."""
    from megagpt.planning.plan import Limits

    limits = Limits(
        arguments.device_memory_gib or device.memory_gib,
        arguments.host_memory_gib,
        arguments.reserve_gib,
        shared=device.is_host,
        pins="native" if os.environ.get(PINS, "").strip().lower() == "native" else "torch",
    )
    if limits.device_gib <= limits.reserve_gib and not limits.shared:
        raise UserError(
            f"--device_memory_gib {limits.device_gib:g}: {limits.reserve_gib:g} GiB of it are "
            f"reserved, so nothing fits; give more, or a smaller --reserve_gib"
        )
    return limits


def accelerator(name: str, table: Path | None) -> "Accelerator":
    """Return the device of a name, from the user's table first."""
    from megagpt.planning.cost.accelerators import ACCELERATORS, find, read_devices

    known = {**(read_devices(table) if table else {}), **ACCELERATORS}
    if (found := find(name, known.values())) is None:
        raise UserError(
            f"--device {name!r} is not known ({', '.join(known)}); for another device, name the "
            "nearest of these and give its figures: --peak_tflops X --device_memory_gib X "
            "--link_gb_per_s X --host_gb_per_s X; or give a table: --devices FILE"
        )
    return found


def parse_arguments() -> argparse.Namespace:
    from megagpt.planning.cost.accelerators import ACCELERATORS
    from megagpt.planning.plan import EFFICIENCY, HOST_MEMORY_GIB, RESERVE_GIB
    from megagpt.schema.model import PRESETS

    parser = command_parser(
        description="Show whether a configuration is legal and fits, where every rank runs, how "
        "fast a step would be at given or assumed rates, and what would fit instead. Exit code "
        "0: legal and fits; 2: not.",
    )
    add = parser.add_argument
    add_config_option(parser)
    add_set_option(parser, SYNONYMS)
    add(
        "--search",
        action="store_true",
        help="show the ten fastest layouts that are legal and fit, and why the file's own loses",
    )
    add(
        "--model",
        metavar="PRESET",
        choices=sorted(PRESETS),
        help="search for a published shape, without a file: llama3-70b, gpt3-13b, ...",
    )
    add(
        "--explain",
        metavar="KEY",
        help="show what a key does, its default, what it costs here, what it excludes",
    )
    add("--write", type=user_path, metavar="FILE", help="write the first layout of a search")
    add("--tokens", type=whole_number(1), metavar="N", help="tokens of the run [the file's]")
    add(
        "--cost",
        type=non_negative,
        metavar="X",
        help="price of a device's hour; shows days and money",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=user_path, help="hostfile, as the launcher reads it")
    where.add_argument(
        "--ranks",
        type=whole_number(1),
        metavar="N",
        help="number of ranks [megagpt.parallel.world_size]",
    )
    where.add_argument("--hosts", type=whole_number(1), metavar="N", help="number of hosts")
    add(
        "--slots",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="ranks per host without a hostfile [8]",
    )
    add(
        "--device",
        default="h100",
        metavar="NAME",
        help=f"kind of GPU, also as its driver names it [h100]: {', '.join(ACCELERATORS)}",
    )
    add(
        "--devices",
        type=user_path,
        metavar="FILE",
        help="a table of further devices, as megagpt/planning/cost/devices.json",
    )
    add(
        "--device_memory_gib",
        type=positive,
        metavar="GIB",
        help="memory of a device [from the data sheet]",
    )
    for name, default, what in (
        ("host_memory_gib", HOST_MEMORY_GIB, "memory of a host"),
        ("reserve_gib", RESERVE_GIB, "device memory not for us: CUDA context, NCCL, fragments"),
    ):
        add(
            f"--{name}",
            type=non_negative,
            default=default,
            metavar="GIB",
            help=f"{what} [{default:g}]",
        )
    add(
        "--efficiency",
        type=probability,
        metavar="SHARE",
        help=f"share of the peak that matrix products reach [the device's, else {EFFICIENCY}]",
    )
    for name, what in RATES.items():
        add(
            f"--{name}",
            type=positive,
            metavar="X",
            help=f"{what} [data sheet or assumption; printed]",
        )
    add("--json", action="store_true", help="print the plan as one JSON object")
    arguments = parser.parse_args()
    if arguments.model and arguments.deepspeed_config != DEFAULT_CONFIG:
        parser.error("--model and --deepspeed_config: give one of them")
    if arguments.write and not (arguments.search or arguments.model):
        parser.error("--write needs --search or --model")
    return arguments


if __name__ == "__main__":
    sys.exit(run_command(main))
