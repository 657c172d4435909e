"""Fold what a reader of a chapter may skip: `python .ci/fold.py` gives boxes of imports and of private helpers a name
and closes them on the site.

What is folded is the cell's own business in the notebook (`code-fold` and `code-summary` in its metadata); cells that
say so already keep their words.
"""
import ast, json, re
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def name_of(source):
    "What to call a cell that a reader may skip, or None."
    try: body = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body
    except SyntaxError: return None
    if not body: return None
    if all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body): return "Imports"
    if all(isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name.startswith("_") for n in body):
        return "Helper: " + ", ".join(n.name for n in body)
    return "Checking the parameters" if len(body) <= 2 and "check_parameters(globals()" in source else None

def unfolded(notebook):
    "Code cells that should be folded and are not, each with its name."
    for c in notebook["cells"]:
        source = "".join(c["source"])
        if c["cell_type"] != "code" or "#| hide" in source or "code-fold" in source or "code-fold" in c["metadata"]:
            continue
        if name := name_of(source): yield c, name

if __name__ == "__main__":
    for path in [*(root/"nbs").glob("0*.ipynb"), *(root/"nbs/appendix").glob("*.ipynb")]:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        found = list(unfolded(notebook))
        for c, name in found: c["metadata"] |= {"code-fold": True, "code-summary": name}
        if found:
            path.write_text(json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
