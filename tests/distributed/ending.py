"""A job that ends right after its last collectives: `torchrun --nproc_per_node 2 -m tests.distributed.ending`.

A mesh outlives the process group, as it does in torch's caches once a tensor was spread over processes.
"""

from __future__ import annotations

import torch
import torch.distributed
import torch.distributed.tensor
from torch.distributed.device_mesh import init_device_mesh

import hq_plugin.distribution  # noqa: F401, leaves the job at the end

torch.distributed.init_process_group("gloo")
MESH = init_device_mesh("cpu", (2,))
for _ in range(100):
    torch.distributed.all_reduce(torch.ones(30_000), group=MESH.get_group(), async_op=True).wait()
