"""The house: who may import whom, and how large a file may grow."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

CORE = {"torch", "sentencepiece", "numpy", "safetensors", "tqdm"}
# Imported where used.
OPTIONAL = {
    "tiktoken",
    "tokenizers",
    "triton",
    "matplotlib",
    "jinja2",
    "pyarrow",
    "ray",
    "zstandard",
    "starlette",
    "uvicorn",
}
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("nanomed/**/*.py"), *ROOT.glob("kernels/*.py")])


def imports(path: Path) -> set[str]:
    """Modules imported anywhere in a file, `from nanomed import x` as nanomed.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_scripts_use_nanomed_nanomed_uses_kernels_kernels_use_torch(path):
    tops = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    allowed = {
        "kernels": {"torch", "triton", "kernels"},
        "nanomed": {*CORE, *OPTIONAL, "nanomed", "kernels"},
    }.get(module_of(path).split(".")[0], {*CORE, "nanomed"})
    assert tops <= allowed


# From the ground up: a room imports only what stands before it in this list, and itself.
ROOMS = [
    *("config", "page", "arguments", "locks", "processes", "meeting", "watchdog", "distributed"),
    *("records", "text", "store", "batches", "model", "run", "hf", "training", "stages"),
    *("build", "evals", "tools"),
]
GROUND = {*ROOMS[: ROOMS.index("records")]}


def room_of(module: str) -> str | None:
    """`nanomed.text.template` stands in the room `text`; kernels and scripts stand in none."""
    parts = module.split(".")
    return parts[1] if parts[0] == "nanomed" and len(parts) > 1 else None


def test_every_file_of_nanomed_stands_in_a_room():
    rooms = {room_of(module_of(path)) for path in ROOT.glob("nanomed/**/*.py")} - {None}
    assert rooms == set(ROOMS)
    on_the_ground = {path.stem for path in ROOT.glob("nanomed/*.py")} - {"__init__"}
    assert on_the_ground == GROUND


@pytest.mark.parametrize("path", sorted(ROOT.glob("nanomed/**/*.py")), ids=module_of)
def test_a_room_imports_only_rooms_below_it(path):
    own = room_of(module_of(path))
    above = ROOMS[ROOMS.index(own) + 1 :] if own else []
    assert [name for name in sorted(imports(path)) if room_of(name) in above] == []


def test_every_room_has_tests_of_its_own():
    """tests/ROOM/ for every room but the ground, whose tests stand in tests/ itself."""
    tested = {path.parent.name for path in ROOT.glob("tests/*/test_*.py")}
    assert set(ROOMS) - GROUND <= tested


def test_no_import_runs_in_a_circle():
    modules = {module_of(path): path for path in SOURCES}
    # A package's own `from package import submodule` is no circle.
    uses = {name: imports(path) & set(modules) - {name} for name, path in modules.items()}

    def reaches(name: str, target: str, seen: set[str]) -> bool:
        for other in uses[name] - seen:
            seen.add(other)
            if other == target or reaches(other, target, seen):
                return True
        return False

    circles = [name for name in modules if name != "nanomed" and reaches(name, name, {"nanomed"})]
    assert circles == []


def test_every_file_is_short_and_has_its_reason_on_top():
    python = [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("samples/*.py")]
    long = [p.name for p in python if len(p.read_text().splitlines()) > 350]
    silent = [module_of(p) for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text()))]
    assert long == [] and silent == []


def test_code_cites_no_document_that_is_not_here():
    """Nor a numbered entry of a list that a reader cannot open."""
    folders = ("nanomed", "kernels", "bench", "tests")
    paths = [*SOURCES, *(p for f in folders for p in ROOT.glob(f"{f}/**/*.py"))]
    texts = {path: path.read_text("utf-8") for path in paths if path != Path(__file__)}
    cited = {name for text in texts.values() for name in re.findall(r"docs/\w+\.md", text)}
    assert [name for name in sorted(cited) if not (ROOT / name).exists()] == []
    listed = re.compile(r"\b(pitfalls?|traps?)(\.md)? \d", re.IGNORECASE)
    assert [module_of(p) for p, text in texts.items() if listed.search(text)] == []


def says_no_encoding(call: ast.Call) -> bool:
    """Whether a call opens a text and says nothing of its encoding."""
    given = {arg.value for arg in call.args if isinstance(arg, ast.Constant)}
    given |= {keyword.arg for keyword in call.keywords}
    is_binary = any(str(mode).endswith("b") for mode in given)
    opens = ast.unparse(call.func).split(".")[-1] in ("read_text", "write_text")
    opens |= ast.unparse(call.func) == "open" and not is_binary
    return opens and not given & {"utf-8", "encoding"}


def test_text_files_are_utf_8_whatever_the_locale_says():
    """On a machine whose locale is GBK one place would write what another cannot read."""
    found = [
        f"{module_of(path)}, line {node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and says_no_encoding(node)
    ]
    assert found == []


def test_importing_does_nothing():
    """It prints nothing, touches no process group and no thread setting, and needs no optional
    package; and our `kernels` has no __version__ that others would take for theirs, and leaves
    its Triton files alone. torch itself imports triton and zstandard. What torch shards, saves and
    compiles with takes as long as torch: --help, refusals and an empty model come without. The
    processes of a corpus's build go without torch."""
    code = (
        "import sys, build_corpus; assert 'torch' not in sys.modules;"
        "import torch; n = torch.get_num_threads(); import train_sft, evaluate, build_dpo;"
        "import kernels;"
        "torch.set_default_device('meta'); train_sft.stage.Aquila(train_sft.stage.MODELS['tiny']);"
        "slow = ('torch.distributed.fsdp', 'torch.distributed.checkpoint', 'torch._dynamo');"
        "assert not [name for name in sys.modules if name.startswith(slow)];"
        "assert n == torch.get_num_threads() and not torch.distributed.is_initialized();"
        "assert not hasattr(kernels, '__version__');"
        "assert not [name for name in sys.modules if name.endswith('_triton')];"
        f"assert not {OPTIONAL | {'transformers'}!r} & set(sys.modules) - {{'triton', 'zstandard'}}"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_readme_has_a_place_for_every_module():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Read in this order")[1]
    modules = [
        p for p in ROOT.glob("nanomed/*") if p.suffix == ".py" or (p / "__init__.py").exists()
    ]
    names = [f"nanomed/{p.name}" + ("/" if p.is_dir() else "") for p in modules]
    missing = [n for n in names if n != "nanomed/__init__.py" and f"`{n}`" not in text]
    assert missing == []
    linked = re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / "README.md").read_text())
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_the_lesson_is_as_long_as_the_readme_says():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lesson = text.split("## The lesson")[1].split("## ")[0]
    files = re.findall(r"\| `([\w/.]+)` \| (\d+) \|", lesson)
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name, _ in files}
    assert {name: int(said) for name, said in files} == lengths and len(files) == 8
    assert f": {sum(lengths.values())} lines" in lesson.replace("\n", " ")
