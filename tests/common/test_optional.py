import importlib.util
import sys

import pytest

from selfmask_dist.common.optional import MissingLibraryError, install_command, require


def test_an_installed_library_is_imported_and_returned():
    assert require("json.decoder", "json") is sys.modules["json.decoder"]


def test_a_missing_library_is_named_with_the_command_that_installs_it():
    with pytest.raises(MissingLibraryError) as caught:
        require("no_such_library.part", "no-such other", extra="serve", needed_by="selfmask serve")
    message = str(caught.value)
    assert message.startswith(
        "selfmask serve needs no_such_library, which is not installed; bring it in with `"
    )
    assert "no-such other`" in message
    assert sys.executable in message
    assert "extra `serve`" in message
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ImportError)


def test_a_library_that_fails_on_import_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_library.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        MissingLibraryError, match=r"half_library cannot be imported \(No module named 'no_such_"
    ):
        require("half_library", "half-library")


@pytest.mark.parametrize("has_pip", [True, False])
def test_the_command_is_uvs_where_the_environment_has_no_pip(monkeypatch, has_pip):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_pip else None)
    command = install_command("peft")
    start = f"{sys.executable} -m pip install" if has_pip else f"uv pip install --python {sys.executable}"
    assert command == f"{start} peft"
