"""nbs/api/*.qmd, the reference pages, from the package's docstrings and the comments beside parameters.

`python .ci/api.py` writes them, `--check` fails if they are out of date. Reads source only: nothing is imported.
A parameter without a comment has the meaning that its name and type have elsewhere in its module, if that is one.
"""
import ast, io, json, re, sys, tokenize
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def arguments(args):
    "The arguments of a signature in order, without self."
    every = args.posonlyargs + args.args + [args.vararg] + args.kwonlyargs + [args.kwarg]
    return [a for a in every if a and a.arg not in ("self", "cls")]

def pairs_of(args):
    "(name, last line) of each argument, its default included."
    defaults = dict(zip([a.arg for a in args.posonlyargs + args.args][::-1], args.defaults[::-1]))
    defaults |= {a.arg: d for a, d in zip(args.kwonlyargs, args.kw_defaults) if d}
    return [(a.arg, defaults.get(a.arg, a).end_lineno) for a in arguments(args)]

def type_of(annotation):
    "An annotation as it reads: a class that is named before it exists loses its quotes."
    if annotation is None: return ""
    quoted = isinstance(annotation, ast.Constant) and isinstance(annotation.value, str)
    return annotation.value if quoted else ast.unparse(annotation)

class Module:
    "A module's public names with their comments."
    def __init__(self, path):
        self.text, self.name = path.read_text(encoding="utf-8"), path.stem
        self.tree = ast.parse(self.text)
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        self.comments = {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}
        self.chapter = re.search(r"File to edit: \.\./nbs/(.*?)\.\s*$", self.text, re.M)[1]
        public = next(n.value for n in self.tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
        self.public = set(ast.literal_eval(public))
        self.meanings = {}    # (parameter, type) -> what comments beside it say
        for f in ast.walk(self.tree):
            if not isinstance(f, ast.FunctionDef): continue
            says = self.described([(a, line) for a, line in pairs_of(f.args) if not f.returns
                                   or line < f.returns.lineno])
            for a in arguments(f.args):
                if says.get(a.arg): self.meanings.setdefault((a.arg, type_of(a.annotation)), set()).add(says[a.arg])

    def meaning(self, a):
        "What a bare parameter means: what others of its name and type in this module do, if that is one thing."
        told = self.meanings.get((a.arg, type_of(a.annotation)), ())
        told = [t for t in told if not t.startswith("[")]    # the shape of what a one-line function gives
        return told[0] if len(told) == 1 and len(a.arg) > 1 else ""

    def described(self, names):
        "Comments of (name, last line) pairs; names that share a line share its comment, part by part."
        out = {}
        for line in dict.fromkeys(l for _, l in names):
            here = [n for n, l in names if l == line]
            text = self.comments.get(line, "")
            parts = [p.strip() for p in text.split(";")]
            if text.startswith("see ") and text.count(" and ") == len(here) - 1:
                parts = ["see " + p for p in text[4:].split(" and ")]
            if len(here) > 1 and len(parts) != len(here): parts = [""]*(len(here)-1) + [text]
            out.update(zip(here, parts if len(here) > 1 else [text]))
        return out

    def parameters(self, args):
        "Rows (name, type, default, meaning) of a signature."
        defaults = dict(zip([a.arg for a in args.posonlyargs + args.args][::-1], args.defaults[::-1]))
        defaults |= {a.arg: d for a, d in zip(args.kwonlyargs, args.kw_defaults) if d}
        star = {getattr(args.vararg, "arg", None): "*", getattr(args.kwarg, "arg", None): "**"}
        says, rows = self.described(pairs_of(args)), []
        for a in arguments(args):
            default = ast.unparse(defaults[a.arg]) if a.arg in defaults else ""
            meaning = says[a.arg] or self.meaning(a)
            rows.append((star.get(a.arg, "")+a.arg, type_of(a.annotation), default, meaning))
        return rows

    def returns(self, f):
        if not f.returns: return ""
        meaning = self.comments.get(f.returns.end_lineno, "")
        # that comment is a parameter's
        if any((a.end_lineno == f.returns.end_lineno) for a in f.args.args): meaning = ""
        return f"**Returns** `{type_of(f.returns)}`" + (f": {escape(meaning)}" if meaning else "") + "\n"

def escape(text):
    "Text with the characters that Pandoc reads escaped, but for code between backquotes."
    if "`" in text: return "`".join(p if i % 2 else escape(p) for i, p in enumerate(text.split("`")))
    return re.sub(r"(?<!\\)([|<$@])", r"\\\1", text)

# shares of the page: of a table with long rows, Pandoc takes them from the dashes
WIDTH = dict(parameter=18, field=18, type=16, default=14, meaning=52)

def table(rows, head=("parameter", "type", "default", "meaning")):
    if not any(any(r[1:]) for r in rows): return ""    # a table of bare names says no more than the signature
    # a column that is empty throughout is none
    told = [i for i in range(len(head)) if i == 0 or any(r[i] for r in rows)]
    rows, head = [[r[i] for i in told] for r in rows], [head[i] for i in told]
    code = lambda s: f"`{s}`".replace("|", "\\|") if s else ""
    lines = [" | ".join(head),
             " | ".join("-"*WIDTH[h] for h in head)] + [" | ".join(escape(v) if h == "meaning" else code(v)
                                                                   for h, v in zip(head, r)) for r in rows]
    return "".join(f"| {l} |\n" for l in lines)

def function(m, f, level, owner=""):
    doc = ast.get_docstring(f) or ""
    name = owner + ("" if f.name == "__init__" else f.name)
    rows = m.parameters(f.args)
    signature = ", ".join(n + (f"={d}" if d else "") for n, _, d, _ in rows)
    return (f"{'#'*level} {name} {{#{name.replace('.', '-')}}}\n\n```python\n{name}({signature})\n```\n\n"
            f"{escape(doc)}\n\n{table(rows)}\n{m.returns(f)}\n")

def klass(m, c):
    doc = ast.get_docstring(c) or ""
    fields = [n for n in c.body if isinstance(n, ast.AnnAssign)]
    says = m.described([(n.target.id, n.end_lineno) for n in fields])
    rows = []
    for n in fields:
        default = ast.unparse(n.value) if n.value else ""
        rows.append((n.target.id, type_of(n.annotation), default, says[n.target.id]))
    text = f"## {c.name} {{#{c.name}}}\n\n{escape(doc)}\n\n{table(rows, ('field', 'type', 'default', 'meaning'))}\n"
    init = next((f for f in c.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    if init: text += table(m.parameters(init.args)) + "\n"
    for f in c.body:
        if isinstance(f, ast.FunctionDef) and not f.name.startswith("_") and ast.get_docstring(f):
            text += function(m, f, 3, c.name + ".")
    return text

def title_of(chapter):
    "The title of a notebook."
    cells = json.loads((root/"nbs"/chapter).read_text(encoding="utf-8"))["cells"]
    return next(l[2:].strip() for c in cells for l in c["source"]
                if c["cell_type"] == "markdown" and l.startswith("# "))

def page(m):
    intro = ast.get_docstring(m.tree) or ""
    head = (f'---\ntitle: "{m.name.capitalize()} (distilltv.{m.name})"\ndescription: "{intro}"\n---\n\n'
            f'The chapter [{title_of(m.chapter)}](../{m.chapter}) explains and tests what is listed here.\n\n')
    parts = [function(m, n, 2) if isinstance(n, ast.FunctionDef) else klass(m, n) for n in m.tree.body
             if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in m.public]
    return re.sub(r"\n{3,}", "\n\n", head + "".join(parts)).rstrip() + "\n"

if __name__ == "__main__":
    modules = [Module(p) for p in sorted((root/"distilltv").glob("*.py")) if not p.stem.startswith("_")]
    made = {root/f"nbs/api/{m.name}.qmd": page(m) for m in modules}
    there = {p: p.read_text(encoding="utf-8") for p in (root/"nbs/api").glob("*.qmd")}
    if "--check" in sys.argv:
        if made != there: sys.exit("nbs/api is out of date: run `python .ci/api.py`")
    else:
        (root/"nbs/api").mkdir(exist_ok=True)
        for p in set(there) - set(made): p.unlink()
        for p, text in made.items(): p.write_text(text, encoding="utf-8")
