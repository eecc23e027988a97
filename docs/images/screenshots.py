"""Takes the README's pictures of the Dagster UI: ``python docs/images/screenshots.py --store STORE``.

Opens the UI on a store (that of ``make demo``), asks a headless Chromium or Chrome for each page, and writes
PNG files beside this script.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PAGES = {
    "graph": ("locations/__repository__@definitions.py/asset-groups/{name}/lineage", (2400, 1220)),
    "selected_subset": ("assets/{name}/selected_subset", (1500, 2300)),
    "checks": (
        "assets/{name}/attention_embeddings?view=checks&checkDetail=some_rows_are_embedded",
        (1500, 900),
    ),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path(".scalselect/demo"))
    parser.add_argument("--name", default="demo", help="of the store's selection")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed")
    port = _free_port()
    command = [Path(sys.executable).with_name("scalselect"), "ui", "--store", arguments.store]
    ui = subprocess.Popen([*command, "--port", str(port)], start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/server_info")
        for picture, (page, (width, height)) in PAGES.items():
            target = Path(__file__).with_name(f"{picture}.png")
            subprocess.run(
                [
                    *(browser, "--headless", "--no-sandbox", "--hide-scrollbars"),
                    # The page goes on asking the server; so much of its time is enough to draw it.
                    "--virtual-time-budget=30000",
                    f"--window-size={width},{height}",
                    f"--screenshot={target}",
                    f"http://127.0.0.1:{port}/{page.format(name=arguments.name)}",
                ],
                check=True,
                timeout=300,
                stderr=subprocess.DEVNULL,
            )
            print(target)
    finally:
        os.killpg(ui.pid, signal.SIGTERM)
        ui.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(url: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(1)


if __name__ == "__main__":
    main()
