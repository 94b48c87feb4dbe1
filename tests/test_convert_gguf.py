"""Refusals of the GGUF converter; a real conversion needs a model that is not part of this repository."""

import pytest

from preference_records import InputError
from tools.convert_gguf import convert_gguf


@pytest.mark.parametrize("content", [None, b"", b"no GGUF at all"])
def test_file_that_is_no_gguf_is_refused_and_nothing_written(tmp_path, content):
    path = tmp_path / "a.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"a.gguf: (no such file|cannot be read as GGUF)"):
        convert_gguf(str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
