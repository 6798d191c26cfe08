"""What keeps the house in order: imports point down, libraries never end the process, README's path is short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (  # from the ground up; rooms of one floor do not import each other
    "checkpoints",
    "machines",
    "envs policy",
    "data",
    "page robot",
    "train_sft train_rlco eval_real",
    "results.experiment results.base results.bench results.simulator results.trust results.interop "
    "results.interop_peers",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def parsed(room):
    """A room's syntax tree without what only runs where it is the script: a script stands on top of all rooms."""
    tree = ast.parse((ROOT / f"{room.replace('.', '/')}.py").read_text())
    script = "if __name__ == '__main__':"
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith(script)]
    return tree


def imported(room):
    """Modules that are imported anywhere in a room, in functions, too."""
    for node in ast.walk(parsed(room)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_its_floor():
    files = [*ROOT.glob("*.py"), *ROOT.glob("results/*.py")]
    rooms = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    assert rooms - {"results.__init__"} == set(FLOOR)


@pytest.mark.parametrize("room", FLOOR)
def test_an_import_points_down(room):
    """So there is no circle, and what stands low can be copied without what stands above it."""
    modules = set(imported(room))
    assert [other for other in modules if FLOOR.get(other, -1) >= FLOOR[room]] == []
    if room in ("checkpoints", "machines", "policy"):  # a policy runs where no simulator is installed
        assert not {module.split(".")[0] for module in modules} & {"sapien", "mani_skill"}


@pytest.mark.parametrize("room", ["checkpoints", "machines", "envs", "policy", "data", "page", "robot"])
def test_a_library_never_ends_the_process(room):
    """A notebook that imports it survives every mistake."""
    named = {ast.unparse(node) for node in ast.walk(parsed(room)) if isinstance(node, (ast.Name, ast.Attribute))}
    assert not named & {"SystemExit", "exit", "sys.exit"}


def test_the_readers_path_is_as_long_as_readme_says():
    path = re.findall(r"^\| \d \| `(\w+)\.(\w+)`.* \| (\d+) \|$", (ROOT / "README.md").read_text(), re.M)
    total = 0
    for room, name, said in path:
        source = (ROOT / f"{room}.py").read_text()
        lines = source.count("\n")
        if name != "py":
            node = next(node for node in ast.parse(source).body if getattr(node, "name", "") == name)
            lines = node.end_lineno - node.lineno + 1
        assert lines == pytest.approx(int(said), rel=0.1), f"{room}.{name}"
        total += lines
    assert len(path) == 6 and total <= 1345  # 1,200 for the method on one machine, the rest for many
