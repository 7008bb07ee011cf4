"""The rules of the house that can be counted (CONTRIBUTING.md): sizes of files, parameters of functions,
what stands twice, the way of query through the files, and the files that it names."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPP, PACKAGE = ROOT / "cpp", ROOT / "jax_fa3"
FOLDERS = CPP, PACKAGE, ROOT / "tests", ROOT / "benchmarks", ROOT / "examples"
MOST_LINES = {".py": 250, ".h": 400, ".cc": 400, ".cu": 400}
MOST_PARAMETERS, MOST_TEMPLATE_PARAMETERS = 8, 6
FEWEST_SHARED_LINES = 6

# Functions whose arguments are not for this library to choose, or are its users'.
PUBLIC = {
    "_attention.py": {"dot_product_attention"},  # jax.nn's, and masks
    "fp8/_attention.py": {"dot_product_attention"},
    "fp8/_quantized_attention.py": {"quantized_dot_product_attention"},
    "kv_cache/_append.py": {"append"},
    "kv_cache/_attention.py": {"dot_product_attention"},
    "kv_cache/_ragged_paged.py": {  # tpu-inference's and jax.experimental's
        "ragged_paged_attention",
        "ragged_paged_attention_hd64",
        "ragged_paged_attention_v2",
    },
    "flax/_attention_fn.py": {"attention_fn"},  # Flax's
    "flax/nnx.py": {"__init__"},  # of Flax's layer
    "integrations/equinox.py": {"multihead_attention"},
    "integrations/tokamax.py": {"__call__"},
}
# CuTe's hook for an instruction: if it does not spell the tensors' types, neither it nor CuTe's own
# function for any instruction is the better match, and the call does not compile.
TEMPLATES = {"common/wgmma.h": {"mma_unpack"}, "fwd/wgmma_long.h": {"mma_unpack"}}


def files(*suffixes: str, folders: tuple[Path, ...] = (CPP, PACKAGE)) -> list[Path]:
    found = [x for folder in folders for x in sorted(folder.rglob("*")) if x.suffix in suffixes]
    assert found
    return found


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def test_files_are_short():
    long = {
        str(file.relative_to(ROOT)): lines
        for file in files(*MOST_LINES, folders=FOLDERS)
        if (lines := len(text_of(file).splitlines())) > MOST_LINES[file.suffix]
    }
    assert not long


def test_files_say_what_they_are_for():
    marks = {".py": '"""', ".h": "//", ".cc": "//", ".cu": "//"}
    every = files(*marks, folders=FOLDERS)
    assert not [x for x in every if not text_of(x).startswith(marks[x.suffix])]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> int:
    x = function.args
    named = [*x.posonlyargs, *x.args, *x.kwonlyargs]
    of_class = bool(named) and named[0].arg in ("self", "cls")
    return len(named) - of_class + (x.vararg is not None) + (x.kwarg is not None)


def test_functions_take_few_parameters():
    found: dict[str, set[str]] = defaultdict(set)
    for file in files(".py", folders=(PACKAGE,)):
        for node in ast.walk(ast.parse(text_of(file))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if parameters(node) > MOST_PARAMETERS:
                name = getattr(node, "name", "lambda")
                found[file.relative_to(PACKAGE).as_posix()].add(name)
    assert found == PUBLIC


def until_closed(text: str) -> str:
    """Up to the bracket that closes what has been opened before."""
    depth = 1
    for i, (before, x) in enumerate(zip(" " + text, text, strict=False)):
        depth += (x in "(<[{") - (x in ")>]}" and before != "-")
        if depth == 0:
            return text[:i]
    return text


def count(parameters: str) -> int:
    while re.search(r"[(<\[{][^()<>\[\]{}]*[)>\]}]", parameters):
        parameters = re.sub(r"[(<\[{][^()<>\[\]{}]*[)>\]}]", "", parameters)
    return len([x for x in parameters.split(",") if x.strip()])


def test_templates_take_few_parameters():
    found: dict[str, set[str]] = defaultdict(set)
    for file in files(".h", ".cc", ".cu", folders=(CPP,)):
        text = re.sub(r"//.*", "", text_of(file))
        for match in re.finditer(r"\btemplate\s*<", text):
            inside = until_closed(text[match.end() :])
            if count(inside) > MOST_TEMPLATE_PARAMETERS:
                of = re.search(r"(\w+)[\s:]*[({;]", text[match.end() + len(inside) :])
                found[file.relative_to(CPP).as_posix()].add(of[1] if of else "?")
    assert found == TEMPLATES


def code(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, without comments, imports and lone punctuation."""
    comment, imports = (
        (r"#", r"(from|import) ") if file.suffix == ".py" else (r"//", "#(include|pragma)")
    )
    for number, line in enumerate(text_of(file).splitlines(), 1):
        line = " ".join(re.sub(rf"\s*{comment} .*", "", line).split())
        if re.search(r"\w", line) and not re.match(imports, line):
            yield number, line


def test_nothing_is_written_twice():
    """Six lines one below the other, letter for letter."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for file in files(".py", ".h", ".cc", ".cu"):
        lines = list(code(file))
        for i in range(len(lines) - FEWEST_SHARED_LINES + 1):
            run = lines[i : i + FEWEST_SHARED_LINES]
            places[tuple(x for _, x in run)].append(f"{file.relative_to(ROOT)}:{run[0][0]}")
    assert not [where for where in places.values() if len(where) > 1]


GUIDE = text_of(ROOT / "CONTRIBUTING.md")
WALK = GUIDE.split("<!-- walk: begin -->")[1].split("<!-- walk: end -->")[0]


def test_the_way_of_query():
    """Five files of Python and six of C++, with the functions that it names first."""
    rows = re.findall(r"^\| (\d+) \| `([^`]+)` \| `(\w+)`", WALK, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, 12))
    assert [name.split("/")[0] for _, name, _ in rows] == ["jax_fa3"] * 5 + ["cpp"] * 6
    for _, name, function in rows:
        assert re.search(rf"\b{function}\(", text_of(ROOT / name)), (name, function)


@pytest.mark.parametrize("way", ["FP8", "The ring"])
def test_other_ways(way: str):
    """Two files more at the most, of both languages together."""
    names = re.findall(r"`([^`]+)`", WALK.split(f"{way} visits")[1].split("\n\n")[0])
    python = [name for name in names if name.endswith(".py")]
    cpp = len(names) - len(python) or 6  # "the forward's six"
    assert python and len(python) + cpp <= 5 + 6 + 2
    assert [x for x in names if not ((PACKAGE / x).is_file() or (CPP / x).is_file())] == []


@pytest.mark.parametrize("part", ["## To change X", "## The way of query"])
def test_named_files_exist(part: str):
    """By their paths, or by their names alone behind that of another file of their folder."""
    names = {x.name for x in files(".py", ".h", ".cc", ".cu", ".def", folders=FOLDERS)}
    section = GUIDE.split(part)[1].split("\n## ")[0]
    for name in re.findall(r"`([\w./]+\.(?:py|h|cc|cu|def))`", section):
        if "NAME" in name or "_x.py" in name:
            continue
        if "/" not in name:
            assert name in names, name
            continue
        found = [x for x in (ROOT / name, PACKAGE / name, CPP / name) if x.is_file()]
        assert found, name


def test_named_constants_exist():
    """Those that cpp/README.md names, and all of a common beginning, as kTurnOfWarpgroup*."""
    source = "".join(text_of(file) for file in files(".h", ".cc", ".cu", folders=(CPP,)))
    named = re.findall(r"`(k[A-Z]\w+)\*?`", text_of(CPP / "README.md"))
    assert named and [name for name in named if not re.search(rf"\b{name}", source)] == []
