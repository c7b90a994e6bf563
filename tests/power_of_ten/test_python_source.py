"""Each rule finds what it is there for, and leaves alone what it is not."""

import textwrap

import pytest

from forge_harness.power_of_ten import documentation
from forge_harness.power_of_ten.python_source import count_python


def counts(code, rule):
    found = count_python("a.py", textwrap.dedent(code))
    return next(count for count in found if count.rule == rule)


def long_function(lines):
    return "def f():\n" + "    x = 1\n" * (lines - 1)


BROKEN = [
    (1, "def f():\n    f()\n"),
    (1, "def f():\n    g()\ndef g():\n    f()\n"),
    (1, "class A:\n    def f(self):\n        self.g()\n    def g(self):\n        self.f()\n"),
    (1, "def f():\n    def g(n):\n        return g(n - 1)\n    return g(9)\n"),
    (1, "class A:\n    @staticmethod\n    def f(n):\n        return A.f(n - 1)\n"),
    (1, "class A:\n    class B:\n        def f(self):\n            return self.f()\n"),
    (1, "if fast:\n    async def f():\n        await f()\n"),
    (2, "while True:\n    pass\n"),
    (2, "while 1:\n    pass\n"),
    (2, "import itertools\nfor i in itertools.count():\n    pass\n"),
    (2, "for line in iter(read, b''):\n    pass\n"),
    (3, "import queue\nq = queue.Queue()\n"),
    (3, "q = deque([])\n"),
    (3, "q = deque(maxlen=None)\n"),
    (3, "q = Queue(0)\n"),
    (3, "q = asyncio.PriorityQueue()\n"),
    (3, "@cache()\ndef f(): ...\n"),
    (3, "@cache\ndef f(x): ...\n"),
    (3, "@functools.cache\ndef f(*x): ...\n"),
    (3, "class A:\n    @cache\n    def f(self): ...\n"),
    (3, "@lru_cache(maxsize=None)\ndef f(x): ...\n"),
    (4, long_function(61)),
    (5, long_function(6)),
    (6, "cases = []\n"),
    (6, "cases = list()\n"),
    (6, "cases = collections.defaultdict(list)\n"),
    (6, "cases = [n for n in names]\n"),
    (6, "def f():\n    global x\n"),
    (7, "try:\n    f()\nexcept:\n    log()\n"),
    (7, "try:\n    f()\nexcept Exception:\n    pass\n"),
    (7, "try:\n    f()\nexcept Exception:\n    ...\n"),
    (7, "try:\n    f()\nexcept (OSError, Exception):\n    pass\n"),
    (7, "subprocess.run(['ls'])\n"),
    (7, "from subprocess import run\nrun(['ls'])\n"),
    (7, "import subprocess as sp\nsp.run(['ls'])\n"),
    (8, "eval('1')\n"),
    (8, "exec(code)\n"),
    (8, "from os import *\n"),
    (9, "import ctypes\n"),
    (9, "import pickle as p\n"),
    (9, "from pickle import loads\n"),
    (9, "from ctypes.util import find_library\n"),
    (9, "a.b.c.d.e = 1\n"),
    (10, "x = 1  # noqa\n"),
    (10, "x = f()  # type: ignore\n"),
    (10, "x = 1  # NOQA\n"),
    (10, "# ruff: noqa\nx = 1\n"),
    (10, "#flake8:NoQA\nx = 1\n"),
]
KEPT = [
    (1, "def f():\n    g()\ndef g():\n    pass\n"),
    (1, "class A:\n    def f(self):\n        other.f()\n"),
    (1, "def f(g):\n    def h():\n        g()\n    return h\ndef g():\n    f(1)\n"),
    (1, "class A:\n    def f(self):\n        f()\ndef f():\n    pass\n"),
    (1, "def f():\n    def g():\n        pass\n    g()\ndef g():\n    f()\n"),
    (2, "while waiting:\n    pass\n"),
    (2, "for i in range(3):\n    pass\n"),
    (2, "for i in iter(items):\n    pass\n"),
    (3, "q = Queue(maxsize=4)\n"),
    (3, "q = deque(items, 4)\n"),
    (3, "q = deque(maxlen=size)\n"),
    (3, "@cache\ndef f(): ...\n"),
    (3, "@lru_cache\ndef f(x): ...\n"),
    (3, "@functools.lru_cache()\ndef f(x): ...\n"),
    (4, long_function(60)),
    (5, long_function(5)),
    (
        5,
        "def f(x):\n    assert x\n    if x:\n        raise ValueError\n    y = x\n    return y\n",
    ),
    (6, "CASES = []\n"),
    (6, "__all__ = ['a']\n"),
    (6, "name = 'a'\n"),
    (6, "log = getLogger(__name__)\n"),
    (7, "try:\n    f()\nexcept KeyError:\n    pass\n"),
    (7, "try:\n    f()\nexcept (OSError, KeyError):\n    pass\n"),
    (7, "try:\n    f()\nexcept Exception:\n    log()\n"),
    (7, "run(['ls'])\n"),
    (7, "subprocess.run(['ls'], check=False)\n"),
    (7, "subprocess.run(['ls'], **options)\n"),
    (8, "model.eval()\n"),
    (8, "re.compile('a')\n"),
    (9, "import json\na.b.c.d = 1\n"),
    (9, "from .pickle import loads\n"),
    (10, "x = 1  # noqa: E501\n"),
    (10, "x = f()  # type: ignore[no-untyped-call]\n"),
    (10, "x = '# noqa'\n"),
    (10, "# ruff: noqa: E501\nx = 1\n"),
]


@pytest.mark.parametrize(("rule", "code"), BROKEN)
def test_a_broken_rule_is_found(rule, code):
    count = counts(code, rule)
    assert 0 < len(count.places) <= count.opportunities
    assert all(place.file == "a.py" and place.line >= 1 for place in count.places)


@pytest.mark.parametrize(("rule", "code"), KEPT)
def test_a_kept_rule_is_left_alone(rule, code):
    assert counts(code, rule).places == ()


def test_checks_are_counted_on_average():
    checked = "def g(x):\n" + "    assert x\n" * 4 + "    return x\n"
    count = counts(long_function(6) + checked, 5)
    assert (count.opportunities, len(count.places)) == (4, 0)


@pytest.mark.filterwarnings("error")
def test_code_that_the_parser_warns_of_is_code(tmp_path):
    """With PYTHONWARNINGS=error, as CI systems have it, such a file was unreadable."""
    text = '"""Doc."""\nPATTERN = "\\d"\n'
    assert counts(text, 6).opportunities == 1
    (tmp_path / "a.py").write_text(text)
    assert documentation([tmp_path]).missing == ()


def test_code_that_cannot_be_parsed_is_no_code():
    with pytest.raises(SyntaxError):
        count_python("a.py", "def f(:\n")


def test_suppressions_with_a_code_are_opportunities_whatever_they_cover():
    code = "# ruff: noqa: E501\nx = 1  # NOQA: F401\ny = f()  # type: ignore[attr-defined]\n"
    assert counts(code, 10).opportunities == 3


def test_bare_caches_are_opportunities_too():
    code = "@cache\ndef f(): ...\n@lru_cache\ndef g(x): ...\n@cache\ndef h(x): ...\n"
    count = counts(code, 3)
    assert count.opportunities == 3
    assert [place.line for place in count.places] == [5]
