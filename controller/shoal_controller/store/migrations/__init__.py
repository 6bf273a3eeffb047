"""Alembic migrations, run when a store is opened.

`upgrade` works in the caller's transaction, so a migration that fails leaves the old schema. A change
of `tables.py` needs a new revision under `versions/`; a test compares the two.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from shoal_protos.errors import Unsupported


def configuration(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade(connection: Connection) -> None:
    """Brings the schema to the newest revision.

    Raises:
        Unsupported: the database has a revision that this version does not know.
    """
    config = configuration(connection)
    scripts = ScriptDirectory.from_config(config)
    current = MigrationContext.configure(connection).get_current_revision()
    if current == scripts.get_current_head():
        return
    if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
        raise Unsupported(
            f"The database has schema {current}, which this version does not know.",
            "A newer Shoal wrote it: update Shoal on this machine.",
        )
    command.upgrade(config, "head")
