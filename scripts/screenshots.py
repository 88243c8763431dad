"""Take the pictures of README and docs from a real server with Chromium.

    python scripts/screenshots.py [--config deployments/configs/smoke.yaml] [--chromium /usr/bin/chromium]
    python scripts/screenshots.py --comparison grid-store/comparisons/alpha-history/report.html

The first form starts a Prefect server and a worker in a temporary folder, deploys, runs the configuration to its end,
and writes docs/images/prefect-ui.png and docs/images/report.png. The second writes docs/images/comparison.png. A
picture ends before a page's sample answers, so that no row of a data set enters the project.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.servers import prefect_server, prefect_worker  # noqa: E402


@contextlib.contextmanager
def chromium(path: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="deployments/configs/smoke.yaml")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--comparison", type=Path, help="page of a comparison; take its picture instead")
    arguments = parser.parse_args()
    images = ROOT / "docs/images"
    if arguments.comparison is not None:
        with chromium(arguments.chromium) as page:
            page.set_viewport_size({"width": 1200, "height": 2050})
            page.goto(arguments.comparison.resolve().as_uri())
            page.wait_for_timeout(3000)
            page.screenshot(path=images / "comparison.png")
        return
    with tempfile.TemporaryDirectory() as folder, prefect_server(Path(folder) / "prefect") as server:
        store = Path(folder) / "store"
        for command in ("work-pool create local --type process", "--no-prompt deploy --all"):
            done = server.cli(*command.split(), cwd=ROOT)
            assert done.returncode == 0, done.stdout + done.stderr
        with prefect_worker(server, "--limit", "1", cwd=ROOT):
            done = server.cli(
                "deployment", "run", "spin/iterate", "-p", f"config={arguments.config}", "-p", f"store={store}"
            )
            found = re.search(r"UUID: (\S+)", done.stdout)
            assert found is not None, done.stdout + done.stderr
            run = server.wait_for_state(found[1], {"COMPLETED", "FAILED", "CRASHED"}, 3600)
            assert run["state_type"] == "COMPLETED", run["state"]
        (report,) = store.glob("runs/*/report.html")
        with chromium(arguments.chromium) as page:
            page.goto(f"{server.url}/runs/flow-run/{found[1]}")
            page.wait_for_timeout(8000)
            page.screenshot(path=images / "prefect-ui.png")
            if "smoke" not in arguments.config:
                page.set_viewport_size({"width": 1200, "height": 1500})
                page.goto(report.as_uri())
                page.wait_for_timeout(3000)
                page.screenshot(path=images / "report.png")


if __name__ == "__main__":
    main()
