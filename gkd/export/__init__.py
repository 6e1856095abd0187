"""A trained student as a folder that transformers and vLLM load. `gkd.export(run, output_dir)` writes one."""

import sys
from types import ModuleType

from gkd.export.exporter import export


class _Package(ModuleType):
    """Makes the package callable: `from gkd import export` gives it once one of its modules is imported."""

    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _Package
