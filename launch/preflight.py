"""Check every host before a run.

python launch/preflight.py --hostfile hosts
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from megagpt.common.arguments import add_config_option, add_set_option, command_parser, user_path
from megagpt.schema.synonyms import SYNONYMS
from megagpt.utils import ExitCode, run_command


def main() -> int:
    arguments = parse_arguments()
    from megagpt.cluster.hosts import read_hostfile
    from megagpt.config import load_config
    from megagpt.preflight import checks as preflight  # after the arguments: --help is instant
    from megagpt.preflight.link import describe_links, measure_links

    config = load_config(arguments.deepspeed_config, arguments.set)
    hosts = read_hostfile(arguments.hostfile) if arguments.hostfile else []
    preflight.require_legal_on(hosts, config, arguments.deepspeed_config)
    directory = arguments.run_dir or Path("runs") / Path(arguments.deepspeed_config).stem
    reports = preflight.examine(hosts, config, directory)
    # flush: the table precedes the problems, also if both go to one file
    print(preflight.table(reports), flush=True)
    problems = [problem for report in reports for problem in report.problems]
    if arguments.bandwidth and not problems:
        print(describe_links(measure_links(hosts)))
    for note in [note for report in reports for note in report.notes]:
        print(f"note: {note}", flush=True)
    for problem in problems:
        print(problem, file=sys.stderr)
    return ExitCode.BAD_INPUT if problems else ExitCode.DONE


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        description="Check every host before a run: ssh, software, code, devices, memory, disks, "
        "clocks, the shared run directory. Exit code 2 if a run would fail. Without --hostfile, "
        "check this machine."
    )
    add = parser.add_argument
    add("--hostfile", type=user_path, help="hostfile, as given to deepspeed [this machine]")
    add_config_option(parser)
    add_set_option(parser, SYNONYMS)
    add("--run_dir", type=user_path, help="run directory [runs/NAME-OF-THE-CONFIG]")
    add(
        "--bandwidth",
        action="store_true",
        help="also measure latency and bandwidth between all ranks",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main))
