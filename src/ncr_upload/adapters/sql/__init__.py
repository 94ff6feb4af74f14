"""The ledger and the studio's catalogue on SQLAlchemy Core: SQLite, MySQL/MariaDB and PostgreSQL by one code path."""
