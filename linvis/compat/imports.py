"""Stand-ins for modules, and context managers around the import of one module."""

import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn


class StandInModule(ModuleType):
    """Module in which every public name exists and those that are not provided raise when called.

    Libraries look up what they might need when they are imported; only a use is an error.

    Args:
        name: Full name of the module.
        doc: Its docstring.
        provided: What it does have.
        missing: Makes the exception for the call of a name that is not provided.
    """

    def __init__(
        self,
        name: str,
        doc: str,
        *,
        provided: Mapping[str, object],
        missing: Callable[[str], Exception],
    ) -> None:
        super().__init__(name, doc)
        self.__spec__ = ModuleSpec(name, loader=None)
        self.__dict__.update(provided)
        self._missing = missing

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        # Introspection asks for private names and must hear that they are absent.
        if name.startswith('_'):
            raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')

        def missing_name(*args: object, **kwargs: object) -> NoReturn:  # noqa: ARG001
            raise self._missing(name)

        missing_name.__name__ = name
        return missing_name


class _ImportContext(MetaPathFinder):
    """Finds one module as usual and has it executed inside a context manager."""

    def __init__(self, name: str, context: Callable[[ModuleType], AbstractContextManager]) -> None:
        self.name = name
        self.context = context

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ContextLoader(spec.loader, self.context)
        return spec


class _ContextLoader(Loader):
    def __init__(
        self, loader: Loader, context: Callable[[ModuleType], AbstractContextManager]
    ) -> None:
        self.loader = loader
        self.context = context

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            # From here on the module is an ordinary one, for `inspect` and the like.
            module.__spec__.loader = module.__loader__ = self.loader
        with self.context(module):
            self.loader.exec_module(module)


def around_import(name: str, context: Callable[[ModuleType], AbstractContextManager[None]]) -> None:
    """Have a module executed inside `context(module)` when it is imported for the first time.

    Nothing is imported now. A module that is imported already is left as it is.

    Args:
        name: Full name of the module; its package is an ordinary one on the import path.
        context: Makes the context manager from the module, which is empty before and filled after.
    """
    sys.meta_path.insert(0, _ImportContext(name, context))
