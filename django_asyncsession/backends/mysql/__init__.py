"""MySQL and MariaDB with asyncmy, natively async; usable as an ENGINE."""

from __future__ import annotations

import sys
from types import ModuleType

# The version of mysqlclient whose interface PyMySQL has, as Django asks for it.
STANDS_FOR = (2, 2, 7, "final", 0)


def install_driver() -> None:
    """Let `import MySQLdb`, which Django's backend does, find PyMySQL when mysqlclient is not
    installed.

    The app does this when Django loads it, before any model, when an alias needs it. Call it in
    the settings module if something connects before that.

    Raises:
        ImportError: neither mysqlclient nor PyMySQL is installed.
    """
    try:
        import MySQLdb  # noqa: F401
    except ImportError:
        _stand_in()


def _stand_in() -> None:
    # A module of its own: PyMySQL itself keeps its name and its version.
    import pymysql.constants.CLIENT
    import pymysql.constants.ER
    import pymysql.constants.FIELD_TYPE
    import pymysql.converters

    module = ModuleType("MySQLdb", pymysql.__doc__)
    module.__dict__.update({k: v for k, v in vars(pymysql).items() if not k.startswith("__")})
    module.__dict__.update(__version__=pymysql.__version__, version_info=STANDS_FOR)
    # What a tool puts in the place of PyMySQL's own, it may put there later.
    module.connect = lambda *args, **kwargs: pymysql.connect(*args, **kwargs)  # type: ignore[attr-defined]
    # A package without files: every submodule that Django, or anyone, imports is named here.
    module.__path__ = []
    sys.modules["MySQLdb"] = module
    for name, submodule in list(sys.modules.items()):
        if name.startswith("pymysql."):
            sys.modules["MySQLdb" + name.removeprefix("pymysql")] = submodule
