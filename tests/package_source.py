"""The source of lora_lab as syntax trees: its modules, and the functions they define."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A module of the package."""

    path: str  # within the package
    source: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """lora_lab.training.loop."""
        return ".".join(("lora_lab", *self.path.removesuffix(".py").split("/"))).removesuffix(".__init__")

    @property
    def line_count(self) -> int:
        return len(self.source.splitlines())


@dataclass(frozen=True)
class Definition:
    """A function or a method, and the classes and functions it is defined in, the outermost first."""

    module: Module
    node: Function
    parents: tuple[ast.ClassDef | Function, ...]

    @property
    def name(self) -> str:
        return ".".join(node.name for node in (*self.parents, self.node))

    @property
    def location(self) -> str:
        return f"{self.module.path}:{self.node.lineno} {self.name}"

    @property
    def line_count(self) -> int:
        return self.node.end_lineno - self.node.lineno + 1

    @property
    def is_public(self) -> bool:
        """No name has a leading underscore but __init__, and it is not nested in a function."""
        names = self.name.removesuffix(".__init__").split(".")
        nested = any(isinstance(parent, Function) for parent in self.parents)
        return not nested and not any(name.startswith("_") for name in names)

    @property
    def docstring(self) -> str:
        """Of a constructor its class's docstring as well."""
        documented = [self.node]
        if self.node.name == "__init__" and self.parents and isinstance(self.parents[-1], ast.ClassDef):
            documented.insert(0, self.parents[-1])
        return "\n".join(filter(None, map(ast.get_docstring, documented)))

    @property
    def parameters(self) -> list[ast.arg]:
        arguments = self.node.args
        variadic = [arg for arg in (arguments.vararg, arguments.kwarg) if arg]
        return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variadic]

    def takes(self, type_name: str) -> bool:
        """Whether a parameter's annotation mentions a type."""
        return any(mentions(parameter.annotation, type_name) for parameter in self.parameters)

    def returns(self, type_name: str) -> bool:
        return mentions(self.node.returns, type_name)

    def own_nodes(self) -> Iterator[ast.AST]:
        """The nodes of the body without those of functions and classes that are defined in it."""
        pending: list[ast.AST] = list(self.node.body)
        while pending:
            node = pending.pop()
            yield node
            if not isinstance(node, Function | ast.ClassDef):
                pending += ast.iter_child_nodes(node)

    def local_names(self) -> set[str]:
        """The parameters and the names that the function assigns, without those it declares global."""
        nodes = list(self.own_nodes())
        assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        declared = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
        return (assigned | {parameter.arg for parameter in self.parameters}) - declared


def mentions(annotation: ast.expr | None, type_name: str) -> bool:
    """Whether an annotation names a type, alone or in another: Tensor, list[torch.Tensor], "Tensor | None"."""
    return annotation is not None and re.search(rf"\b{type_name}\b", ast.unparse(annotation)) is not None


def read_package(checkout: Path) -> list[Module]:
    package = checkout / "lora_lab"
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    return [Module(path.relative_to(package).as_posix(), source, ast.parse(source)) for path, source in sources.items()]


def definitions(module: Module) -> Iterator[Definition]:
    """All functions of a module, methods and nested functions included."""

    def walk(node: ast.AST, parents: tuple[ast.ClassDef | Function, ...]) -> Iterator[Definition]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield Definition(module, child, parents)
            yield from walk(child, (*parents, child) if isinstance(child, Function | ast.ClassDef) else parents)

    return walk(module.tree, ())
