"""Where in a class's own source a step of its forward stands, and that source with calls put round such steps."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import linecache
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

KEYWORDS = (("input",), ("other", "mat2", "batch1"), ("batch2",))
"""What the arguments of products are called, by their number."""

Kind = Literal["function", "method", "inner"]
"""What a rewritten function is: a global function, a method of the class, or one of a module within."""

Position = tuple[int, int, int, int]
"""First line, first column, last line, last column (columns in bytes), as the compiler notes them."""


@dataclass(frozen=True)
class Place:
    """An expression in a function: a call or an operator. is_direct: the step itself, not a call that leads to it."""

    function: types.FunctionType
    position: Position
    is_direct: bool

    def __str__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}, line {self.position[0]}: {self.text!r}"

    @property
    def text(self) -> str:
        """The source of the expression, on one line; of its line where it is no call or operator, or nothing."""
        try:
            return " ".join(ast.unparse(find(self.function, self.position)).split())
        except OSError:
            return linecache.getline(self.function.__code__.co_filename, self.position[0]).strip()


@dataclass(frozen=True)
class Wrap:
    """A call `spot(site, expression)` to put round an expression at a place: its value, or its operand of a number.

    target: the value is one of several that are unpacked into names: the number of the name, which is set anew after that.
    kernel: the expression calls a fused kernel; what is called in its place, with the kernel before its arguments.
    """

    place: Place
    site: str = ""
    operand: int | None = None
    target: int | None = None
    kernel: str = ""


@functools.cache
def _tree(file: str) -> ast.Module:
    """Raises OSError if there is no source. Cells of a notebook have some, too, though no file."""
    if not (lines := linecache.getlines(file)):
        raise OSError(f"no source of {file}")
    return ast.parse("".join(lines))


@functools.cache
def definition(function: types.FunctionType) -> ast.FunctionDef:
    """The definition of a function in its file. Raises OSError if there is no source."""
    code = function.__code__
    for node in ast.walk(_tree(code.co_filename)):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first == code.co_firstlineno:
                return node
    raise OSError(f"the source of {function.__qualname__} is not in {code.co_filename}")


def find(function: types.FunctionType, position: Position) -> ast.expr:
    """The expression at a position. Raises OSError if there is none."""
    for node in ast.walk(definition(function)):
        if isinstance(node, ast.Call | ast.BinOp) and _position(node) == position:
            return node
    raise OSError(f"no call or operator at line {position[0]} of {function.__qualname__}")


def _position(node: Any) -> Position:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


_POSITIONS: weakref.WeakKeyDictionary[types.CodeType, tuple[int, list[Any]]] = weakref.WeakKeyDictionary()
"""Where each instruction of a code stands, as long as there is that code, and whose code it is."""


def position_of(frame: types.FrameType) -> Position | None:
    """Where a frame stands now."""
    code = frame.f_code
    found = _POSITIONS.get(code)
    if found is None or found[0] != id(code):  # equal codes may stand in different places
        _POSITIONS[code] = found = id(code), list(code.co_positions())
    first, last, start, end = found[1][frame.f_lasti // 2]
    if first is None or last is None or start is None or end is None:
        return None
    return first, start, last, end


def operand(function: types.FunctionType, node: ast.expr, number: int, is_direct: bool) -> tuple[Any, Any]:
    """Where the operand of a number is kept in an expression: the object that holds it, and the index or field name.

    Raises OSError if it is not written out there.
    """
    if isinstance(node, ast.BinOp):
        return node, ("left", "right")[number]
    assert isinstance(node, ast.Call)
    names = KEYWORDS[number]
    if is_direct and isinstance(node.func, ast.Attribute) and not _is_module(function, node.func.value):
        if number == 0:
            return node.func, "value"
        number -= 1
    if number > 0 and len(node.args) == 2 and isinstance(node.args[1], ast.List | ast.Tuple):
        return node.args[1].elts, number - 1  # einsum takes its factors in a list, too
    if number < len(node.args) and not any(isinstance(a, ast.Starred) for a in node.args[: number + 1]):
        return node.args, number
    for keyword in node.keywords:
        if keyword.arg in names:
            return keyword, "value"
    raise OSError(f"operand {number} is not written out in {ast.unparse(node)}")


@functools.cache
def n_returned(function: Any) -> int | None:
    """How many values a function gives as a tuple that each of its returns writes out; None if it does not, or is not known."""
    try:
        node = definition(inspect.unwrap(function))
    except (OSError, AttributeError):
        return None
    values = [part.value for part in ast.walk(node) if isinstance(part, ast.Return)]
    sizes = {len(value.elts) if isinstance(value, ast.Tuple) else 0 for value in values}
    return sizes.pop() or None if len(sizes) == 1 else None


def unpacked_name(node: ast.Assign, number: int | None) -> str:
    """The name that one of several values is given in `a, b = ...`. Raises OSError if it is given none."""
    targets = getattr(node.targets[0], "elts", ()) if len(node.targets) == 1 else ()
    name = targets[number] if number is not None and number < len(targets) else None
    if isinstance(name, ast.Name) and not any(isinstance(t, ast.Starred) for t in targets):
        return name.id
    raise OSError(f"value {number} is given no name in {ast.unparse(node)}")


def find_unpacking(function: types.FunctionType, position: Position) -> ast.Assign:
    """The assignment whose whole value is the expression at a position. Raises OSError if there is none."""
    for node in ast.walk(definition(function)):
        if isinstance(node, ast.Assign) and _position(node.value) == position:
            return node
    raise OSError(f"no assignment at line {position[0]} of {function.__qualname__}")


def _is_super(node: ast.expr) -> bool:
    """Whether an expression is `super().name`."""
    owner = node.value if isinstance(node, ast.Attribute) else None
    return isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"


def _is_module(function: types.FunctionType, node: ast.expr) -> bool:
    """Whether an expression names a Python module (torch, nn.functional), also one that the function itself imports."""
    if isinstance(node, ast.Attribute):
        return _is_module(function, node.value)
    if not isinstance(node, ast.Name):
        return False
    imports = [n for n in ast.walk(definition(function)) if isinstance(n, ast.Import | ast.ImportFrom)]
    own = {(alias.asname or alias.name).partition(".")[0] for statement in imports for alias in statement.names}
    return node.id in own or isinstance(function.__globals__.get(node.id), types.ModuleType)


def rewrite(
    function: types.FunctionType,
    wraps: Iterable[Wrap],
    helpers: Mapping[Position, tuple[str, Callable[..., Any], Kind]],
    is_method: bool,
) -> tuple[Callable[..., Any], str]:
    """A function with calls put round expressions, and its source.

    helpers: the calls of other rewritten functions, by position: the name that is called there, what to call instead, and
      what that is: a function, a method (of a base class, called through super() or by its name), or one of a module within.
    A method calls `self._surgery.spot`; any other function gets the surgery as the keyword `_surgery`.
    """
    node = copy.deepcopy(definition(function))
    kinds = [d.id for d in node.decorator_list if isinstance(d, ast.Name)]
    if "classmethod" in kinds:
        raise OSError(f"{function.__qualname__} is a class method")
    node.decorator_list = [d for d in node.decorator_list if not (isinstance(d, ast.Name) and d.id == "staticmethod")]
    first = node.args.posonlyargs + node.args.args
    surgery: ast.expr = ast.Name("_surgery", ast.Load())
    if is_method:
        surgery = ast.Attribute(ast.Name(first[0].arg, ast.Load()), "_surgery", ast.Load())
    else:
        node.args.kwonlyargs.append(ast.arg("_surgery"))
        node.args.kw_defaults.append(ast.Constant(None))

    def call(site: str, inner: ast.expr) -> ast.expr:
        new = ast.Call(ast.Attribute(surgery, "spot", ast.Load()), [ast.Constant(site), inner], [])
        return ast.copy_location(new, inner)

    by_position: dict[Position, list[Wrap]] = {}
    unpacked: dict[Position, list[Wrap]] = {}
    for wrap in wraps:
        (by_position if wrap.target is None else unpacked).setdefault(wrap.place.position, []).append(wrap)
    names: dict[str, Any] = {}

    class Transformer(ast.NodeTransformer):
        def visit_Assign(self, old: ast.Assign) -> Any:
            found = unpacked.pop(_position(old.value), [])
            new: list[ast.stmt] = [self.generic_visit(old)]  # type: ignore[list-item]
            for wrap in found:
                name = unpacked_name(old, wrap.target)
                value = call(wrap.site, ast.copy_location(ast.Name(name, ast.Load()), old))
                new.append(ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), old))
            return new

        def generic_visit(self, old: ast.AST) -> ast.AST:
            position = _position(old) if isinstance(old, ast.Call | ast.BinOp) else None
            if isinstance(old, ast.Attribute):  # outside of its class the compiler does not do it
                old.attr = _mangled(old.attr, function)
            new = super().generic_visit(old)
            if position is None:
                return new
            if position in helpers and isinstance(new, ast.Call):
                name, helper, kind = helpers[position]
                called = f"_surgery_{name}"
                while names.setdefault(called, helper) is not helper:
                    called += "_"  # of another module, with the same name
                if kind == "method" and _is_super(new.func):
                    new.args.insert(0, ast.copy_location(ast.Name(first[0].arg, ast.Load()), new.func))
                if kind == "inner":
                    is_named = isinstance(new.func, ast.Attribute) and new.func.attr == name
                    module = new.func.value if is_named else new.func  # type: ignore[attr-defined]
                    check = ast.Attribute(surgery, "inner", ast.Load())
                    new.args.insert(0, ast.copy_location(ast.Call(check, [module], []), new.func))
                new.func = ast.copy_location(ast.Name(called, ast.Load()), new.func)
                if kind != "method":
                    new.keywords.append(ast.keyword("_surgery", surgery))
            for wrap in by_position.pop(position, []):
                if wrap.kernel:
                    assert isinstance(new, ast.Call)
                    new.args.insert(0, new.func)
                    new.func = ast.copy_location(ast.Attribute(surgery, wrap.kernel, ast.Load()), new.func)
                    continue
                if wrap.operand is None:
                    new = call(wrap.site, new)  # type: ignore[arg-type]
                    continue
                holder, key = operand(function, new, wrap.operand, wrap.place.is_direct)  # type: ignore[arg-type]
                if isinstance(key, int):
                    holder[key] = call(wrap.site, holder[key])
                else:
                    setattr(holder, key, call(wrap.site, getattr(holder, key)))
            return new

    new = Transformer().visit(node)
    if left := [*by_position, *unpacked]:
        raise OSError(f"no expression at {left} of {function.__qualname__}")
    ast.fix_missing_locations(new)
    source = ast.unparse(new)
    key = (function, source, tuple(names.items()))
    if key not in _REWRITTEN:
        _REWRITTEN.setdefault(key, _compile(function, new, names))
    return _REWRITTEN[key], source


_REWRITTEN: dict[Any, Callable[..., Any]] = {}
"""What has been compiled: a model that is patched again gets the same functions, and so the same classes."""


def _mangled(name: str, function: types.FunctionType) -> str:
    """A private name (`__x`) as Python writes it in the class that a function was defined in."""
    owner = function.__qualname__.rpartition(".")[0].rpartition(".")[2].lstrip("_")
    is_private = name.startswith("__") and not name.endswith("__") and owner and owner != "<locals>"
    return f"_{owner}{name}" if is_private else name


def _compile(function: types.FunctionType, node: ast.FunctionDef, names: Mapping[str, Any]) -> Callable[..., Any]:
    """The function of a definition, with the globals and the closure of another, and names of its own."""
    free = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    factory = ast.FunctionDef(
        name="_surgery_factory",
        args=ast.arguments([], [ast.arg(n) for n in (*free, *names)], None, [], [], None, []),
        body=[node, ast.Return(ast.Name(node.name, ast.Load()))],
        decorator_list=[],
    )
    factory.type_params = []  # type: ignore[attr-defined]  # a field from Python 3.12 on
    module = ast.fix_missing_locations(ast.Module([factory], []))
    space: dict[str, Any] = {}
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, space)
    return space["_surgery_factory"](*(cell.cell_contents for cell in free.values()), *names.values())


def owned_functions(cls: type) -> dict[types.CodeType, types.FunctionType]:
    """The functions that a class defines or inherits, by their code, decorators taken off."""
    found: dict[types.CodeType, types.FunctionType] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for member in vars(base).values():
            member = getattr(member, "__func__", member)
            if callable(member) and isinstance(function := inspect.unwrap(member), types.FunctionType):
                found[function.__code__] = function
    return found


@functools.cache
def method_names(cls: type) -> dict[types.FunctionType, list[str]]:
    """The functions that a class's methods are, decorators taken off, with the names under which an instance has them.

    Without static methods, which do not know the instance, and methods that a subclass has overridden.
    """
    found: dict[types.FunctionType, list[str]] = {}
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        if not isinstance(member, staticmethod):
            member = getattr(member, "__func__", member)
            if callable(member) and isinstance(function := inspect.unwrap(member), types.FunctionType):
                found.setdefault(function, []).append(name)
    return found
