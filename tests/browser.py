"""A page in headless Chromium (Debian: apt-get install chromium): its DOM after scripts, its console, its requests."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OWN = re.compile(r"https?://(clients2|www|accounts)\.google\.com/(time|async|ListAccounts)")  # Chromium's own services


class Visit(NamedTuple):
    dom: str
    console: list[str]  # messages of scripts, and of the browser on the page's behalf
    requests: list[str]  # addresses that the page asked for, those of the browser's own services left out


def visit(url: str, folder: Path, width: int = 1280, dark: bool = False) -> Visit:
    """Open `url`. folder: for the profile and the log of requests."""
    log = folder / "net.json"
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-default-apps", "--disable-sync", "--disable-features=AutofillServerCommunication", "--disable-extensions",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--enable-logging=stderr", f"--window-size={width},1200",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={log}", "--virtual-time-budget=3000", "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    text = log.read_text(encoding="utf-8").rstrip().rstrip(",")
    content = json.loads(text if text.endswith("}") else text + "]}")
    kinds = content["constants"]["logEventTypes"]
    urls = [
        event["params"]["url"]
        for event in content["events"]
        if event["type"] == kinds["URL_REQUEST_START_JOB"] and "url" in event.get("params", {})
    ]
    asked = [url for url in dict.fromkeys(urls) if url.startswith(("http", "ws")) and not OWN.match(url)]
    return Visit(done.stdout, console, asked)
