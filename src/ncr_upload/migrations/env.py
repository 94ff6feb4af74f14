"""Alembic's entry: migrates over the connection that `apply.upgrade` hands it."""

from __future__ import annotations

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, version_table="ncr_alembic_version", transaction_per_migration=True)
with context.begin_transaction():
    context.run_migrations()
