"""README.md from nbs/index.ipynb and, below it, nbs/use.ipynb, without Quarto: `python .ci/readme.py` writes it,
`--check` fails if it is out of date.

Prose is copied; a code cell shows its source unless it says `#| echo: false`, then its outputs; `#| hide` drops both.
Links and pictures are relative to nbs/ in the notebook and to the repository in the README. A figure's caption, which
only Quarto shows, becomes a line of its own; badges say what workflows, licence and citation file say.
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

def found(pattern, file): return re.search(pattern, (root/file).read_text(encoding="utf-8"))[1]

def badges():
    "Badges whose words come from the files that decide them."
    repo = found(r"repo-url: (\S+)", "_quarto.yml")
    pythons = re.findall(r"[\d.]+", found(r"python: \[(.*?)\]", ".github/workflows/test.yml"))
    licence, doi = found(r'\nlicense = "(.*)"', "pyproject.toml"), found(r"doi: (\S+)", "CITATION.cff")
    static = lambda left, right, colour: (f"https://img.shields.io/badge/{left}-"
                                          f"{right.replace('-', '--').replace(' ', '_')}-{colour}")
    flow = lambda name, to: f"[![{name}]({repo}/actions/workflows/{name}.yml/badge.svg)]({to})"
    return " ".join([flow("test", f"{repo}/actions/workflows/test.yml"),
                     flow("docs", found(r"site-url: (\S+)", "_quarto.yml")),
                     f"[![Python {pythons[0]} to {pythons[-1]}]"
                     f"({static('python', f'{pythons[0]} to {pythons[-1]}', 'blue')})](pyproject.toml)",
                     f"[![licence {licence}]({static('licence', licence, 'green')})](LICENSE)",
                     f"[![paper: Interspeech 2025]({static('paper', 'Interspeech 2025', 'b31b1b')})]"
                     f"(https://doi.org/{doi})"])

def prose(name):
    "A page as Markdown of the repository's root: without what only Quarto reads."
    text = "\n\n".join(p.strip()
                       for p in parts(json.loads((root/f"nbs/{name}.ipynb").read_text(encoding="utf-8"))["cells"]))
    text = re.sub(r"^:::.*\n?", "", text, flags=re.M)                                     # divs
    text = re.sub(r" ?\[@[\w; @-]+\]", "", text)                                          # citations
    text = re.sub(r"^: (.*?) *\{#tbl-[^}]*\}$", r"<sub>\1</sub>", text, flags=re.M)         # captions of tables
    text = re.sub(r'!\[([^\]]*)\]\(([^)]*)\)\{[^}]*fig-alt="([^"]*)"[^}]*\}', r"![\3](\2)\n\n<sub>\1</sub>", text)
    # Markdown links, attributes off
    text = re.sub(r"(\]\()([^)\s]+)(\))(?:\{[^}]*\})?", relink, text)
    return re.sub(r'((?:src|href)=")([^"]+)(")', relink, text)

def readme():
    title, rest = prose("index").split("\n", 1)
    # the title and what it is about: its sections say no less
    use = re.sub(r"^# .*\n\n> .*\n", "", prose("use"), count=1)
    return (f"<!-- made from nbs/index.ipynb and nbs/use.ipynb by .ci/readme.py: edit those -->\n{title}\n\n"
            f"{badges()}\n{rest}\n\n{use.strip()}\n")

if __name__ == "__main__":
    if "--check" not in sys.argv: (root/"README.md").write_text(readme(), encoding="utf-8")
    elif (root/"README.md").read_text(encoding="utf-8") != readme():
        sys.exit("README.md is out of date: run `python .ci/readme.py`")
