"""Alembic's entry point: migrates on the connection that `migrations.upgrade` hands over."""

from alembic import context

from shoal_controller.store.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    compare_type=True,
)
context.run_migrations()
