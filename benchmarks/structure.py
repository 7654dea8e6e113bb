"""How the package is built, in numbers that a newcomer feels: sizes, documents, names, circles of imports.

Every file is read with `ast` and `tokenize`; nothing of the package is imported, so a tree that does not even
run can be measured. What is counted:

- *entries*: Python files and folders of Python files in the root of the package;
- *lines of a function*: from `def` to its end, without its docstring;
- *parameters*: all but `self` and `cls`; `*args` and `**kwargs` count as one each;
- *public functions*: functions and methods at the top level of modules and classes, no part of whose name
  begins with an underscore; overloads and setters share the docstring of what they belong to;
- *comments*: those that say something to a reader, so no `noqa` or `type: ignore`; *lines of code* are
  neither blank nor only a comment or docstring;
- *circles*: groups of files each of which imports every other one, directly or through others. Imports inside
  functions and under TYPE_CHECKING count.

    python benchmarks/structure.py [--tree selfmask_dist] --json
"""

import ast
import io
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Benchmark

ROOT = Path(__file__).resolve().parents[1]
MAX_ENTRIES, MAX_FILES_OF_A_FOLDER = 16, 14
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 400
MAX_PARAMETERS, MAX_LONG_PARAMETER_LISTS = 8, 3
FOR_TOOLS = ("noqa", "type:", "fmt:", "pragma", "mypy:", "ruff:", "!")

AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class File:
    """One module: its dotted name and what it holds."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Whether it is the `__init__.py` of a folder."""
        return self.path.name == "__init__.py"


def read_tree(root: Path) -> list[File]:
    """Return every Python file below `root`, a package's folder, in the order of their paths."""
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        files.append(File(path, module, text, ast.parse(text, str(path))))
    return files


def entries_of(root: Path) -> list[str]:
    """Return the Python files and the folders with Python files that stand in `root`."""
    return sorted(
        path.name
        for path in root.iterdir()
        if path.suffix == ".py" or (path.is_dir() and next(path.rglob("*.py"), None) is not None)
    )


def files_by_folder(files: Iterable[File]) -> Counter[Path]:
    """Return how many Python files stand in each folder, those of its sub-folders not among them."""
    return Counter(file.path.parent for file in files)


def functions_of(file: File) -> Iterator[tuple[str, AnyFunction]]:
    """Yield every function and method with its dotted name, nested ones too."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, AnyFunction]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}.{child.name}", child
                yield from walk(child, f"{prefix}.{child.name}")
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}.{child.name}")
            else:
                yield from walk(child, prefix)

    yield from walk(file.tree, file.module)


def lines_of(function: AnyFunction) -> int:
    """Return the lines from `def` to the function's end, without its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def num_parameters(function: AnyFunction) -> int:
    """Return the number of parameters without `self` and `cls`."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args]
    is_bound = bool(named) and named[0].arg in ("self", "cls")
    starred = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return len(named) - is_bound + len(arguments.kwonlyargs) + starred


def public_functions(file: File) -> Iterator[tuple[str, AnyFunction]]:
    """Yield the functions that others may call, with their dotted names."""

    def is_second(function: AnyFunction) -> bool:
        names = [ast.unparse(decorator).rpartition(".")[2] for decorator in function.decorator_list]
        return not {"overload", "setter", "deleter"}.isdisjoint(names)

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, AnyFunction]]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, name)
            elif not is_second(node):
                yield name, node

    if not any(part.startswith("_") for part in file.module.split(".")):
        yield from walk(file.tree.body, file.module)


def comments_and_code(file: File) -> tuple[int, int]:
    """Return the number of comments written for readers and the number of lines of code."""
    comments = 0
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(file.text).readline):
        if token.type == tokenize.COMMENT:
            comments += not token.string.lstrip("#").strip().startswith(FOR_TOOLS)
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code.discard(file.text.count("\n") + 1)  # where the file ends
    return comments, len(code)


def class_names(files: Iterable[File]) -> dict[str, list[str]]:
    """Return for every class name the modules that define it, once for each definition."""
    found = defaultdict(list)
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(file.module)
    return dict(found)


def imports_of(file: File, modules: set[str]) -> set[str]:
    """Return which of `modules` a file imports anywhere in its text, itself left out.

    `from package import name` means the module `package.name` where there is one, else the `__init__.py` of
    the package. A package that is only passed on the way to one of its modules is not counted.
    """
    found: set[str] = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = file.module.split(".")
                kept = len(parts) - node.level + file.is_package
                base = ".".join([*parts[:kept], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
    return (found & modules) - {file.module}


def circles_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other, each group sorted (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in number:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], number[other])
        if lowest[node] == number[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                circles.append(sorted(members))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return sorted(circles)


def import_graph(files: Iterable[File]) -> dict[str, set[str]]:
    """Return for every module the modules of the same tree that it imports."""
    files = list(files)
    modules = {file.module for file in files}
    return {file.module: imports_of(file, modules) for file in files}


def measure(benchmark: Benchmark, root: Path) -> None:
    """Record the figures of the package whose folder is `root`."""
    files = read_tree(root)
    functions = [(name, function) for file in files for name, function in functions_of(file)]
    figure = benchmark.figure
    figure("files", len(files))
    figure("functions", len(functions))
    figure("entries in the root", len(entries_of(root)), max=MAX_ENTRIES)

    folder, count = files_by_folder(files).most_common(1)[0]
    figure("files in the largest folder", count, max=MAX_FILES_OF_A_FOLDER)
    figure("largest folder", folder.relative_to(root.parent).as_posix())

    sizes = {name: lines_of(function) for name, function in functions}
    longest = {name: lines for name, lines in sizes.items() if lines > MAX_FUNCTION_LINES}
    figure(f"functions over {MAX_FUNCTION_LINES} lines", len(longest), max=0)
    figure("long functions", longest)
    lengths = {file.module: file.text.count("\n") for file in files}
    large = {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}
    figure(f"files over {MAX_FILE_LINES} lines", len(large), max=0)
    figure("large files", large)

    parameters = {name: num_parameters(function) for name, function in functions}
    many = {name: number for name, number in parameters.items() if number > MAX_PARAMETERS}
    figure(f"parameter lists over {MAX_PARAMETERS}", len(many), max=MAX_LONG_PARAMETER_LISTS)
    figure("long parameter lists", many)

    public = [(name, function) for file in files for name, function in public_functions(file)]
    bare = [name for name, function in public if ast.get_docstring(function) is None]
    figure("documented public functions", 1 - len(bare) / max(1, len(public)))
    figure("undocumented public functions", bare)
    comments, code = (sum(numbers) for numbers in zip(*map(comments_and_code, files), strict=True))
    figure("lines of code", code)
    figure("comments per 100 lines of code", 100 * comments / max(1, code))

    twice = {name: where for name, where in class_names(files).items() if len(where) > 1}
    figure("class names that stand twice", len(twice), max=0)
    figure("repeated class names", twice)
    circles = circles_of(import_graph(files))
    figure("import circles", len(circles), max=0)
    figure("files in circles", circles)


def main(argv: list[str] | None = None) -> int:
    """Measure a tree; returns the exit code."""
    benchmark = Benchmark("structure", __doc__)
    benchmark.parser.add_argument(
        "--tree", type=Path, default=ROOT / "selfmask_dist", help="the folder of the package"
    )
    measure(benchmark, benchmark.parse(argv).tree.resolve())
    return benchmark.finish()


if __name__ == "__main__":
    sys.exit(main())
