"""Imports go one way. The order below is the architecture; a module may import what stands before it, never what stands after."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_fast"
STAGES = ("train.sft", "train.reward", "train.ppo", "train.dpo")
LAYERS = [
    "_C",
    "ops",
    "adapters",  # ops alone; nothing in train imports it, though it stands lower: see test_train_needs_no_adapter
    "rlhf_fast",  # the package itself: what stands above, exported
    "train.errors",
    "train.distributed",
    "train.fsdp",
    "train.config",
    "train.zero",
    "train.rows",
    "train.data",
    "train.model",
    "train.policy",
    "train.lora",
    "train.generate",
    "train.engine",
    "train.checkpoint",
    "train.trackers",
    "train.loop",
    "train.estimate",
    "train.chat",
    "train.trl",
    "train.finite",
    "train.replies",
    "train.resume",
    "train.record",
    "train.rollout",
    "train.checks",
    "train.group",
    "train.evaluate",
    "train.rewards",
    "train.guard",
    "train.versus",
    *STAGES,
    "train.report",
    "train.run",
    "demo",
    "cli",
]


def layer_of(module: str) -> str:
    name = module.removeprefix("rlhf_fast").removeprefix(".")
    matches = [layer for layer in LAYERS if name == layer or name.startswith(layer + ".")]
    return max(matches, key=len) if matches else name or "rlhf_fast"


def modules() -> list[tuple[str, Path]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"), p) for p in paths]


def imports_of(name: str, path: Path):
    tree = ast.parse(path.read_text(), str(path))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    known = {module for module, _ in modules()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "rlhf_fast")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            if base.split(".")[0] != "rlhf_fast":
                continue
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in known or whole == "rlhf_fast._C" else base


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_go_downward(name, path):
    mine = layer_of(name)
    if name == "rlhf_fast.train":
        return  # an empty shelf: see test_train_holds_no_code
    assert mine in LAYERS, f"{name} has no place in the layers: add it to LAYERS where it belongs"
    for imported in imports_of(name, path):
        other = layer_of(imported)
        if other == mine and mine not in STAGES:
            continue
        assert other in LAYERS, f"{name} imports {imported}, which has no place in the layers"
        assert LAYERS.index(other) < LAYERS.index(mine), f"{name} imports {imported}, which stands above it"
        assert not (mine in STAGES and other in STAGES), f"{name} imports {imported}: stages never import each other"


def test_train_needs_no_adapter():
    for name, path in modules():
        if name.startswith(("rlhf_fast.train", "rlhf_fast.demo")):
            assert not [i for i in imports_of(name, path) if i.startswith("rlhf_fast.adapters")], name


def test_train_holds_no_code():
    tree = ast.parse((PACKAGE / "train" / "__init__.py").read_text())
    assert all(isinstance(node, ast.Expr) for node in tree.body)


def test_nothing_unsafe_is_called():
    """No pickle, no eval, no remote code: what a model directory or a data file holds is never executed."""
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "pickle.load", "pickle.loads", "os.system"), (
                    f"{name}: {called}"
                )
                for keyword in node.keywords:
                    assert not (keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", None)), name
