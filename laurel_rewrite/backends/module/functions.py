"""Functions and classes made from edited source, which mean what their originals mean.

An edited function is compiled where the original stood: inside a class of the original's name, so that private names are mangled alike
and `super()` finds the defining class, with the original's globals, closure, defaults and annotations. Where the class holds the
function inside something else (a decorator's wrapper, a static method, a property), a copy of that thing holds the edited one. No decorator runs
again, and no registry hears of the new class.
"""

from __future__ import annotations
import __future__

import abc
import ast
import contextlib
import functools
import hashlib
import importlib
import linecache
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

from laurel_rewrite.backends.module.containers import methods_of
from laurel_rewrite.backends.module.wrappers import chains, grafted, wrapped_as
from laurel_rewrite.errors import RewriteError

BASE = "_laurel_base"
"""Attribute of a rewritten class: the class it was made from."""
RECIPE = "_laurel_recipe"
"""Attribute of a class that no module holds: a thing that pickles, and whose `cls` it is."""
_FUTURE = functools.reduce(int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names))
_TYPED: dict[str, Any] = {"type_params": []} if "type_params" in ast.ClassDef._fields else {}  # since Python 3.12


@dataclass(frozen=True)
class Place:
    """Where a function is found again: an attribute of a class or of a module, and the function's own name and line inside it."""

    holder: type | str
    attribute: str
    name: str
    line: int

    def value(self) -> Any:
        """What the attribute holds, found without running a descriptor."""
        if isinstance(self.holder, type):
            return vars(self.holder).get(self.attribute)
        found: Any = sys.modules.get(self.holder) or importlib.import_module(self.holder)
        for part in self.attribute.split("."):
            found = vars(found).get(part) if isinstance(found, type) else getattr(found, part, None)
        return found

    def function(self) -> FunctionType:
        """The function itself.

        Raises:
            RewriteError: it is not there, because the source has changed.
        """
        for chain in chains(self.value()):
            function = chain[-1]
            if isinstance(function, FunctionType) and (function.__code__.co_name, function.__code__.co_firstlineno) == (
                self.name,
                self.line,
            ):
                return function
        holder = self.holder.__qualname__ if isinstance(self.holder, type) else self.holder
        raise RewriteError(f"{holder}.{self.attribute} is not what it was when the model was rewritten; was its source changed?")


@dataclass(frozen=True)
class Function:
    """The edited text of one function.

    Attributes:
        name: of the edited function; the original's, or a helper's own.
        original: where the function it was made from stands.
        text: its lines from `def` on, as they stand in the file, without decorators.
        decorators: the source of those decorators that the saved text must repeat, because they wrap the function.
        owner: name of the class whose body the text stands in, or None.
        helpers: names of further functions that the text calls.
        method: whether the class holds it; a function of a module else.
        aliases: names under which the class has it.
    """

    name: str
    original: Place
    text: str
    decorators: tuple[str, ...] = ()
    owner: str | None = None
    helpers: tuple[str, ...] = ()
    method: bool = True
    aliases: tuple[str, ...] = ()

    def compiled(self, helpers: Mapping[str, FunctionType]) -> FunctionType:
        """The function, ready to be called."""
        original = self.original.function()
        added = {name: helpers[name] for name in self.helpers}
        scope = [name for name in original.__code__.co_freevars if name != "__class__"] + list(added)
        code = _code(self, original, scope)
        cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
        cells |= {name: CellType(value) for name, value in added.items()}
        if "__class__" in code.co_freevars:
            cells.setdefault("__class__", CellType(self.original.holder))
        made = FunctionType(
            code, original.__globals__, self.name, original.__defaults__, tuple(cells[name] for name in code.co_freevars) or None
        )
        made.__kwdefaults__ = original.__kwdefaults__
        made.__annotations__ = original.__annotations__
        made.__dict__.update(original.__dict__)
        made.__doc__, made.__module__ = original.__doc__, original.__module__
        made.__qualname__ = original.__qualname__.removesuffix(original.__name__) + self.name
        return made


@dataclass(frozen=True)
class Rewritten:
    """A class with some functions edited: the base, its new methods, and the helpers that they call, in the order of their need.

    It pickles by the base's name and these texts, so that a model of such a class pickles wherever one of the base does.
    """

    base: type
    methods: tuple[Function, ...]
    helpers: tuple[Function, ...] = ()

    @property
    def cls(self) -> type:
        """The subclass of `base`; the same one each time."""
        return _class_of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        return self


@functools.cache
def _class_of(rewritten: Rewritten) -> type:
    base = rewritten.base
    live: dict[str, FunctionType] = {}
    for helper in rewritten.helpers:
        live[helper.name] = helper.compiled(live)
    namespace: dict[str, Any] = {}
    for method in rewritten.methods:
        function = method.compiled(live)
        held = method.original.value()
        if method.aliases:
            for alias in method.aliases:
                where = next(c for c in base.__mro__ if alias in vars(c))
                namespace[alias] = grafted(vars(where)[alias], method.original.function(), function)
        else:  # beside the original, under a name of its own
            kind = type(held) if isinstance(held, staticmethod | classmethod) else None
            namespace[mangled(method.name, method.owner)] = kind(function) if kind is not None else function
    namespace |= without_fast_path(base) | methods_of(base)
    namespace[BASE] = base
    return made_quietly(base.__name__, (base,), namespace, rewritten)


def made_quietly(name: str, bases: tuple[type, ...], namespace: dict[str, Any], recipe: Any, *, like: type | None = None) -> type:
    """A subclass that is made without the hooks of the last of its bases.

    Args:
        recipe: by which its instances pickle; see `picklable`.
        like: the class that it looks like and pickles as; None for the last of its bases.
    """
    base = bases[-1]
    shown = base if like is None else like
    looks: dict[str, Any] = {"__module__": shown.__module__, "__qualname__": shown.__qualname__, "__doc__": shown.__doc__}
    looks |= {"__reduce_ex__": picklable(recipe, shown), RECIPE: recipe}
    kind: Any = type(base)
    make = abc.ABCMeta.__new__ if issubclass(kind, abc.ABCMeta) else type.__new__
    with unheard([base]):
        made: type = make(_standing_in(kind) if len(bases) == 1 else kind, name, bases, {**namespace, **looks})
        return made


class _StandsIn(type):
    """Class of rewritten classes, which stand for their base: what is of the base is of each of them. Blocks of one class may have several
    (where a site is left out), and engines take the class of the first block that they find for that of all (FSDP's policies, by name or not)."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or (BASE in vars(cls) and isinstance(instance, vars(cls)[BASE]))


@functools.cache
def _standing_in(kind: type) -> type:
    if kind is type:
        return _StandsIn
    return kind if issubclass(kind, _StandsIn) else type(f"_StandsIn{kind.__name__}", (_StandsIn, kind), {})


@contextlib.contextmanager
def unheard(bases: Iterable[type]) -> Iterator[None]:
    """No `__init_subclass__` of these classes hears of subclasses that are made meanwhile: a registry would take them for the originals."""
    hook = "__init_subclass__"
    with _making:
        own = {base: vars(base).get(hook) for base in bases}
        try:
            for base in own:
                type.__setattr__(base, hook, classmethod(lambda cls, **options: None))
            yield
        finally:
            for base, before in own.items():
                if before is None:
                    type.__delattr__(base, hook)
                else:
                    type.__setattr__(base, hook, before)


_making = threading.RLock()


def without_fast_path(base: type) -> dict[str, Any]:
    """torch.nn.TransformerEncoderLayer computes its sums in a fused kernel in eval mode, unless its activation is unknown."""
    from torch import nn

    return {"activation_relu_or_gelu": property(lambda self: 0)} if issubclass(base, nn.TransformerEncoderLayer) else {}


# Pickle


@dataclass(frozen=True)
class Written:
    """A class of a saved module: its base, the module's text, and its name there. It pickles as `Rewritten` does."""

    base: type
    text: str
    name: str

    @property
    def cls(self) -> type:
        """The class; the same one each time."""
        if self not in _adopted:
            filename = f"<laurel {hashlib.sha256(self.text.encode()).hexdigest()[:12]}>"
            linecache.cache[filename] = (len(self.text), None, self.text.splitlines(keepends=True), filename)
            scope: dict[str, Any] = {"__name__": "modeling_laurel"}
            with unheard([self.base]):
                exec(compile(self.text, filename, "exec"), scope)
            adopt(scope[self.name], self)
        return _adopted[self]

    def __deepcopy__(self, memo: dict[int, Any]) -> Written:
        return self


_adopted: dict[Written, type] = {}


def adopt(cls: type, recipe: Written) -> type:
    """Make a class of a saved module look like the class that it replaces. Where the same text was loaded before, the class of then is
    given back: a recipe has one class, by which the models of both pickle."""
    if recipe in _adopted:
        return _adopted[recipe]
    base: Any = recipe.base
    for name, value in list(vars(cls).items()):
        held = next((vars(c)[name] for c in base.__mro__ if name in vars(c)), None)
        wrapped = None if held is None else wrapped_as(held, value)
        if wrapped is not None:
            setattr(cls, name, wrapped)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    _adopted[recipe] = made_quietly(base.__name__, (cls,), {**own, BASE: base}, recipe, like=base)
    return _adopted[recipe]


def picklable(recipe: Any, base: type) -> Any:
    """`__reduce_ex__` for a class that no module holds: the base's own, with a recipe, whose `cls` it is, in the place of the class."""

    reduce: Any = base.__reduce_ex__

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = reduce(self, protocol)
        if not isinstance(reduced, tuple):
            return reduced
        function, args, *rest = reduced
        named = (function, *args)
        if not any(thing is recipe.cls for thing in named):
            return reduced
        places = tuple(position for position, thing in enumerate(named) if thing is recipe.cls)
        return (_rebuilt, (recipe, places, *(None if position in places else thing for position, thing in enumerate(named))), *rest)

    return __reduce_ex__


def _rebuilt(recipe: Any, places: tuple[int, ...], *named: Any) -> Any:
    function, *args = (recipe.cls if position in places else thing for position, thing in enumerate(named))
    return function(*args)


# Compiling


def _code(function: Function, original: FunctionType, scope: list[str]) -> CodeType:
    """The code of an edited text, with `scope` as free names, mangled as in its class."""
    indented = function.text[:1].isspace()
    first = original.__code__.co_firstlineno
    filename = f"<laurel {original.__module__}.{original.__qualname__} {hashlib.sha256(function.text.encode()).hexdigest()[:12]}>"
    try:
        tree = ast.parse(("if 1:\n" if indented else "") + function.text)
    except SyntaxError as error:  # a form of addition that nobody thought of
        where = f"{original.__code__.co_filename}:{first + (error.lineno or 1) - 1 - indented}"
        raise RewriteError(
            f"{where}: the edited source of {original.__qualname__} would be no Python ({error.msg}); please report it"
        ) from error
    node: Any = tree.body[0].body[0] if indented else tree.body[0]  # type: ignore[attr-defined]  # an If
    ast.increment_lineno(node, first - node.lineno)
    body: list[ast.stmt] = [node]
    if function.owner is not None:
        body = [_at(ast.ClassDef(name=function.owner, bases=[], keywords=[], body=[node], decorator_list=[], **_TYPED), first)]
        if function.owner not in scope:  # the class that the text names is the module's, not this one around it
            body.insert(0, _at(ast.Global(names=[function.owner]), first))
    arguments = ast.arguments(
        posonlyargs=[], args=[_at(ast.arg(arg=name), first) for name in scope], kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    outer = _at(ast.FunctionDef(name="_scope", args=arguments, body=body, decorator_list=[], **_TYPED), first)
    flags = original.__code__.co_flags & _FUTURE
    module = compile(ast.Module(body=[outer], type_ignores=[]), filename, "exec", flags=flags, dont_inherit=True)
    text = "\n" * (first - 1) + function.text
    linecache.cache[filename] = (len(text), None, [line + "\n" for line in text.split("\n")], filename)
    found = next((code for code in codes_of(module) if code.co_name == node.name and code.co_firstlineno >= first), None)
    assert found is not None
    return found.replace(co_qualname=original.__code__.co_qualname)


def _at(node: Any, line: int) -> Any:
    node.lineno = node.end_lineno = line
    node.col_offset = node.end_col_offset = 0
    return node


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """A code object and those inside it, outer ones first."""
    queue = [code]
    for outer in queue:
        yield outer
        queue += [constant for constant in outer.co_consts if isinstance(constant, CodeType)]


def contains(outer: CodeType, inner: CodeType) -> bool:
    """Whether a code object is another or stands inside it: a nested function, a lambda, a comprehension."""
    return outer is inner or (outer.co_filename == inner.co_filename and any(code is inner for code in codes_of(outer)))


def name_of(cls: type) -> str:
    """A class as files name it, "module:class"."""
    return f"{cls.__module__}:{cls.__qualname__}"


def mangled(name: str, owner: str | None) -> str:
    """A name as the compiler knows it inside a class."""
    if owner is None or not name.startswith("__") or name.endswith("__") or not owner.strip("_"):
        return name
    return f"_{owner.lstrip('_')}{name}"


# Where functions stand


def find_in_class(cls: type, code: CodeType) -> tuple[Place, FunctionType, tuple[str, ...]] | None:
    """The function of a class, its own or inherited, whose code this is or holds: its place, itself, and all its names there.

    Raises:
        RewriteError: another class of the hierarchy overrides it, and calls it through super().
    """
    resolved = {name: (c, value) for c in reversed(cls.__mro__) if c is not object for name, value in vars(c).items()}
    names: list[str] = []
    found: tuple[Place, FunctionType] | None = None
    for name, (holder, value) in resolved.items():
        function = _holding(value, code)
        if function is not None:
            names.append(name)
            if found is None or name == function.__name__:
                found = _place(holder, name, function), function
    if found is not None:
        return *found, tuple(names)
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if _holding(value, code) is not None:
                raise RewriteError(
                    f"{code.co_filename}:{code.co_firstlineno}: the sum stands in {base.__qualname__}.{name}, which "
                    f"{cls.__qualname__} overrides and calls through super()"
                )
    return None


def find_in_module(code: CodeType) -> tuple[Place, FunctionType] | None:
    """A function, or a method of some class, that its own module has by name."""
    name = code.co_qualname.partition(".<locals>")[0]
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and getattr(module, "__file__", None) == code.co_filename:
            function = _holding(Place(module.__name__, name, "", 0).value(), code)
            if function is not None:
                return _place(module.__name__, name, function), function
    return None


def _place(holder: type | str, name: str, function: FunctionType) -> Place:
    return Place(holder, name, function.__code__.co_name, function.__code__.co_firstlineno)


def _holding(thing: Any, code: CodeType) -> FunctionType | None:
    return next((chain[-1] for chain in chains(thing) if contains(chain[-1].__code__, code)), None)
