"""Devices that are quarantined or keep a variant."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("devices") as table:
        table.add_column(sa.Column("quarantined", sa.Boolean(), nullable=False, server_default=sa.false()))
        table.add_column(sa.Column("pins", sa.JSON(), nullable=False, server_default="{}"))
        table.add_column(sa.Column("held", sa.JSON(), nullable=False, server_default="{}"))


def downgrade() -> None:
    with op.batch_alter_table("devices") as table:
        table.drop_column("held")
        table.drop_column("pins")
        table.drop_column("quarantined")
