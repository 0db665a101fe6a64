"""One program on several processes: accelerate, launched by torchrun, over gloo on CPUs.

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 docs/examples/several_processes.py
    accelerate launch --multi_gpu --num_processes 4 docs/examples/several_processes.py   # on GPUs; not tried

Training splits each batch, the search splits policies, every process returns the same model and the first one
writes the files. Run by plain `python` it does the same on one process.
"""

import torch
import torch.nn.functional as F
from accelerate import PartialState
from sklearn.datasets import load_digits
from torch import nn

import hq_plugin as hq

torch.manual_seed(0)  # the same float model on every process; usually it is loaded from a file
raw = load_digits()
images, labels = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(raw.target)
batches = list(zip(images.split(64), labels.split(64), strict=True))

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(256, 32),
    nn.ReLU(),
    nn.Linear(32, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(5):
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

small = hq.quantize(
    model.eval(),
    "3bit",
    batches,
    effort="fast",
    meta_steps=10,
    search_evaluations=30,
    finetune_steps=20,
    progress=False,
)
hq.save(small, "small", overwrite=True)
state = PartialState()  # after the call: hq_plugin has told accelerate about CPUs by then
print(
    f"process {state.process_index} of {state.num_processes}: {small.hq.effective_bits:.3f} bits, "
    f"KL {small.hq.kl:.5f}, {small.hq.policy}",
    flush=True,
)
state.destroy_process_group()
