"""After `quarto render`, which runs this (see _quarto.yml): take out of the pages what Quarto loads from elsewhere.

To any page with an HTML output, a table for one, Quarto adds require.js and jQuery from a CDN, for widgets; the only ones here are
progress bars, which say nothing after the run. Without them the site asks nobody but its own origin, and a reader without a network sees no error.
"""
import os, re
from pathlib import Path

REMOTE = re.compile(r"""<script\b[^>]*\bsrc="https://cdn\.jsdelivr\.net/npm/(?:requirejs|jquery|@jupyter-widgets/html-manager)@[^>]*></script>\s*"""
                    r"""|<script\b[^>]*>define\('jquery'.*?</script>\s*""", re.S)

def offline(html): return REMOTE.sub("", html)

if __name__ == "__main__":
    for f in Path(os.environ["QUARTO_PROJECT_OUTPUT_DIR"]).rglob("*.html"):
        html = f.read_text(encoding="utf8")
        if (clean := offline(html)) != html: f.write_text(clean, encoding="utf8")
