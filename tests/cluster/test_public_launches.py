"""Launch lines and hostfiles as they are published: each is taken, or answered with what to type.
Host names and addresses are replaced; the options of each program are cut to the first few.
"""

import shlex
from contextlib import suppress
from unittest.mock import patch

import pytest
from deepspeed.launcher.runner import _parse_hostfile
from deepspeed.launcher.runner import parse_args as parse_deepspeed

from launch import train as train_command
from megagpt.cluster.hosts import HostfileError, parse_hostfile

TAKEN: list[str] = []
SET = "no such option; type --set"

# What stands after `deepspeed`, and what is said. From public scripts that call DeepSpeed's
# launcher: chat and vision fine-tuning, DeepSpeed's examples, Megatron-DeepSpeed, its issue 191.
OF_DEEPSPEED = [
    ("--hostfile=hosts --num_nodes=4 --num_gpus=8 launch/train.py --deepspeed a.json", TAKEN),
    ("--num_gpus 8 --num_nodes 2 --hostfile hosts --master_addr 192.0.2.12 launch/train.py", TAKEN),
    ("--include localhost:0,1,2,3 --master_port 29503 launch/train.py --deepspeed a.json", TAKEN),
    ("--include=localhost:4,5 --master_port 6000 launch/train.py --deepspeed "
     "--deepspeed_config a.json", TAKEN),
    ("--exclude worker-2:0 --hostfile hosts launch/train.py --deepspeed-config a.json", TAKEN),
    ("launch/train.py --epoch 1 --deepspeed --deepspeed_config a.json",
     [f"--epoch: {SET} megagpt.training.total_epochs=1"]),
    ("--bind_cores_to_rank --bind_core_list 0-9,12-21 launch/train.py --log-interval 250 "
     "--deepspeed --deepspeed_config a.json",
     [f"--log_interval: {SET} megagpt.monitor.log_interval_steps=250"]),
    ("--num_gpus=4 --bind_cores_to_rank launch/train.py --deepspeed_config=a.json "
     "--num_train_epochs 3 --lr 1e-5 --batch_size 4",
     [f"--num_train_epochs: {SET} megagpt.training.total_epochs=3",
      f"--lr: {SET} optimizer.params.lr=1e-5",
      f"--batch_size: {SET} train_micro_batch_size_per_gpu=4"]),
    ("--master_addr localhost --master_port 1234 --no_ssh_check --launcher OpenMPI "
     "launch/train.py --deepspeed --deepspeed_config a.json", TAKEN),
    ("--num_nodes 1 --num_gpus 1 launch/train.py --tensor-model-parallel-size 2 --num-layers 4 "
     "--seq-length 2048",
     [f"--tensor_model_parallel_size: {SET} megagpt.parallel.tensor=2",
      f"--num_layers: {SET} megagpt.model.num_layers=4",
      f"--seq_length: {SET} megagpt.model.sequence_length=2048"]),
    ("/hostfile launch/train.py --deepspeed", None),  # the hostfile as the script (issue 575)
]  # fmt: skip

# Words after the script that torchrun, torch.distributed.launch, accelerate and srun started.
OF_OTHERS = [
    ("--local-rank=0 --deepspeed_config=a.json --steps=200",
     [f"--steps=200: {SET} megagpt.training.total_steps=200"]),
    ("50 10", ["50: belongs to no option; remove it", "10: belongs to no option; remove it"]),
    ("--deepspeed a.json --output_dir out --max_grad_norm 1.0",
     ["--output_dir: no such option; type --run_dir out", f"--max_grad_norm: {SET} gradient"]),
    ("--config_file a.json", ["--config_file: no such option; type --deepspeed_config a.json"]),
]  # fmt: skip


def answers(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that train.py says to its words; none if it takes them."""
    with patch("sys.argv", ["launch/train.py", *words]), suppress(SystemExit):
        train_command.parse_arguments()
    return capsys.readouterr().err.splitlines()


def assert_said(said: list[str], expected: list[str]) -> None:
    assert len(said) == len(expected), said
    for line, start in zip(said, expected, strict=True):
        assert line.startswith(f"train.py: {start}")


@pytest.mark.parametrize(("line", "expected"), OF_DEEPSPEED)
def test_lines_of_deepspeed(
    line: str, expected: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's own parser splits the line; its user arguments are ours."""
    launcher = parse_deepspeed(shlex.split(line))
    if expected is None:
        assert launcher.user_script == "/hostfile"
        return
    assert launcher.user_script == "launch/train.py"
    assert_said(answers(["--local_rank=0", *launcher.user_args], capsys), expected)


@pytest.mark.parametrize(("line", "expected"), OF_OTHERS)
def test_lines_of_other_launchers(
    line: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_said(answers(shlex.split(line), capsys), expected)


HOSTFILES = [
    ("algo-1 slots=4\nalgo-2 slots=4\n", ""),  # SageMaker (DeepSpeed's issue 1923)
    ("ddp-0.ddp.ml-dev.svc.cluster.local slots=2\n", ""),  # Kubernetes (2612)
    ("gpu-a slots=8 max_slots=8\n", ""),  # srun hostname | awk '{print $1" slots=8 max_slots=8"}'
    ("192.0.2.10 slots=8 max_slots=16\n192.0.2.11 slots=8 max_slots=16\n", ""),  # OpenMPI's
    ("user00@192.0.2.10 slots=2\nroot@192.0.2.7 slots=1\n", "root@192.0.2.7 has 1 slots"),  # 575
    ("192.0.2.1 slots=8 \n192.0.2.2 lots=8 \n", "expected `NAME slots=N`"),  # 3669
    ("192.0.2.1 slots=8max_slots=8\n", "expected `NAME slots=N`"),  # a list on OpenMPI
    ("node1\nnode2\n", "expected `NAME slots=N`"),  # mpirun -f, pdsh
    ("node1:8\nnode2:8\n", "expected `NAME slots=N`"),  # MPICH, Intel MPI
    ("gpu-a slots=8\ngpu-a slots=8\n", "gpu-a is listed 2 times"),  # srun with several tasks a host
    ("gpu[01-04] slots=8\n", "is not a host name"),  # a list of Slurm's
]


@pytest.mark.parametrize(("text", "said"), HOSTFILES)
def test_hostfiles(text: str, said: str) -> None:
    """What is taken is what DeepSpeed reads; what is refused it cannot run, or misreads."""
    if said:
        with pytest.raises(HostfileError, match=r"hostfile: ") as refused:
            parse_hostfile(text)
        assert said in str(refused.value)
        return
    assert {host.name: host.slots for host in parse_hostfile(text)} == dict(
        _parse_hostfile(text.splitlines())
    )
