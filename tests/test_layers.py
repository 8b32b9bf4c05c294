"""The layers of the package: a file imports only from its own subpackage or from lower ones.

The imports are read from the sources, those inside functions and under TYPE_CHECKING included.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the lowest. `errors` and `statistics` are files beside the rooms.
LAYERS = """
    errors config ops nn host statistics plots data model sampling likelihood tables evaluation runs interop
    training report cli
""".split()
# The public names, which are imported on first use; `python -m cdm_fast`; what ops run on.
FACE, PROGRAM, KERNELS = "cdm_fast", "cdm_fast.__main__", ("cdm_fast.kernels", "cdm_fast._C")
NO_ROOM = {"__init__", "__main__", "errors", "statistics"}


def name_of(path):
    """The module of a file below `ROOT`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("cdm_fast", *parts)
    return ".".join(parts).removesuffix(".__init__")


def sources():
    """Text by module, of the package and its kernels."""
    paths = [*(ROOT / "cdm_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    return {name_of(path): path.read_text() for path in sorted(paths)}


def imported(text, modules, lazy=True):
    """The modules among `modules`, and the packages that are none, that a source imports.

    `from package import name` imports the module of that name where there is one, and the package otherwise.
    """
    found = set()
    for node in _statements(ast.parse(text), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides where it leads"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules or inner in KERNELS else node.module)
    return {name for name in found if name.split(".")[0] == "cdm_fast"}


def _statements(tree, lazy):
    """Every statement, or only those that run when the module is imported."""
    if lazy:
        yield from ast.walk(tree)
        return
    for node in ast.iter_child_nodes(tree):
        checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not checking and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from _statements(node, lazy)


def height(module):
    """The position of a module's room in `LAYERS`; of the package itself, above all."""
    if module in (FACE, PROGRAM):
        return len(LAYERS)
    if module.startswith(KERNELS):
        return LAYERS.index("ops")
    return LAYERS.index(module.split(".")[1])


def upward(module, text, modules):
    """The imports of a module that lead to a higher room."""
    return {other for other in imported(text, modules) if height(other) > height(module)}


def test_every_file_lies_in_a_room():
    folder = ROOT / "cdm_fast"
    rooms = {path.name for path in folder.iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(LAYERS) - NO_ROOM
    assert {path.stem for path in folder.glob("*.py")} == NO_ROOM
    assert not [path for path in folder.rglob("*.py") if len(path.relative_to(folder).parts) > 2]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_room_imports_from_lower_rooms_only(layer):
    modules = sources()
    mine = [m for m in modules if m not in (FACE, PROGRAM) and height(m) == LAYERS.index(layer)]
    assert mine
    found = {module: upward(module, modules[module], modules) for module in mine}
    # `doctor` tells the version, which the package holds.
    allowed = {"cdm_fast.cli.doctor": {FACE}}
    assert {module: others for module, others in found.items() if others - allowed.get(module, set())} == {}


def test_loading_a_run_imports_no_likelihood():
    modules = sources()
    found, pending = set(), ["cdm_fast.runs.load"]
    while pending:
        module = pending.pop()
        if module in modules and module not in found:
            found.add(module)
            pending += imported(modules[module], modules)
    assert {module.split(".")[1] for module in found} & {"likelihood", "sampling", "plots"} == set()


def test_no_files_import_each_other_in_a_circle():
    modules = sources()
    graph = {
        module: imported(text, modules, lazy=False) - {FACE, module} - set(KERNELS)
        for module, text in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "text",
    [
        "from cdm_fast.runs.load import load",
        "import cdm_fast.runs.load",
        "from cdm_fast.runs import load",
        "from cdm_fast import runs",
        "def late():\n    from cdm_fast.runs.load import load",
        "if TYPE_CHECKING:\n    from cdm_fast.runs.load import load",
        "from cdm_fast import load",
    ],
)
def test_an_import_of_a_higher_room_is_seen(text):
    modules = {"cdm_fast": "", "cdm_fast.runs": "", "cdm_fast.runs.load": "", "cdm_fast.model.cdm": ""}
    assert upward("cdm_fast.model.cdm", text, modules)
    assert not upward("cdm_fast.model.cdm", "from cdm_fast.nn import MLP\nimport torch", modules)


@pytest.mark.parametrize("folder", ["benchmarks", "docs", "building", "cdm_fast", "kernels"])
def test_only_tests_import_tests(folder):
    """Tests may import what benchmarks share; nothing outside the tests imports them."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    found = {str(path.relative_to(ROOT)) for path in paths if "tests" in top_packages(path.read_text())}
    assert found == set()


def top_packages(text):
    """The first words of all imports in a source."""
    nodes = list(ast.walk(ast.parse(text)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_a_relative_import_is_seen():
    with pytest.raises(AssertionError, match="relative"):
        imported("from . import load", set())
