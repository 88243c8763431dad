"""The form of `spin/iterate` as people meet it: the Prefect UI in a real browser."""

from __future__ import annotations

import re
import time

import pytest

from spinreg_core.config import RunConfig
from tests.support.browser import needs_chromium, new_page
from tests.support.servers import PrefectServer

pytestmark = [pytest.mark.slow, needs_chromium]


def letters(text: str) -> str:
    """Letters and digits alone: the UI renders Markdown."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


def test_ui_form_shows_every_field_and_refuses_wrong_values(deployed_server: PrefectServer) -> None:
    server = deployed_server
    iterate = server.api("GET", "deployments/name/spin/iterate")["id"]
    before = server.api("POST", "flow_runs/count", {})
    with new_page(viewport={"width": 1200, "height": 3000}) as page:
        page.goto(f"{server.url}/deployments/deployment/{iterate}/run")
        page.get_by_text("Whose answers play against the human ones").wait_for(timeout=90_000)
        shown = letters(page.inner_text("body"))
        for name, field in RunConfig.model_fields.items():
            groups = getattr(type(field.default), "model_fields", {})
            for described in groups.values() if groups else [field]:
                assert letters(described.description) in shown, f"{name}: {described.description}"
        alpha = page.locator(
            ".schema-form-property", has=page.locator("label", has_text=re.compile(r"^\s*Alpha \("))
        ).last
        alpha.locator("input").fill("1.5")
        page.get_by_role("button", name="Submit").click()
        page.get_by_text("1.5 is greater than the maximum of 1").first.wait_for(timeout=30_000)
        assert server.api("POST", "flow_runs/count", {}) == before, "refused, and no run exists"
        alpha.locator("input").fill("0.25")
        page.get_by_text("1.5 is greater than the maximum of 1").first.wait_for(state="hidden", timeout=60_000)
        page.get_by_role("button", name="Submit").click()
        end = time.monotonic() + 120
        while server.api("POST", "flow_runs/count", {}) == before:
            assert time.monotonic() < end, "nothing was submitted"
            page.wait_for_timeout(500)  # lets the page go on
    (run,) = server.api("POST", "flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})
    assert run["parameters"]["objective"] == {"alpha": 0.25}
    assert run["parameters"]["opponent"] == {}, "what was left alone says nothing, so that a file's value stays"
    server.api("DELETE", f"flow_runs/{run['id']}")
