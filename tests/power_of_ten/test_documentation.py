"""Docstrings of what a tree offers."""

from forge_harness.power_of_ten import documentation

CODE = '''"""Module."""


class A:
    """Class."""

    def f(self): ...

    def _hidden(self): ...


def g():
    """Function."""


def h():
    def inner(): ...
'''


def test_public_definitions_are_counted(tmp_path):
    (tmp_path / "a.py").write_text(CODE)
    found = documentation([tmp_path])
    assert found.definitions == 5
    assert [place.sentence() for place in found.missing] == [
        "a.py:7: A.f has no docstring",
        "a.py:16: h has no docstring",
    ]
    assert found.share == 1 - 2 / 5


def test_an_empty_module_needs_none(tmp_path):
    (tmp_path / "a.py").write_text("")
    assert documentation([tmp_path]).definitions == 0
    assert documentation([tmp_path]).share == 0


def test_a_file_that_cannot_be_parsed_is_undocumented(tmp_path):
    (tmp_path / "a.py").write_text("def (")
    found = documentation([tmp_path])
    assert (found.definitions, len(found.missing)) == (1, 1)
