"""How large the package is: files, lines, long functions, many parameters, import circles.

python tools/house_figures.py [--files N] [--lines N] [--file N] [--function N] [--parameters N]

Prints a table of mmscale/ and exits 1 where a figure is above its limit, or modules import each
other in a circle.
"""

import argparse
import ast
import graphlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mmscale"
# Imports inside functions of these close a circle on purpose: each format's writer brings a library
# of its own, and builds on what they share.
DEFERRED = {"mmscale.checkpoint.export"}


@dataclass(frozen=True)
class Function:
    """A function or method.

    Attributes:
        place: File, line and name.
        lines: From `def` to its end, its docstring among them.
        parameters: Without `self` and `cls`.
    """

    place: str
    lines: int
    parameters: int


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every module's file by its dotted name; a package's is its `__init__.py`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def lines_of(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def functions(path: Path) -> Iterator[Function]:
    """Every function of a file, those in classes and functions too; but for a GPU's kernels.

    These take each pointer and size by itself.
    """
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
                continue
            given = node.args
            named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            bound = bool(named) and named[0].arg in ("self", "cls")
            others = (given.vararg is not None) + (given.kwarg is not None)
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            place = f"{path.name}:{node.lineno} {node.name}"
            yield Function(place, length, len(named) - bound + others)


def imported(path: Path, known: dict[str, Path], in_functions: bool = True) -> set[str]:
    """Names of our modules that a file imports.

    Args:
        path: The file.
        known: Every module.
        in_functions: Count what it imports when a function runs, too.
    """
    tree = ast.parse(path.read_text("utf-8"))
    found = set()
    for node in ast.walk(tree) if in_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module or "")
    return found & known.keys()


def circle(package: Path = PACKAGE) -> list[str]:
    """Modules that import each other in a circle, the first of them again at its end; else none."""
    known = modules(package)
    graph = {
        name: imported(path, known, name not in DEFERRED) - {name} for name, path in known.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def main(words: Sequence[str]) -> int:
    """Print the figures; returns 1 where one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("files", "lines", "file", "function", "parameters"):
        parser.add_argument(f"--{name}", type=int, help="the most that is allowed")
    limits = vars(parser.parse_args(words))
    known = modules()
    sizes = {str(path.relative_to(PACKAGE.parent)): lines_of(path) for path in known.values()}
    every = [function for path in known.values() for function in functions(path)]
    longest, widest = max(sizes, key=sizes.__getitem__), max(every, key=lambda f: f.parameters)
    slowest = max(every, key=lambda f: f.lines)
    rows = [
        ("files", len(sizes), ""),
        ("lines", sum(sizes.values()), ""),
        ("file", sizes[longest], longest),
        ("function", slowest.lines, slowest.place),
        ("parameters", widest.parameters, widest.place),
    ]
    too_large = [name for name, value, _ in rows if limits[name] and value > limits[name]]
    for name, value, where in rows:
        mark = f"  above {limits[name]:,}" if name in too_large else ""
        print(f"{name:11}{value:7,}  {where}{mark}")
    print(f"functions above 60 lines: {sum(function.lines > 60 for function in every)}")
    print(f"functions with more than 7 parameters: {sum(f.parameters > 7 for f in every)}")
    found = circle()
    print("import circle:", " -> ".join(found) or "none")
    return 1 if too_large or found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
