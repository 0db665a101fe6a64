"""Choosing a policy by hand on a saved session: the page that `hq-plugin explore` serves on loopback.

`planner.py` plans and predicts, `calibration.py` corrects predictions, `answers.py` makes JSON of both, `server.py`
serves it; `explore.html` with its styles and scripts is the page.
"""

from hq_plugin.explore.answers import Answers
from hq_plugin.explore.planner import Planner, Prediction
from hq_plugin.explore.server import Server

__all__ = ["Answers", "Planner", "Prediction", "Server"]
