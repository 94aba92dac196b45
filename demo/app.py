"""A page that compares long prompts: stock SDXL, compel and FineLIP-SDXL side by side.

python demo/app.py
python demo/app.py --base stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 --finelip runs/finelip/last
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from finelip_sdxl.cli.drawing import open_comparison
from finelip_sdxl.cli.options import add_pipeline, add_refiner, check_models, device_and_dtype
from finelip_sdxl.console import COUNT, Parser, announce, number, quiet_diffusers, with_flags

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

THREADS = 40  # of the page, beside those of runs that wait
MAX_UPLOAD = "32mb"  # more than any PNG of this page


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="finelip-sdxl-demo-") as folder:
        try:
            serve(options, Path(folder))
        except (ValueError, TypeError, OSError, MemoryError) as error:
            flags = {name: f"--{name.replace('_', '-')}" for name in vars(options)}
            print(f"app.py: error: {with_flags(' '.join(str(error).split()), flags)}", file=sys.stderr)
            return 2
    return 0


def serve(options: argparse.Namespace, folder: Path, wait: bool = True) -> Any:
    """Load the models and open the page. Files go to `folder`. With `wait` this returns after Ctrl+C."""
    check_models(options)
    announce(f"Opening {options.base}…")
    # Before Gradio is imported: it would send usage figures to its makers.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    device, dtype = device_and_dtype(options)
    quiet_diffusers()

    from demo.page import build_page
    from demo.theme import SCRIPT, STYLE, THEME

    comparison = open_comparison(options, device, dtype)
    page = build_page(comparison, folder / "pictures", options.max_side, options.max_waiting)
    bypass_proxy(options.host)
    try:
        with redirect_stdout(io.StringIO()):  # also where it is quiet, Gradio prints pages about a public address
            # Closed: a request past the queue cannot be canceled.
            page.queue(api_open=False).launch(
                server_name=options.host,
                server_port=options.port,
                share=options.share,
                prevent_thread_lock=True,
                theme=THEME,
                css=STYLE,
                head=f"<script>{SCRIPT}</script>",
                max_file_size=MAX_UPLOAD,
                max_threads=THREADS + options.max_waiting,  # each run that waits has one
                footer_links=["api", "settings"],
                show_error=True,
                quiet=True,  # its messages name its own arguments in place of flags
            )
    except OSError as error:
        if "empty port" in str(error):  # also said of an address that is another machine's
            port, can = ("No port from 7860 on", "can") if options.port is None else (f"Port {options.port}", "cannot")
            raise OSError(
                f"{port} {can} be opened at {options.host}: expected a free port, and an address of this machine. Pass"
                " another --port or --host."
            ) from error
        raise
    except Exception as error:  # Gradio has no narrower one
        raise OSError(
            f"The page was opened, but does not answer this machine ({error!s:.300}). A proxy or a firewall may stand"
            f" between: look at http_proxy and no_proxy in the environment, or try --host 127.0.0.1."
        ) from error
    print(f"The page is open at {page.local_url}; press Ctrl+C to close it.")
    if page.share_url:
        print(f"For a week everybody may see it at {page.share_url}.")
    elif options.share:
        print(
            "It has no public address: --share needs Gradio's servers, which were not reached. Try again when they can"
            " be, or pass --host 0.0.0.0 to let machines of your own network in."
        )
    if wait and page.is_running:
        page.block_thread()
    return page


def bypass_proxy(host: str) -> None:
    """Exempt this host from any proxy: Gradio asks its own page whether it is up."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [*given.split(","), "localhost", "127.0.0.1", "::1", host]
    direct = dict.fromkeys(name.strip() for name in hosts if name.strip())
    # Some programs look at one name, some at the other.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(direct)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="app.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pipeline(parser)
    add_refiner(parser)
    group = parser.add_argument_group("the page")
    add = group.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address of the page; 0.0.0.0 lets other machines in "
        "(default: %(default)s)")  # fmt: skip
    port = number(int, least=1, most=2**16 - 1)
    add("--port", type=port, metavar="N", help="port of the page (default: the first free one from 7860 on)")
    add("--share", action="store_true", help="open a public address, too, through Gradio's servers")
    add("--max-side", type=COUNT, default=1536, metavar="PIXELS", help="largest width and height of a picture "
        "(default: %(default)s)")  # fmt: skip
    add("--max-waiting", type=COUNT, default=20, metavar="N", help="number of runs that may wait for their turn "
        "(default: %(default)s)")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that files are deleted, as after Ctrl+C
    sys.exit(main())
