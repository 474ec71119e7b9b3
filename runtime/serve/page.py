"""The page to try a prompt, and the policy by which a browser runs that and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path


def read_page() -> tuple[bytes, str]:
    """(HTML, Content-Security-Policy): its one script and one style are allowed by their hashes."""
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    policy = {
        "default-src": "'none'",
        "script-src": source(script),
        "style-src": source(style),
        "img-src": "data:",
        "connect-src": "'self'",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    return text.encode(), "; ".join(f"{name} {value}" for name, value in policy.items())


def source(text: str) -> str:
    """A CSP source: exactly this text."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"
