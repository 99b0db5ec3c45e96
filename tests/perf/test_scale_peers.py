import ast
import sys
from pathlib import Path

from pipeline.perf import scale, scale_peers


def test_peers_are_run_without_the_library() -> None:
    tree = ast.parse(Path(scale_peers.__file__).read_text())
    imported = {
        name.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
    }
    imported |= {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    others = imported - sys.stdlib_module_names
    assert others == {"yaml"}  # which all of them need
    assert set(scale.PEERS) == set(scale_peers._READ)
