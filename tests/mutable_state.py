"""Find the state of lora_lab that belongs to no object: variables of modules and classes that functions change.

Counted are module-level names that a function rebinds (`global`, or as an attribute of the imported module) or changes
in place (subscript, attribute, a mutating method of a container), module-level instances of classes of the package
whose methods change them, and containers of a class that are changed in place. Changes by module-level code, which
builds a constant, do not count."""

import ast
from collections.abc import Iterator

from tests.package_source import Definition, Function, Module, definitions

CONTAINERS = {"list", "dict", "set", "bytearray", "deque", "defaultdict", "Counter", "OrderedDict", "ChainMap"}
CONTAINERS |= {"WeakSet", "WeakKeyDictionary", "WeakValueDictionary", "ContextVar", "local"}
MUTATORS = {"append", "add", "extend", "insert", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard"}
MUTATORS |= {"sort", "reverse", "appendleft", "popleft", "extendleft", "subtract", "set"}
CACHES = {"cache", "lru_cache"}

Variable = tuple[str, str]  # module and name in it


def mutable_variables(modules: list[Module]) -> list[str]:
    """As "path/of/module.py name", a class's variables as "path/of/module.py Class.name"."""
    values = {module.name: _module_level_values(module) for module in modules}
    variables: set[Variable] = set()
    for module in modules:
        visible = _imported_names(module, values) | {name: (module.name, name) for name in values[module.name]}
        enclosing: dict[Function, set[str]] = {}
        for definition in definitions(module):
            enclosing[definition.node] = definition.local_names()
            functions = [node for node in (*definition.parents, definition.node) if isinstance(node, Function)]
            hidden = set().union(*(enclosing[function] for function in functions))
            unhidden = {name: variable for name, variable in visible.items() if name not in hidden}
            variables |= set(_changed_variables(definition, unhidden, values))
    variables |= set(_mutable_instances(modules, values))
    paths = {module.name: module.path for module in modules}
    of_classes = [f"{module.path} {name}" for module in modules for name in _changed_class_variables(module)]
    return sorted([f"{paths[module]} {name}" for module, name in variables] + of_classes)


def cached_functions(modules: list[Module]) -> list[str]:
    """Functions of modules, not methods, that keep their results."""
    functions = [definition for module in modules for definition in definitions(module) if not definition.parents]
    return [
        definition.location
        for definition in functions
        if any(_last_name(decorator) in CACHES for decorator in definition.node.decorator_list)
    ]


def _module_level_values(module: Module) -> dict[str, ast.expr | None]:
    """The names that a module assigns, and what it assigns first."""
    values: dict[str, ast.expr | None] = {}
    for target, value in _assignments(module.tree.body):
        values.setdefault(target, value)
    return values


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr | None]]:
    for statement in body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from ((target.id, statement.value) for target in targets if isinstance(target, ast.Name))


def _imported_names(module: Module, values: dict[str, dict]) -> dict[str, Variable]:
    """What a module imports from the package, by its name there; of a whole module the variable's name is empty."""
    imported: dict[str, Variable] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_lab"):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                variable = (submodule, "") if submodule in values else (node.module, alias.name)
                imported[alias.asname or alias.name] = variable
    return imported


def _changed_variables(
    definition: Definition, visible: dict[str, Variable], values: dict[str, dict]
) -> Iterator[Variable]:
    """The module-level variables that a function rebinds or changes in place; `visible` are those it can name."""

    def variable_of(node: ast.expr) -> tuple[Variable | None, bool]:
        """The variable that NAME, module.NAME, NAME.attribute or NAME[...] belongs to, and whether `node` is all of
        it."""
        attributes: list[str] = []
        while isinstance(node, ast.Attribute | ast.Subscript):
            attributes.append(node.attr if isinstance(node, ast.Attribute) else "")
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in visible:
            return None, False
        module, name = visible[node.id]
        name = name or (attributes.pop() if attributes else "")
        return ((module, name) if name in values.get(module, {}) else None), not attributes

    for node in definition.own_nodes():
        variable = None
        if isinstance(node, ast.Global):
            yield from (visible[name] for name in node.names if name in visible)
        elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            variable, _ = variable_of(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            variable, whole = variable_of(node.func.value)
            if variable and whole and not _is_container(values[variable[0]][variable[1]]):
                variable = None
        if variable:
            yield variable


def _mutable_instances(modules: list[Module], values: dict[str, dict]) -> Iterator[Variable]:
    """Module-level instances of the package's classes that have a method, other than __init__, that changes them."""
    methods = [
        (definition, definition.parents[-1].name)
        for module in modules
        for definition in definitions(module)
        if definition.parents and isinstance(definition.parents[-1], ast.ClassDef)
    ]
    mutable = {
        class_name
        for definition, class_name in methods
        for node in definition.own_nodes()
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and definition.node.name != "__init__"
    }
    for module, named in values.items():
        yield from ((module, name) for name, value in named.items() if _called(value) in mutable)


def _changed_class_variables(module: Module) -> set[str]:
    """Containers in the body of a class that functions of the module change in place, through the class or `self`."""
    changed = {
        node.func.value.attr
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS
        if isinstance(node.func.value, ast.Attribute)
    }
    classes = [node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    return {
        f"{node.name}.{name}"
        for node in classes
        for name, value in _assignments(node.body)
        if name in changed and _is_container(value)
    }


def _is_container(value: ast.expr | None) -> bool:
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    return isinstance(value, displays) or _called(value) in CONTAINERS


def _called(value: ast.expr | None) -> str | None:
    """The name of what a call calls."""
    return _last_name(value) if isinstance(value, ast.Call) else None


def _last_name(node: ast.expr) -> str:
    """cache of functools.cache and of functools.cache(...)."""
    return ast.unparse(node.func if isinstance(node, ast.Call) else node).rpartition(".")[2]
