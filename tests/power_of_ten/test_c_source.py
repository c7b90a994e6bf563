"""The rules that can be read from C, C++ and CUDA without a compiler."""

import pytest

from forge_harness.power_of_ten import assess
from forge_harness.power_of_ten.c_source import count_c

LONG = "int f() {\n" + "  g();\n" * 59 + "}\n"


def counts(code, rule):
    return next(count for count in count_c("a.cpp", code) if count.rule == rule)


@pytest.mark.parametrize(
    ("rule", "code", "line"),
    [
        (1, "void f() {\n  goto end;\nend:\n  return;\n}\n", 2),
        (1, "void f() {\n  if (setjmp(b)) return;\n}\n", 2),
        (2, "void f() {\n  for (;;) {}\n}\n", 2),
        (2, "void f() {\n  while (true) {}\n}\n", 2),
        (4, LONG, 1),
        (8, "#define MAX(a, b) ((a) > (b) ? (a) : (b))\n", 1),
        (9, "void f(char **names);\n", 1),
        # Quotes that begin no string must not hide what comes after them.
        (1, "int f(char c) {\n  if (c == '\"') goto end;\nend:\n  return c == '\"';\n}\n", 2),
        (2, "int f(char c) {\n  if (c == '\\'') { while (true) {} }\n  return c == '\"';\n}\n", 2),
        (1, 'const char *a = R"(")";\nvoid f() {\n  goto end;\nend: ; }\n// "\n', 3),
        (1, "int a = 1'000;\nvoid f() {\n  goto end;\nend: ; }\nint b = 1'000;\n", 3),
        (8, "\f\n#define MAX(a, b) ((a) > (b) ? (a) : (b))\n", 2),
    ],
)
def test_a_broken_rule_is_found_where_it_is(rule, code, line):
    count = counts(code, rule)
    assert [place.line for place in count.places] == [line]
    assert count.opportunities >= 1


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (1, '// goto nowhere\nint f() { return g("goto x"); }\n'),
        (2, "void f() {\n  for (int i = 0; i < 4; ++i) {}\n}\n"),
        (4, LONG.replace("  g();\n", "", 1)),
        (8, "#define LIMIT 4\n#include <cstdint>\n"),
        (9, "void f(const char *name) { int x = a * b; }\n"),
        (1, 'const char *a = R"x(goto end;)" goto end;)x";\n'),
    ],
)
def test_a_kept_rule_is_left_alone(rule, code):
    assert counts(code, rule).places == ()


def test_a_place_is_told_in_one_line():
    (place,) = counts("void f() {\n  goto\n    end;\nend: ; }\n", 1).places
    assert place.sentence() == "a.cpp:2: `goto end` jumps"


@pytest.mark.parametrize("name", ["a.hh", "a.hxx", "a.c++", "a.tpp"])
def test_cpp_has_many_names(name, tmp_path):
    (tmp_path / name).write_text("void f() {\n  goto end;\nend: ; }\n")
    assert [p.file for p in assess([tmp_path]).rules[0].places] == [name]
