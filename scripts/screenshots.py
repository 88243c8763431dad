"""The pictures of the README: a run in the Prefect UI and the report, taken from a real server and Chromium.

    python scripts/screenshots.py [--config deployments/configs/smoke.yaml] [--chromium /usr/bin/chromium]

Starts a Prefect server and a worker of its own in a temporary folder, deploys, runs the configuration to its end and
writes docs/images/prefect-ui.png and docs/images/report.png.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from servers import prefect_server, prefect_worker  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="deployments/configs/smoke.yaml")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    images = ROOT / "docs/images"
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
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.goto(f"{server.url}/runs/flow-run/{found[1]}")
            page.wait_for_timeout(8000)
            page.screenshot(path=images / "prefect-ui.png")
            if "smoke" not in arguments.config:
                page.set_viewport_size({"width": 1200, "height": 1500})
                page.goto(report.as_uri())
                page.wait_for_timeout(3000)
                page.screenshot(path=images / "report.png")
            browser.close()


if __name__ == "__main__":
    main()
