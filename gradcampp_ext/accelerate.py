"""Scripts written for pytorch-grad-cam or torchcam, run by this package's classes.

    with gradcampp_ext.accelerate():   # or without "with", until .stop()
        ...

    python -m gradcampp_ext.accelerate script.py ARGUMENT...

Each class that gradcampp_ext.compat has is replaced, wherever a module of the peer refers to it, by
a class that derives from both, so that ``isinstance`` and ``issubclass`` answer as before. Where
the original was imported by name earlier, that name still means it; what is made from it is
accelerated too, but classes derived from it are not. Nor are child processes that do not inherit
memory (multiprocessing's spawn), unless they call this themselves.

The module is called as a function: ``gradcampp_ext.accelerate(...)``.
"""

from __future__ import annotations

import builtins
import importlib
import io
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import wraps
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType, TracebackType
from typing import Any, NoReturn

# Of each peer, the module where its users find these classes.
PEERS = {
    "pytorch_grad_cam": (
        "pytorch_grad_cam",
        (
            "GradCAM",
            "GradCAMPlusPlus",
            "XGradCAM",
            "LayerCAM",
            "HiResCAM",
            "GradCAMElementWise",
        ),
    ),
    "torchcam": (
        "torchcam.methods",
        ("GradCAM", "GradCAMpp", "SmoothGradCAMpp", "XGradCAM", "LayerCAM"),
    ),
}

_lock = threading.RLock()
_active: dict[str, _Swap] = {}


class Acceleration:
    """What ``accelerate`` began, to be ended by ``stop`` or by leaving the context."""

    def __init__(self, peers: Sequence[str]) -> None:
        with _lock, ExitStack() as begun:
            for peer in peers:
                _begin(peer)
                begun.callback(_end, peer)
            self._begun = begun.pop_all()

    def stop(self) -> None:
        """Ends it; the originals are back once nobody else accelerates the peer."""
        with _lock:
            self._begun.close()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def accelerate(*peers: str) -> Acceleration:
    """Lets installed peers' classes be computed by this package, in the whole process.

    Calls may be nested and come from several threads: the last one to stop brings the originals
    back. Objects and subclasses made in the meantime stay what they are.

    Args:
        peers: "pytorch_grad_cam", "torchcam"; none means those that are installed.
    Raises: ValueError for another name; ImportError if a named peer, or every one, is missing.
    """
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"peers must be among {', '.join(PEERS)}; got {peer!r}")
    installed = [peer for peer in PEERS if find_spec(peer) is not None]
    wanted = list(dict.fromkeys(peers)) or installed
    missing = [peer for peer in wanted if peer not in installed]
    if missing or not wanted:
        raise ImportError(
            f"accelerate() found no package {' and no '.join(missing or PEERS)} to accelerate; "
            "install it (pip install grad-cam, pip install torchcam) in this environment"
        )
    return Acceleration(wanted)


def run(script: str, arguments: Sequence[str] = ()) -> None:
    """Runs a Python file as ``python script arguments...`` would, accelerated.

    Its exceptions are reported as ever, without this package's frames, and end the process.
    """
    name = str(Path(script).absolute())
    try:
        with io.open_code(name) as file:
            source = file.read()
    except OSError as error:
        _stop(f"can't open file {name!r}: {error.strerror}")
    sys.argv[:] = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(script).resolve().parent)
    try:
        accelerate()
    except ImportError as error:
        _stop(str(error))
    main = ModuleType("__main__")
    loader = SourceFileLoader("__main__", name)
    vars(main).update(__file__=name, __loader__=loader, __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = main
    try:
        exec(compile(source, name, "exec", dont_inherit=True), vars(main))
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = _within(error.__traceback__, name)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.excepthook = lambda *_: None  # the interpreter only sets the exit code now
        raise


class _Swap:
    """One peer's classes, swapped in all its modules, and the way back."""

    def __init__(self, peer: str) -> None:
        self.users = 0
        self._peer = peer
        home, names = PEERS[peer]
        public = importlib.import_module(home)
        ours = importlib.import_module(f"gradcampp_ext.compat.{peer}")
        self._swapped: dict[Any, type] = {}  # original: what stands for it
        self._inits: dict[type, Any] = {}
        for name in names:
            original, mine = getattr(public, name), getattr(ours, name)
            namespace = {
                "__module__": mine.__module__,
                "__doc__": mine.__doc__,
                "__del__": lambda _: None,  # the peer's removes hooks, which there are none of
            }
            self._swapped[original] = type(name, (mine, original), namespace)

    def begin(self) -> None:
        for original, swapped in self._swapped.items():
            self._inits[original] = vars(original).get("__init__")
            original.__init__ = _redirecting(original, swapped)
        self._replace(self._swapped)

    def end(self) -> None:
        for original, init in self._inits.items():
            if init is None:
                del original.__init__  # type: ignore[misc]
            else:
                original.__init__ = init  # type: ignore[misc]
        self._replace({swapped: original for original, swapped in self._swapped.items()})

    def _replace(self, new: dict[Any, type]) -> None:
        """In the namespaces of the peer's modules, and the defaults of their functions."""
        for module in self._modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, type) and value in new:
                    setattr(module, name, new[value])
            for function in _functions(module):
                if function.__defaults__:
                    function.__defaults__ = tuple(
                        _among(new, value) for value in function.__defaults__
                    )
                if function.__kwdefaults__:
                    named = function.__kwdefaults__.items()
                    function.__kwdefaults__ = {name: _among(new, value) for name, value in named}

    def _modules(self) -> list[ModuleType]:
        return [
            module
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] == self._peer and isinstance(module, ModuleType)
        ]


def _stop(message: str) -> NoReturn:
    print(f"gradcampp: {message}", file=sys.stderr)
    sys.exit(2)


def _begin(peer: str) -> None:
    swap = _active.get(peer)
    if swap is None:
        swap = _Swap(peer)
        try:
            swap.begin()
        except BaseException:
            swap.end()
            raise
        _active[peer] = swap
    swap.users += 1


def _end(peer: str) -> None:
    swap = _active[peer]
    swap.users -= 1
    if swap.users == 0:
        swap.end()
        del _active[peer]


def _redirecting(original: Any, swapped: type) -> Callable[..., None]:
    """An __init__ for the original by which its instances become the other class's."""
    init = original.__init__
    own = init
    if isinstance(init, FunctionType) and original.__name__ in init.__code__.co_names:
        # super(GradCAM, self) looks the name up in the module, where it means another class now.
        names = {**init.__globals__, original.__name__: original}
        own = FunctionType(init.__code__, names, init.__name__, init.__defaults__, init.__closure__)
        own.__kwdefaults__ = init.__kwdefaults__

    @wraps(init)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        if type(self) is original:
            self.__class__ = swapped
            self.__init__(*arguments, **options)
        else:
            own(self, *arguments, **options)

    return __init__


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Functions and methods that a module defines."""
    for value in list(vars(module).values()):
        parts = list(vars(value).values()) if isinstance(value, type) else [value]
        for part in parts:
            if isinstance(part, FunctionType) and part.__module__ == module.__name__:
                yield part


def _among(new: dict[Any, type], value: Any) -> Any:
    return new[value] if isinstance(value, type) and value in new else value


def _within(trace: TracebackType | None, file: str) -> TracebackType | None:
    """A traceback from the first frame of a file on."""
    while trace is not None and trace.tb_frame.f_code.co_filename != file:
        trace = trace.tb_next
    return trace


def main() -> None:
    """``python -m gradcampp_ext.accelerate script.py ARGUMENT...``"""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m gradcampp_ext.accelerate SCRIPT [ARGUMENT...]")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    run(sys.argv[1], sys.argv[2:])


class _Callable(ModuleType):
    def __call__(self, *peers: str) -> Acceleration:
        return accelerate(*peers)


if __name__ == "__main__":
    importlib.import_module("gradcampp_ext.accelerate").main()
else:
    sys.modules[__name__].__class__ = _Callable
