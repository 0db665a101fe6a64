"""`python -m hq_plugin`, which is `hq-plugin`; as a module it can be given to `accelerate launch -m`."""

from hq_plugin.cli import app

if __name__ == "__main__":  # processes that workers of a DataLoader start import this file again
    app(prog_name="hq-plugin")
