"""`hq-plugin`, the command line. `main.py` lists the commands, each of which is a file of its own."""

from hq_plugin.cli.main import app

__all__ = ["app"]
