"""Imports every module of the method, for processes that are forked and then import nothing more."""

import pkgutil
from importlib import import_module

from scalselect_assets import method

for module in pkgutil.iter_modules(method.__path__, f"{method.__name__}."):
    import_module(module.name)
