"""mega_tvm: compiles Mega models into shared libraries and runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mega_tvm.compiler import compile_model
    from mega_tvm.runtime import Model, load
    from reference.config import MegaConfig

__version__ = "0.1.0"

__all__ = ["MegaConfig", "Model", "__version__", "compile_model", "load"]

# Each name is imported at its first use: loading a model needs neither TVM's compiler nor torch.
_HOMES = {
    "MegaConfig": "reference.config",
    "Model": "mega_tvm.runtime",
    "compile_model": "mega_tvm.compiler",
    "load": "mega_tvm.runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mega_tvm' has no attribute {name!r}")
    import importlib

    if _HOMES[name] == "mega_tvm.runtime":
        from mega_tvm.ffi_import import import_tvm_ffi

        import_tvm_ffi()
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
