"""base < maths < parts < engines < cli: imports go downwards only (read from the sources, nothing is run)."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ddo_cli"
BASE, MATHS, PARTS, ENGINES, CLI = range(5)
PART_PACKAGES = {"models", "data", "training", "metrics"}
SAMPLERS = (
    "samplers",
    "flow_samplers",
    "vp_samplers",
    "trace",
    "churn",
)  # of diffusion; base, because recipes read the table of samplers


def place(module: str) -> tuple[int, str]:
    """(layer, part package) of a dotted module name below ddo_cli."""
    names = module.split(".")[1:]
    if not names or names[0] in ("api", "cli", "commands", "__main__"):
        return (CLI if names else BASE), ""
    if names[0] == "diffusion" and names[-1] in SAMPLERS:
        return BASE, ""
    if names[0] in ("codec", "likelihood", "generation", "objectives", "diffusion") or names == ["metrics", "frechet"]:
        return MATHS, ""
    if names[0] in PART_PACKAGES:
        return PARTS, names[0]
    if names[0] in ("engines", "assets"):
        return ENGINES, names[1] if len(names) > 1 else ""
    return BASE, ""


def imports(path: Path):
    """(importing module, imported module, imported name or "")."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((module, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((module, node.module, alias.name) for alias in node.names)


def edges(triples):
    """(importing module, imported module) of this package."""
    for module, target, name in triples:
        folder = PACKAGE.parent / target.replace(".", "/")
        if (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file():
            target = f"{target}.{name}"  # `from package import module`
        if target.split(".")[0] == "ddo_cli":
            yield module, target


def circle(triples) -> list[str]:
    """The modules of a circle of imports, those inside functions among them; empty if there is none."""
    graph = {}
    for module, target in edges(triples):
        graph.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def problems(triples) -> list[str]:
    found = []
    for module, target in edges(triples):
        (layer, part), (other_layer, other_part) = place(module), place(target)
        if other_layer > layer:
            found.append(f"{module} imports {target} from a layer above")
        if layer == other_layer == PARTS and part != other_part:
            found.append(f"{module} imports {target}: part packages do not import one another")
    return found


def test_imports_go_downwards():
    files = sorted(
        set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"}
    )  # which names the interface for type checkers
    assert len(files) > 30
    triples = [triple for path in files for triple in imports(path)]
    assert problems(triples) == []
    assert circle(triples) == []


def test_the_rule_finds_a_breach():
    assert problems([("ddo_cli.rng", "ddo_cli.likelihood", "Draw")])
    assert problems([("ddo_cli.models.tokens", "ddo_cli.data.pairs", "Pairs")])
    assert problems([("ddo_cli.diffusion.samplers", "ddo_cli.engines", "sample")])
    assert problems([("ddo_cli.recipe.schema", "ddo_cli.diffusion", "denoiser")])
    assert not problems([("ddo_cli.recipe.schema", "ddo_cli.diffusion.samplers", "SAMPLERS")])
    assert not problems([("ddo_cli.engines.sampling.sample", "ddo_cli.data.samples", "Writer")])


def test_the_rule_finds_a_circle():
    there = ("ddo_cli.likelihood", "ddo_cli.codec", "Codec")
    assert not circle([there])
    assert circle([there, ("ddo_cli.codec", "ddo_cli.diffusion", "guidance"),
                   ("ddo_cli.diffusion.guidance", "ddo_cli", "likelihood")])  # fmt: skip


def kinds_of_model() -> set[str]:
    """The classes of likelihood models, by name."""
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    bases = {node.name: {ast.unparse(base) for base in node.bases} for node in nodes if isinstance(node, ast.ClassDef)}
    kinds = {"LikelihoodModel"}
    while more := {name for name, parents in bases.items() if parents & kinds} - kinds:
        kinds |= more
    return kinds


def asked_kinds(source: str, kinds: set[str]) -> list[str]:
    """The calls of `isinstance` that ask for one of these classes."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    asked = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "isinstance"]
    names = [{leaf.id for leaf in ast.walk(node.args[1]) if isinstance(leaf, ast.Name)} for node in asked]
    return [ast.unparse(node) for node, of in zip(asked, names, strict=True) if of & kinds]


def test_engines_ask_no_model_for_its_kind():
    kinds = kinds_of_model()
    assert {"DiffusionModel", "MixtureModel", "Var", "PixelTransformer"} <= kinds
    assert asked_kinds("isinstance(model, (Var, int))", kinds)
    for folder in ("engines", "training", "assets", "commands"):
        for path in (PACKAGE / folder).rglob("*.py"):
            assert not asked_kinds(path.read_text(), kinds), path


def test_only_console_prints():
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("console.py",):
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = [node.func.id for node in calls if isinstance(node.func, ast.Name)]
        assert "print" not in names, f"{path} prints; use ddo_cli.console"


def test_only_dist_calls_torch_distributed():
    for path in PACKAGE.rglob("*.py"):
        targets = [f"{target}.{name}" for _, target, name in imports(path)]
        if path.name not in ("dist.py", "sharding.py"):
            assert not [target for target in targets if target.startswith("torch.distributed")], path
