"""Other libraries as they ship, each in an environment of its own, on the models and data of these benchmarks.

    python -m tests.benchmarks.rivals [--rivals modelopt mct ...] [--models resnet20 ...] [--budgets 2.5 3 4]
    python -m tests.benchmarks.rivals --page

| file | holds |
|---|---|
| `__main__.py` | which rival runs what; asks, measures, appends rows to docs/benchmarks/rivals.jsonl |
| `environment.py` | an environment for each rival, from its pinned requirements |
| `tasks.py` | what is handed over: weights, images or text, `task.json` |
| `accounting.py` | bytes and effective bits of what comes back, counted alike for everybody |
| `page.py` | docs/benchmarks/rivals.md, from the rows |
| `hand.py` | the other side: reads a task and writes the answer; imports torch and safetensors only |
| `modelopt.py`, `mct.py`, `quanto.py`, `autoround.py`, `torchao_.py`, `hqq_.py` | one for each rival, run there |

A rival's process never imports hq_plugin, and nothing that is handed over is pickled.
"""
