"""README.md from nbs/index.ipynb, without Quarto: `python .ci/readme.py` writes it, `--check` fails if it is out of date.

Prose is copied; a code cell shows its source unless it says `#| echo: false`, then its outputs; `#| hide` drops both.
Links and pictures are relative to nbs/ in the notebook and to the repository in the README.
"""
import json, posixpath, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def relink(match):
    "A link as seen from nbs/ -> the same link as seen from the repository."
    before, target, after = match.groups()
    if re.match(r"[a-z]+:|#|/", target): return match[0]
    return before + posixpath.normpath(posixpath.join("nbs", target)) + after

def output(out):
    data = out.get("data", {})
    if "text/markdown" in data: return "".join(data["text/markdown"])
    text = "".join(out.get("text") or data.get("text/plain", ""))
    return f"```\n{text.rstrip()}\n```"

def parts(cells):
    for c in cells:
        source = "".join(c["source"])
        if c["cell_type"] == "raw" or "#| hide" in source: continue
        if c["cell_type"] == "markdown":
            yield source
            continue
        code = "\n".join(line for line in source.splitlines() if not line.startswith("#|"))
        if "#| echo: false" not in source: yield f"```python\n{code}\n```"
        yield from map(output, c["outputs"])

def readme():
    cells = json.loads((root/"nbs/index.ipynb").read_text())["cells"]
    text = "\n\n".join(p.strip() for p in parts(cells))
    text = re.sub(r"^:::.*\n?", "", text, flags=re.M)                                     # Quarto's divs
    text = re.sub(r"(\]\()([^)\s]+)(\))(?:\{[^}]*\})?", relink, text)                     # Markdown links, Quarto's attributes off
    text = re.sub(r'((?:src|href)=")([^"]+)(")', relink, text)
    return "<!-- made from nbs/index.ipynb by .ci/readme.py: edit that -->\n" + text + "\n"

if __name__ == "__main__":
    if "--check" not in sys.argv: (root/"README.md").write_text(readme())
    elif (root/"README.md").read_text() != readme(): sys.exit("README.md is out of date: run `python .ci/readme.py`")
