"""The counting of `benchmarks/structure.py`, on packages planted for it."""

import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from benchmarks import structure


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write the files of a package `plot`; returns its folder."""
    for name, text in {"__init__.py": "", **files}.items():
        path = root / "plot" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    return root / "plot"


def figures_of(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], bool]:
    assert structure.main([f"--tree={root}", f"--out={root.parent / 'result.json'}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    return result["figures"], result["pass"]


def test_sizes_are_those_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "\n".join(f"    x = {n}" for n in range(59))
    root = plant(
        tmp_path,
        {
            "a/__init__.py": "",
            "a/one.py": f'def fits():\n    """Two\n\n    paragraphs."""\n{body}\n',
            "a/two.py": f"class C:\n  @staticmethod\n  def longer():\n    y = 0\n{body}\n    return y\n",
            "a/deep/three.py": "x = 0\n" * 401,
            "empty/notes.txt": "no Python here",
        },
    )
    figures, holds = figures_of(root, capsys)
    assert figures["files"] == 5
    assert figures["entries in the root"] == 2
    assert (figures["files in the largest folder"], figures["largest folder"]) == (3, "plot/a")
    assert figures["long functions"] == {"plot.a.two.C.longer": 62}
    assert figures["large files"] == {"plot.a.deep.three": 401}
    assert not holds


def test_a_package_without_a_fault_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plant(
        tmp_path, {"a.py": 'def f(x):\n    """Return x."""\n    return x\n', "b.py": "from plot import a"}
    )
    figures, holds = figures_of(root, capsys)
    assert holds
    assert figures["documented public functions"] == 1


def test_parameters_and_documentation(tmp_path: Path) -> None:
    text = '''
        from typing import overload

        class Masks:
            def method(self, a, /, b, c, *args, d, e=1, f=2, **kwargs):
                """Return what it is given."""

            @property
            def size(self):
                """Return the size."""

            @size.setter
            def size(self, value): ...

            def bare(self): ...

            def _own(self): ...

        class _Hidden:
            def method(self): ...

        @overload
        def load(a): ...

        async def load(a):
            """Return it."""

            def inner(): ...
    '''
    root = plant(tmp_path, {"a.py": text, "_private.py": "def nobody_calls(): ..."})
    _, private, file = structure.read_tree(root)
    assert (private.module, file.module) == ("plot._private", "plot.a")
    counts = {name: structure.num_parameters(function) for name, function in structure.functions_of(file)}
    assert counts["plot.a.Masks.method"] == 8
    assert counts["plot.a.load.inner"] == 0
    public = [name for name, _ in structure.public_functions(file)]
    assert public == ["plot.a.Masks.method", "plot.a.Masks.size", "plot.a.Masks.bare", "plot.a.load"]
    assert not list(structure.public_functions(private))


def test_comments_for_readers_and_lines_of_code(tmp_path: Path) -> None:
    text = '''\
        """A docstring
        of two lines."""

        # why
        x = """a string # that is no comment
        """  # noqa: S105
        #: for readers too
        y = (
            1,  # one

            2,  # type: ignore
        )
    '''
    file = structure.read_tree(plant(tmp_path, {"a.py": text}))[1]
    assert structure.comments_and_code(file) == (3, 6)


def test_a_class_name_that_stands_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plant(
        tmp_path, {"a.py": "class Life: ...\nclass Other: ...\n", "b.py": "def f():\n    class Life: ...\n"}
    )
    figures, _ = figures_of(root, capsys)
    assert figures["repeated class names"] == {"Life": ["plot.a", "plot.b"]}
    assert figures["class names that stand twice"] == 1


@pytest.mark.parametrize(
    ("files", "circles"),
    [
        ({"a.py": "import plot.b", "b.py": "import os"}, []),
        ({"a.py": "import plot.b", "b.py": "from plot.a import x"}, [["plot.a", "plot.b"]]),
        ({"a.py": "from plot import b", "b.py": "def f():\n    from . import a"}, [["plot.a", "plot.b"]]),
        (
            {
                "a.py": "from .in_.c import x",
                "b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from plot.a import T\n",
                "in_/__init__.py": "",
                "in_/c.py": "from ..b import y",
            },
            [["plot.a", "plot.b", "plot.in_.c"]],
        ),
        (
            {
                "in_/__init__.py": "from plot.in_.c import x",
                "in_/c.py": "from plot.in_.d import y",
                "in_/d.py": "",
            },
            [],
        ),
        (
            {"in_/__init__.py": "from .c import x", "in_/c.py": "from plot.in_ import y"},
            [["plot.in_", "plot.in_.c"]],
        ),
        (
            {
                "a.py": "import plot.b",
                "b.py": "import plot.a",
                "c.py": "import plot.d",
                "d.py": "import plot.c",
            },
            [["plot.a", "plot.b"], ["plot.c", "plot.d"]],
        ),
    ],
    ids=["none", "two", "lazy and relative", "types, three", "through a package", "package", "apart"],
)
def test_circles_of_imports(tmp_path: Path, files: dict[str, str], circles: list[list[str]]) -> None:
    graph = structure.import_graph(structure.read_tree(plant(tmp_path, files)))
    assert structure.circles_of(graph) == circles
