"""The matrix: hq_plugin against everything else that one could use, at equal bytes and equal training steps.

`python -m tests.benchmarks` runs it. A reader may start at `tasks.py` (what is quantized), go on to `methods.py`
(who quantizes it) and `run.py` (one row), and end at `claims.py` and `page.py` (what follows).
"""
