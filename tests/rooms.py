"""The walls between the modules of the package, and the size of the notebooks' cells: `make check` runs this file.

No module or notebook uses a private name of another module; no imports run in a circle (those inside functions count);
no exported cell has more than 30 lines, its directives apart; and no line of code has more than 120 columns.
"""
import ast
import json
import re
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

LONGEST, WIDEST = 30, 120
LONG = {}  # exported cells that may be longer: {the cell's id: the reason}


def imports(node, package):
    "Of an import: (dotted path, name that it has here, path of what has that name) for each of its names"
    for alias in node.names:
        if isinstance(node, ast.Import):
            top = alias.name.partition(".")[0]
            yield (alias.name, alias.asname, alias.name) if alias.asname else (alias.name, top, top)
        else:
            path = ".".join(filter(None, [package if node.level else "", node.module, alias.name]))
            yield path, alias.asname or alias.name, path


def rooms(code, package, modules):
    "Of a piece of code: (line, module, name in it or an empty string) for all that it takes from one of `modules`"
    nodes, found, names = list(ast.walk(ast.parse(code))), [], {}
    for node in nodes:
        if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
        for path, name, meant in imports(node, package):
            found.append((node.lineno, path))
            names[name] = meant
    for node in nodes:
        if not isinstance(node, ast.Attribute): continue
        first, _, rest = ast.unparse(node).partition(".")
        if first in names: found.append((node.lineno, f"{names[first]}.{rest}"))
    parts = [(line, *path.split("."), "", "") for line, path in found]
    inside = ((line, module, name) for line, top, module, name, *_ in parts if top == package and module in modules)
    return list(dict.fromkeys(inside))


def private_names(place, taken):
    for line, module, name in taken:
        if name.startswith("_") and not name.endswith("__"): yield f"{place}:{line}: {name} is private to {module}"


def circles(package, graph):
    "Of {module: {module that it imports: line}}: a circle of imports, with the places that make it"
    try: TopologicalSorter(graph).prepare()
    except CycleError as error:
        steps = [f"{package}/{a}.py:{graph[a][b]}" for a, b in pairwise(error.args[1][::-1])]
        yield f"{steps[0]}: imports run in a circle: {' → '.join([*steps, steps[0]])}"


def sizes(place, code, exported, allowed):
    counted = sum(not line.startswith("#|") for line in code.splitlines())
    if exported and counted > allowed: yield f"{place}: {counted} lines in an exported cell; {LONGEST} are allowed"
    for number, line in enumerate(code.splitlines(), 1):
        if len(line) > WIDEST: yield f"{place}:{number}: {len(line)} columns; {WIDEST} are allowed"


def faults(root, package="entrodrop"):
    "What is wrong in a repository, each a line that begins with the place: a line of a module or of a notebook's cell"
    files = {p.stem: p.read_text(encoding="utf-8") for p in sorted((root / package).glob("[!_]*.py"))}
    taken = {module: rooms(code, package, files) for module, code in files.items()}
    for module in files: yield from private_names(f"{package}/{module}.py", taken[module])
    yield from circles(package, {module: {other: line for line, other, _ in taken[module]} for module in files})
    for path in sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code": continue
            place, code = f"{path.relative_to(root)}:{cell['id']}", "".join(cell["source"])
            exported = re.match(r"(#\|.*\n)*#\| *export", code)
            if not exported: yield from private_names(place, rooms(code, package, files))  # else it is in the module
            yield from sizes(place, code, exported, float("inf") if cell["id"] in LONG else LONGEST)


if __name__ == "__main__":
    found = list(faults(Path(__file__).parent.parent))
    if found: sys.exit("\n".join([*found, f"{len(found)} faults; tests/rooms.py says what is asked"]))
