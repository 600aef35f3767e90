"""The rules of the house, read from the code with ast: where things stand, and which way imports run."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CONCEPTS = {"ddpm", "unet", "autoencoder", "adaptor", "classifier", "adversarial_noise", "metrics", "gaussians"}
PROGRAMS = {"train_tan", "pretrain", "sample", "evaluate", "toy2d"}
ROOMS = ("baselines", "checkpoints", "domains", "experiments", "plumbing")
FLOORS = {"experiments": 5, "settings": 3, "checkpoints": 2, "domains": 2, "baselines": 2, "plumbing": 1,
          **dict.fromkeys(PROGRAMS, 4), **dict.fromkeys(CONCEPTS, 0)}
HEAVY = {"lpips", "torch_fidelity", "matplotlib", "torchvision", "huggingface_hub", "torch.utils.tensorboard"}  # imported where needed


def source_files(root):
    files = [*root.glob("*.py"), *(file for room in ROOMS for file in (root / room).rglob("*.py"))]
    return {file.relative_to(root): file.read_text() for file in sorted(files)}


def imports_of(tree):
    """(module, name or "", node) of each import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module, alias.name, node) for alias in node.names)


def faults(files):
    """What breaks the rules, in words; `files` are {path: text} of the project."""
    found, graph = [], {}
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    top = {path.stem for path in files if len(path.parts) == 1}
    for name in sorted(top - CONCEPTS - PROGRAMS - {"settings"}):
        found.append(f"{name}.py: has no place at the top")
    for module, path in modules.items():
        if "exported" in path.parts:  # goes out with a model, and is run there
            continue
        tree, home = ast.parse(files[path]), path.parts[0].removesuffix(".py")
        inner = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
                 for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))}
        graph[module] = set()
        for imported, name, node in imports_of(tree):
            target = f"{imported}.{name}" if f"{imported}.{name}" in modules else imported
            other, ours = imported.split(".")[0], target in modules
            where = f"{path}:{node.lineno}"
            if id(node) in inner and (ours or not {other, imported} & HEAVY):
                found.append(f"{where}: imports {imported} inside a function")
            if home in CONCEPTS and not ours and other != "torch" and other not in sys.stdlib_module_names:
                found.append(f"{where}: a concept imports {other}")
            if not ours:
                continue
            graph[module].add(target)
            if other in PROGRAMS:
                found.append(f"{where}: imports the program {other}")
            elif FLOORS[other] > FLOORS[home]:
                found.append(f"{where}: {home} imports {other}, which is above it")
            if home == "toy2d" and other not in CONCEPTS | {"plumbing"}:
                found.append(f"{where}: toy2d.py imports the room {other}")
        found += [f"{path}:{node.lineno}: a lambda with a name" for node in ast.walk(tree)
                  if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)]
        if path.name == "__init__.py":
            names = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
                     for alias in node.names}
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            found += [f"{path}: re-exports {name}" for name in sorted(names - used)]
    found += [f"circle: {module}" for module in graph if module in reached(graph, module)]
    return found


def reached(graph, module):
    """The modules that this one imports, at any distance."""
    seen, todo = set(), [module]
    while todo:
        for other in graph.get(todo.pop(), ()):
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def functions(files):
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield path, node


def test_the_house_keeps_its_rules():
    assert faults(source_files(ROOT)) == []


def test_what_stands_at_the_top():
    top = {path.name for path in source_files(ROOT) if len(path.parts) == 1}
    assert {"ddpm.py", "unet.py", "adaptor.py", "classifier.py", "adversarial_noise.py", "train_tan.py", "evaluate.py",
            "toy2d.py"} <= top


def test_sizes():
    files = source_files(ROOT)
    long = [f"{path}:{node.lineno} {node.name}" for path, node in functions(files) if node.end_lineno - node.lineno >= 80]
    assert not long
    lines = [line for text in files.values() for line in text.splitlines()]
    assert sum(len(line) > 110 for line in lines) <= 0.01 * len(lines)


def test_type_hints_are_everywhere():
    bare = []
    for path, node in functions(source_files(ROOT)):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs,
                     *filter(None, (node.args.vararg, node.args.kwarg))]
        untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if untyped or (node.returns is None and node.name != "__init__"):
            bare.append(f"{path}:{node.lineno} {node.name}")
    assert not bare


def test_the_demo_is_small():
    """toy2d.py with all that it pulls in."""
    files = source_files(ROOT)
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): text for path, text in files.items()}
    graph = {}
    for module, text in modules.items():
        pairs = [(imported, f"{imported}.{name}") for imported, name, _ in imports_of(ast.parse(text))]
        graph[module] = {long if long in modules else short for short, long in pairs if {short, long} & modules.keys()}
    sizes = {module: len(modules[module].splitlines()) for module in {"toy2d", *reached(graph, "toy2d")}}
    assert sum(sizes.values()) <= 1500, sizes


@pytest.mark.parametrize("path, text, says", [
    ("utils.py", "", "utils.py: has no place at the top"),
    ("ddpm.py", "from plumbing import files\n", "ddpm.py:1: ddpm imports plumbing, which is above it"),
    ("ddpm.py", "import numpy\n", "ddpm.py:1: a concept imports numpy"),
    ("plumbing/files.py", "from domains import judge\n", "plumbing/files.py:1: plumbing imports domains, which is above"),
    ("experiments/tables.py", "import evaluate\n", "experiments/tables.py:1: imports the program evaluate"),
    ("domains/judge.py", "def f():\n    from plumbing import files\n", "domains/judge.py:2: imports plumbing inside"),
    ("settings.py", "double = lambda x: 2 * x\n", "settings.py:1: a lambda with a name"),
    ("plumbing/__init__.py", "from plumbing.files import write\n", "plumbing/__init__.py: re-exports write"),
    ("unet.py", "import ddpm\n", "circle: ddpm"),
    ("toy2d.py", "from domains import judge\n", "toy2d.py:1: toy2d.py imports the room domains"),
])
def test_a_broken_rule_is_seen(path, text, says):
    files = {Path("ddpm.py"): "import unet\n", Path("unet.py"): "", Path("evaluate.py"): "",
             Path("domains/judge.py"): "", Path("plumbing/files.py"): "", Path("plumbing/__init__.py"): ""}
    assert not faults(files)
    assert any(fault.startswith(says) for fault in faults(files | {Path(path): text}))
