"""Takes the README's picture of the report: docs/images/report.png from docs/results/compare.json.

Needs Debian's chromium and chromedriver; run by hand after a new run was recorded (CONTRIBUTING, Figures).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from tilewise.compare import page

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Render the page, open it, save what a reader first sees."""
    result = json.loads((ROOT / "docs/results/compare.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        page.write(result, Path(folder) / "report.html")
        options = Options()
        for flag in (
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "disable-background-networking",
            "hide-scrollbars",
        ):
            options.add_argument(f"--{flag}")
        options.add_argument("--window-size=1280,1900")
        options.add_argument(f"--user-data-dir={folder}/profile")
        browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        try:
            browser.get((Path(folder) / "report.html").as_uri())
            browser.save_screenshot(str(ROOT / "docs/images/report.png"))
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
