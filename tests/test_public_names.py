"""The names that `selfmask_dist` gives to its users, and that asking for none of them costs nothing."""

import subprocess
import sys

import pytest

import selfmask_dist
from tests.support.tiny_run import child_environment


@pytest.mark.parametrize("name", [name for name in selfmask_dist.__all__ if name != "__version__"])
def test_public_names_are_found(name: str) -> None:
    found = getattr(selfmask_dist, name)
    assert found.__name__ == name
    assert name in dir(selfmask_dist)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'unmask'"):
        _ = selfmask_dist.unmask


def test_importing_the_package_imports_no_library() -> None:
    script = (
        "import sys, selfmask_dist; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=child_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
