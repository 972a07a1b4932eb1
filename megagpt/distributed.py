"""The mesh of ranks: the place of each process on the axes, and the groups they form.

World = pipeline x data x tensor, tensor innermost, so that tensor-parallel ranks are neighbours on
one host. The mesh is also what DeepSpeed calls an mpu (model-parallel unit); its model-parallel
group is every axis except data.
"""

import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # torch's own is 10 minutes with NCCL


class Mesh:
    """The place of this rank on the axes pipeline, data and tensor, and the group of each axis.

    Every rank must construct it, once torch.distributed is initialised. ``device_type`` is cpu or
    cuda.
    """

    def __init__(self, pipeline: int, data: int, tensor: int, device_type: str) -> None:
        sizes = (pipeline, data, tensor)
        names = ("pipeline", "data", "tensor")
        self.device_mesh: DeviceMesh = init_device_mesh(device_type, sizes, mesh_dim_names=names)
        self.pipeline_rank, self.data_rank, self.tensor_rank = (
            self.device_mesh.get_coordinate() or (0, 0, 0)
        )
        self.pipeline_size, self.data_size, self.tensor_size = sizes
        self.data_group = self.device_mesh["data"].get_group()
        self.pipeline_group = self.device_mesh["pipeline"].get_group()
        self.tensor_group = self.device_mesh["tensor"].get_group()
        self.model_group = self._model_group()

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The groups of the axes and of the replica, each once.

        Axes that join the same ranks may share a group.
        """
        groups = (self.data_group, self.pipeline_group, self.tensor_group, self.model_group)
        return [*{group.group_name: group for group in groups}.values()]

    def close(self) -> None:
        """Destroy the groups; every rank must call it.

        A gloo group keeps polling threads as long as it lives.
        """
        for group in self.groups:
            if group is not dist.group.WORLD:  # an axis that spans all ranks uses WORLD itself
                dist.destroy_process_group(group)

    def _model_group(self) -> dist.ProcessGroup:
        """Return the group of this data replica's pipeline x tensor ranks.

        Every rank must take part in creating every group.
        """
        ranks = self.device_mesh.mesh
        groups = {
            data: dist.new_group(ranks[:, data, :].flatten().tolist())
            for data in range(self.data_size)
        }
        return groups[self.data_rank]

    @property
    def rank(self) -> int:
        """The global rank."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return dist.get_world_size()

    def stages(self, virtual_stages: int) -> range:
        """Return the stages that this rank holds: every pipeline_size-th.

        A micro-batch therefore passes every rank in turn.
        """
        return range(self.pipeline_rank, self.pipeline_size * virtual_stages, self.pipeline_size)

    def rank_of_stage(self, stage: int) -> int:
        """Return the global rank of a stage, for this rank's data replica and tensor shard."""
        return int(
            self.device_mesh.mesh[stage % self.pipeline_size, self.data_rank, self.tensor_rank]
        )

    @property
    def name(self) -> str:
        """The name of this rank in error messages."""
        place = f"pipeline {self.pipeline_rank}, data {self.data_rank}, tensor {self.tensor_rank}"
        return f"{place} (rank {self.rank}, host {socket.gethostname()})"

    # The methods that DeepSpeed calls on an mpu. There must be no initialize_sequence_parallel:
    # its presence tells DeepSpeed that the mpu does Ulysses (zero/stage3.py:371).
    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group

    def get_model_parallel_rank(self) -> int:
        return self.pipeline_rank * self.tensor_size + self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.pipeline_size * self.tensor_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model_group
