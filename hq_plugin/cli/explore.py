"""`hq-plugin explore`: a page on this machine, to choose a policy by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hq_plugin.cli.errors import one_line_errors
from hq_plugin.cli.options import AsJson, Debug
from hq_plugin.cli.output import say, say_json


def explore(
    session: Annotated[Path, typer.Argument(help="A session, from hq-plugin meta-train or Session.save.")],
    port: Annotated[int, typer.Option(help="Port on this machine; 0 takes a free one.", min=0, max=65535)] = 0,
    profile: Annotated[Path | None, typer.Option(help="Predict latency, too: from hq-plugin profile.")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Choose a budget and pin layers by hand, in the browser.

    The page predicts size, bits, BitOps, latency and distance at once, and gives the policy as a file, with the
    command that makes it. The model is not needed for that. Only this machine can reach the page, by the address
    with its token. Ctrl-C ends it.

    \b
    Examples:
      hq-plugin explore session
      hq-plugin explore session --profile laptop.json --open
    """
    from hq_plugin.explore import Answers, Server
    from hq_plugin.profiles import Profile
    from hq_plugin.session_store import read_session_outline

    with one_line_errors(debug):
        outline = read_session_outline(session)
        if profile is not None:
            times = Profile.load(profile)
            times.check_target(outline.target or times.target)
            times.put_into(outline.costs)
        with Server(Answers(outline, session), port) as server:
            if as_json:
                say_json({"url": server.url})
            else:
                say(f"{server.url}  (Ctrl-C ends it)")
            # Whoever reads a pipe waits for this line.
            sys.stdout.flush()
            if open_browser:
                import webbrowser

                webbrowser.open(server.url)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                typer.echo("ended", err=True)
